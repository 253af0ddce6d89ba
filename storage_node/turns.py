"""Turns for work that has time: short, and rarer while others want the processor.

Page reads and the ingest share the process with it, and get in between two turns. The other
processes of the machine, maybe five more storage nodes among them, share its processors. A turn
that took longer than it was at work had to wait for them, and is followed by a rest that many times
as long. So six nodes with pages to settle leave most of a processor to whoever reads one, and a
node that is alone works on without a rest. A turn during which pages were read is followed by a
longer one: who read a page may well read another.

While log comes, work that must keep up with it does not rest: it would fall behind just then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

TURN_S: Final = 0.002
_PATIENCE: Final = 4.0
"""Rest for each second waited for a processor, or for the disk."""
_LONGEST_REST_S: Final = 0.1
_REST_FROM_READS_S: Final = 0.05


class Turns:
    """The turns of one task; each begins where the rest before it ended."""

    def __init__(
        self,
        reads: Callable[[], int],
        wall: Callable[[], float] = time.monotonic,
        worked: Callable[[], float] = time.thread_time,
    ) -> None:
        """`reads` counts calls that read pages. Clocks (s): of all time; of work here."""
        self._reads = reads
        self._reads_before = reads()
        self._wall = wall
        self._worked = worked
        self.begin()

    def begin(self) -> None:
        """A turn begins now: there was something else to do before."""
        self._began = self._due = self._wall()
        self._worked_before = self._worked()

    @property
    def over(self) -> bool:
        """Whether it is time to give way."""
        return self._wall() - self._began >= TURN_S

    @property
    def rest_s(self) -> float:
        """How long to rest after this turn.

        What it waited for is counted from when it was due: a turn is short enough to be left in
        peace once it has begun.
        """
        waited = (self._wall() - self._due) - (self._worked() - self._worked_before)
        least = 0.0 if self._reads() == self._reads_before else _REST_FROM_READS_S
        return min(max(_PATIENCE * waited, least), _LONGEST_REST_S)

    async def give_way(self, *, patient: bool = True) -> None:
        """End the turn, and rest if there is time; return when the next turn begins."""
        rest_s = self.rest_s if patient else 0.0
        self._due = self._wall() + rest_s
        self._worked_before = self._worked()
        self._reads_before = self._reads()
        await asyncio.sleep(rest_s)
        self._began = self._wall()
