"""What a new writer does with the log it finds (design section 3, steps 2 to 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from boreal.errors import Internal, QuorumUnavailable
from boreal.quorum.lineage import Lineage
from boreal.quorum.rule import QuorumRule
from boreal.quorum.segment import SegmentState
from boreal.types import Epoch, Lsn, NodeName, format_lsn


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """The log as the new writer takes it over."""

    lineage: Lineage
    """To be adopted by every segment; its last entry is the new epoch's."""
    end: Lsn
    """T: the log ends here; the new writer's WAL begins here."""
    source: NodeName
    """Holds every byte up to `end`."""

    def carried_out(self, rule: QuorumRule, answers: Mapping[NodeName, SegmentState]) -> bool:
        """Whether the log up to `end` is durable, so that it may be served and added to."""
        holders = [
            state
            for state in answers.values()
            if state.lineage == self.lineage and state.scl >= self.end
        ]
        return len(holders) >= rule.write


def choose_source(
    rule: QuorumRule, epoch: Epoch, answers: Mapping[NodeName, SegmentState]
) -> NodeName:
    """The segment whose log the writer of `epoch` takes over: the highest (log epoch, SCL).

    `answers` are states *after* fencing with `epoch`. Raises QuorumUnavailable with fewer than a
    write quorum of them. (A read quorum would already see every acknowledged record and leave the
    old writer short of its four; a write quorum is what the new writer needs to go on, and sees
    each record twice.) A source that turns out unreadable may be left out, if a write quorum
    remains.
    """
    fenced = {name: state for name, state in answers.items() if state.promised == epoch}
    if len(fenced) < rule.write:
        raise QuorumUnavailable(
            f"{len(fenced)} of {rule.copies} storage nodes fenced epoch {epoch}; {rule.write} are "
            "needed. Start more storage nodes",
            answered=len(fenced),
            needed=rule.write,
        )
    if any(state.lineage.last.epoch == epoch for state in fenced.values()):
        raise Internal(
            f"epoch {epoch} made its recovery plan before; a new recovery needs a new epoch"
        )
    if len({state.lineage.entries[0] for state in fenced.values()}) > 1:
        raise Internal("the segments do not begin alike: they are not of one volume")
    # Ties hold the same bytes; the name only makes the choice the same everywhere.
    return max(fenced, key=lambda name: (fenced[name].position, name))


def plan_recovery(
    rule: QuorumRule, epoch: Epoch, answers: Mapping[NodeName, SegmentState], record_end: Lsn
) -> RecoveryPlan:
    """Cut the chosen log at `record_end`, the end of its last complete WAL record.

    Made once for an epoch, then only carried out. Every epoch starts at a record's end, so a cut
    below the newest start the source has reached means that its log was misread.
    """
    source = choose_source(rule, epoch, answers)
    state = answers[source]
    reached = max(entry.start for entry in state.lineage.entries if entry.start <= state.scl)
    if not reached <= record_end <= state.scl:
        raise Internal(
            f"the last record ends at {format_lsn(record_end)}, outside what the last writer that "
            f"{source} knows wrote: [{format_lsn(reached)}, {format_lsn(state.scl)})"
        )
    return RecoveryPlan(
        lineage=state.lineage.extended(epoch, record_end), end=record_end, source=source
    )
