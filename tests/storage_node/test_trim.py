"""Log that nobody needs goes, whole segments of it; what somebody may need stays, over any stop.

Segments in this process for the rules; a crash is a second opening of files nobody closed, with the
files of the moment put back. Then real nodes: one killed again and again while it trims, and one
that was away while another trimmed. The log is zeros, as behind an XLOG_SWITCH.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from boreal.errors import BelowLogStart, Internal
from boreal.quorum import Lineage
from boreal.rpc import storage_pb2, storage_pb2_grpc
from boreal.rpc.edge import open_channel, volume_ref
from boreal.types import WAL_SEGMENT_BYTES, Epoch, Lsn
from storage_node.config import VolumeLayout
from storage_node.log import LogReader, VolumeLog
from storage_node.segment import Segment
from storage_node.shared_state import SharedState
from tests.storage_node.node_process import (
    VOLUME,
    FakeControl,
    LogClient,
    NodeProcess,
    fake_control,
    log_client,
)
from tests.storage_node.segment_kit import new_segment, reopened

START = Lsn(5 * WAL_SEGMENT_BYTES)
MIB = 1 << 20


def segment_at(number: float) -> Lsn:
    return Lsn(START + int(number * WAL_SEGMENT_BYTES))


def filled(segment: Segment, end: int) -> Segment:
    """Append up to `end`, all of it durable on a quorum."""
    epoch = segment.state.lineage.last.epoch
    for at in range(segment.state.scl, end, MIB):
        upto = min(end, at + MIB)
        segment.stage(epoch, at, bytes(upto - at), upto)
    segment.flush()
    return segment


def bundle(redo: int) -> storage_pb2.BundleManifest:
    return storage_pb2.BundleManifest(redo_lsn=redo, end_lsn=redo + 100, epoch=1)


def delete(segment: Segment, files: list[Path]) -> None:
    for file in files:
        file.unlink()


def trimmed(segment: Segment, *, pgmrpl: int, redo: int | None = None) -> list[Path]:
    """Tell it the floors and have it trim; what it wants deleted."""
    segment.heard_writer(with_data=True, pgmrpl=pgmrpl)
    if redo is not None:
        segment.bundles.put_manifest(bundle(redo))
    segment.raise_floor()
    return segment.trim()


def names(segment: Segment) -> list[str]:
    return sorted(path.name for path in segment.layout.log.iterdir())


def hold_nothing(shared: SharedState) -> None:
    """Play a page process that has indexed all there will be and needs none of its log."""
    shared.indexed = shared.retired = segment_at(100)


@pytest.fixture
def segment(tmp_path: Path) -> Segment:
    segment = filled(new_segment(tmp_path, START), segment_at(4.5))
    hold_nothing(segment.shared)
    return segment


# --- what goes and what stays --------------------------------------------------------------------


def test_whole_segments_below_the_floor_go_and_stay_gone(segment: Segment) -> None:
    files = trimmed(segment, pgmrpl=segment_at(2.7), redo=segment_at(3.2))
    assert segment.shared.floor == segment_at(2.7)
    assert segment.state.start == segment.shared.start == segment_at(2)
    assert len(files) == 4  # two segments with their checksums
    with pytest.raises(BelowLogStart) as caught:
        segment.reader.read(Lsn(segment_at(2) - 1), segment_at(3))
    assert caught.value.details == {"start_lsn": segment_at(2)}
    delete(segment, files)
    again = reopened(segment)
    assert (again.state.start, again.state.scl) == (segment_at(2), segment_at(4.5))
    assert again.reader.read(segment_at(2), segment_at(4.5)) == bytes(
        segment_at(4.5) - segment_at(2)
    )
    filled(again, segment_at(6.1))
    assert again.trim() == []


def test_without_a_bundle_nothing_goes(segment: Segment) -> None:
    assert trimmed(segment, pgmrpl=segment_at(3)) == []
    assert segment.shared.floor == 0


def test_without_a_word_of_the_writer_nothing_goes(segment: Segment) -> None:
    assert trimmed(segment, pgmrpl=0, redo=segment_at(3)) == []


def test_the_segment_a_kept_bundle_starts_in_stays_whole(segment: Segment) -> None:
    trimmed(segment, pgmrpl=segment_at(4), redo=Lsn(segment_at(2) - 8))
    assert segment.state.start == segment_at(1)


def test_nothing_goes_that_is_not_known_to_be_durable(tmp_path: Path) -> None:
    segment = new_segment(tmp_path, START)
    hold_nothing(segment.shared)
    for at in range(START, segment_at(3), MIB):
        segment.stage(1, at, bytes(MIB), segment_at(1.5))
    segment.flush()
    trimmed(segment, pgmrpl=segment_at(3), redo=segment_at(3))
    assert segment.state.start == segment_at(1)
    assert segment.shared.floor == segment_at(1.5)


def test_the_floor_never_falls(segment: Segment) -> None:
    trimmed(segment, pgmrpl=segment_at(3), redo=segment_at(2))
    trimmed(segment, pgmrpl=segment_at(1), redo=segment_at(1))
    assert segment.shared.floor == segment_at(2)


def test_the_page_process_holds_the_log_it_needs(tmp_path: Path) -> None:
    segment = filled(new_segment(tmp_path, START), segment_at(3))
    pages = SharedState(segment.layout.shared)
    assert trimmed(segment, pgmrpl=segment_at(3), redo=segment_at(3)) == []
    pages.retired = segment_at(1.9)
    assert len(segment.trim()) == 2
    assert segment.state.start == segment_at(1)
    pages.retired = segment_at(3)
    segment.trim()
    assert segment.state.start == segment_at(3)  # all there is, and the log goes on
    filled(segment, segment_at(3.1))
    assert reopened(segment).state.scl == segment_at(3.1)
    pages.close()


def test_a_volume_is_found_made_though_its_log_begins_later(segment: Segment) -> None:
    made = segment.facts
    trimmed(segment, pgmrpl=segment_at(2), redo=segment_at(2))
    assert reopened(segment).facts == made


def test_a_new_writer_cuts_above_what_was_dropped(segment: Segment) -> None:
    trimmed(segment, pgmrpl=segment_at(2), redo=segment_at(2))
    lineage = Lineage.of([(1, START), (2, segment_at(4.2))])
    segment.adopt(Epoch(2), lineage)
    assert (segment.state.start, segment.state.scl) == (segment_at(2), segment_at(4.2))
    with pytest.raises(Internal, match="before this log starts"):
        segment.adopt(Epoch(3), Lineage.of([(1, START), (3, segment_at(1))]))


# --- readers -------------------------------------------------------------------------------------


def test_a_reader_lets_go_of_dropped_files_and_says_so(segment: Segment) -> None:
    reader = LogReader(segment.layout.root)
    for number in range(4):
        reader.read(segment_at(number), segment_at(number + 0.9))
    delete(segment, trimmed(segment, pgmrpl=segment_at(2), redo=segment_at(2)))
    assert reader.read(segment_at(2.5), segment_at(2.6))
    assert sorted(reader._segments) == [segment_at(2), segment_at(3)]
    with pytest.raises(BelowLogStart):
        reader.read(segment_at(1.5), segment_at(2.5))
    reader.close()


# --- stops in between ----------------------------------------------------------------------------


@pytest.mark.parametrize("deleted", range(5))
def test_a_kill_at_any_step_of_a_trim_heals_at_the_next_start(
    segment: Segment, deleted: int
) -> None:
    delete(segment, trimmed(segment, pgmrpl=segment_at(2), redo=segment_at(2))[:deleted])
    again = reopened(segment)
    assert again.state.start == segment_at(2)
    assert len(names(again)) == 6
    assert again.reader.read(segment_at(2), segment_at(4.5))
    filled(again, segment_at(5))


def test_a_kill_before_the_new_start_is_durable_changes_nothing(segment: Segment) -> None:
    before = segment.layout.state.read_bytes()
    trimmed(segment, pgmrpl=segment_at(2), redo=segment_at(2))
    segment.layout.state.write_bytes(before)
    again = reopened(segment)
    assert again.state.start == START
    assert again.reader.read(START, segment_at(1))
    filled(again, segment_at(4.6))  # the last VDL is told again
    hold_nothing(again.shared)
    assert again.trim() == [], "the writer has not told the floor again"
    assert len(trimmed(again, pgmrpl=segment_at(2))) == 4


def test_orphaned_checksums_are_removed_too(tmp_path: Path, segment: Segment) -> None:
    segment.close()
    copy = tmp_path / "copy"
    shutil.copytree(segment.layout.log, copy)
    log = VolumeLog(copy, segment_at(2), segment.state.lineage.timelines())
    assert log.end == segment_at(4.5)
    log.close()
    assert len(list(copy.iterdir())) == 6


# --- real nodes ----------------------------------------------------------------------------------


def relieve_pages(node: NodeProcess) -> None:
    """The same on a node, whose own page process waits for an import and says nothing."""
    shared = SharedState(VolumeLayout(root=node.data_dir / "volumes" / VOLUME).shared)
    hold_nothing(shared)
    shared.close()


@pytest_asyncio.fixture
async def control() -> AsyncIterator[tuple[FakeControl, str]]:
    async with fake_control() as running:
        yield running


@pytest_asyncio.fixture
async def nodes(
    control: tuple[FakeControl, str], tmp_path: Path
) -> AsyncIterator[list[NodeProcess]]:
    nodes = [NodeProcess(f"sn-{n}", tmp_path, control[1]) for n in (1, 2)]
    try:
        yield nodes
    finally:
        for node in nodes:
            node.stop()


async def until(condition: Callable[[], Awaitable[bool]], limit_s: float = 20) -> None:
    async with asyncio.timeout(limit_s):
        while not await condition():
            await asyncio.sleep(0.02)


async def write(client: LogClient, at: int, end: int, *, pgmrpl: int = 0) -> Lsn:
    """Append up to `end`, told to be durable on a quorum."""
    while at < end:
        upto = min(end, at + MIB)
        request = client.request(1, at, bytes(upto - at), upto)
        request.pgmrpl = pgmrpl
        at = await client.send(request)
    return Lsn(at)


async def store_bundle(node: NodeProcess, redo: int) -> None:
    async with open_channel(node.address) as channel:
        stub: storage_pb2_grpc.BundlesAsyncStub = storage_pb2_grpc.BundlesStub(channel)
        request = storage_pb2.PutManifestRequest(
            volume=volume_ref(VOLUME, 1), manifest=bundle(redo)
        )
        await stub.PutManifest(request, timeout=10)


async def test_a_node_killed_while_it_trims_never_lacks_what_it_says_it_has(
    nodes: list[NodeProcess],
) -> None:
    node, choose = nodes[0], random.Random(1)
    await asyncio.to_thread(node.start)
    async with log_client(node.address) as client:
        await client.create(1, START)
        relieve_pages(node)
        end = await write(client, START, segment_at(1.5))
        for _ in range(4):
            await store_bundle(node, end - 200)
            await store_bundle(node, end - 199)
            await store_bundle(node, end - 198)
            end = await write(client, end, end + 2 * WAL_SEGMENT_BYTES, pgmrpl=end)
            await asyncio.sleep(choose.random())  # anywhere in the trimmer's round
            await asyncio.to_thread(node.stop)
            await asyncio.to_thread(node.start)
            relieve_pages(node)
            position = await client.position(1)
            assert position.scl == end
            for at in range(position.start_lsn, end, 4 * MIB):
                assert await client.log(1, at, min(at + 4 * MIB, end))
            with pytest.raises(BelowLogStart):
                await client.log(1, position.start_lsn - 1, end)

        end = await write(client, end, end + 8, pgmrpl=end)

        async def settled() -> bool:
            return (await client.position(1)).start_lsn >= end - 4 * WAL_SEGMENT_BYTES

        await until(settled)
        kept = (end - (await client.position(1)).start_lsn) // WAL_SEGMENT_BYTES + 1
        log = node.data_dir / "volumes" / VOLUME / "log"

        async def deleted() -> bool:
            return len(list(log.iterdir())) <= 2 * kept

        await until(deleted)


async def test_a_node_that_was_away_finds_at_its_peer_what_it_lacks(
    nodes: list[NodeProcess],
) -> None:
    """The writer, which is played here, does not let the floor pass what the absent node has."""
    ahead, behind = nodes
    await asyncio.gather(*(asyncio.to_thread(node.start) for node in nodes))
    async with log_client(ahead.address) as one, log_client(behind.address) as two:
        for client in (one, two):
            await client.create(1, START)
            await write(client, START, segment_at(2.3))
        relieve_pages(ahead)
        await asyncio.to_thread(behind.stop)
        held = segment_at(2.3)
        end = await write(one, held, segment_at(5.2), pgmrpl=held)
        await store_bundle(ahead, held + 1000)

        async def trimmed_ahead() -> bool:
            return (await one.position(1)).start_lsn == segment_at(2)

        await until(trimmed_ahead)
        await asyncio.to_thread(behind.start)

        async def level() -> bool:
            return (await two.position(1)).scl == end

        await until(level)
        assert (await two.position(1)).start_lsn == START
        assert await two.log(1, START, 0) == bytes(end - START)


async def test_a_node_whose_log_nobody_continues_says_so(
    nodes: list[NodeProcess], control: tuple[FakeControl, str]
) -> None:
    ahead, behind = nodes
    await asyncio.gather(*(asyncio.to_thread(node.start) for node in nodes))
    async with log_client(ahead.address) as one, log_client(behind.address) as two:
        for client in (one, two):
            await client.create(1, START)
            await write(client, START, segment_at(0.3))
        relieve_pages(ahead)
        await asyncio.to_thread(behind.stop)
        await store_bundle(ahead, segment_at(2.5))
        await write(one, segment_at(0.3), segment_at(3), pgmrpl=segment_at(2.5))

        async def trimmed_ahead() -> bool:
            return (await one.position(1)).start_lsn == segment_at(2)

        await until(trimmed_ahead)
        await asyncio.to_thread(behind.start)

        async def told() -> bool:
            report = control[0].reports["sn-2"]
            return any("kept by no storage node" in each.failure for each in report.segments)

        await until(told)
