"""Which writer epoch wrote which part of the log, and where two such histories part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from boreal.errors import Internal
from boreal.types import Epoch, Lsn, Timeline


class EpochStart(NamedTuple):
    """Writer epoch `epoch` wrote the bytes from `start` on."""

    epoch: Epoch
    start: Lsn


class TimelineStart(NamedTuple):
    """PostgreSQL timeline `timeline` holds the bytes from `start` on."""

    timeline: Timeline
    start: Lsn


@dataclass(frozen=True, slots=True)
class Lineage:
    """A volume's history of writers, oldest first.

    Invariant: at least one entry, epochs strictly grow, starts never shrink. (Equal starts happen:
    a writer that was fenced before anything it wrote survived.)
    """

    entries: tuple[EpochStart, ...]

    def __post_init__(self) -> None:
        if not self.entries:
            raise Internal("a lineage has at least the epoch that created the volume")
        for earlier, later in zip(self.entries, self.entries[1:], strict=False):
            if later.epoch <= earlier.epoch or later.start < earlier.start:
                raise Internal(f"lineage out of order: {earlier} then {later}")

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> Lineage:
        """Build from (epoch, start LSN) pairs."""
        return cls(tuple(EpochStart(Epoch(epoch), Lsn(start)) for epoch, start in pairs))

    @property
    def last(self) -> EpochStart:
        """The newest entry."""
        return self.entries[-1]

    def epoch_at(self, scl: Lsn) -> Epoch:
        """The log epoch of a segment that holds this lineage's bytes up to `scl`.

        The last epoch whose start it has reached. A segment that adopted a lineage without having
        caught up with its last start still counts under the older epoch: it lacks bytes the newer
        one is built on.
        """
        reached = self.entries[0].epoch
        for entry in self.entries:
            if entry.start <= scl:
                reached = entry.epoch
        return reached

    def extended(self, epoch: Epoch, start: Lsn) -> Lineage:
        """This history up to `start`, then `epoch`. Entries that began past `start` are dropped."""
        kept = tuple(entry for entry in self.entries if entry.start <= start)
        return Lineage((*kept, EpochStart(epoch, start)))

    def parts_from(self, other: Lineage) -> Lsn | None:
        """The LSN up to which bytes of both lineages are the same bytes; None if they are equal.

        Past the first entry in which they differ, either side may hold what the other never saw.
        """
        common = 0
        for mine, theirs in zip(self.entries, other.entries, strict=False):
            if mine != theirs:
                break
            common += 1
        starts = [
            line.entries[common].start for line in (self, other) if len(line.entries) > common
        ]
        return min(starts) if starts else None

    def timelines(self) -> tuple[TimelineStart, ...]:
        """The PostgreSQL timelines this history amounts to, oldest first.

        Each promotion opens a timeline, numbered from 1 without gaps. A writer of which no record
        survived left no timeline behind: its successor starts at the same LSN and is numbered the
        same. Nobody can tell, provided a timeline is announced only once it holds a durable record.
        """
        starts = sorted({entry.start for entry in self.entries})
        return tuple(TimelineStart(Timeline(n), start) for n, start in enumerate(starts, start=1))
