"""Goal: what the work in the background may not break: bounded chains, nothing dropped that is
still needed, a steady size, and other pages going on when one cannot be made or the disk is full.

Method: random histories (history.py) in a real log and a real index, with a redo or a disk that
fails on purpose. (test_history.py compares every page with the model.)
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from boreal.errors import CorruptData, CorruptWal, NotMaterializable, RedoFailed
from boreal.types import BlockNumber, Lsn, PageKey, RelationFork
from boreal.wal import BlockRef, WalDecoder, WalRecord
from storage_node.entries import fork_of_key, page_key
from storage_node.index import IndexView
from storage_node.versions import Refusal, refusal_row
from tests.storage_node.history import History, HistoryRedo, make_history
from tests.storage_node.history_kit import (
    CHAIN_RECORDS,
    RETAIN_BYTES,
    differences,
    history_volume,
    settled,
)
from tests.storage_node.page_volume_kit import WAIT_S, Indexed, running


@pytest.fixture(scope="module")
def history() -> History:
    return make_history(7, 900 * 1024, states=30)


@pytest.fixture
def parts(tmp_path: Path, history: History) -> Iterator[Indexed]:
    made = history_volume(tmp_path, history)
    yield made
    made.close()


def _pages(history: History) -> Iterator[PageKey]:
    for fork, blocks in history.sizes.items():
        for block in range(blocks):
            yield PageKey(fork, BlockNumber(block))


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def _run(parts: Indexed, history: History) -> None:
    async with running(parts) as ingest:
        await ingest.wait_for(history.wal.end, WAIT_S)
        await settled(parts)


async def test_no_chain_is_longer_than_its_bound(parts: Indexed, history: History) -> None:
    await _run(parts, history)
    versions = parts.index.version_count
    assert versions > 0
    with parts.index.view() as view:
        for page in _pages(history):
            try:
                path = parts.materializer.path(view, page, history.wal.end, cached=False)
            except NotMaterializable:
                continue
            assert path.length <= CHAIN_RECORDS, f"{page}"


async def test_retirement_keeps_what_was_asked_for_and_no_more(
    parts: Indexed, history: History
) -> None:
    parts.segment.shared.floor = history.states[-2].lsn
    await _run(parts, history)
    kept = parts.segment.shared.floor - parts.segment.shared.retired
    assert kept <= RETAIN_BYTES
    assert parts.index.retired == parts.segment.shared.retired
    assert history.states[-2].lsn - RETAIN_BYTES <= parts.index.lowest <= history.states[-2].lsn
    # The versions that are left: one below the floor for each page, and what chains need.
    assert differences(parts, history.states[-1]) == []


async def test_without_a_floor_nothing_is_retired(parts: Indexed, history: History) -> None:
    await _run(parts, history)
    assert parts.segment.shared.retired == history.import_lsn
    assert parts.index.lowest == history.import_lsn
    assert len(parts.index.layers) > 5


async def test_nothing_of_what_was_dropped_stays_for_ever(tmp_path: Path) -> None:
    """After everything was retired the tables hold what the volume is now, and little else."""
    history = make_history(11, 900 * 1024)
    parts = history_volume(tmp_path, history)
    parts.segment.shared.floor = history.wal.end
    await _run(parts, history)
    imported = set(history.imported)
    with parts.index.view() as view:
        lowest, retired = parts.index.lowest, parts.index.retired
        useless = [
            (fork, lsn)
            for fork, lsn in _size_rows(view)
            if fork not in imported and lsn <= retired and view.size(fork, lowest) is None
        ]
        existing = sum(view.relations(lowest).values())
    assert useless == []
    assert parts.index.version_count < 3 * existing
    parts.close()


def _size_rows(view: IndexView) -> list[tuple[RelationFork, int]]:
    rows = view.facts._sizes._cursor
    return [(fork_of_key(key[:13]), int.from_bytes(key[13:], "big")) for key, _ in rows]


class _Stumbling(HistoryRedo):
    """Cannot apply one record, though it is sound."""

    stumbles_at = 0

    def apply(self, page: bytearray, record: WalRecord, block: BlockRef) -> None:
        if record.start == self.stumbles_at:
            raise CorruptWal("it does not fit", lsn=record.start)
        super().apply(page, record, block)


@pytest.fixture(scope="module")
def calm() -> History:
    return make_history(8, 600 * 1024, states=10, calm=True)


def _early_record(history: History) -> tuple[PageKey, int]:
    """A page that began as imported, and its first record."""
    imported = {PageKey(fork, BlockNumber(0)) for fork in history.imported}
    offset = history.import_lsn - history.start
    for record in WalDecoder(history.import_lsn).feed(bytes(history.wal.data[offset:])):
        for block in record.blocks:
            if block.page in imported:
                return block.page, record.start
    raise AssertionError("no imported page was changed")


async def test_a_record_that_does_not_fit_holds_retirement_until_it_does(
    tmp_path: Path, calm: History
) -> None:
    """A better redo may yet make the page: so its log stays."""
    redo = _Stumbling()
    parts = history_volume(tmp_path, calm, redo)
    page, start = _early_record(calm)
    redo.stumbles_at = start
    parts.segment.shared.floor = calm.wal.end
    async with running(parts) as ingest:
        await ingest.wait_for(calm.wal.end, WAIT_S)
        await _until(lambda: parts.compaction.held)
        assert parts.segment.shared.retired <= start
        with parts.index.view() as view, pytest.raises(RedoFailed):
            parts.materializer.page(view, page, calm.wal.end)
        redo.stumbles_at = 0
        parts.compaction._retire_at = 0.0
        parts.compaction.wake()
        await _until(lambda: parts.segment.shared.retired > start)
        await settled(parts)
    assert parts.compaction.held == ""
    assert differences(parts, calm.states[-1]) == []
    parts.close()


async def test_damaged_log_is_given_up_for_its_pages_alone(tmp_path: Path, calm: History) -> None:
    """Nothing repairs it by waiting: the page is refused, all others go on."""
    parts = history_volume(tmp_path, calm)
    page, start = _early_record(calm)
    read = parts.materializer._read_log

    def damaged(at: Lsn, length: int) -> bytes:
        if at <= start < at + length:
            raise CorruptWal("the log page does not match its checksum", lsn=at)
        return read(at, length)

    parts.materializer._read_log = damaged
    parts.segment.shared.floor = calm.wal.end
    async with running(parts) as ingest:
        await ingest.wait_for(calm.wal.end, WAIT_S)
        await _until(lambda: parts.segment.shared.retired > start)
        await settled(parts)
    assert parts.retirement.refused >= 1
    assert parts.compaction.held == ""
    state = calm.states[-1]
    right = 0
    with parts.index.view() as view:
        with pytest.raises(CorruptData):
            parts.materializer.page(view, page, state.lsn)
        for other in _pages(calm):
            try:
                content = parts.materializer.page(view, other, state.lsn)
            except (CorruptData, NotMaterializable):
                continue
            assert content == state.page(other)
            right += 1
    assert right > 50
    parts.close()


async def test_a_damaged_version_is_not_served_and_made_good_from_the_log(
    parts: Indexed, history: History
) -> None:
    await _run(parts, history)
    with parts.index.view() as view:
        page, version = next(
            (page, version)
            for page in _pages(history)
            if (version := view.version(page_key(page), history.wal.end)) is not None
            and version.sound
        )
        expected = parts.materializer.page(view, page, history.wal.end)
    broken = version.stored[:-1] + bytes((version.stored[-1] ^ 1,))
    await parts.index.store([(version.key, broken)])
    parts.materializer._cache.clear()
    with parts.index.view() as view:
        found = view.version(page_key(page), history.wal.end)
        assert found is not None
        assert not found.sound
        with pytest.raises(CorruptData):
            found.content(page)
        assert parts.materializer.page(view, page, history.wal.end) == expected


async def test_refusals_are_checked_too(parts: Indexed) -> None:
    page = PageKey(parts.index.imported.forks[0][0], BlockNumber(0))
    for reason, error in (
        (Refusal.UNKNOWN_RECORD, NotMaterializable),
        (Refusal.DAMAGED, CorruptData),
    ):
        key, value = refusal_row(page_key(page), 4096, reason, 2048)
        await parts.index.store([(key, value)])
        with parts.index.view() as view:
            version = view.version(page_key(page), 5000)
            assert version is not None
            assert version.sound
            with pytest.raises(error):
                version.content(page)
        for at in range(len(value)):
            damaged = bytearray(value)
            damaged[at] ^= 1
            await parts.index.store([(key, bytes(damaged))])
            with parts.index.view() as view:
                version = view.version(page_key(page), 5000)
                assert version is not None
                assert not version.sound
                with pytest.raises(CorruptData):
                    version.content(page)


async def test_a_full_disk_holds_up_nothing_but_writes(parts: Indexed, history: History) -> None:
    """Pages are served from memory and log meanwhile; it goes on by itself."""
    full = True
    write = parts.index._write

    async def refusing(work: Callable[[], Any]) -> Any:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return await write(work)

    parts.index._write = refusing  # type: ignore[method-assign]
    parts.segment.shared.floor = history.wal.end
    async with running(parts) as ingest:
        await _until(lambda: "written" in parts.segment.shared.failure)
        reached = [state for state in history.states if state.lsn <= ingest.reached]
        assert reached
        assert differences(parts, reached[-1]) == []
        full = False
        await ingest.wait_for(history.wal.end, WAIT_S)
        await settled(parts)
    assert parts.segment.shared.failure == ""
    assert parts.index.retired > history.import_lsn
    assert differences(parts, history.states[-1]) == []
