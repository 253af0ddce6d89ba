"""Goal: the lane of GetPages answers many calls at once, in any order, and no peer, however wrong
or slow, makes it hold more than it should or keeps pages from the others.

Method: the real lane on a real socket over a volume that the test scripts, and a client that sends
right and wrong bytes. (What GetPages answers is in test_page_service.py.)
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from typing import cast

import pytest

from boreal import errors
from boreal.errors import BorealError
from boreal.frames import MAX_FRAME_BYTES, frame
from boreal.rpc import common_pb2, storage_pb2
from boreal.rpc.edge import error_from_wire
from boreal.types import PAGE_BYTES, Epoch, Lsn, RelationFork
from storage_node.framed import MAX_CONNECTIONS, FramedServer
from storage_node.page_lane import MAX_CALLS, MAX_REQUEST_BYTES, page_lane
from storage_node.page_reads import MAX_PAGES_A_CALL, MAX_PAGES_A_MESSAGE
from storage_node.page_volume import PageVolume, PageVolumes
from tests.storage_node.page_lane_kit import PageLaneClient, page_lane_client
from tests.storage_node.page_volume_kit import WAIT_S

INDEXED = Lsn(1000)


class Volume:
    """All pages as of every LSN up to INDEXED; the test moves the index on."""

    def __init__(self) -> None:
        self.waiting = 0
        self.reached = asyncio.Event()
        self.pages_made = 0
        self.failure: Exception | None = None

    async def wait_for(self, lsn: Lsn, lineage_epoch: Epoch, timeout_s: float) -> None:
        if lsn <= INDEXED:
            return
        self.waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                await self.reached.wait()
        except TimeoutError:
            raise errors.NotIndexedYet("behind", indexed_lsn=INDEXED) from None
        finally:
            self.waiting -= 1

    def pages(self, fork: RelationFork, blocks: Sequence[int], lsn: Lsn) -> list[bytes | None]:
        if self.failure is not None:
            raise self.failure
        self.pages_made += len(blocks)
        return [bytes([block % 256]) * PAGE_BYTES if block % 7 else None for block in blocks]


class Volumes:
    def __init__(self, volume: Volume) -> None:
        self._volume = volume

    async def get(self, volume: str, epoch: Epoch) -> PageVolume:
        return cast("PageVolume", self._volume)


class Lane:
    def __init__(self, volume: Volume, server: FramedServer, port: int) -> None:
        self.volume = volume
        self.server = server
        self.port = port


@pytest.fixture
async def lane() -> AsyncIterator[Lane]:
    volume = Volume()
    async with asyncio.TaskGroup() as tasks:
        server = page_lane(cast("PageVolumes", Volumes(volume)), tasks)
        yield Lane(volume, server, await server.start("127.0.0.1", 0))
        await server.stop()


def ask(first: int = 1, count: int = 1, lsn: int = 1) -> storage_pb2.GetPagesRequest:
    return storage_pb2.GetPagesRequest(
        fork=common_pb2.RelationFork(relation=5), first_block=first, count=count, lsn=lsn
    )


LATER = INDEXED + 1


async def until(condition: object) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.005)


async def check(client: PageLaneClient) -> None:
    """It still serves."""
    (images,) = await client.images(client.begin(ask(3)))
    assert images.pages == bytes([3]) * PAGE_BYTES


# --- calls --------------------------------------------------------------------------------------


async def test_one_page_is_one_answer(lane: Lane) -> None:
    async with page_lane_client(lane.port) as client:
        answer = await client.answer(client.begin(ask(3)))
        assert answer.last
        assert answer.images == storage_pb2.PageImages(
            first_block=3, pages=bytes([3]) * PAGE_BYTES, exists=[True]
        )
        (absent,) = await client.images(client.begin(ask(7)))
        assert (absent.pages, list(absent.exists)) == (bytes(PAGE_BYTES), [False])


async def test_the_largest_call_comes_in_messages_that_pass(lane: Lane) -> None:
    async with page_lane_client(lane.port) as client:
        images = await client.images(client.begin(ask(0, MAX_PAGES_A_CALL)))
    assert [each.first_block for each in images] == list(
        range(0, MAX_PAGES_A_CALL, MAX_PAGES_A_MESSAGE)
    )
    assert all(len(each.exists) == MAX_PAGES_A_MESSAGE for each in images)
    largest = storage_pb2.PageAnswer(call=2**64 - 1, images=images[0], last=True)
    assert largest.ByteSize() <= MAX_FRAME_BYTES


async def test_calls_are_answered_as_they_can_be(lane: Lane) -> None:
    async with page_lane_client(lane.port) as client:
        late = client.begin(ask(lsn=LATER))
        quick = [client.begin(ask(block)) for block in range(1, 100)]
        for block, call in enumerate(quick, start=1):
            (images,) = await client.images(call)
            assert images.first_block == block
        assert late not in client.answered
        lane.volume.reached.set()
        assert len(await client.images(late)) == 1


async def test_a_page_does_not_wait_for_a_large_call_before_it(lane: Lane) -> None:
    async with page_lane_client(lane.port) as client:
        large, small = client.begin(ask(0, MAX_PAGES_A_CALL)), client.begin(ask(3))
        assert (await client.answer(small)).last
        assert lane.volume.pages_made <= MAX_PAGES_A_CALL  # answered in the middle of the other
        assert len(await client.images(large)) == MAX_PAGES_A_CALL // MAX_PAGES_A_MESSAGE
        assert lane.volume.pages_made == MAX_PAGES_A_CALL + 1


async def test_a_call_waits_no_longer_than_its_caller(lane: Lane) -> None:
    async with page_lane_client(lane.port) as client:
        with pytest.raises(errors.NotIndexedYet) as raised:
            await client.images(client.begin(ask(lsn=LATER), within_s=0.05))
        assert raised.value.details == {"indexed_lsn": INDEXED}
        await check(client)


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (errors.NotMaterializable("no redo"), errors.NotMaterializable),
        (errors.StaleEpoch("old", promised_epoch=4), errors.StaleEpoch),
        (ZeroDivisionError("a bug"), errors.Internal),
    ],
)
async def test_a_failure_is_told_and_the_connection_goes_on(
    lane: Lane, failure: Exception, told: type[BorealError]
) -> None:
    async with page_lane_client(lane.port) as client:
        lane.volume.failure = failure
        with pytest.raises(told) as raised:
            await client.images(client.begin(ask()))
        assert raised.value.details == getattr(failure, "details", {})
        lane.volume.failure = None
        await check(client)


async def test_a_call_that_is_taken_back_ends(lane: Lane) -> None:
    async with page_lane_client(lane.port) as client:
        late = [client.begin(ask(lsn=LATER)) for _ in range(3)]
        await until(lambda: lane.volume.waiting == 3)
        client.cancel(late[1])
        await until(lambda: lane.volume.waiting == 2)
        client.cancel(client.begin(ask(lsn=LATER)))  # before it began
        client.cancel(99)  # never was
        lane.volume.reached.set()
        await client.images(late[0])
        await client.images(late[2])
        await check(client)
        assert not client.answered


async def test_calls_end_with_their_connection(lane: Lane) -> None:
    async with page_lane_client(lane.port) as client:
        client.begin(ask(lsn=LATER))
        await until(lambda: lane.volume.waiting == 1)
    await until(lambda: lane.volume.waiting == 0 and not lane.server.open)


async def test_calls_end_with_the_server(lane: Lane) -> None:
    async with page_lane_client(lane.port) as client:
        call = client.begin(ask(lsn=LATER))
        await until(lambda: lane.volume.waiting == 1)
        await lane.server.stop()
        with pytest.raises(EOFError):
            await client.answer(call)
    assert lane.volume.waiting == 0


# --- bounds -------------------------------------------------------------------------------------


async def test_more_calls_than_the_limit_are_refused(lane: Lane) -> None:
    async with page_lane_client(lane.port) as client:
        calls = [client.begin(ask(lsn=LATER)) for _ in range(MAX_CALLS)]
        with pytest.raises(errors.NotNow):
            await client.images(client.begin(ask()))
        assert lane.volume.waiting == MAX_CALLS
        client.cancel(calls[0])
        await until(lambda: lane.volume.waiting == MAX_CALLS - 1)
        await check(client)


def call(number: int, **what: object) -> bytes:
    return frame(storage_pb2.PageCall(call=number, **what).SerializeToString())  # type: ignore[arg-type]


_GARBAGE = {
    "not protobuf": (frame(b"\xff" * 40), errors.MalformedRequest),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", errors.OversizeRequest),
    "oversize": ((MAX_REQUEST_BYTES + 1).to_bytes(4, "big") + b"x", errors.OversizeRequest),
    "neither get nor cancel": (call(5), errors.MalformedRequest),
    "call 0": (call(0, get=ask()), errors.MalformedRequest),
    "a number twice": (
        call(7, get=ask(lsn=LATER)) + call(7, get=ask()),
        errors.MalformedRequest,
    ),
}


@pytest.mark.parametrize(("data", "refusal"), _GARBAGE.values(), ids=_GARBAGE.keys())
async def test_garbage_is_answered_and_hung_up_on(
    lane: Lane, data: bytes, refusal: type[BorealError]
) -> None:
    async with page_lane_client(lane.port) as good, page_lane_client(lane.port) as bad:
        await check(bad)
        bad.send(data)
        answer = await bad.answer(0)
        assert isinstance(error_from_wire(answer.error), refusal)
        with pytest.raises(EOFError):
            await bad.answer(0)
        await check(good)
        await until(lambda: len(lane.server.open) == 1)
        assert lane.volume.waiting == 0


async def test_a_peer_that_does_not_read_has_little_made_for_it(lane: Lane) -> None:
    async with page_lane_client(lane.port) as good, page_lane_client(lane.port) as slow:
        calls = [slow.begin(ask(0, MAX_PAGES_A_CALL)) for _ in range(50)]
        before = -1
        while before != lane.volume.pages_made:  # until it stands still
            before = lane.volume.pages_made
            await check(good)
            before += 1  # the page of `check`
            for _ in range(50):
                await asyncio.sleep(0)
        made = lane.volume.pages_made
        # A message of each, and what sockets, stream and write buffer hold.
        assert made <= (50 + 32) * MAX_PAGES_A_MESSAGE
        await check(good)
        for each in calls:  # and when it reads, all of it comes
            assert len(await slow.images(each)) == MAX_PAGES_A_CALL // MAX_PAGES_A_MESSAGE


async def test_connections_over_the_limit_are_closed(lane: Lane) -> None:
    with ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS):
            peer = stack.enter_context(socket.socket())
            peer.setblocking(False)
            await asyncio.get_running_loop().sock_connect(peer, ("127.0.0.1", lane.port))
        await until(lambda: len(lane.server.open) == MAX_CONNECTIONS)
        async with page_lane_client(lane.port) as client:
            with pytest.raises((EOFError, ConnectionError)):
                await client.images(client.begin(ask()))


async def test_a_taken_port_is_told(lane: Lane) -> None:
    async with asyncio.TaskGroup() as tasks:
        other = page_lane(cast("PageVolumes", Volumes(lane.volume)), tasks)
        with pytest.raises(errors.BadUsage, match="cannot listen"):
            await other.start("127.0.0.1", lane.port)
