"""Goal: histories compare, part, grow and number their timelines as the quorum argument needs.

Method: small histories by example, and one property over all of them.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boreal.errors import Internal
from boreal.quorum import Lineage
from boreal.types import Epoch, Lsn


def lineage(*pairs: tuple[int, int]) -> Lineage:
    return Lineage.of(pairs)


@pytest.mark.parametrize("pairs", [[], [(1, 0), (1, 5)], [(2, 0), (1, 5)], [(1, 5), (2, 0)]])
def test_a_history_out_of_order_is_refused(pairs: list[tuple[int, int]]) -> None:
    with pytest.raises(Internal):
        Lineage.of(pairs)


@pytest.mark.parametrize(
    ("scl", "epoch"), [(10, 1), (99, 1), (100, 3), (101, 3), (199, 3), (200, 4), (9999, 4)]
)
def test_the_log_epoch_is_that_of_the_last_start_reached(scl: int, epoch: int) -> None:
    """At equal starts the later counts: its writer took everything up to there over."""
    assert lineage((1, 10), (2, 100), (3, 100), (4, 200)).epoch_at(Lsn(scl)) == epoch


def test_extending_drops_what_began_past_the_cut() -> None:
    history = lineage((1, 0), (2, 100), (3, 200))
    assert history.extended(Epoch(7), Lsn(150)) == lineage((1, 0), (2, 100), (7, 150))
    assert history.extended(Epoch(7), Lsn(200)) == lineage((1, 0), (2, 100), (3, 200), (7, 200))


@pytest.mark.parametrize(
    ("one", "other", "parting"),
    [
        pytest.param([(1, 0)], [(1, 0)], None, id="equal"),
        pytest.param([(1, 0)], [(1, 0), (2, 100)], 100, id="one epoch later"),
        pytest.param([(1, 0), (2, 100)], [(1, 0), (3, 80)], 80, id="a failed writer cut later"),
        pytest.param([(1, 0), (2, 80)], [(1, 0), (3, 100)], 80, id="a failed writer cut earlier"),
        pytest.param([(1, 0), (2, 80)], [(1, 0), (3, 80)], 80, id="same cut, other writer"),
        pytest.param(
            [(1, 0), (2, 80), (5, 90)],
            [(1, 0), (2, 80), (3, 85), (9, 300)],
            85,
            id="away for several epochs",
        ),
    ],
)
def test_histories_part_where_one_may_hold_what_the_other_never_saw(
    one: list[tuple[int, int]], other: list[tuple[int, int]], parting: int | None
) -> None:
    assert Lineage.of(one).parts_from(Lineage.of(other)) == parting
    assert Lineage.of(other).parts_from(Lineage.of(one)) == parting


def test_each_start_opens_a_timeline_and_equal_starts_one_only() -> None:
    history = lineage((1, 0), (4, 100), (5, 100), (9, 250))
    assert history.timelines() == ((1, 0), (2, 100), (3, 250))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(0, 60))
def test_an_extension_parts_from_its_origin_at_the_cut_or_before(
    starts: list[int], cut: int
) -> None:
    origin = Lineage.of(enumerate([0, *sorted(starts)], start=1))
    extended = origin.extended(Epoch(99), Lsn(cut))
    parting = extended.parts_from(origin)
    dropped = [entry.start for entry in origin.entries if entry.start > cut]
    assert parting == min([cut, *dropped])
    assert extended.last == (99, cut)
