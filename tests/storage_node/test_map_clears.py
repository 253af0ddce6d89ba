"""Goal: visibility bits cleared from memory are those that the log says were cleared.

Method: runs of entries against the page as PostgreSQL's rules leave it; then an index of a real
run, each map page of which is made with and without what is in memory, at every one of its entries.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from boreal.pages import visibility
from boreal.pages.visibility import ALL_FROZEN, HEAP_BLOCKS_PER_PAGE, VALID_BITS
from boreal.types import PAGE_BYTES, BlockNumber, Fork, Lsn, PageKey
from storage_node.entries import Kind, start_of
from storage_node.index import IndexView
from storage_node.map_clears import MapClears
from tests.storage_node.page_volume_kit import (
    WAIT_S,
    Indexed,
    append,
    fill_store,
    make_segment,
    running,
    storage_config,
)
from tests.storage_node.recorded_run import RecordedRun

_FULL = b"\xff" * PAGE_BYTES


def _cleared(*pairs: tuple[int, int]) -> bytes:
    page = bytearray(_FULL)
    for heap_block, bits in pairs:
        visibility.clear(page, heap_block, bits)
    return bytes(page)


def _entries(*starts: int) -> list[int]:
    return [start | Kind.MAP_CLEAR for start in starts]


def _known(*items: tuple[int, int, int]) -> MapClears:
    clears = MapClears()
    for start, heap_block, bits in items:
        clears.note(start, heap_block, bits)
    return clears


def test_a_run_of_records_is_applied_at_once() -> None:
    block = 3 * HEAP_BLOCKS_PER_PAGE + 17
    clears = _known((8, block, VALID_BITS), (16, 5, ALL_FROZEN), (16, 6, VALID_BITS), (24, 9, 3))
    page = bytearray(_FULL)
    assert clears.apply(page, _entries(8, 16, 24), 0, 2) == 2
    assert page == _cleared((17, VALID_BITS), (5, ALL_FROZEN), (6, VALID_BITS))
    page = bytearray(_FULL)
    assert clears.apply(page, _entries(8, 16, 24), 1, 3) == 3
    assert page == _cleared((5, ALL_FROZEN), (6, VALID_BITS), (9, VALID_BITS))


@pytest.mark.parametrize("stranger", [12 * 8 | Kind.MAP_CLEAR, 16 | Kind.CHANGE, 16 | Kind.MAP_CUT])
def test_it_stops_at_what_is_not_its_own(stranger: int) -> None:
    clears = _known((8, 1, 3), (16, 2, 3), (104, 3, 3))
    entries = [*_entries(8), stranger, *_entries(104)]
    page = bytearray(_FULL)
    assert clears.apply(page, entries, 0, 3) == 1
    assert page == _cleared((1, VALID_BITS))
    assert clears.apply(page, entries, 1, 3) == 1
    assert clears.apply(page, entries, 3, 3) == 3
    assert MapClears().apply(page, entries, 0, 3) == 0


def _made(parts: Indexed, view: IndexView, page: PageKey, lsn: int, *, noted: bool) -> bytes:
    path = parts.materializer.path(view, page, Lsn(lsn), cached=False)
    if not noted:
        path.clears = ()
    while not path.complete:
        parts.materializer.walk(path, 7)
    return path.content


async def test_map_pages_are_the_same_from_memory_and_from_the_log(
    recorded_run: RecordedRun, tmp_path: Path
) -> None:
    segment = make_segment(storage_config(tmp_path), recorded_run)
    end = recorded_run.snapshots[-1].lsn
    append(segment, recorded_run, end)
    parts = Indexed(segment, fill_store(segment.layout.pages, recorded_run))
    async with running(parts) as ingest:
        await ingest.wait_for(end, WAIT_S)
    noted = compared = 0
    with parts.index.view() as view:
        for fork, blocks in view.relations(view.indexed).items():
            if fork.fork is not Fork.VM:
                continue
            for block in range(blocks):
                page = PageKey(fork, BlockNumber(block))
                noted += bool(view.clears(page))
                for entry in view.entries(page, 0, view.indexed)[-40:]:
                    # As of the middle of a record, and as of where the next may begin.
                    for lsn in (start_of(entry) + 8, start_of(entry) + 160):
                        if lsn <= view.indexed:
                            expected = _made(parts, view, page, lsn, noted=False)
                            assert _made(parts, view, page, lsn, noted=True) == expected
                            compared += 1
    parts.close()
    assert noted > 2
    assert compared > 100
