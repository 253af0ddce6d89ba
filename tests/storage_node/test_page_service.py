"""Goal: StoragePages and GetPages keep their contract, and whatever is asked wrongly gets a typed
refusal.

Method: the real service on a real gRPC server and the real lane, in this process, over a segment
holding a recorded run; the test plays the log process. (What is the lane's own: test_page_lane.py.)
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from boreal import errors
from boreal.errors import BorealError
from boreal.pages import digest_pages
from boreal.rpc import storage_pb2, storage_pb2_grpc
from boreal.rpc.edge import calling, fork_to_wire, make_server, open_channel, volume_ref
from boreal.types import PAGE_BYTES, Epoch, Fork, Lsn, RelationFork, VolumeId
from storage_node.config import StorageConfig
from storage_node.page_lane import page_lane
from storage_node.page_service import PageService
from storage_node.page_volume import PageVolumes
from storage_node.segment import Segment
from tests.storage_node.page_lane_kit import page_lane_client
from tests.storage_node.page_volume_kit import (
    EPOCH,
    VOLUME,
    WAIT_S,
    append,
    import_messages,
    make_segment,
    storage_config,
    tell_vdl,
)
from tests.storage_node.recorded_run import RecordedRun

PG_CLASS = RelationFork(1663, 5, 1259, Fork.MAIN)


@dataclass(frozen=True, slots=True)
class Node:
    """The service under test, and a client of it."""

    config: StorageConfig
    volumes: PageVolumes
    lane_port: int
    stub: storage_pb2_grpc.StoragePagesAsyncStub

    async def import_pages(
        self, messages: Iterator[storage_pb2.ImportPagesRequest]
    ) -> storage_pb2.ImportPagesResponse:
        with calling("sn-1", "ImportPages"):
            response: storage_pb2.ImportPagesResponse = await self.stub.ImportPages(
                messages, timeout=WAIT_S
            )
        return response

    async def pages(
        self,
        lsn: int,
        fork: RelationFork = PG_CLASS,
        first: int = 0,
        count: int = 1,
        *,
        volume: str = VOLUME,
        epoch: int = EPOCH,
        timeout_s: float = WAIT_S,
    ) -> list[storage_pb2.PageImages]:
        request = storage_pb2.GetPagesRequest(
            volume=volume_ref(VolumeId(volume), epoch),
            fork=fork_to_wire(fork),
            first_block=first,
            count=count,
            lsn=lsn,
        )
        async with page_lane_client(self.lane_port) as client:
            return await client.images(client.begin(request, timeout_s))

    async def digest(self, lsn: int, *ranges: tuple[RelationFork, int, int]) -> bytes:
        request = storage_pb2.DigestPagesRequest(
            volume=volume_ref(VOLUME, EPOCH),
            lsn=lsn,
            ranges=(
                storage_pb2.PageRange(fork=fork_to_wire(fork), first_block=first, count=count)
                for fork, first, count in ranges
            ),
        )
        with calling("sn-1", "DigestPages"):
            answer: storage_pb2.PageDigest = await self.stub.DigestPages(request, timeout=WAIT_S)
        return answer.sha256

    async def relations(self, lsn: int) -> dict[tuple[int, int, int, int], int]:
        request = storage_pb2.ListRelationsRequest(volume=volume_ref(VOLUME, EPOCH), lsn=lsn)
        found = {}
        with calling("sn-1", "ListRelations"):
            async for sizes in self.stub.ListRelations(request, timeout=WAIT_S):
                for size in sizes.relations:
                    fork = size.fork
                    key = (fork.tablespace, fork.database, fork.relation, fork.fork)
                    found[key] = size.blocks
        return found

    async def state(self) -> storage_pb2.IndexState:
        request = storage_pb2.GetIndexStateRequest(volume=volume_ref(VOLUME, EPOCH))
        with calling("sn-1", "GetIndexState"):
            state: storage_pb2.IndexState = await self.stub.GetIndexState(request, timeout=WAIT_S)
        return state


@asynccontextmanager
async def _serving(config: StorageConfig) -> AsyncIterator[Node]:
    server = make_server()
    port = server.add_insecure_port("127.0.0.1:0")
    async with asyncio.TaskGroup() as tasks:
        volumes = PageVolumes(config, tasks)
        storage_pb2_grpc.add_StoragePagesServicer_to_server(PageService(volumes), server)
        await server.start()
        lane = page_lane(volumes, tasks)
        lane_port = await lane.start("127.0.0.1", 0)
        channel = open_channel(f"127.0.0.1:{port}")
        try:
            yield Node(config, volumes, lane_port, storage_pb2_grpc.StoragePagesStub(channel))
        finally:
            await channel.close(None)
            await lane.stop()
            await server.stop(None)
            await volumes.close()


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with _serving(storage_config(tmp_path)) as serving:
        yield serving


@pytest.fixture
def segment(node: Node, recorded_run: RecordedRun) -> Iterator[Segment]:
    made = make_segment(node.config, recorded_run)
    append(made, recorded_run, recorded_run.snapshots[0].lsn)
    yield made
    made.close()


async def test_pages_come_as_of_their_lsn(
    node: Node, segment: Segment, recorded_run: RecordedRun
) -> None:
    await node.import_pages(import_messages(recorded_run))
    imported, snapshot = recorded_run.imported[PG_CLASS], recorded_run.snapshots[0]
    before = await node.pages(recorded_run.import_lsn, count=200)
    assert [len(images.exists) for images in before] == [128, 72]
    assert [images.first_block for images in before] == [0, 128]
    exists = [there for images in before for there in images.exists]
    assert exists == [n < len(imported) // PAGE_BYTES for n in range(200)]
    content = b"".join(images.pages for images in before)
    assert content == imported + bytes(200 * PAGE_BYTES - len(imported))
    (after,) = await node.pages(snapshot.lsn, count=20)
    blocks = len(snapshot.files[PG_CLASS]) // PAGE_BYTES
    assert list(after.exists) == [n < blocks for n in range(20)]
    assert after.pages != content[: 20 * PAGE_BYTES]
    sizes = await node.relations(snapshot.lsn)
    assert sizes[1663, 5, 1259, 0] == blocks
    assert not any(fork == Fork.FSM for *_, fork in sizes)
    state = await node.state()
    assert state.indexed_lsn <= state.log_scl == snapshot.lsn
    assert state.lag_bytes == snapshot.lsn - state.indexed_lsn
    assert state.retired_lsn == state.lowest_lsn == recorded_run.import_lsn
    assert state.failure == state.held == ""


async def test_a_digest_is_that_of_the_pages(
    node: Node, segment: Segment, recorded_run: RecordedRun
) -> None:
    await node.import_pages(import_messages(recorded_run))
    lsn = recorded_run.snapshots[0].lsn
    other = PG_CLASS._replace(relation=1249)

    async def told(fork: RelationFork, first: int, count: int) -> list[bytes | None]:
        return [
            images.pages[n * PAGE_BYTES : (n + 1) * PAGE_BYTES] if exists else None
            for images in await node.pages(lsn, fork, first, count)
            for n, exists in enumerate(images.exists)
        ]

    pages = await told(PG_CLASS, 0, 200)
    assert None in pages
    assert await node.digest(lsn, (PG_CLASS, 0, 200)) == digest_pages(pages)
    pieces = (PG_CLASS, 2, 3), (other, 0, 150)
    both = [page for piece in pieces for page in await told(*piece)]
    assert await node.digest(lsn, *pieces) == digest_pages(both)
    assert await node.digest(lsn, *reversed(pieces)) != digest_pages(both)
    assert digest_pages([None]) != digest_pages([bytes(PAGE_BYTES)]) != digest_pages([])


async def test_bad_digest_requests_are_refused(
    node: Node, segment: Segment, recorded_run: RecordedRun
) -> None:
    await node.import_pages(import_messages(recorded_run))
    for ranges, refusal in (
        ([], errors.MalformedRequest),
        ([(PG_CLASS, 0, 0)], errors.MalformedRequest),
        ([(PG_CLASS, 0xFFFFFFFF, 1)], errors.MalformedRequest),
        ([(PG_CLASS, 0, 1000), (PG_CLASS, 0, 25)], errors.OversizeRequest),
    ):
        with pytest.raises(refusal):
            await node.digest(recorded_run.import_lsn, *ranges)


async def test_a_read_waits_for_its_lsn(
    node: Node, segment: Segment, recorded_run: RecordedRun
) -> None:
    await node.import_pages(import_messages(recorded_run))
    later = Lsn(recorded_run.snapshots[0].lsn + 4 * PAGE_BYTES)
    with pytest.raises(errors.NotIndexedYet):
        await node.pages(later, timeout_s=0.3)
    waiting = asyncio.create_task(node.pages(later))
    append(segment, recorded_run, later, recorded_run.snapshots[0].lsn)
    tell_vdl(segment, later)
    await node.volumes.wake()
    assert len(await waiting) == 1


async def test_an_import_can_be_repeated_and_not_changed(
    node: Node, segment: Segment, recorded_run: RecordedRun
) -> None:
    first = await node.import_pages(import_messages(recorded_run))
    again = await node.import_pages(import_messages(recorded_run))
    kept = [content for fork, content in recorded_run.imported.items() if fork.fork is not Fork.FSM]
    assert first.pages == again.pages == sum(map(len, kept)) // PAGE_BYTES
    message = next(import_messages(recorded_run))
    message.lsn += 8
    with pytest.raises(errors.VolumeMismatch):
        await node.import_pages(iter([message]))


async def test_an_unfinished_import_leaves_nothing(
    node: Node, segment: Segment, recorded_run: RecordedRun
) -> None:
    messages = list(import_messages(recorded_run))
    with pytest.raises(errors.MalformedRequest):
        await node.import_pages(iter(messages[:50]))
    with pytest.raises(errors.NotIndexedYet):
        await node.pages(recorded_run.import_lsn, timeout_s=0.2)
    second = next(n for n, message in enumerate(messages) if message.first_block)
    with pytest.raises(errors.MalformedRequest):  # a gap
        await node.import_pages(iter(messages[: second - 1] + messages[second:]))
    ragged = storage_pb2.ImportPagesRequest(
        volume=volume_ref(VOLUME, EPOCH), lsn=recorded_run.import_lsn, pages=b"x" * 100
    )
    ragged.fork.CopyFrom(fork_to_wire(PG_CLASS))
    with pytest.raises(errors.MalformedRequest):
        await node.import_pages(iter([ragged]))
    assert (await node.import_pages(iter(messages))).pages > 0
    assert len(await node.pages(recorded_run.import_lsn)) == 1


async def test_an_import_survives_a_restart(recorded_run: RecordedRun, tmp_path: Path) -> None:
    config = storage_config(tmp_path)
    made = make_segment(config, recorded_run)
    append(made, recorded_run, recorded_run.snapshots[0].lsn)
    async with _serving(config) as node:
        await node.import_pages(import_messages(recorded_run))
        (first,) = await node.pages(recorded_run.snapshots[0].lsn, count=10)
    async with _serving(config) as node:
        (again,) = await node.pages(recorded_run.snapshots[0].lsn, count=10)
    assert first == again
    made.close()


@pytest.mark.parametrize(
    ("asked", "refusal"),
    [
        ({"volume": "nobody"}, errors.UnknownVolume),
        ({"volume": "../etc"}, errors.MalformedRequest),
        ({"epoch": 0}, errors.StaleEpoch),
        ({"count": 0}, errors.MalformedRequest),
        ({"count": 1025}, errors.OversizeRequest),
        ({"first": 0xFFFFFFFF}, errors.MalformedRequest),
        ({"lsn": 5}, errors.BelowLogStart),
        ({"fork": RelationFork(1663, 5, 1259, 9)}, errors.MalformedRequest),  # type: ignore[arg-type]
    ],
)
async def test_bad_requests_are_refused(
    node: Node,
    segment: Segment,
    recorded_run: RecordedRun,
    asked: dict[str, object],
    refusal: type[BorealError],
) -> None:
    await node.import_pages(import_messages(recorded_run))
    with pytest.raises(refusal):
        await node.pages(**{"lsn": recorded_run.import_lsn, **asked})  # type: ignore[arg-type]
    assert len(await node.pages(recorded_run.import_lsn)) == 1


async def test_a_fence_reaches_readers(
    node: Node, segment: Segment, recorded_run: RecordedRun
) -> None:
    await node.import_pages(import_messages(recorded_run))
    segment.fence(Epoch(7))
    with pytest.raises(errors.StaleEpoch) as refused:
        await node.pages(recorded_run.import_lsn)
    assert refused.value.details == {"promised_epoch": 7}
    assert len(await node.pages(recorded_run.import_lsn, epoch=7)) == 1


async def test_a_dropped_volume_is_gone_and_may_come_back(
    node: Node, recorded_run: RecordedRun
) -> None:
    made = make_segment(node.config, recorded_run)
    await node.import_pages(import_messages(recorded_run))
    waiting = asyncio.create_task(node.pages(recorded_run.end))
    await node.pages(recorded_run.import_lsn)
    made.close(dropped=True)
    shutil.rmtree(made.layout.root)
    await node.volumes.wake()
    with pytest.raises(errors.UnknownVolume):
        await waiting
    with pytest.raises(errors.UnknownVolume):
        await node.pages(recorded_run.import_lsn)
    again = make_segment(node.config, recorded_run)
    with pytest.raises(errors.NotIndexedYet):
        await node.pages(recorded_run.import_lsn, timeout_s=0.2)
    again.close()
