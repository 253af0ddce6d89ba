"""Goal: the index answers for every LSN it ever covered, and is thrown away when not to be trusted.

Method: entries written by hand into a real LMDB environment; no WAL.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from boreal.types import BlockNumber, Fork, Lsn, PageKey, RelationFork
from storage_node.index import Entry, Ground, Imported, Kind, PageIndex

HEAP = RelationFork(1663, 5, 100, Fork.MAIN)
MAP = RelationFork(1663, 5, 100, Fork.VM)
OTHER = RelationFork(1663, 6, 200, Fork.MAIN)
IMPORTED = Imported(lsn=Lsn(1000), forks=((HEAP, 3), (OTHER, 0)))
BOOT = "0b6f6a3a-2f5c-4f0e-8a5c-4f4c0a7f2a11"


def _page(fork: RelationFork, block: int) -> PageKey:
    return PageKey(fork, BlockNumber(block))


@pytest.fixture
def index(tmp_path: Path) -> Iterator[PageIndex]:
    opened = PageIndex.open(tmp_path / "index", IMPORTED, BOOT)
    yield opened
    opened.close()


def _size(index: PageIndex, fork: RelationFork, lsn: int) -> int | None:
    with index.view() as view:
        return view.size(fork, Lsn(lsn))


def _ground(index: PageIndex, page: PageKey, lsn: int) -> Ground:
    with index.view() as view:
        return view.ground(page, Lsn(lsn))


def test_a_new_index_knows_the_import(index: PageIndex) -> None:
    assert index.indexed == 1000
    assert _size(index, HEAP, 1000) == 3
    assert _size(index, OTHER, 9999) == 0
    assert _size(index, MAP, 9999) is None
    assert _ground(index, _page(HEAP, 1), 5000) == Ground(Lsn(1000), imported=True)


def test_history_is_of_one_page_newest_first(index: PageIndex) -> None:
    with index.batch() as batch:
        for end in (1100, 1300, 1200):
            batch.touch(_page(HEAP, 1), Lsn(end - 50), Lsn(end), Kind.CHANGE)
        batch.touch(_page(HEAP, 0), Lsn(1350), Lsn(1400), Kind.BASE)
        batch.touch(_page(HEAP, 2), Lsn(1010), Lsn(1020), Kind.BASE, b"payload")
        batch.indexed = Lsn(1400)
    with index.view() as view:
        ends = [entry.end for entry in view.history(_page(HEAP, 1), Lsn(0), Lsn(9999))]
        assert ends == [1300, 1200, 1100]
        ends = [entry.end for entry in view.history(_page(HEAP, 1), Lsn(1100), Lsn(1299))]
        assert ends == [1200]
        (only,) = view.history(_page(HEAP, 2), Lsn(0), Lsn(9999))
        assert only == Entry(Lsn(1020), Lsn(1010), Kind.BASE, b"payload")
        assert list(view.history(_page(OTHER, 0), Lsn(0), Lsn(9999))) == []


def test_sizes_have_versions(index: PageIndex) -> None:
    with index.batch() as batch:
        batch.resize(HEAP, Lsn(1100), 9)
        batch.resize(HEAP, Lsn(1200), 2)
        batch.resize(HEAP, Lsn(1300), None)
        batch.resize(HEAP, Lsn(1400), 1)
    sizes = [_size(index, HEAP, lsn) for lsn in (1099, 1100, 1199, 1200, 1300, 1399, 1400)]
    assert sizes == [3, 9, 9, 2, None, None, 1]


def test_a_cut_voids_only_what_lay_past_it(index: PageIndex) -> None:
    with index.batch() as batch:
        batch.cut(HEAP, Lsn(1200), 2)
        batch.cut(HEAP, Lsn(1500), 7)
    assert _ground(index, _page(HEAP, 1), 9999).imported
    assert _ground(index, _page(HEAP, 2), 1199).imported
    assert _ground(index, _page(HEAP, 2), 9999) == Ground(Lsn(1200))
    assert _ground(index, _page(HEAP, 7), 9999) == Ground(Lsn(1500))
    assert _ground(index, _page(MAP, 7), 9999).imported


def test_a_copied_database_shows_its_source_as_it_was(index: PageIndex) -> None:
    copy, second = OTHER._replace(database=7), OTHER._replace(database=8)
    with index.batch() as batch:
        batch.resize(OTHER, Lsn(1100), 4)
        batch.copy_database((1663, 6), 1663, 7, Lsn(1200))
        batch.resize(OTHER, Lsn(1300), 5)
        batch.resize(copy, Lsn(1400), 6)
        batch.copy_database((1663, 7), 1663, 8, Lsn(1500))
        batch.drop_database(1663, 7, Lsn(1600))
    assert [_size(index, copy, lsn) for lsn in (1199, 1200, 1399, 1400, 1600)] == [
        None,
        4,
        4,
        6,
        None,
    ]
    assert _size(index, second, 9999) == 6
    assert _ground(index, _page(copy, 1), 1400) == Ground(Lsn(1200), source=_page(OTHER, 1))
    assert _ground(index, _page(second, 1), 9999) == Ground(Lsn(1500), source=_page(copy, 1))
    assert _ground(index, _page(copy, 1), 1600) == Ground(Lsn(1600))
    with index.view() as view:
        assert view.relations(Lsn(1250)) == {HEAP: 3, OTHER: 4, copy: 4}
        assert view.relations(Lsn(9999)) == {HEAP: 3, OTHER: 5, second: 6}


def test_a_relation_dropped_from_a_copy_stays_in_the_source(index: PageIndex) -> None:
    copy = OTHER._replace(database=7)
    with index.batch() as batch:
        batch.copy_database((1663, 6), 1663, 7, Lsn(1200))
        batch.resize(copy, Lsn(1300), None)
    with index.view() as view:
        assert view.relations(Lsn(1300)) == {HEAP: 3, OTHER: 0}


def test_what_is_committed_is_there_after_reopening(tmp_path: Path) -> None:
    index = PageIndex.open(tmp_path / "index", IMPORTED, BOOT)
    with index.batch() as batch:
        batch.resize(HEAP, Lsn(1100), 9)
        batch.indexed = Lsn(1100)
    with suppress(KeyError), index.batch() as batch:
        batch.resize(HEAP, Lsn(1200), 10)
        batch.indexed = Lsn(1200)
        raise KeyError
    assert index.indexed == 1100
    index.close()
    index = PageIndex.open(tmp_path / "index", IMPORTED, BOOT)
    assert index.indexed == 1100
    assert _size(index, HEAP, 1200) == 9
    index.close()


@pytest.mark.parametrize("change", ["boot", "import", "garbage"])
def test_an_index_not_to_be_trusted_begins_anew(tmp_path: Path, change: str) -> None:
    path = tmp_path / "index"
    index = PageIndex.open(path, IMPORTED, BOOT)
    with index.batch() as batch:
        batch.resize(HEAP, Lsn(1100), 9)
        batch.indexed = Lsn(1100)
    index.close()
    imported, boot = IMPORTED, BOOT
    if change == "boot":
        boot = "1" + BOOT[1:]
    elif change == "import":
        imported = Imported(lsn=Lsn(1001), forks=IMPORTED.forks)
    else:
        (path / "data.mdb").write_bytes(b"nonsense" * 4096)
    index = PageIndex.open(path, imported, boot)
    assert index.indexed == imported.lsn
    assert _size(index, HEAP, 9999) == 3
    index.close()
