"""The sessions that were handed over or are relayed, as far as this process has to do with them.

What was handed over PostgreSQL serves alone. But a writer that was frozen (its machine, its
process) and deposed meanwhile cannot tell its clients so, and they would wait for it as long as
they live. So a copy of each connection is kept, unused, beside the carrier it was handed over with,
and closed when the carrier ends, for then PostgreSQL's process has ended. When another instance
becomes the writer, the sessions of the former one are ended by that copy, or by their relay.

What this process does not know of, because it was started since, only PostgreSQL can end.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import structlog

from boreal.types import InstanceName
from control_plane.endpoints.choice import Route
from control_plane.endpoints.hangups import Hangups
from control_plane.endpoints.relay import Relay

_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Session:
    """One of them."""

    instance: InstanceName
    of_writer: bool
    """The instance was the writer at some time of the session."""
    end: Callable[[], None]
    """Hangs up on the client."""
    release: Callable[[], None]
    """Lets go of what this process has of it."""


class Sessions:
    """Those whose end has not been seen yet; `most` of them at most."""

    def __init__(self, hangups: Hangups, most: int) -> None:
        self._hangups = hangups
        self._most = most
        self._sessions: set[_Session] = set()

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def full(self) -> bool:
        """Whether there are as many as may be. What is handed over then is not kept; what would be
        relayed must be refused.
        """
        return len(self._sessions) >= self._most

    def keep(self, client: socket.socket, carrier: socket.socket, route: Route) -> None:
        """A connection was taken by the instance of `route`. Copies both sockets."""
        if self.full:
            return
        copy, line = client.dup(), carrier.dup()

        def end() -> None:
            with suppress(OSError):  # the client was first
                copy.shutdown(socket.SHUT_RDWR)

        def release() -> None:
            self._hangups.forget(line)
            line.close()
            copy.close()

        session = _Session(route.instance, route.writer, end, release)
        self._sessions.add(session)
        self._hangups.watch(line, lambda: self._drop(session))

    def relayed(self, route: Route) -> Relay:
        """A new relay to the instance of `route`, kept until it ends."""
        relay = Relay(lambda: self._sessions.discard(session))
        session = _Session(route.instance, route.writer, relay.end, relay.end)
        self._sessions.add(session)
        return relay

    def writer_is(self, writer: InstanceName) -> None:
        """End the sessions of every former writer."""
        deposed = []
        for session in self._sessions:
            if session.instance == writer:
                session.of_writer = True
            elif session.of_writer:
                deposed.append(session)
        for session in deposed:
            session.end()
            self._drop(session)
        if deposed:
            _log.info("sessions of a former writer were ended", writer=writer, count=len(deposed))

    def close(self) -> None:
        """Keep none any more. What was handed over goes on; what is relayed ends here."""
        for session in tuple(self._sessions):
            self._drop(session)

    def _drop(self, session: _Session) -> None:
        self._sessions.discard(session)
        session.release()
