"""Goal: the simulator would notice if a rule of boreal.quorum were wrong; else its silence means
nothing.

Method: plug one wrong rule at a time into the simulated fleet, the kind of mistake somebody would
make, and look for the first seed that ends in a breach. Where boreal.quorum guards itself with
Internal, that counts as noticed too.
"""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from boreal.errors import Internal, QuorumUnavailable
from boreal.quorum import Accepted, DurabilityTracker, Lineage, RecoveryPlan, SegmentState
from boreal.types import Epoch, Lsn, NodeName
from tests.quorum.parts import Rules, Violation
from tests.quorum.simulator import run_seed

SEEDS = 3000
"""Far more than any of them needs."""

States = Mapping[NodeName, SegmentState]


class OwnChoice(Rules):
    """A recovery with its own idea of whom to ask and whom to follow."""

    fenced_nodes = 4

    def rank(self, state: SegmentState) -> tuple[int, ...]:
        return state.position

    def choose(self, epoch: Epoch, answers: States) -> NodeName:
        if len(answers) < self.fenced_nodes:
            raise QuorumUnavailable("fence more")
        return max(answers, key=lambda name: (self.rank(answers[name]), name))

    def plan(self, epoch: Epoch, answers: States, end: Lsn) -> RecoveryPlan:
        source = self.choose(epoch, answers)
        lineage = answers[source].lineage.extended(epoch, end)
        return RecoveryPlan(lineage=lineage, end=end, source=source)


class SourceByScl(OwnChoice):
    def rank(self, state: SegmentState) -> tuple[int, ...]:
        return (state.scl,)


class SourceByLastEntry(OwnChoice):
    """As if epoch_at told the last entry's epoch whatever the SCL."""

    def rank(self, state: SegmentState) -> tuple[int, ...]:
        return (state.lineage.last.epoch, state.scl)


class SourceByPromise(OwnChoice):
    """Any of the fenced will do, they all promised the same."""

    def rank(self, state: SegmentState) -> tuple[int, ...]:
        return (state.promised,)


class FenceOnlyTwo(OwnChoice):
    fenced_nodes = 2


class FenceOnlyThree(OwnChoice):
    """Not wrong: see test_three_fenced_segments_would_do."""

    fenced_nodes = 3


class CreatedUnderNewestEpoch(OwnChoice):
    def created(self, newest: Epoch) -> SegmentState:
        return SegmentState.created(newest, Lsn(0))


class CountWhoHasNotAdopted(Rules):
    def counts(self, plan: RecoveryPlan, position: SegmentState) -> bool:
        return True


class CountBelowTheStart(Rules):
    """The VDL moves before the log is on a quorum up to T (Raft's figure 8)."""

    def may_serve(self, plan: RecoveryPlan, positions: States) -> bool:
        return len(positions) >= 4

    def first_vdl(self, plan: RecoveryPlan) -> Lsn:
        return Lsn(0)


class ServeBeforeItIsCarriedOut(Rules):
    def may_serve(self, plan: RecoveryPlan, positions: States) -> bool:
        return len(positions) >= 4


class AppendWithoutAdopting(Rules):
    def append(self, state: SegmentState, epoch: Epoch, at: Lsn, length: int, vdl: Lsn) -> Accepted:
        state.check_epoch(epoch)
        own = replace(state, promised=state.lineage.last.epoch)
        accepted = own.append(state.lineage.last.epoch, at, length, vdl)
        return accepted._replace(state=replace(accepted.state, promised=state.promised))


class AppendDespitePromise(Rules):
    def append(self, state: SegmentState, epoch: Epoch, at: Lsn, length: int, vdl: Lsn) -> Accepted:
        own = replace(state, promised=state.lineage.last.epoch)
        accepted = own.append(epoch, at, length, vdl)
        return accepted._replace(state=replace(accepted.state, promised=state.promised))


class AdoptKeepsTheTail(Rules):
    def adopt(self, state: SegmentState, epoch: Epoch, lineage: Lineage) -> SegmentState:
        return replace(state.adopt(epoch, lineage), scl=state.scl)


class AdoptCutsAtNewStart(Rules):
    """Cuts at the last entry's start instead of where the histories part."""

    def adopt(self, state: SegmentState, epoch: Epoch, lineage: Lineage) -> SegmentState:
        scl = min(state.scl, lineage.last.start)
        return replace(state.adopt(epoch, lineage), scl=scl)


class AdoptRecordsBeforeItCuts(Rules):
    adopt_cuts_first = False


class PromiseForgotten(Rules):
    def restarted(self, state: SegmentState) -> SegmentState:
        return replace(state, promised=state.lineage.last.epoch)


class CatchUpWhileFenced(Rules):
    def check_catch_up(self, state: SegmentState, lineage: Lineage) -> None:
        replace(state, promised=state.lineage.last.epoch).catch_up_from(lineage)


class CatchUpAcrossLineages(Rules):
    def check_catch_up(self, state: SegmentState, lineage: Lineage) -> None:
        """Whatever came after the SCL will do."""


class PeerServesAnyone(Rules):
    def check_source_of_catch_up(self, state: SegmentState, epoch: Epoch) -> None:
        state.check_epoch(epoch)


class ReadersBelievedAnywhere(Rules):
    def told_durable(self, state: SegmentState, epoch: Epoch, end: Lsn) -> SegmentState:
        return replace(state, vdl=max(state.vdl, min(end, state.scl)))


class TrimWhatIsDurable(Rules):
    """Four copies are enough to forget it, and too few for the two nodes that never had it."""

    def floor(self, tracker: DurabilityTracker) -> Lsn | None:
        return tracker.vdl


class TrimWithoutTheSilent(Rules):
    """As if a node that has not reported to this writer did not exist."""

    def floor(self, tracker: DurabilityTracker) -> Lsn | None:
        return min([tracker.vdl, *tracker.scls.values()])


class TrimInsideARecord(Rules):
    """A node may lose the beginning of a record with its power, though it acknowledged it."""

    floor_at_record_end = False


class TrimAllThatIsHere(Rules):
    def trim(self, state: SegmentState, floor: Lsn) -> SegmentState:
        return replace(state, start=state.scl)


class TrimDropsFirst(Rules):
    trim_says_so_first = False


@pytest.mark.parametrize(
    ("wrong", "likely_seed"),
    [
        (SourceByScl, 441),
        (SourceByLastEntry, 20),
        (SourceByPromise, 0),
        (FenceOnlyTwo, 4),
        (CreatedUnderNewestEpoch, 12),
        (CountWhoHasNotAdopted, 24),
        (CountBelowTheStart, 1),
        (ServeBeforeItIsCarriedOut, 0),
        (AppendWithoutAdopting, 4),
        (AppendDespitePromise, 1),
        (AdoptKeepsTheTail, 1),
        (AdoptCutsAtNewStart, 1),
        (AdoptRecordsBeforeItCuts, 56),
        (PromiseForgotten, 6),
        (CatchUpWhileFenced, 448),
        (CatchUpAcrossLineages, 303),
        (PeerServesAnyone, 6),
        (ReadersBelievedAnywhere, 386),
        (TrimWhatIsDurable, 2),
        (TrimWithoutTheSilent, 2),
        (TrimInsideARecord, 16),
        (TrimAllThatIsHere, 2),
        (TrimDropsFirst, 5),
    ],
)
def test_a_wrong_rule_is_noticed(wrong: type[Rules], likely_seed: int) -> None:
    """`likely_seed` only saves time: where the hunt found its prey when this was written."""

    def hunt() -> None:
        for seed in (likely_seed, *range(SEEDS)):
            run_seed(seed, wrong())

    with pytest.raises((Violation, Internal)):
        hunt()


def test_three_fenced_segments_would_do() -> None:
    """Any three meet any four, so this is no wrong rule, and the simulator does not cry wolf."""
    for seed in range(100):
        run_seed(seed, FenceOnlyThree())
