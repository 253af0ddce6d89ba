"""The writer's lease as its PostgreSQL sees it: two words in a file beside the page socket.

The page shim looks at them in each PostgreSQL process, once a client's message is in. While the
lease that the first tells of has run out, the message is held back; so an agent that was frozen, or
cut off from the storage nodes, serves nobody with data that a successor may have changed since
(boreal.quorum.lease has the argument). With the second set, messages of sessions that are not in a
transaction are held back too: a writer makes way, and none of its transactions is cut in two.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from boreal.engine import Account
from boreal.quorum import SIX_WAY
from boreal.quorum.lease import held_until

_SUFFIX = ".lease"
_BYTES = 16
_UNTIL, _DRAINING = 0, 1
_NANOSECONDS = 1_000_000_000
NOT_NEEDED = 0
"""What a reader serves is durable, and told to be a moment old: it needs no lease."""
HELD_BACK = 1
"""A time long past: no message of a client gets through."""


class Lease:
    """The agent's side of the file beside `socket`. `close` unmaps it; the file stays."""

    def __init__(self, socket: Path, account: Account) -> None:
        path = socket.with_name(socket.name + _SUFFIX)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            account.own(path)
            os.ftruncate(descriptor, _BYTES)
            self._map = mmap.mmap(descriptor, _BYTES)
        finally:
            os.close(descriptor)
        # Whole words at once, which no struct format of a fixed byte order promises.
        self._words = memoryview(self._map).cast("Q")
        self._words[_UNTIL], self._words[_DRAINING] = NOT_NEEDED, 0

    def hold_back(self) -> None:
        """Let no client's message through until `renew` says otherwise."""
        self._words[_UNTIL] = HELD_BACK

    def renew(self, contacts: Iterable[float]) -> None:
        """Tell how long the lease reaches, given when the nodes were last in contact."""
        until = held_until(SIX_WAY, contacts)
        # A word that was greater stands: what was held until then is held.
        told = HELD_BACK if until is None else max(HELD_BACK, int(until * _NANOSECONDS))
        self._words[_UNTIL] = max(self._words[_UNTIL], told)

    def drain(self) -> None:
        """Let no transaction begin any more; those under way go on."""
        self._words[_DRAINING] = 1

    def held(self, clock: Callable[[], float]) -> bool:
        """Whether messages get through now. `clock` is monotonic seconds."""
        return self._words[_UNTIL] == NOT_NEEDED or clock() * _NANOSECONDS < self._words[_UNTIL]

    def close(self) -> None:
        """Unmap it."""
        self._words.release()
        self._map.close()
