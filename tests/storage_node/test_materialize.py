"""Goal: a page that storage materializes is PostgreSQL's own: every page, at several LSNs.

Method: a stock PostgreSQL runs a workload over all kinds of relations, without full-page writes.
Its WAL goes into a real log and is indexed once, as a whole. At each LSN where files were copied
every page of every file is compared, byte for byte under PostgreSQL's own masks; the earlier LSNs
are read from an index that knows all that came after.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from boreal.errors import CorruptData, CorruptWal, NotMaterializable
from boreal.pages.layout import PageHeader, is_zero, page_lsn
from boreal.pages.masks import PageKind, mask_page
from boreal.types import PAGE_BYTES, BlockNumber, Fork, Lsn, PageKey, RelationFork
from storage_node.entries import Kind, kind_of, start_of
from storage_node.index import IndexView
from storage_node.page_store import PageStore
from tests.storage_node.page_volume_kit import (
    WAIT_S,
    Indexed,
    append,
    fill_store,
    make_segment,
    running,
    storage_config,
)
from tests.storage_node.recorded_run import RecordedRun, Relation, Snapshot, page_keys

_PACKED = "postgres.dup_packed"
"""Its first pages were logged as compressed images, which storage does not take."""
_GIST_BUILD_LSN = 1
_SEQUENCE_COUNTS = slice(8160, 8177)
"""last_value, log_cnt and is_called: the WAL runs up to 32 values ahead of the page."""
_SPGIST_CACHE = slice(28, 92)
"""SpGistLUPCache on the meta page: hints that are never logged."""


@pytest.fixture(scope="module")
def indexed(
    recorded_run: RecordedRun, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Indexed]:
    directory = tmp_path_factory.mktemp("indexed")
    segment = make_segment(storage_config(directory), recorded_run)
    append(segment, recorded_run, recorded_run.end)
    parts = Indexed(segment, fill_store(segment.layout.pages, recorded_run))
    yield parts
    parts.close()


@pytest.fixture
async def indexed_through(indexed: Indexed, recorded_run: RecordedRun) -> Indexed:
    async with running(indexed) as ingest:
        await ingest.wait_for(recorded_run.snapshots[-1].lsn, WAIT_S)
    return indexed


def _kind(fork: RelationFork, relation: Relation | None) -> PageKind | None:
    if fork.fork is Fork.VM:
        return PageKind.VISIBILITY_MAP
    return None if relation is None else relation.kind


def _gist_split(page: bytes) -> tuple[int, int, int]:
    """NSN and F_FOLLOW_RIGHT. The masks blank them: an image has them as they were before."""
    high, low, _, flags = struct.unpack_from("<IIIH", page, PageHeader.of(page).special)
    return high, low, flags & 8


def _difference(
    page: PageKey, ours: bytes, theirs: bytes, kind: PageKind | None, *, map_may_lack_bits: bool
) -> str | None:
    """What is wrong with our page, if anything."""
    if ours == theirs:
        return None
    fork = page.relation.fork
    if fork is not Fork.VM and page_lsn(ours) != page_lsn(theirs) != _GIST_BUILD_LSN:
        return f"LSN {page_lsn(ours):X} instead of {page_lsn(theirs):X}"
    if kind is None:
        return "differs in a database nobody connected to"
    if kind is PageKind.GIST and _gist_split(ours) != _gist_split(theirs):
        return f"split state {_gist_split(ours)} instead of {_gist_split(theirs)}"
    mine, wanted = bytearray(ours), bytearray(theirs)
    for copy in (mine, wanted):
        mask_page(copy, kind, page.block)
        if kind is PageKind.SEQUENCE:
            copy[_SEQUENCE_COUNTS] = bytes(17)
        if kind is PageKind.SPGIST and page.block == 0:
            copy[_SPGIST_CACHE] = bytes(64)
    if map_may_lack_bits and not any(a & ~b for a, b in zip(mine, wanted, strict=True)):
        return None
    at = [n for n in range(PAGE_BYTES) if mine[n] != wanted[n]]
    return f"differs at {at[:10]}" if at else None


def _differences(indexed: Indexed, view: IndexView, snapshot: Snapshot) -> Iterator[str]:
    relations = view.relations(snapshot.lsn)
    kept = {fork for fork in snapshot.files if fork.fork is not Fork.FSM}
    yield from (f"{fork} is only in storage" for fork in set(relations) - kept)
    for fork in sorted(kept):
        relation = snapshot.catalog.get((fork.tablespace, fork.database, fork.relation))
        if relation is not None and relation.unlogged and fork.fork is not Fork.INIT:
            continue
        name = f"{fork} ({relation.name if relation else 'unknown'})"
        content = snapshot.files[fork]
        size = relations.get(fork)
        if size is None or size * PAGE_BYTES > len(content):
            yield f"{name} has {size} blocks in storage, not {len(content) // PAGE_BYTES}"
            continue
        # CREATE DATABASE logs map pages as if they had the standard layout, which loses the bits:
        # stock PostgreSQL's own redo makes an empty map of it, too.
        lacks_bits = relation is not None and relation.name.startswith("logged.")
        for page, theirs in page_keys(fork, content):
            try:
                ours = indexed.materializer.page(view, page, snapshot.lsn)
            except NotMaterializable:
                if relation is None or relation.name != _PACKED:
                    yield f"{name} block {page.block} cannot be materialized"
                continue
            if ours is None:
                if not is_zero(theirs):
                    yield f"{name} lacks block {page.block}"
                continue
            kind = _kind(fork, relation)
            wrong = _difference(
                page, ours, theirs, kind, map_may_lack_bits=lacks_bits and fork.fork is Fork.VM
            )
            if wrong is not None:
                yield f"{name} block {page.block}: {wrong}"


@pytest.mark.parametrize("number", range(4))
async def test_every_page_is_postgresqls_own(
    indexed_through: Indexed, recorded_run: RecordedRun, number: int
) -> None:
    with indexed_through.index.view() as view:
        found = list(_differences(indexed_through, view, recorded_run.snapshots[number]))
    assert found == []


async def test_the_run_exercises_what_it_should(
    indexed_through: Indexed, recorded_run: RecordedRun
) -> None:
    """An oracle that never met a truncation or a map clear proves nothing about them."""
    kinds: set[Kind] = set()
    listed: list[set[RelationFork]] = []
    with indexed_through.index.view() as view:
        for snapshot in recorded_run.snapshots:
            listed.append(set(view.relations(snapshot.lsn)))
            for fork in listed[-1]:
                for block in (BlockNumber(0), BlockNumber(1)):
                    entries = view.entries(PageKey(fork, block), 0, snapshot.lsn)
                    kinds |= {kind_of(entry) for entry in entries}
    assert kinds >= {Kind.BASE, Kind.CHANGE, Kind.UNKNOWN, Kind.MAP_CLEAR, Kind.MAP_CUT}
    for earlier, later in itertools.pairwise(listed):
        assert later - earlier, "no relation was made"
    assert listed[0] - listed[1], "no relation was dropped"
    assert listed[2] - listed[3], "no database was dropped"


async def test_a_page_nobody_can_redo_is_refused(
    indexed_through: Indexed, recorded_run: RecordedRun
) -> None:
    last = recorded_run.snapshots[-1]
    (fork,) = [
        RelationFork(*key, Fork.MAIN)
        for key, relation in last.catalog.items()
        if relation.name == _PACKED
    ]
    with indexed_through.index.view() as view, pytest.raises(NotMaterializable):
        indexed_through.materializer.page(view, PageKey(fork, BlockNumber(1)), last.lsn)


async def test_a_block_past_the_end_does_not_exist(
    indexed_through: Indexed, recorded_run: RecordedRun
) -> None:
    last = recorded_run.snapshots[-1]
    with indexed_through.index.view() as view:
        fork, blocks = next(iter(view.relations(last.lsn).items()))
        past = PageKey(fork, BlockNumber(blocks))
        nowhere = PageKey(fork._replace(relation=4_000_000), BlockNumber(0))
        assert indexed_through.materializer.page(view, past, last.lsn) is None
        assert indexed_through.materializer.page(view, nowhere, last.lsn) is None


async def test_a_flipped_bit_in_the_log_is_never_served(
    recorded_run: RecordedRun, tmp_path: Path
) -> None:
    segment = make_segment(storage_config(tmp_path), recorded_run)
    lsn = recorded_run.snapshots[0].lsn
    append(segment, recorded_run, lsn)
    parts = Indexed(segment, fill_store(segment.layout.pages, recorded_run))
    async with running(parts) as ingest:
        await ingest.wait_for(lsn, WAIT_S)
    with parts.index.view() as view:
        fork = next(
            RelationFork(*key, Fork.MAIN)
            for key, relation in recorded_run.snapshots[0].catalog.items()
            if relation.name == "postgres.dup"
        )
        page = PageKey(fork, BlockNumber(0))
        entry = view.entries(page, 0, lsn)[-1]
        _flip_log_byte(segment.layout.log, recorded_run, Lsn(start_of(entry) + 60))
        segment.reader._forget(segment.shared.generation)  # what it has in memory was sound
        with pytest.raises(CorruptWal):
            parts.materializer.page(view, page, lsn)
    parts.close()


def _flip_log_byte(directory: Path, run: RecordedRun, lsn: Lsn) -> None:
    files = sorted(path for path in directory.iterdir() if len(path.name) == 24)
    number, offset = divmod(lsn - run.wal_start, 16 << 20)
    with files[number].open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


async def test_a_flipped_bit_in_an_imported_page_is_never_served(
    recorded_run: RecordedRun, tmp_path: Path
) -> None:
    store = fill_store(tmp_path, recorded_run)
    fork, content = max(recorded_run.imported.items(), key=lambda item: len(item[1]))
    page = PageKey(fork, BlockNumber(3))
    expected = content[3 * PAGE_BYTES : 4 * PAGE_BYTES]
    assert store.page(page) == expected
    store.close()
    data = tmp_path / "imports" / "data.mdb"
    raw = bytearray(data.read_bytes())
    at = raw.index(expected[-600:-500]) + 50
    raw[at] ^= 1
    data.write_bytes(raw)
    reopened = PageStore(tmp_path)
    with pytest.raises(CorruptData):
        reopened.page(page)
    assert reopened.page(PageKey(fork, BlockNumber(4))) == content[4 * PAGE_BYTES : 5 * PAGE_BYTES]
    reopened.close()
