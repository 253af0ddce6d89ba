"""Goal: the writer lets storage forget only what no read, no bundle and no node can want again.

Method: the rule on values, then hypothesis against a model that remembers everything.
"""

from hypothesis import given
from hypothesis import strategies as st

from boreal.types import KEPT_BUNDLES, PAGE_BYTES, WAL_SEGMENT_BYTES, Lsn
from compute_node.floors import Floors

BASE = 9 * WAL_SEGMENT_BYTES + 100


def lsn(number: int) -> Lsn:
    return Lsn(BASE + number)


def test_nothing_is_told_while_a_node_has_not_been_heard_of() -> None:
    floors = Floors(start=lsn(900), restored_redo=lsn(500))
    floors.advance(None, None)
    assert (floors.pgmrpl, floors.read_point) == (0, lsn(900))
    floors.advance(lsn(950), None)
    assert floors.pgmrpl == lsn(500)


def test_a_node_that_is_away_holds_the_floor_and_not_the_read_point() -> None:
    floors = Floors(start=lsn(900), restored_redo=lsn(500))
    floors.advance(lsn(950), None)
    for redo in (1000, 1100, 1200, 1300):
        floors.bundle_stored(lsn(redo))
        floors.advance(lsn(950), None)
    assert (floors.pgmrpl, floors.read_point) == (lsn(500), lsn(1200))
    floors.advance(lsn(1300), None)
    assert floors.pgmrpl == lsn(1100)


def test_after_a_restart_the_restored_bundle_holds_the_floor_until_it_is_forgotten() -> None:
    floors = Floors(start=lsn(900), restored_redo=lsn(500))
    told = []
    for redo in (1000, 1100, 1200):
        floors.bundle_stored(lsn(redo))
        floors.advance(lsn(5000), None)
        told.append((floors.pgmrpl, floors.read_point))
    assert told == [
        (lsn(500), lsn(900)),
        (lsn(500), lsn(1000)),
        (lsn(1000), lsn(1100)),
    ]


def test_the_writer_never_reads_before_its_own_beginning() -> None:
    floors = Floors(start=lsn(900), restored_redo=lsn(500))
    for redo in (600, 700, 800):  # cannot be, and would do no harm
        floors.bundle_stored(lsn(redo))
        floors.advance(lsn(950), None)
    assert floors.read_point == lsn(900)


def test_floors_are_records_ends() -> None:
    """A checkpoint's redo may be where the next record begins, behind a page's header."""
    page = Lsn(10 * WAL_SEGMENT_BYTES + 3 * PAGE_BYTES)
    floors = Floors(start=lsn(0), restored_redo=Lsn(page + 24))
    floors.advance(Lsn(page + 500), None)
    assert (floors.pgmrpl, floors.read_point) == (page, page)


def test_readers_hold_the_floor_and_not_the_read_point() -> None:
    floors = Floors(start=lsn(900), restored_redo=lsn(500))
    for redo in (1000, 1100, 1200, 1300):
        floors.bundle_stored(lsn(redo))
    floors.advance(lsn(5000), lsn(0))
    assert (floors.pgmrpl, floors.read_point) == (lsn(0), lsn(1200))
    floors.advance(lsn(5000), lsn(1050))
    assert floors.pgmrpl == lsn(1050)
    floors.advance(lsn(5000), lsn(700))  # one that came late: what is gone is gone
    assert floors.pgmrpl == lsn(1050)
    floors.advance(lsn(5000), lsn(4000))
    assert floors.pgmrpl == lsn(1100)


def test_a_reader_that_does_not_know_yet_holds_everything() -> None:
    floors = Floors(start=lsn(900), restored_redo=lsn(500))
    floors.advance(lsn(5000), Lsn(0))
    assert floors.pgmrpl == 0


_behind = st.one_of(st.none(), st.integers(-500, 100))


@given(st.lists(st.tuples(st.integers(0, 300), _behind, _behind)))
def test_floors_only_grow_and_pass_nothing_that_may_be_wanted(
    steps: list[tuple[int, int | None, int | None]],
) -> None:
    floors = Floors(start=lsn(600), restored_redo=lsn(500))
    redos, durable = [500], 600
    for written, behind, reader_behind in steps:
        before = (floors.pgmrpl, floors.read_point)
        durable += written
        if written > 100:
            redos.append(durable - 50)
            floors.bundle_stored(lsn(redos[-1]))
        held = None if behind is None else lsn(durable + min(behind, 0))
        readers = None if reader_behind is None else lsn(durable + min(reader_behind, 0))
        floors.advance(held, readers)
        assert (floors.pgmrpl, floors.read_point) >= before
        assert floors.pgmrpl <= min(map(lsn, redos[-KEPT_BUNDLES:]))
        assert floors.pgmrpl <= floors.read_point <= lsn(durable)
        if floors.pgmrpl > before[0]:
            assert held is not None
            assert floors.pgmrpl <= held
            assert readers is None or floors.pgmrpl <= readers
