"""Goal: the index follows the log exactly as far as it may, and stops loudly where it must.

Method: a recorded run's WAL in a real segment; the ingest runs against it while the test appends,
cuts, or damages. The run ends with records that break the agreement on after-images.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from boreal.errors import IngestStopped, NotIndexedYet
from boreal.types import Epoch, Lsn
from boreal.wal import WalDecoder
from tests.storage_node.page_volume_kit import (
    EPOCH,
    WAIT_S,
    Indexed,
    append,
    fill_store,
    make_segment,
    running,
    storage_config,
    tell_vdl,
)
from tests.storage_node.recorded_run import RecordedRun

_SMALL = 1 << 20
"""So little log to retain makes for small layers, several of them before the first snapshot."""


@pytest.fixture
def parts(recorded_run: RecordedRun, tmp_path: Path) -> Iterator[Indexed]:
    segment = make_segment(storage_config(tmp_path), recorded_run)
    made = Indexed(segment, fill_store(segment.layout.pages, recorded_run))
    yield made
    made.close()


def _long_record(run: RecordedRun) -> tuple[Lsn, Lsn]:
    """A record of some length, not far into the run."""
    decoder = WalDecoder(run.import_lsn)
    offset = run.import_lsn - run.wal_start
    for record in decoder.feed(run.wal[offset : offset + (1 << 20)]):
        if record.end - record.start > 8000 and record.start > run.import_lsn + 100_000:
            return record.start, record.end
    raise AssertionError("the run has no long record")


async def test_only_complete_records_below_the_vdl_are_indexed(
    parts: Indexed, recorded_run: RecordedRun
) -> None:
    start, end = _long_record(recorded_run)
    vdl = Lsn(start + 4000)
    append(parts.segment, recorded_run, Lsn(end + 50_000), vdl)
    async with running(parts) as ingest:
        await ingest.wait_for(vdl, WAIT_S)
        assert ingest.reached == vdl
        assert parts.index.indexed == start
        assert parts.segment.shared.indexed == start
        with pytest.raises(NotIndexedYet) as refused:
            await ingest.wait_for(Lsn(vdl + 1), 0.05)
        assert refused.value.details == {"indexed_lsn": vdl}
        waiting = asyncio.create_task(ingest.wait_for(end, WAIT_S))
        tell_vdl(parts.segment, end)
        ingest.wake()
        await waiting
        assert parts.index.indexed == end


async def test_a_cut_log_leaves_nothing_of_the_bytes_that_went(
    parts: Indexed, recorded_run: RecordedRun
) -> None:
    """The VDL may lie inside a record that recovery then cuts; other bytes come in its place."""
    start, end = _long_record(recorded_run)
    append(parts.segment, recorded_run, start)
    lost = b"\x55" * 4000
    head = recorded_run.wal[start - recorded_run.wal_start :][:24]
    room = 8192 - start % 8192
    parts.segment.stage(EPOCH, start, (head + lost)[: min(room, 3000)], Lsn(start + 3000))
    parts.segment.flush()
    async with running(parts) as ingest:
        await ingest.wait_for(parts.segment.state.scl, WAIT_S)
        assert parts.index.indexed == start
        parts.segment.fence(Epoch(2))
        lineage = parts.segment.state.lineage.extended(Epoch(2), start)
        parts.segment.adopt(Epoch(2), lineage)
        append(parts.segment, recorded_run, Lsn(end + 50_000))
        await ingest.wait_for(end, WAIT_S)
        assert ingest.failure is None


async def test_a_missing_image_stops_the_index_and_what_lies_below_stays(
    parts: Indexed, recorded_run: RecordedRun
) -> None:
    last = recorded_run.snapshots[-1].lsn
    append(parts.segment, recorded_run, recorded_run.end)
    async with running(parts) as ingest:
        await ingest.wait_for(last, WAIT_S)
        with pytest.raises(IngestStopped) as stopped:
            await ingest.wait_for(recorded_run.end, WAIT_S)
        assert last <= stopped.value.details["lsn"] < recorded_run.end
        assert "wal_consistency_checking" in parts.segment.shared.failure
        await ingest.wait_for(last, 0)
        with parts.index.view() as view:
            assert view.relations(last)


async def test_damage_in_the_log_stops_the_index(parts: Indexed, recorded_run: RecordedRun) -> None:
    start, end = _long_record(recorded_run)
    append(parts.segment, recorded_run, Lsn(end + 50_000))
    file = next(path for path in parts.segment.layout.log.iterdir() if len(path.name) == 24)
    with file.open("r+b") as opened:
        opened.seek(start - recorded_run.wal_start + 2000)
        opened.write(b"\xff\x00\xff")
    async with running(parts) as ingest:
        with pytest.raises(IngestStopped):
            await ingest.wait_for(end, WAIT_S)
        assert parts.index.indexed <= start


async def test_it_goes_on_where_it_stopped(recorded_run: RecordedRun, tmp_path: Path) -> None:
    segment = make_segment(storage_config(tmp_path), recorded_run)
    store = fill_store(segment.layout.pages, recorded_run)
    first, second = (snapshot.lsn for snapshot in recorded_run.snapshots[:2])
    append(segment, recorded_run, second, first)
    parts = Indexed(segment, store, retain_bytes=_SMALL)
    async with running(parts) as ingest:
        await ingest.wait_for(first, WAIT_S)
    sealed = parts.index.sealed_to
    parts.index.close()
    tell_vdl(segment, second)
    again = Indexed(segment, store, retain_bytes=_SMALL)
    assert again.index.indexed == again.index.sealed_to >= sealed > recorded_run.import_lsn
    async with running(again) as ingest:
        await ingest.wait_for(second, WAIT_S)
        assert again.index.indexed <= second
    again.close()
