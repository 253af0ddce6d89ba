"""How far back the volume is kept: what the writer tells the storage nodes of it (the PGMRPL)."""

from __future__ import annotations

from collections import deque

from boreal.types import KEPT_BUNDLES, Lsn, record_end_before


class Floors:
    """The writer's share in garbage collection. Pure.

    Invariant: neither floor shrinks; `pgmrpl` is a record's end, at or below the read point, the
    redo of each of the bundles kept and what readers may still ask for, and every storage node has
    held all below it. (A record's end: a node that loses power may lose the beginning of a record
    again, and it would be nowhere.)
    """

    def __init__(self, *, start: Lsn, restored_redo: Lsn) -> None:
        """`start` is where the writer's WAL begins, `restored_redo` where its replay began.

        Older bundles than the one restored may be kept; a storage node looks after its own.
        """
        self._redos = deque([record_end_before(restored_redo)], KEPT_BUNDLES)
        self.read_point = start
        """Where the writer's missing pages are read at; storage has what it takes for that."""
        self.pgmrpl = Lsn(0)
        """Nobody goes back below it; 0: nobody knows yet."""

    def bundle_stored(self, redo: Lsn) -> None:
        """A bundle is on a write quorum, and the log up to its end is durable."""
        self._redos.append(record_end_before(redo))

    def advance(self, held_everywhere: Lsn | None, followers_floor: Lsn | None) -> None:
        """Raise both as far as is right now.

        `held_everywhere`: below it every node has the log; None while one has not been heard of.
        `followers_floor`: no reader asks for a page as of an older LSN; None: there are no readers.
        """
        # Not the newest: the index need not have come so far. Nor the oldest: a page that is on its
        # way when the next bundle is stored must still be there.
        self.read_point = max(self.read_point, self._redos[(len(self._redos) - 1) // 2])
        floor = min(self._redos[0], self.read_point)
        if followers_floor is not None:
            floor = min(floor, record_end_before(followers_floor))
        if held_everywhere is not None and held_everywhere >= floor:
            self.pgmrpl = max(self.pgmrpl, floor)
