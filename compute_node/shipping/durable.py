"""How long log takes from PostgreSQL's walsender to a write quorum: what a commit waits for."""

from __future__ import annotations

from collections import deque

from boreal.histogram import Durations
from boreal.types import Lsn

MOST_MARKS = 4096


class Durability:
    """Notes when log arrives and observes how long it took once it is durable. Pure.

    Each arrival counts once, whatever its size: a walsender sends on what there is whenever it is
    free, so under load one arrival is the commits of many sessions. Memory is bounded: with that
    many under way, further ones are not observed. On the commit path: half a microsecond for each.
    """

    def __init__(self) -> None:
        self.took = Durations()
        self._marks: deque[tuple[Lsn, float]] = deque()
        """(end, when it came), oldest first; none of them durable."""

    def arrived(self, end: Lsn, now: float) -> None:
        """Log up to `end` is here. `now` is a monotonic clock's."""
        if len(self._marks) < MOST_MARKS:
            self._marks.append((end, now))

    def durable(self, vdl: Lsn, now: float) -> None:
        """The log is durable up to `vdl`."""
        marks = self._marks
        while marks and marks[0][0] <= vdl:
            self.took.observe(now - marks.popleft()[1])
