"""Goal: a new writer takes over the one log that holds every acknowledged record, or none.

Method: the classic traps by example, on values: SCL against epoch, a lineage adopted but not
reached, too few answers, a second plan, and Raft's figure 8.
"""

from dataclasses import replace

import pytest

from boreal.errors import Internal, QuorumUnavailable
from boreal.quorum import (
    SIX_WAY,
    DurabilityTracker,
    Lineage,
    QuorumRule,
    SegmentState,
    choose_source,
    plan_recovery,
)
from boreal.types import Epoch, Lsn, NodeName

A, B, C, D, E, F = (NodeName(name) for name in "ABCDEF")


def segment(*pairs: tuple[int, int], scl: int, promised: int | None = None) -> SegmentState:
    lineage = Lineage.of(pairs)
    return SegmentState(
        promised=Epoch(promised or lineage.last.epoch),
        lineage=lineage,
        start=lineage.entries[0].start,
        scl=Lsn(scl),
        vdl=lineage.entries[0].start,
    )


def fenced(epoch: int, **states: SegmentState) -> dict[NodeName, SegmentState]:
    return {NodeName(name): state.fence(Epoch(epoch)) for name, state in states.items()}


# --- the choice


def test_a_longer_log_of_an_older_epoch_does_not_win() -> None:
    answers = fenced(
        3,
        A=segment((1, 0), scl=500),
        B=segment((1, 0), (2, 100), scl=120),
        C=segment((1, 0), (2, 100), scl=110),
        D=segment((1, 0), scl=90),
    )
    assert choose_source(SIX_WAY, Epoch(3), answers) == B


def test_a_lineage_adopted_but_not_reached_does_not_win() -> None:
    answers = fenced(
        3,
        A=segment((1, 0), scl=100),
        B=segment((1, 0), (2, 100), scl=40),
        C=segment((1, 0), (2, 100), scl=99),
        D=segment((1, 0), scl=90),
    )
    assert choose_source(SIX_WAY, Epoch(3), answers) == A
    plan = plan_recovery(SIX_WAY, Epoch(3), answers, Lsn(100))
    assert plan.lineage == Lineage.of([(1, 0), (3, 100)])


def test_an_empty_epoch_counts_for_those_who_reached_its_start() -> None:
    answers = fenced(
        3,
        A=segment((1, 0), scl=150),
        B=segment((1, 0), (2, 100), scl=100),
        C=segment((1, 0), scl=90),
        D=segment((1, 0), scl=90),
    )
    plan = plan_recovery(SIX_WAY, Epoch(3), answers, Lsn(100))
    assert (plan.source, plan.end) == (B, 100)
    assert plan.lineage == Lineage.of([(1, 0), (2, 100), (3, 100)])


def test_ties_are_broken_the_same_way_everywhere() -> None:
    same = segment((1, 0), scl=50)
    answers = fenced(2, A=same, B=same, C=same, D=same)
    backwards = dict(reversed(answers.items()))
    assert choose_source(SIX_WAY, Epoch(2), answers) == choose_source(SIX_WAY, Epoch(2), backwards)


def test_fewer_than_four_fenced_are_too_few() -> None:
    same = segment((1, 0), scl=50)
    answers = fenced(2, A=same, B=same, C=same) | {D: same}
    with pytest.raises(QuorumUnavailable) as refused:
        choose_source(SIX_WAY, Epoch(2), answers)
    assert refused.value.details == {"answered": 3, "needed": 4}


def test_an_epoch_makes_one_plan() -> None:
    same = segment((1, 0), scl=50)
    answers = fenced(2, A=same, B=same, C=same) | {D: segment((1, 0), (2, 30), scl=30)}
    with pytest.raises(Internal, match="new epoch"):
        choose_source(SIX_WAY, Epoch(2), answers)


def test_a_segment_made_under_a_later_epoch_is_found_out() -> None:
    """Its empty log would outrank every other."""
    same = segment((1, 0), scl=50)
    answers = fenced(3, A=same, B=same, C=same, D=segment((2, 0), scl=0))
    with pytest.raises(Internal, match="not of one volume"):
        choose_source(SIX_WAY, Epoch(3), answers)


# --- the plan


def test_the_cut_lies_in_what_the_sources_last_writer_wrote() -> None:
    state = segment((1, 0), (2, 100), scl=120)
    answers = fenced(3, A=state, B=state, C=state, D=state)
    assert plan_recovery(SIX_WAY, Epoch(3), answers, Lsn(100)).end == 100
    assert plan_recovery(SIX_WAY, Epoch(3), answers, Lsn(120)).end == 120
    for misread in (99, 121):
        with pytest.raises(Internal):
            plan_recovery(SIX_WAY, Epoch(3), answers, Lsn(misread))


def test_a_plan_is_carried_out_once_four_followers_hold_it_all() -> None:
    old = segment((1, 0), scl=120)
    plan = plan_recovery(SIX_WAY, Epoch(2), fenced(2, A=old, B=old, C=old, D=old), Lsn(100))
    done = old.adopt(Epoch(2), plan.lineage)
    lagging = segment((1, 0), scl=99).adopt(Epoch(2), plan.lineage)
    assert done.scl == 100
    three = {A: done, B: done, C: done}
    assert not plan.carried_out(SIX_WAY, three | {D: old, E: old, F: lagging})
    assert plan.carried_out(SIX_WAY, three | {D: done})


def test_four_copies_under_older_log_epochs_are_not_durable() -> None:
    """Raft's figure 8: E comes back with the log of a failed writer, younger and shorter."""
    failed = segment((1, 0), (2, 60), scl=90)  # E: all that is left of writer 2
    plan = plan_recovery(
        SIX_WAY,
        Epoch(3),
        fenced(
            3,
            A=segment((1, 0), scl=100),
            B=segment((1, 0), scl=0),
            C=segment((1, 0), scl=0),
            D=segment((1, 0), scl=0),
        ),
        Lsn(100),
    )
    # Writer 3 has A's log on four segments up to 70, then dies. Had it called that durable ...
    answers = {
        name: segment(*plan.lineage.entries, scl=scl)
        for name, scl in {A: 100, B: 80, C: 80, D: 70}.items()
    }
    assert not plan.carried_out(SIX_WAY, answers)
    # ... the next writer would contradict it, rightly.
    next_answers = fenced(4, C=answers[C], D=answers[D], E=failed, F=segment((1, 0), scl=0))
    assert plan_recovery(SIX_WAY, Epoch(4), next_answers, Lsn(90)).source == E


# --- the VDL


def test_the_vdl_is_what_four_segments_hold() -> None:
    tracker = DurabilityTracker(SIX_WAY, Lsn(100))
    for node, scl in {A: 150, B: 140, C: 130}.items():
        assert tracker.adopted(node, Lsn(scl)) == 100
    assert tracker.adopted(D, Lsn(20)) == 100
    assert tracker.acked(D, Lsn(135)) == 130
    assert tracker.scls == {A: 150, B: 140, C: 130, D: 135}


def test_what_is_held_everywhere_takes_a_word_of_every_segment() -> None:
    tracker = DurabilityTracker(SIX_WAY, Lsn(100))
    for number, node in enumerate((A, B, C, D, E)):
        tracker.adopted(node, Lsn(150 + number))
    assert tracker.held_everywhere is None
    tracker.adopted(F, Lsn(20))
    assert tracker.held_everywhere == 20
    tracker.acked(F, Lsn(160))
    assert tracker.held_everywhere == 150


def test_the_log_is_taken_over_from_a_segment_that_dropped_its_beginning() -> None:
    long = segment((1, 0), (2, 100), scl=500)
    short = replace(long, vdl=Lsn(450)).trim(Lsn(400))
    answers = fenced(3, A=long, B=short, C=replace(short, scl=Lsn(510)), D=long)
    plan = plan_recovery(SIX_WAY, Epoch(3), answers, Lsn(490))
    assert (plan.source, plan.end) == (C, 490)
    assert [state.adopt(Epoch(3), plan.lineage).start for state in answers.values()] == [
        *(0, 400, 400, 0)
    ]


def test_the_vdl_never_shrinks() -> None:
    """A node that lost power comes back with less; what was durable stays so."""
    tracker = DurabilityTracker(SIX_WAY, Lsn(0))
    for node in (A, B, C, D):
        tracker.adopted(node, Lsn(100))
    assert tracker.vdl == 100
    assert tracker.adopted(D, Lsn(90)) == 100
    assert tracker.acked(C, Lsn(50)) == 100
    assert tracker.scls[D] == 90


def test_an_ack_before_the_adoption_is_a_bug() -> None:
    with pytest.raises(Internal):
        DurabilityTracker(SIX_WAY, Lsn(0)).acked(A, Lsn(1))


def test_a_seventh_segment_is_a_bug() -> None:
    tracker = DurabilityTracker(SIX_WAY, Lsn(0))
    for node in (A, B, C, D, E, F):
        tracker.adopted(node, Lsn(0))
    with pytest.raises(Internal):
        tracker.adopted(NodeName("G"), Lsn(0))


@pytest.mark.parametrize(("copies", "write", "read"), [(6, 3, 4), (6, 4, 2), (3, 2, 1)])
def test_quorums_that_need_not_meet_are_refused(copies: int, write: int, read: int) -> None:
    with pytest.raises(Internal):
        QuorumRule(copies=copies, write=write, read=read)
