"""How often pages were taken out of relation files: what tells that a fetched page may be too old.

Two numbers in a small file beside the page socket, mapped by the agent and, through the shim, by
every PostgreSQL process (`struct losses` in boreal_shim.c):

- *evictions*, the agent's: odd while it punches holes. It grows before the first hole is there.
- *cuts*, PostgreSQL's: it grows after each truncation and each unlink of a relation file, before
  PostgreSQL goes on and could put a new block where an old one was.

Whoever fetches pages ahead of their use reads the sum before asking, and discards them if the sum
is another when they are to be used. Both only grow, so the sum tells whether either did.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from boreal.engine import Account

_SUFFIX = ".losses"
_BYTES = 16
_EVICTIONS, _CUTS = 0, 1


class Losses:
    """The agent's side of the file beside `socket`. `close` unmaps it; the file stays."""

    def __init__(self, socket: Path, account: Account) -> None:
        path = socket.with_name(socket.name + _SUFFIX)
        # Not made anew where there is one: processes of PostgreSQL may have it mapped.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            account.own(path)
            os.ftruncate(descriptor, _BYTES)
            self._map = mmap.mmap(descriptor, _BYTES)
        finally:
            os.close(descriptor)
        # Whole words at once, which no struct format of a fixed byte order promises.
        self._words = memoryview(self._map).cast("Q")
        self._words[_EVICTIONS] += self._words[_EVICTIONS] % 2

    def count(self) -> int:
        """All losses so far."""
        return self._words[_EVICTIONS] + self._words[_CUTS]

    @contextmanager
    def evicting(self) -> Iterator[None]:
        """Within it, holes may be punched. By one task at a time."""
        self._words[_EVICTIONS] += 1
        try:
            yield
        finally:
            self._words[_EVICTIONS] += 1

    def close(self) -> None:
        """Unmap it."""
        self._words.release()
        self._map.close()
