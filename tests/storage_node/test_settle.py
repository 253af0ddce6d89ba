"""Goal: when the log is quiet, pages get versions, so that reading them takes no redo; and this
work breaks nothing, whenever it is interrupted or killed.

Method: random histories (history.py) in a real log and a real index; quiet is a few milliseconds
here. Every page is compared with the model at every LSN.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from boreal.errors import CorruptData, NotMaterializable
from boreal.types import BlockNumber, Lsn, PageKey
from boreal.wal import BlockRef, WalRecord
from storage_node import turns
from storage_node.entries import PAGE_KEY_BYTES
from storage_node.index import IndexView, PageIndex, Tables
from tests.storage_node.history import History, HistoryRedo, make_history
from tests.storage_node.history_kit import (
    CHAIN_RECORDS,
    append_history,
    differences,
    history_segment,
    history_store,
    history_volume,
    open_history,
    run_or_die,
    settled,
)
from tests.storage_node.page_volume_kit import WAIT_S, Indexed, running

QUIET_S = 0.02


class _Counting(HistoryRedo):
    """Counts the records it applies."""

    applied = 0

    def apply(self, page: bytearray, record: WalRecord, block: BlockRef) -> None:
        self.applied += 1
        super().apply(page, record, block)


@pytest.fixture(scope="module")
def history() -> History:
    return make_history(21, 900 * 1024, states=30)


@pytest.fixture
def parts(tmp_path: Path, history: History) -> Iterator[Indexed]:
    made = _open(tmp_path, history)
    yield made
    made.close()


def _open(directory: Path, history: History, end: Lsn | None = None) -> Indexed:
    return history_volume(directory, history, _Counting(), end=end, quiet_s=QUIET_S)


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)


async def _settle(parts: Indexed, lsn: Lsn) -> None:
    async with running(parts) as ingest:
        await ingest.wait_for(lsn, WAIT_S)
        await _until(lambda: parts.compaction.unsettled == 0)


def _behind(view: IndexView, parts: Indexed, page: PageKey) -> int:
    """Records between a page's last version and now; 0 for one that cannot be made."""
    try:
        return parts.materializer.path(view, page, view.indexed, cached=False).length
    except NotMaterializable:
        return 0


def _pages(view: IndexView) -> Iterator[PageKey]:
    for fork, blocks in view.relations(view.indexed).items():
        for block in range(blocks):
            yield PageKey(fork, BlockNumber(block))


def _read_as_stored(parts: Indexed) -> int:
    """Pages of which a run's read takes the stored version, looking no further."""
    found = 0
    with parts.index.view() as view:
        for fork, blocks in view.relations(view.indexed).items():
            versions = view.versions(fork, range(blocks), view.indexed)
            for block, version in enumerate(versions):
                if version is not None and (content := version.intact()) is not None:
                    page = PageKey(fork, BlockNumber(block))
                    assert content == parts.materializer.page(view, page, view.indexed)
                    found += 1
    return found


async def test_reading_what_is_settled_takes_no_redo(parts: Indexed, history: History) -> None:
    await _settle(parts, history.wal.end)
    redo = parts.materializer._redo
    assert isinstance(redo, _Counting)
    redo.applied = 0
    parts.materializer._cache.clear()
    last = parts.index.layers[-1].end
    untouched = 0
    with parts.index.view() as view:
        for page in _pages(view):
            if view.entries(page, last, view.indexed):
                continue  # by the little there is in the open layer
            if view.ground(page, view.indexed).source is not None:
                continue  # retirement is what carries out copies of databases
            untouched += 1
            assert _behind(view, parts, page) == 0, f"{page}"
            try:
                parts.materializer.page(view, page, view.indexed)
            except NotMaterializable:
                continue
    assert untouched > 50
    assert redo.applied == 0
    assert _read_as_stored(parts) > 50
    for state in history.states[::5]:
        assert differences(parts, state) == [], f"at {state.lsn:X}"


async def test_a_damaged_version_is_never_served(parts: Indexed, history: History) -> None:
    """The log that the versions were made from is there still: the page is made from it."""
    await _settle(parts, history.wal.end)
    read = _read_as_stored(parts)

    def flip_bits(transaction: Any, tables: Tables) -> None:
        rows = list(transaction.cursor(tables.versions))
        for key, stored in rows:
            damaged = bytearray(stored)
            damaged[-1] ^= 1
            transaction.put(key, bytes(damaged), db=tables.versions)

    await parts.index.change(flip_bits)
    assert read > 50
    assert _read_as_stored(parts) == 0
    with parts.index.view() as view:
        for fork, blocks in view.relations(view.indexed).items():
            for block in range(blocks):
                page = PageKey(fork, BlockNumber(block))
                with suppress(NotMaterializable, CorruptData):
                    (content,) = parts.materializer.pages(view, fork, [block], view.indexed)
                    assert content == history.states[-1].page(page)


async def test_a_page_is_left_to_the_last_layer_that_tells_of_it(
    parts: Indexed, history: History
) -> None:
    stored: list[bytes] = []
    store = parts.index.store

    async def noting(rows: Any, superseded: Any = (), needless: Any = None) -> None:
        if needless is not None:  # as settling alone calls it
            stored.extend(key for key, _ in rows)
        await store(rows, superseded, needless or ())

    async with running(parts) as ingest:
        await ingest.wait_for(history.wal.end, WAIT_S)
        parts.index.store = noting  # type: ignore[method-assign]
        await _until(lambda: parts.compaction.unsettled == 0)
    assert len({key[:PAGE_KEY_BYTES] for key in stored}) == len(stored) > 50


async def test_the_open_layer_is_settled_once_it_has_grown(tmp_path: Path) -> None:
    history = make_history(22, 50 * 1024, calm=True)
    parts = _open(tmp_path, history)
    parts.index.layer_bytes = 256 * 1024
    await _settle(parts, history.wal.end)
    assert not parts.index.layers
    with parts.index.view() as view:
        assert all(_behind(view, parts, page) == 0 for page in _pages(view))
    assert differences(parts, history.states[-1]) == []
    parts.close()


async def test_it_waits_while_log_comes_and_goes_on_after(tmp_path: Path, history: History) -> None:
    """One state after the other, each as soon as a version was stored for the one before."""
    parts = _open(tmp_path, history, history.states[5].lsn)
    next_write = asyncio.Event()
    write = parts.index._write

    async def telling(work: Callable[[], Any]) -> Any:
        next_write.set()
        return await write(work)

    parts.index._write = telling  # type: ignore[method-assign]
    async with running(parts) as ingest:
        for state in history.states[6:]:
            next_write.clear()
            await _until(lambda: next_write.is_set() or not parts.compaction.unsettled)
            append_history(parts.segment, history, state.lsn)
            ingest.wake()
            await ingest.wait_for(state.lsn, WAIT_S)
        await _until(lambda: parts.compaction.unsettled == 0)
    for state in history.states[::5]:
        assert differences(parts, state) == [], f"at {state.lsn:X}"
    parts.close()


async def test_it_stops_when_log_comes(
    parts: Indexed, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "TURN_S", 0)  # a page each
    settling = parts.compaction._settling
    async with running(parts) as ingest:
        await ingest.wait_for(history.wal.end, WAIT_S)
        await settled(parts)
    settling.settled_to = Lsn(0)  # as after a restart
    await _until(lambda: settling.quiet)
    # Log that comes while its first turn is under way.
    give_way = settling._turns.give_way
    taken = 0

    async def log_comes() -> None:
        nonlocal taken
        taken += 1
        parts.index.layer.end = Lsn(parts.index.layer.end + 8)
        await give_way()

    settling._turns.give_way = log_comes  # type: ignore[method-assign,assignment]
    assert not await settling.run()
    assert taken == 1
    assert not await settling.run()
    assert taken == 1


async def test_bursts_do_not_pile_up_versions(tmp_path: Path) -> None:
    history = make_history(23, 400 * 1024, states=25, calm=True)
    parts = _open(tmp_path, history, history.states[1].lsn)
    parts.index.layer_bytes = 64 * 1024  # counts from 4 KiB on
    entries = 0
    async with running(parts) as ingest:
        for state in history.states[2:]:
            append_history(parts.segment, history, state.lsn)
            ingest.wake()
            await ingest.wait_for(state.lsn, WAIT_S)
            await _until(lambda: parts.compaction.unsettled == 0)
    with parts.index.view() as view:
        pages = list(_pages(view))
        entries = sum(len(view.entries(page, 0, view.indexed)) for page in pages)
    # Half a chain between two versions, and the last of each page.
    assert parts.index.version_count <= entries / (CHAIN_RECORDS // 4) + 2 * len(pages)
    for state in history.states[::10]:
        assert differences(parts, state) == [], f"at {state.lsn:X}"
    parts.close()


class _Killed(BaseException):
    """The process is gone."""


def _die(index: PageIndex, number: int, *, durable: bool) -> Callable[[], bool]:
    """Let write `number` be the last, whether it gets to the disk or not.

    What is returned tells whether it was one of settling.
    """
    write, store = index._write, index.store
    count = 0
    settling = False

    async def noting(rows: Any, superseded: Any = (), needless: Any = None) -> None:
        nonlocal settling
        settling = needless is not None  # as settling alone calls it
        await store(rows, superseded, needless or ())
        settling = False

    async def dying(work: Callable[[], Any]) -> Any:
        nonlocal count
        count += 1
        if count >= number:
            if durable and count == number:
                await write(work)
            raise _Killed
        return await write(work)

    index._write = dying  # type: ignore[method-assign]
    index.store = noting  # type: ignore[method-assign]
    return lambda: settling


@pytest.mark.parametrize("durable", [False, True])
async def test_killed_at_any_write_it_continues(
    tmp_path: Path, durable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run is killed one write later than the one before, until one runs to its end."""
    monkeypatch.setattr("storage_node.settle.VERSIONS_A_COMMIT", 3)
    history = make_history(24, 500 * 1024, states=5)
    segment = history_segment(tmp_path, history)
    append_history(segment, history, history.wal.end)
    history_store(segment, history).close()
    segment.shared.floor = history.states[-3].lsn
    kills = kills_of_settling = 0
    killed = True
    while killed:
        parts = open_history(segment, quiet_s=QUIET_S)
        was_settling = _die(parts.index, 1 + kills, durable=durable)
        killed = await run_or_die(parts, _ended(parts))
        for state in history.states:
            if parts.index.lowest <= state.lsn <= parts.ingest.reached:
                assert differences(parts, state) == [], f"at {state.lsn:X}"
        kills += killed
        kills_of_settling += killed and was_settling()
        parts.index.close()
        parts.store.close()
    assert kills_of_settling > 2
    segment.close()


async def _ended(parts: Indexed) -> None:
    await parts.ingest.wait_for(parts.segment.state.scl, WAIT_S)
    await settled(parts)
    await _until(lambda: parts.compaction.unsettled == 0)
