"""Goal: a segment promises, adopts, appends and fills up as its class says, and refuses the rest.

Method: each rule by example, on values.
"""

from dataclasses import replace

import pytest

from boreal.errors import Internal, LineageNotAdopted, LogGap, StaleEpoch
from boreal.quorum import Lineage, SegmentState
from boreal.types import Epoch, Lsn


def segment(
    *pairs: tuple[int, int], scl: int, promised: int | None = None, vdl: int = 0
) -> SegmentState:
    lineage = Lineage.of(pairs)
    epoch = Epoch(promised or lineage.last.epoch)
    return SegmentState(
        promised=epoch, lineage=lineage, start=Lsn(pairs[0][1]), scl=Lsn(scl), vdl=Lsn(vdl)
    )


def test_a_new_segment_stands_where_the_volume_began() -> None:
    state = SegmentState.created(Epoch(1), Lsn(100))
    assert state.position == (1, 100)
    assert not state.fenced
    assert state.append(Epoch(1), Lsn(100), 5, Lsn(0)).state.scl == 105


def test_the_position_counts_under_the_epoch_whose_start_it_reached() -> None:
    assert segment((1, 0), (2, 100), scl=99).position == (1, 99)
    assert segment((1, 0), (2, 100), scl=100).position == (2, 100)


# --- fence


def test_a_fenced_segment_accepts_nothing_until_it_adopts() -> None:
    fenced = segment((1, 0), scl=50).fence(Epoch(2))
    assert fenced.fenced
    assert fenced.position == (1, 50)
    with pytest.raises(StaleEpoch) as refused:
        fenced.append(Epoch(1), Lsn(50), 1, Lsn(0))
    assert refused.value.details == {"promised_epoch": 2}
    with pytest.raises(LineageNotAdopted):
        fenced.append(Epoch(2), Lsn(50), 1, Lsn(0))
    with pytest.raises(LineageNotAdopted):
        fenced.catch_up_from(fenced.lineage)
    adopted = fenced.adopt(Epoch(2), Lineage.of([(1, 0), (2, 50)]))
    assert adopted.append(Epoch(2), Lsn(50), 1, Lsn(0)).state.scl == 51


def test_a_promise_is_repeated_but_never_taken_back() -> None:
    fenced = segment((1, 0), scl=50).fence(Epoch(3))
    assert fenced.fence(Epoch(3)) == fenced
    for stale in (Epoch(1), Epoch(2)):
        with pytest.raises(StaleEpoch):
            fenced.fence(stale)
    with pytest.raises(StaleEpoch):
        fenced.adopt(Epoch(2), Lineage.of([(1, 0), (2, 50)]))


# --- adopt


@pytest.mark.parametrize(
    ("mine", "scl", "lineage", "kept"),
    [
        pytest.param([(1, 0)], 150, [(1, 0), (2, 100)], 100, id="has too much"),
        pytest.param([(1, 0)], 60, [(1, 0), (2, 100)], 60, id="lags"),
        pytest.param([(1, 0), (2, 100)], 140, [(1, 0), (3, 80)], 80, id="of a failed writer"),
        pytest.param([(1, 0), (2, 70)], 140, [(1, 0), (3, 80)], 70, id="parts before the cut"),
        pytest.param([(1, 0), (2, 70)], 60, [(1, 0), (3, 80)], 60, id="lags before the parting"),
        pytest.param([(1, 0)], 500, [(1, 0), (4, 90), (7, 400), (9, 700)], 90, id="long away"),
    ],
)
def test_adopting_keeps_only_what_both_histories_share(
    mine: list[tuple[int, int]], scl: int, lineage: list[tuple[int, int]], kept: int
) -> None:
    after = segment(*mine, scl=scl, vdl=50).adopt(Epoch(lineage[-1][0]), Lineage.of(lineage))
    assert after.scl == kept
    assert after.vdl == 50
    assert after.lineage == Lineage.of(lineage)
    assert after.promised == lineage[-1][0]


def test_adopting_again_costs_nothing_that_was_appended_since() -> None:
    state = segment((1, 0), (2, 100), scl=130)
    assert state.adopt(Epoch(2), state.lineage) == state


def test_an_epoch_has_one_lineage() -> None:
    with pytest.raises(Internal, match="one recovery plan"):
        segment((1, 0), (2, 100), scl=130).adopt(Epoch(2), Lineage.of([(1, 0), (2, 90)]))


def test_a_lineage_of_somebody_else_is_refused() -> None:
    with pytest.raises(Internal):
        segment((1, 0), scl=50).adopt(Epoch(3), Lineage.of([(1, 0), (2, 50)]))
    with pytest.raises(Internal, match="before this log starts"):
        segment((1, 100), scl=150).adopt(Epoch(2), Lineage.of([(1, 50), (2, 150)]))


# --- trim


def test_the_log_is_kept_from_a_later_start_on() -> None:
    state = segment((1, 0), scl=150, vdl=120)
    after = state.trim(Lsn(100))
    assert (after.start, after.scl, after.vdl) == (100, 150, 120)
    assert after.trim(Lsn(100)) is after
    assert after.trim(Lsn(40)) is after
    assert after.append(Epoch(1), Lsn(150), 5, Lsn(0)).state.start == 100


def test_what_a_new_writer_may_cut_is_never_dropped() -> None:
    state = segment((1, 0), scl=150, vdl=120)
    with pytest.raises(Internal, match="only known to be durable"):
        state.trim(Lsn(121))
    trimmed = state.trim(Lsn(120))
    cut = trimmed.adopt(Epoch(2), Lineage.of([(1, 0), (2, 120)]))
    assert (cut.start, cut.scl) == (120, 120)
    with pytest.raises(Internal, match="before this log starts"):
        trimmed.adopt(Epoch(2), Lineage.of([(1, 0), (2, 119)]))


# --- append


def test_an_append_adds_what_is_new_and_skips_what_is_there() -> None:
    state = segment((1, 0), scl=50)
    accepted = state.append(Epoch(1), Lsn(40), 25, Lsn(45))
    assert (accepted.at, accepted.skip) == (50, 10)
    assert (accepted.state.scl, accepted.state.vdl) == (65, 45)
    repeated = accepted.state.append(Epoch(1), Lsn(40), 25, Lsn(45))
    assert (repeated.at, repeated.skip, repeated.state) == (65, 25, accepted.state)


def test_a_gap_is_refused_with_the_place_to_go_on_from() -> None:
    with pytest.raises(LogGap) as refused:
        segment((1, 0), scl=50).append(Epoch(1), Lsn(51), 1, Lsn(0))
    assert refused.value.details == {"scl": 50}


def test_the_vdl_learned_never_shrinks_and_never_passes_what_is_held() -> None:
    state = segment((1, 0), scl=50, vdl=30)
    assert state.append(Epoch(1), Lsn(50), 0, Lsn(80)).state.vdl == 50
    assert state.append(Epoch(1), Lsn(50), 0, Lsn(10)).state.vdl == 30


def test_a_writer_whose_lineage_was_not_adopted_is_refused() -> None:
    with pytest.raises(LineageNotAdopted):
        segment((1, 0), scl=50).append(Epoch(2), Lsn(50), 1, Lsn(0))


# --- readers and peers


def test_the_log_is_read_only_by_those_who_follow_its_lineage() -> None:
    state = segment((1, 0), (2, 100), scl=120)
    state.check_follows(Epoch(2))
    with pytest.raises(StaleEpoch):
        state.check_follows(Epoch(1))
    with pytest.raises(LineageNotAdopted):
        state.check_follows(Epoch(3))
    with pytest.raises(LineageNotAdopted):
        state.fence(Epoch(3)).check_follows(Epoch(3))


def test_peers_fill_each_other_only_within_one_lineage() -> None:
    state = segment((1, 0), (2, 100), scl=60)
    assert state.catch_up_from(state.lineage) == state.lineage
    for other in ([(1, 0)], [(1, 0), (2, 90)], [(1, 0), (2, 100), (3, 120)]):
        with pytest.raises(LineageNotAdopted):
            state.catch_up_from(Lineage.of(other))


def test_a_state_that_cannot_be_is_refused() -> None:
    state = segment((1, 0), (2, 100), scl=120)
    with pytest.raises(Internal):
        replace(state, promised=Epoch(1))
    with pytest.raises(Internal):
        replace(state, scl=Lsn(-1))
