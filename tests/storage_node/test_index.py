"""Goal: the index answers for every LSN it covers, from memory and from disk alike, and what is
damaged is made again from the log or refused, never believed.

Method: entries and facts written by hand into a real index; no WAL. Each history is looked at
three times: in the open layer, frozen, and sealed and opened again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from boreal.errors import CorruptData
from boreal.types import BlockNumber, Fork, Lsn, PageKey, RelationFork
from storage_node.entries import Kind, kind_of, page_key, page_of, page_of_key, raw_key, start_of
from storage_node.facts import Ground
from storage_node.index import IndexView, PageIndex
from storage_node.layer import LAYER_PAGES, OpenLayer
from storage_node.layer_file import LayerImage, SealedLayer
from storage_node.page_store import Imported

HEAP = RelationFork(1663, 5, 100, Fork.MAIN)
MAP = RelationFork(1663, 5, 100, Fork.VM)
OTHER = RelationFork(1663, 6, 200, Fork.MAIN)
IMPORTED = Imported(lsn=Lsn(1000), forks=((HEAP, 3), (OTHER, 0)))


def _page(fork: RelationFork, block: int) -> PageKey:
    return PageKey(fork, BlockNumber(block))


def _open(path: Path, *, imported: Imported = IMPORTED, log_start: int = 0) -> PageIndex:
    return PageIndex.open(path, imported, log_start=Lsn(log_start))


async def _seal(index: PageIndex) -> None:
    index.freeze()
    assert index.frozen is not None
    image = LayerImage(index.frozen)
    for _ in image.steps():
        pass
    await index.seal(image)


class Stages:
    """One history in its three places."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = _open(path)
        self.now = ""

    async def each(self) -> AsyncIterator[IndexView]:
        with self.view("open") as view:
            yield view
        self.index.freeze()
        with self.view("frozen") as view:
            yield view
        assert self.index.frozen is not None
        image = LayerImage(self.index.frozen)
        for _ in image.steps():
            pass
        await self.index.seal(image)
        with self.view("sealed") as view:
            yield view
        self.index.close()
        self.index = _open(self.path)
        with self.view("opened again") as view:
            yield view

    @contextmanager
    def view(self, now: str) -> Iterator[IndexView]:
        self.now = now
        with self.index.view() as view:
            yield view


@pytest.fixture
def stages(tmp_path: Path) -> Iterator[Stages]:
    made = Stages(tmp_path / "index")
    yield made
    made.index.close()


def test_a_new_index_knows_the_import(stages: Stages) -> None:
    index = stages.index
    assert index.indexed == index.sealed_to == index.retired == index.lowest == 1000
    with index.view() as view:
        assert view.size(HEAP, 1000) == 3
        assert view.size(OTHER, 9999) == 0
        assert view.size(MAP, 9999) is None
        assert view.ground(_page(HEAP, 1), 5000) == Ground(Lsn(1000), imported=True)


async def test_entries_are_of_one_page_ascending(stages: Stages) -> None:
    layer = stages.index.layer
    for start in (1104, 1200, 1304):
        layer.touch(_page(HEAP, 1), start, Kind.CHANGE)
    layer.touch(_page(HEAP, 0), 1352, Kind.BASE)
    layer.touch(_page(MAP, 1), 1360, Kind.MAP_CLEAR)
    layer.end = Lsn(1400)
    async for view in stages.each():
        entries = view.entries(_page(HEAP, 1), 0, 9999)
        assert [(start_of(entry), kind_of(entry)) for entry in entries] == [
            (1104, Kind.CHANGE),
            (1200, Kind.CHANGE),
            (1304, Kind.CHANGE),
        ]
        assert view.entries(_page(HEAP, 1), 1200, 1304) == [1200]
        (only,) = view.entries(_page(HEAP, 0), 0, 9999)
        assert (start_of(only), kind_of(only)) == (1352, Kind.BASE)
        (only,) = view.entries(_page(MAP, 1), 0, 9999)
        assert (start_of(only), kind_of(only)) == (1360, Kind.MAP_CLEAR)
        assert view.entries(_page(MAP, 0), 0, 9999) == []
        assert view.entries(_page(OTHER, 1), 0, 9999) == []
        assert view.indexed == 1400, stages.now


async def test_entries_come_from_all_layers(stages: Stages) -> None:
    index = stages.index
    for start in (1104, 1200, 1304):
        index.layer.touch(_page(HEAP, 1), start, Kind.CHANGE)
        index.layer.end = Lsn(start + 40)
        if start < 1300:
            await _seal(index)
    index.freeze()
    index.layer.touch(_page(HEAP, 1), 1400, Kind.BASE)
    with index.view() as view:
        assert view.entries(_page(HEAP, 1), 0, 9999) == [1104, 1200, 1304, 1400 | Kind.BASE]
        assert view.entries(_page(HEAP, 1), 1200, 1400) == [1200, 1304]


async def test_sizes_have_versions(stages: Stages) -> None:
    layer = stages.index.layer
    layer.reach(_page(HEAP, 8), 1100)
    layer.cut(HEAP, 1200, 2)
    layer.drop(HEAP, 1300)
    layer.create(HEAP, 1400)
    layer.end = Lsn(1400)
    async for view in stages.each():
        lsns = (1099, 1100, 1199, 1200, 1300, 1399, 1400)
        assert [view.size(HEAP, lsn) for lsn in lsns] == [3, 9, 9, 2, None, None, 0]


async def test_a_cut_voids_only_what_lay_past_it(stages: Stages) -> None:
    layer = stages.index.layer
    layer.cut(HEAP, 1200, 2)
    layer.reach(_page(HEAP, 9), 1400)
    layer.cut(HEAP, 1500, 7)
    layer.end = Lsn(1500)
    async for view in stages.each():
        assert view.ground(_page(HEAP, 1), 9999).imported
        assert view.ground(_page(HEAP, 2), 1199).imported
        assert view.ground(_page(HEAP, 2), 9999) == Ground(Lsn(1200))
        assert view.ground(_page(HEAP, 7), 9999) == Ground(Lsn(1500))
        assert view.ground(_page(MAP, 7), 9999).imported


def test_a_page_cut_off_makes_its_fork_grow_again(stages: Stages) -> None:
    """Sizes are only looked at when a page is new in the layer."""
    layer = stages.index.layer
    raw = raw_key(_page(HEAP, 7))
    layer.pages[raw] = [1104]
    layer.first(raw, 1150)
    layer.cut(HEAP, 1200, 4)
    assert raw not in layer.pages
    layer.pages[raw] = [1304]
    layer.first(raw, 1350)
    layer.end = Lsn(1350)
    with stages.index.view() as view:
        assert [view.size(HEAP, lsn) for lsn in (1150, 1200, 1350)] == [8, 4, 8]
        assert view.entries(_page(HEAP, 7), 0, 9999) == [1104, 1304]


def _copied(layer: OpenLayer, copy: RelationFork) -> None:
    layer.reach(_page(OTHER, 3), 1100)
    layer.copy_database((1663, 6), 1663, 7, 1200)
    layer.reach(_page(OTHER, 4), 1300)
    layer.reach(_page(copy, 5), 1400)
    layer.copy_database((1663, 7), 1663, 8, 1500)
    layer.drop_database(1663, 7, 1600)
    layer.end = Lsn(1600)


async def test_a_copied_database_shows_its_source_as_it_was(stages: Stages) -> None:
    copy, second = OTHER._replace(database=7), OTHER._replace(database=8)
    _copied(stages.index.layer, copy)
    async for view in stages.each():
        sizes = [view.size(copy, lsn) for lsn in (1199, 1200, 1399, 1400, 1600)]
        assert sizes == [None, 4, 4, 6, None]
        assert view.size(second, 9999) == 6
        assert view.ground(_page(copy, 1), 1400) == Ground(Lsn(1200), source=_page(OTHER, 1))
        assert view.ground(_page(second, 1), 9999) == Ground(Lsn(1500), source=_page(copy, 1))
        assert view.ground(_page(copy, 1), 1600) == Ground(Lsn(1600))
        assert view.relations(1250) == {HEAP: 3, OTHER: 4, copy: 4}
        assert view.relations(9999) == {HEAP: 3, OTHER: 5, second: 6}
        assert [(lsn, made[1]) for lsn, _, made in view.facts.copies(9999)] == [
            (1200, 7),
            (1500, 8),
        ]


async def test_a_relation_dropped_from_a_copy_stays_in_the_source(stages: Stages) -> None:
    copy = OTHER._replace(database=7)
    layer = stages.index.layer
    layer.copy_database((1663, 6), 1663, 7, 1200)
    layer.drop(copy, 1300)
    layer.end = Lsn(1300)
    async for view in stages.each():
        assert view.relations(1300) == {HEAP: 3, OTHER: 0}


async def test_what_lies_past_the_layers_end_can_be_taken_out(stages: Stages) -> None:
    """Indexing was interrupted in the middle of a record; it is indexed again."""
    layer = stages.index.layer
    layer.touch(_page(HEAP, 1), 1104, Kind.CHANGE)
    layer.reach(_page(HEAP, 4), 1150)
    layer.end = Lsn(1150)
    for _ in range(2):
        layer.touch(_page(HEAP, 1), 1152, Kind.CHANGE)
        layer.touch(_page(HEAP, 2), 1152, Kind.BASE)
        layer.reach(_page(HEAP, 9), 1200)
        layer.cut(HEAP, 1200, 1)
        layer.cut_back()
        with stages.index.view() as view:
            assert view.entries(_page(HEAP, 1), 0, 9999) == [1104]
            assert view.entries(_page(HEAP, 2), 0, 9999) == []
            assert view.size(HEAP, 9999) == 5
            assert view.ground(_page(HEAP, 2), 9999).imported
    async for view in stages.each():
        assert view.entries(_page(HEAP, 1), 0, 9999) == [1104]
        assert view.size(HEAP, 9999) == 5


def test_keys_are_one_to_one() -> None:
    for fork in (HEAP, MAP, HEAP._replace(fork=Fork.INIT), RelationFork(1664, 0, 1262, Fork.MAIN)):
        for block in (0, 1, 255, 256, 70_000, 0xFFFFFFFE):
            page = _page(fork, block)
            assert page_of(raw_key(page)) == page
            assert page_of_key(page_key(page)) == page
    assert page_key(_page(HEAP, 1)) < page_key(_page(HEAP, 256)) < page_key(_page(MAP, 0))


# --- layers --------------------------------------------------------------------------------------


def _large_layer(index: PageIndex, pages: int) -> dict[PageKey, list[int]]:
    expected: dict[PageKey, list[int]] = {}
    for number in range(pages):
        page = _page((HEAP, MAP, OTHER)[number % 3], number * 7919 % 1_000_003)
        for start in range(1104 + 8 * number, 1104 + 8 * number + 8 * (number % 5 + 1), 8):
            index.layer.touch(page, start, Kind.CHANGE)
            expected.setdefault(page, []).append(start)
    index.layer.end = Lsn(1104 + 8 * pages + 64)
    return expected


async def test_a_large_layer_gives_back_every_page(tmp_path: Path) -> None:
    index = _open(tmp_path / "index")
    expected = _large_layer(index, 5000)
    await _seal(index)
    with index.view() as view:
        assert {page: view.entries(page, 0, 1 << 40) for page in expected} == expected
        assert not any(view.entries(_page(HEAP, n), 0, 1 << 40) for n in range(1, 500))
    (layer,) = index.layers
    assert layer.pages == 5000
    keys = [key for key, _ in layer.all()]
    assert keys == sorted(page_key(page) for page in expected)
    counts = {page_of_key(key): count for key, count in layer.counts()}
    assert counts == {page: len(entries) for page, entries in expected.items()}
    index.close()


def test_a_layer_is_full_at_so_many_pages(tmp_path: Path) -> None:
    index = _open(tmp_path / "index")
    for block in range(LAYER_PAGES - 1):
        index.layer.pages[raw_key(_page(HEAP, block))] = [1104]
    assert not index.layer.full
    index.layer.pages[raw_key(_page(HEAP, LAYER_PAGES))] = [1104]
    assert index.layer.full
    index.close()


async def _two_layers(path: Path) -> list[Path]:
    index = _open(path)
    for start in (1104, 1200):
        index.layer.touch(_page(HEAP, 1), start, Kind.CHANGE)
        index.layer.reach(_page(HEAP, start // 100), start + 40)
        index.layer.end = Lsn(start + 40)
        await _seal(index)
    paths = [layer.path for layer in index.layers]
    index.close()
    return paths


async def test_every_damaged_byte_of_a_layer_is_noticed(tmp_path: Path) -> None:
    path, _ = await _two_layers(tmp_path / "index")
    sound = path.read_bytes()
    for at in range(len(sound)):
        damaged = bytearray(sound)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(CorruptData):
            SealedLayer(path)
    for length in range(len(sound)):
        path.write_bytes(sound[:length])
        with pytest.raises(CorruptData):
            SealedLayer(path)


async def test_a_damaged_layer_and_what_follows_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "index"
    first, second = await _two_layers(path)
    second.write_bytes(second.read_bytes()[:-1])
    index = _open(path)
    assert (index.indexed, len(index.layers)) == (1144, 1)
    assert not second.exists()
    index.close()
    first.unlink()
    index = _open(path)
    assert (index.indexed, len(index.layers)) == (1000, 0)
    with index.view() as view:
        assert view.size(HEAP, 1100) == 3
    index.close()


async def test_a_damaged_layer_whose_log_is_gone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "index"
    first, _ = await _two_layers(path)
    first.write_bytes(b"nonsense")
    with pytest.raises(CorruptData):
        _open(path, log_start=1001)


async def test_a_layer_that_was_not_committed_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "index"
    index = _open(path)
    index.layer.touch(_page(HEAP, 1), 1104, Kind.CHANGE)
    index.layer.end = Lsn(1144)
    index.freeze()
    assert index.frozen is not None
    image = LayerImage(index.frozen)
    for _ in image.steps():
        pass
    stray = image.write(path)
    index.close()
    index = _open(path)
    assert index.indexed == 1000
    assert not stray.exists()
    index.close()


@pytest.mark.parametrize("change", ["import", "garbage"])
async def test_an_index_not_to_be_trusted_begins_anew(tmp_path: Path, change: str) -> None:
    path = tmp_path / "index"
    await _two_layers(path)
    imported = IMPORTED
    if change == "import":
        imported = Imported(lsn=Lsn(1008), forks=IMPORTED.forks)
    else:
        (path / "data.mdb").write_bytes(b"nonsense" * 4096)
    with pytest.raises(CorruptData):
        _open(path, imported=imported, log_start=1016)
    index = _open(path, imported=imported)
    assert index.indexed == imported.lsn
    with index.view() as view:
        assert view.size(HEAP, 9999) == 3
    index.close()
