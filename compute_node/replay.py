"""How far a reader is behind the log it was given. Pure."""

from __future__ import annotations

from collections import deque

from boreal.types import Lsn

_MARKS = 256
_MARK_EVERY_S = 0.005


class ReplayLag:
    """How long the oldest log that was given to PostgreSQL has been waiting to be replayed.

    Times are seconds of the caller's monotonic clock. Invariant: `replayed` never shrinks; memory
    is bounded: log that comes within a few milliseconds counts as having come with the first of it.
    """

    def __init__(self) -> None:
        self.replayed = Lsn(0)
        self._given = Lsn(0)
        self._marks: deque[tuple[Lsn, float]] = deque()
        """(end, when it was given), oldest first; all of them past `replayed`."""

    def given(self, end: Lsn, at: float) -> None:
        """The log up to `end` may be replayed from now on."""
        if end <= self._given:
            return
        self._given = end
        crowded = len(self._marks) >= _MARKS
        if self._marks and (crowded or at - self._marks[-1][1] < _MARK_EVERY_S):
            self._marks[-1] = (end, self._marks[-1][1])
        elif end > self.replayed:
            self._marks.append((end, at))

    def replay(self, upto: Lsn) -> None:
        """PostgreSQL said that it replayed so far."""
        self.replayed = max(self.replayed, upto)
        while self._marks and self._marks[0][0] <= self.replayed:
            self._marks.popleft()

    def lag_us(self, now: float) -> int:
        """The lag at `now`; 0 if all is replayed."""
        return round((now - self._marks[0][1]) * 1e6) if self._marks else 0
