"""A real storage node process by both lanes: durable over kill -9, typed refusals, nothing hurt.

The log is a stock PostgreSQL's, except where its bytes do not matter: zeros are what the engine
writes behind an XLOG_SWITCH, so they are right anywhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from boreal.errors import (
    BelowLogStart,
    BeyondLog,
    BorealError,
    CorruptWal,
    DiskFull,
    LineageNotAdopted,
    LogGap,
    MalformedRequest,
    NoBundle,
    OversizeRequest,
    StaleEpoch,
    UnknownVolume,
)
from boreal.frames import MAX_APPEND_BYTES, MAX_FRAME_BYTES, frame
from boreal.quorum import Lineage
from boreal.rpc import storage_pb2, storage_pb2_grpc
from boreal.rpc.edge import calling, error_from_wire, open_channel, volume_ref
from boreal.types import WAL_SEGMENT_BYTES, Lsn, VolumeId
from tests.storage_node.node_process import (
    VOLUME,
    FakeControl,
    LogClient,
    NodeProcess,
    ack,
    fake_control,
    lane_client,
    log_client,
)
from tests.storage_node.segment_kit import engine_wal

START = Lsn(3 * WAL_SEGMENT_BYTES)


@pytest_asyncio.fixture
async def control() -> AsyncIterator[tuple[FakeControl, str]]:
    async with fake_control() as running:
        yield running


@pytest.fixture
def node(control: tuple[FakeControl, str], tmp_path: Path) -> Iterator[NodeProcess]:
    node = NodeProcess("sn-1", tmp_path, control[1])
    try:
        yield node
    finally:
        node.stop()


async def started(node: NodeProcess) -> None:
    await asyncio.to_thread(node.start)


async def killed(node: NodeProcess) -> None:
    await asyncio.to_thread(node.stop)


async def test_both_lanes_write_the_same_log_and_a_kill_loses_nothing(node: NodeProcess) -> None:
    wal = engine_wal()
    volumes = {"grpc": VolumeId("by-grpc"), "lane": VolumeId("by-lane")}
    end = Lsn(wal.start + 2_345_678)
    await started(node)
    async with log_client(node.address) as client, lane_client(node.frames_port) as lane:
        for volume in volumes.values():
            await LogClient(stub=client.stub, volume=volume).create(1, wal.start)
        for at in range(wal.start, end, 300_001):
            data = wal.at(at, min(end, at + 300_001))
            by_grpc = LogClient(stub=client.stub, volume=volumes["grpc"])
            by_lane = LogClient(stub=client.stub, volume=volumes["lane"])
            assert await by_grpc.append(1, at, data) == at + len(data)
            assert await lane.append(by_lane.request(1, at, data)) == at + len(data)
    await killed(node)
    await started(node)
    async with log_client(node.address) as client:
        for volume in volumes.values():
            each = LogClient(stub=client.stub, volume=volume)
            assert (await each.position(1)).scl == end
            assert await each.log(1, wal.start, 0) == wal.at(wal.start, end)
            assert await each.log(1, wal.start + 7, end - 9) == wal.at(wal.start + 7, end - 9)


async def test_frames_that_come_together_are_answered_in_order(node: NodeProcess) -> None:
    await started(node)
    async with log_client(node.address) as client, lane_client(node.frames_port) as lane:
        await client.create(1, START)
        requests = [
            client.request(1, START, bytes(100)),
            client.request(0, START + 100, bytes(100)),
            client.request(1, START + 100, bytes(100)),
            client.request(1, START + 500, bytes(100)),
            client.request(1, START + 150, bytes(100)),
            LogClient(stub=client.stub, volume=VolumeId("other")).request(1, START, b""),
            client.request(1, START + 250, b"", START + 250),
        ]
        lane.send(b"".join(frame(request.SerializeToString()) for request in requests))
        outcomes = [await lane.receive() for _ in requests]
        assert [outcome.error.code for outcome in outcomes] == [
            *("", "StaleEpoch", "", "LogGap", "", "UnknownVolume", "")
        ]
        assert (await client.position(1)).scl == START + 250
        assert (await client.position(1)).vdl == START + 250


_GARBAGE = {
    "not protobuf": (frame(b"\xff" * 40), MalformedRequest),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", OversizeRequest),
    "oversize": ((MAX_FRAME_BYTES + 1).to_bytes(4, "big") + b"x", OversizeRequest),
}


@pytest.mark.parametrize(("data", "error"), _GARBAGE.values(), ids=_GARBAGE.keys())
async def test_garbage_on_the_lane_is_answered_and_hung_up_on(
    node: NodeProcess, data: bytes, error: type[BorealError]
) -> None:
    await started(node)
    async with log_client(node.address) as client, lane_client(node.frames_port) as good:
        await client.create(1, START)
        async with lane_client(node.frames_port) as bad:
            whole = frame(client.request(1, START, bytes(100)).SerializeToString())
            bad.send(whole + data)
            assert ack(await bad.receive()) == START + 100  # what came before it counts
            assert isinstance(error_from_wire((await bad.receive()).error), error)
            with pytest.raises(EOFError):
                await bad.receive()
        assert await good.append(client.request(1, START + 100, bytes(9))) == START + 109


async def test_wrong_requests_get_typed_errors_and_the_node_goes_on(node: NodeProcess) -> None:
    await started(node)
    async with log_client(node.address) as client, lane_client(node.frames_port) as lane:
        await client.create(2, START)
        unknown = LogClient(stub=client.stub, volume=VolumeId("nobody"))
        wrong: list[tuple[LogClient, int, int, bytes, type[BorealError]]] = [
            (client, 1, START, b"", StaleEpoch),
            (client, 3, START, bytes(8), LineageNotAdopted),
            (client, 2, START + 1, bytes(8), LogGap),
            (client, 2, 1 << 63, bytes(8), LogGap),
            (client, 2, START, bytes(MAX_APPEND_BYTES + 1), OversizeRequest),
            (client, 2, START, b"no WAL page" * 10, MalformedRequest),
            (unknown, 2, START, bytes(8), UnknownVolume),
        ]
        for caller, epoch, at, data, error in wrong:
            with pytest.raises(error):
                await caller.append(epoch, at, data)
            with pytest.raises(error):
                await lane.append(caller.request(epoch, at, data))
        with pytest.raises(StaleEpoch) as caught:
            await client.log(1, START, 0)
        assert caught.value.details["promised_epoch"] == 2
        with pytest.raises(StaleEpoch):
            await client.position(1)
        with pytest.raises(BelowLogStart):
            await client.log(2, START - 1, START)
        with pytest.raises(BeyondLog):
            await client.log(2, START, START + 1)
        with pytest.raises(MalformedRequest):
            await client.adopt(3, Lineage.of([(2, START)]))
        with pytest.raises(MalformedRequest):
            await unknown.create(1, START + 1)
        assert await client.append(2, START, bytes(100)) == START + 100


async def test_a_fenced_segment_waits_for_its_writer(node: NodeProcess) -> None:
    await started(node)
    async with log_client(node.address) as client:
        await client.create(1, START)
        await client.append(1, START, bytes(100))
        assert (await client.fence(4)).promised_epoch == 4
        await killed(node)
        await started(node)
        with pytest.raises(StaleEpoch):
            await client.append(1, START + 100, bytes(1))
        position = await client.adopt(4, Lineage.of([(1, START), (4, START + 60)]))
        assert position.scl == START + 60
        assert await client.append(4, START + 60, bytes(50)) == START + 110


async def test_a_flipped_bit_is_not_served_by_the_node(node: NodeProcess) -> None:
    wal = engine_wal()
    await started(node)
    async with log_client(node.address) as client:
        await client.create(1, wal.start)
        end = wal.start + 900_000
        await client.append(1, wal.start, wal.at(wal.start, end))
        (path,) = (node.data_dir / "volumes" / VOLUME / "log").glob("0" * 7 + "1*")
        with path.open("r+b") as file:
            file.seek(400_000)
            flipped = bytes([file.read(1)[0] ^ 1])
            file.seek(400_000)
            file.write(flipped)
        with pytest.raises(CorruptWal):
            await client.log(1, wal.start, end)
        assert await client.log(1, wal.start, wal.start + 390_000) == wal.at(
            wal.start, wal.start + 390_000
        )
        assert await client.log(1, wal.start + 500_000, end) == wal.at(wal.start + 500_000, end)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one segment file and little else."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root, and the right to mount")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


async def test_a_full_disk_acknowledges_nothing_and_heals(
    control: tuple[FakeControl, str], small_disk: Path
) -> None:
    node = NodeProcess("sn-1", small_disk, control[1])
    try:
        await started(node)
        async with log_client(node.address) as client, lane_client(node.frames_port) as lane:
            await client.create(1, START)
            at = await lane.append(client.request(1, START, bytes(1000)))
            while at < START + (15 << 20):
                at = await lane.append(client.request(1, at, bytes(1 << 20)))
            with pytest.raises(DiskFull):
                await lane.append(client.request(1, at, bytes(1 << 20)))
            assert (await client.position(1)).scl == at
            assert await lane.append(client.request(1, at, bytes(10))) == at + 10
            grow = ["mount", "-o", "remount,size=60m", str(small_disk)]
            await asyncio.to_thread(subprocess.run, grow, check=True)
            at = await lane.append(client.request(1, at + 10, bytes(1 << 20)))
            assert at == START + 1010 + (16 << 20)
    finally:
        await asyncio.to_thread(node.stop, signal.SIGTERM)


async def test_the_node_reports_and_stops_cleanly(
    node: NodeProcess, control: tuple[FakeControl, str]
) -> None:
    await started(node)
    async with log_client(node.address) as client:
        await client.create(1, START)
        await client.append(1, START, bytes(100), vdl=START + 50)
    async with asyncio.timeout(10):
        while not (reports := control[0].reports) or not reports["sn-1"].segments:
            await asyncio.sleep(0.05)
    report = reports["sn-1"]
    assert report.node.addresses.log == node.address
    (segment,) = report.segments
    assert (segment.volume_id, segment.scl, segment.vdl) == (VOLUME, START + 100, START + 50)
    again = await asyncio.to_thread(
        subprocess.run, node.command(), capture_output=True, timeout=30, check=False
    )
    assert again.returncode == 1
    assert b"in use by another storage node" in again.stderr
    assert await asyncio.to_thread(node.stop, signal.SIGTERM) == 0, node.output


async def test_bundles_by_grpc(node: NodeProcess) -> None:
    await started(node)
    channel = open_channel(node.address)
    stub: storage_pb2_grpc.BundlesAsyncStub = storage_pb2_grpc.BundlesStub(channel)
    ref, data = volume_ref(VOLUME, 1), os.urandom(2_500_000)
    digest = hashlib.sha256(data).digest()
    async with log_client(node.address) as client:
        await client.create(1, START)
    with pytest.raises(NoBundle), calling("node", "GetManifest"):
        await stub.GetManifest(storage_pb2.GetManifestRequest(volume=ref), timeout=10)
    find = storage_pb2.FindMissingRequest(volume=ref, sha256=[digest])
    assert (await stub.FindMissing(find, timeout=10)).sha256 == [digest]
    chunks = [
        storage_pb2.PutContentRequest(volume=ref, sha256=digest, data=data[at : at + 1_000_000])
        for at in range(0, len(data), 1_000_000)
    ]
    await stub.PutContent(iter(chunks), timeout=10)
    assert not (await stub.FindMissing(find, timeout=10)).sha256
    manifest = storage_pb2.BundleManifest(
        end_lsn=START + 5, files=[storage_pb2.BundleFile(path="f", sha256=digest)]
    )
    put = storage_pb2.PutManifestRequest(volume=ref, manifest=manifest)
    await stub.PutManifest(put, timeout=10)
    await killed(node)
    await started(node)
    got = await stub.GetManifest(storage_pb2.GetManifestRequest(volume=ref), timeout=10)
    assert got == manifest
    content = storage_pb2.GetContentRequest(volume=ref, sha256=digest)
    assert b"".join([c.data async for c in stub.GetContent(content, timeout=10)]) == data
    stale = storage_pb2.GetManifestRequest(volume=volume_ref(VOLUME, 0))
    with pytest.raises(StaleEpoch), calling("node", "GetManifest"):
        await stub.GetManifest(stale, timeout=10)
    await channel.close(None)


async def test_a_fence_tells_how_long_the_writer_was_silent(node: NodeProcess) -> None:
    await started(node)
    async with log_client(node.address) as client, lane_client(node.frames_port) as lane:
        await client.create(1, START)
        before = time.monotonic()
        await lane.append(client.request(1, START, b""))
        fences = [await client.fence(2) for _ in range(3)]
        for fence in fences:
            assert fence.writer_silent_ms <= (time.monotonic() - before) * 1000
        with pytest.raises(StaleEpoch):
            await lane.append(client.request(1, START, b""))
        last = await client.fence(2)  # what it refused is no word of a writer's
        assert last.writer_silent_ms >= fences[-1].writer_silent_ms
