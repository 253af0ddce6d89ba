"""Handing a client's connection to an instance's PostgreSQL; the page shim takes it there.

The protocol, and why a client never is with two, is told in `compute_node/shim/connections.c`.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from enum import Enum
from typing import Self

_MESSAGE = b"\0"


class Outcome(Enum):
    """How an offer ended."""

    TAKEN = "taken"
    """PostgreSQL has the connection: what becomes of it is not our business any more."""
    REFUSED = "refused"
    """Nobody listens there, or it ended before it answered."""
    BUSY = "busy"
    """So many wait there already that the offer could not be made."""
    WITHDRAWN = "withdrawn"
    """It was not answered; we have the connection, and nobody else has."""


class Offer:
    """A connection offered to one instance. A context manager; none of its calls waits.

    Leaving it before it was answered withdraws it too, but then nobody learns whether it was taken.
    """

    def __init__(self, client: socket.socket, handover: str) -> None:
        self._client = client
        self._path = handover
        self.carrier = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        """Readable once there is an answer."""
        self.carrier.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.carrier.close()

    def make(self) -> Outcome | None:
        """Make the offer; None if it stands."""
        try:
            self.carrier.connect(self._path)
            socket.send_fds(self.carrier, [_MESSAGE], [self._client.fileno()])
        except BlockingIOError:
            return Outcome.BUSY
        except OSError:
            return Outcome.REFUSED
        return None

    def answer(self) -> Outcome | None:
        """Look for the answer; None if there is none yet."""
        try:
            return Outcome.TAKEN if self.carrier.recv(1) else Outcome.REFUSED
        except BlockingIOError:
            return None
        except OSError:
            return Outcome.REFUSED

    def withdraw(self) -> Outcome:
        """Take it back, unless it was taken."""
        with suppress(OSError):  # the other end is gone, and with it the offer
            self.carrier.shutdown(socket.SHUT_RDWR)
        return Outcome.TAKEN if self.answer() is Outcome.TAKEN else Outcome.WITHDRAWN
