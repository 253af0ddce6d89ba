"""From records to pages: what a record does to each page it names.

The seam is `Redo`. The index asks `step` of every block reference when it first meets the record;
materialization later calls `apply` for the records on a page's path. Values in, values out: nothing
here does I/O.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Protocol

from boreal.wal import BlockRef, WalRecord


class Step(Enum):
    """What a record does to one page it names."""

    BASE = auto()
    """The whole page is in the record; whatever was there before does not matter."""
    CHANGE = auto()
    """The page after is the page before, changed."""
    NOTHING = auto()
    """The page stays as it is."""
    UNKNOWN = auto()
    """This redo cannot tell the page after; the page is refused until its next base."""


class Redo(Protocol):
    """Knows PostgreSQL's records."""

    def step(self, record: WalRecord, block: BlockRef) -> Step:
        """Say what `record` does to `block`.

        Raises IngestStopped for a record that breaks what writer and storage agreed on: to index
        past it would make every later answer a guess.
        """

    def apply(self, page: bytearray, record: WalRecord, block: BlockRef) -> None:
        """Change `page` (8 KiB) in place from before `record` to after it.

        Called only where `step` said BASE (then `page` may hold anything) or CHANGE.
        """
