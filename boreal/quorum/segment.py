"""What one segment may accept: the rules a storage node applies to every call about its log.

The storage node keeps a `SegmentState` durable and asks it before it touches the log; the state
never sees the bytes themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from boreal.errors import Internal, LineageNotAdopted, LogGap, StaleEpoch
from boreal.quorum.lineage import EpochStart, Lineage
from boreal.types import Epoch, Lsn, format_lsn


class Accepted(NamedTuple):
    """An append was accepted: write the data without its first `skip` bytes at `at`."""

    at: Lsn
    skip: int
    state: SegmentState
    """The state once those bytes are durable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentState:
    """One segment of one volume.

    Invariant: `start <= scl`, and no adopted lineage ever parts below `start` (`trim` sees to it);
    `vdl` is a durable point some writer told of, so no adopted lineage
    ever parts below a record's end at or below it; `promised` is never below the lineage's last
    epoch and never shrinks. While `promised` is above it, the segment is *fenced*: it has promised
    a new writer to stay as it is, and accepts no bytes from anyone.
    """

    promised: Epoch
    lineage: Lineage
    start: Lsn
    """The log is kept from here on. Segments of one volume may differ in it."""
    scl: Lsn
    vdl: Lsn

    def __post_init__(self) -> None:
        if self.promised < self.lineage.last.epoch:
            raise Internal(f"promised epoch {self.promised} is below lineage {self.lineage.last}")
        if self.scl < self.start:
            raise Internal(f"SCL {format_lsn(self.scl)} is below the log's start")

    @classmethod
    def created(cls, epoch: Epoch, start: Lsn) -> SegmentState:
        """An empty segment of the volume that `epoch` created with its log beginning at `start`.

        Always the volume's first epoch, also when this segment is made long after: it holds
        nothing, and its position must say so.
        """
        return cls(
            promised=epoch,
            lineage=Lineage((EpochStart(epoch, start),)),
            start=start,
            scl=start,
            vdl=start,
        )

    @property
    def position(self) -> tuple[Epoch, Lsn]:
        """What recovery compares: (log epoch, SCL). Never compare the SCL alone."""
        return (self.lineage.epoch_at(self.scl), self.scl)

    @property
    def fenced(self) -> bool:
        """Whether a newer writer's lineage is awaited."""
        return self.promised > self.lineage.last.epoch

    def check_epoch(self, epoch: Epoch) -> None:
        """Raise StaleEpoch if a caller of `epoch` has been superseded."""
        if epoch < self.promised:
            raise StaleEpoch(
                f"epoch {epoch} is stale: this segment promised epoch {self.promised}. "
                "A newer writer owns the volume; stop writing",
                promised_epoch=self.promised,
            )

    def check_follows(self, epoch: Epoch) -> None:
        """Raise StaleEpoch or LineageNotAdopted unless the bytes here are of `epoch`'s lineage.

        For the writer, for readers of the log and for peers that catch up. That an epoch is not
        stale is not enough: a segment that was away may hold bytes of a writer that lost. Recovery
        alone reads the segment it chose without this check: it knows from the answer to the fence
        whose bytes they are. A longer read asks again after each chunk: an Adopt may come in
        between.
        """
        self.check_epoch(epoch)
        if epoch != self.lineage.last.epoch:
            raise LineageNotAdopted(
                f"epoch {epoch} is not the last of this segment's lineage "
                f"({self.lineage.last.epoch}); send Adopt first",
                promised_epoch=self.promised,
            )

    def fence(self, epoch: Epoch) -> SegmentState:
        """Promise `epoch`. Make the result durable before answering.

        The answer tells the SCL for good: an append accepted earlier is either counted in it or
        never acknowledged.
        """
        self.check_epoch(epoch)
        return replace(self, promised=epoch)

    def adopt(self, epoch: Epoch, lineage: Lineage) -> SegmentState:
        """Take `lineage`, the history as the writer of `epoch` established it.

        The result's SCL may be lower: discard the log beyond it *before* the result is made
        durable, else a crash in between would present another writer's bytes under this lineage.
        """
        self.check_epoch(epoch)
        if lineage.last.epoch != epoch:
            raise Internal(f"lineage ends with epoch {lineage.last.epoch}, caller has {epoch}")
        parting = self.lineage.parts_from(lineage)
        if parting is None:
            return replace(self, promised=epoch)
        if self.lineage.last.epoch == epoch:
            raise Internal(
                f"epoch {epoch} was adopted here as {self.lineage.last} and now comes as "
                f"{lineage.last}: an epoch makes one recovery plan"
            )
        if parting < self.start:
            raise Internal(
                f"lineage parts at {format_lsn(parting)}, before this log starts: "
                "the segment belongs to another volume, or must be rebuilt from a peer"
            )
        # A lineage that only adds an entry at or past our SCL costs us nothing.
        scl = min(self.scl, parting)
        return replace(self, promised=epoch, lineage=lineage, scl=scl, vdl=min(self.vdl, scl))

    def append(self, epoch: Epoch, at: Lsn, length: int, vdl: Lsn) -> Accepted:
        """Accept `length` bytes at `at`, or say why not: StaleEpoch, LineageNotAdopted, LogGap."""
        self.check_follows(epoch)
        if at > self.scl:
            raise LogGap(
                f"append at {format_lsn(at)} leaves a gap: this segment is complete to "
                f"{format_lsn(self.scl)}; send from there",
                scl=self.scl,
            )
        skip = min(length, self.scl - at)
        scl = Lsn(self.scl + length - skip)
        # Spelled out: on the commit path dataclasses.replace would cost as much as all the rest.
        after = SegmentState(
            promised=self.promised,
            lineage=self.lineage,
            start=self.start,
            scl=scl,
            vdl=max(self.vdl, min(vdl, scl)),
        )
        return Accepted(at=self.scl, skip=skip, state=after)

    def trim(self, floor: Lsn) -> SegmentState:
        """Keep the log from `floor` on only; a floor that is lower than before changes nothing.

        `floor` lies at or below a record's end that is durable and that every segment of the volume
        holds: below it no lineage parts, recovery looks for no record, and nobody lacks anything.
        Only the writer can know all of that. Checked here is what a segment can know.

        Make the result durable *before* the log is dropped, else a crash in between would leave a
        segment that says it holds what is gone.
        """
        if floor <= self.start:
            return self
        if floor > self.vdl:
            raise Internal(
                f"the log below {format_lsn(floor)} was to be dropped, but it is only known to be "
                f"durable up to {format_lsn(self.vdl)}"
            )
        return replace(self, start=floor)

    def catch_up_from(self, lineage: Lineage) -> Lineage:
        """Check that a peer with `lineage` may fill this segment's log; return the lineage.

        Only between segments of one and the same adopted lineage, and never into a fenced one: what
        it answered to the fence must stay true until it adopts.
        """
        if self.fenced or lineage != self.lineage:
            raise LineageNotAdopted(
                "this segment and its peer do not follow the same lineage; adopt first",
                promised_epoch=self.promised,
            )
        return lineage
