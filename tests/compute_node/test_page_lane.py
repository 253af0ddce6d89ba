"""Goal: a call to a node's lane ends once, in time, with its pages or with the error that tells
what happened; nothing is left by callers who go, or by a node that goes, hangs or talks nonsense.

Method: real sockets; a node in this process that answers as the test says.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from boreal.errors import (
    BorealError,
    CorruptData,
    Internal,
    NotNow,
    StaleEpoch,
    UnknownOutcome,
    Unreachable,
)
from boreal.frames import MAX_FRAME_BYTES
from boreal.rpc import common_pb2, storage_pb2
from boreal.rpc.edge import error_to_wire
from boreal.types import PAGE_BYTES, NodeName
from compute_node.page_lane import MAX_CALLS, PageLane
from tests.compute_node.fake_lane import FakeLane

LIMIT_S = 20.0


def page(block: int) -> bytes:
    return bytes([block % 256]) * PAGE_BYTES


class Node:
    """Every third block does not exist. `HELD` and later ones wait until `released`."""

    HELD = 1000

    def __init__(self) -> None:
        self.lane = FakeLane(self.get_pages)
        self.released = asyncio.Event()
        self.waiting = 0
        self.failure: BorealError | None = None

    async def get_pages(
        self, request: storage_pb2.GetPagesRequest
    ) -> AsyncIterator[storage_pb2.PageImages]:
        if self.failure is not None:
            raise self.failure
        if request.first_block >= self.HELD:
            self.waiting += 1
            try:
                await self.released.wait()
            finally:
                self.waiting -= 1
        for at in range(request.first_block, request.first_block + request.count, 128):
            blocks = range(at, min(at + 128, request.first_block + request.count))
            yield storage_pb2.PageImages(
                first_block=at,
                pages=b"".join(page(b) if b % 3 else bytes(PAGE_BYTES) for b in blocks),
                exists=[b % 3 > 0 for b in blocks],
            )


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Node, PageLane]]:
    node = Node()
    await node.lane.start()
    lane = PageLane(NodeName("sn-1"), f"127.0.0.1:{node.lane.port}")
    try:
        yield node, lane
    finally:
        await lane.close()
        await node.lane.stop()


def ask(first: int, count: int = 1) -> storage_pb2.GetPagesRequest:
    return storage_pb2.GetPagesRequest(
        fork=common_pb2.RelationFork(relation=5), first_block=first, count=count
    )


def expected(first: int, count: int = 1) -> list[bytes | None]:
    return [page(b) if b % 3 else None for b in range(first, first + count)]


async def until(condition: object) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.005)


def under_way(lane: PageLane) -> int:
    return 0 if lane._connection is None else len(lane._connection._calls)


# --- answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 128, 1024])
async def test_pages_come_as_they_are(count: int) -> None:
    async with serving() as (_node, lane):
        for first in (0, 1):
            assert await lane.get_pages(ask(first, count), LIMIT_S) == expected(first, count)
        assert not under_way(lane)


async def test_many_calls_share_a_connection_and_end_in_any_order() -> None:
    async with serving() as (node, lane):
        held = asyncio.ensure_future(lane.get_pages(ask(node.HELD), LIMIT_S))
        numbers = range(200)
        found = await asyncio.gather(*(lane.get_pages(ask(n, 3), LIMIT_S) for n in numbers))
        assert found == [expected(n, 3) for n in numbers]
        assert not held.done()
        node.released.set()
        assert await held == expected(node.HELD)
        assert len(node.lane.peers) == 1
        assert not under_way(lane)


async def test_the_nodes_error_is_raised() -> None:
    async with serving() as (node, lane):
        node.failure = StaleEpoch("old", promised_epoch=7)
        with pytest.raises(StaleEpoch) as raised:
            await lane.get_pages(ask(1), LIMIT_S)
        assert raised.value.details == {"promised_epoch": 7}
        node.failure = None
        assert await lane.get_pages(ask(1), LIMIT_S) == expected(1)


_WRONG = {
    "another block": {"first_block": 2, "pages": page(2), "exists": [True]},
    "half a page": {"first_block": 1, "pages": b"half", "exists": [True]},
    "too many": {"first_block": 1, "pages": page(1) * 2, "exists": [True, True]},
    "none": {"first_block": 1},
}


@pytest.mark.parametrize("images", _WRONG.values(), ids=_WRONG.keys())
async def test_pages_that_were_not_asked_for_are_corrupt(images: dict[str, object]) -> None:
    async def wrong(
        _request: storage_pb2.GetPagesRequest,
    ) -> AsyncIterator[storage_pb2.PageImages]:
        yield storage_pb2.PageImages(**images)  # type: ignore[arg-type]

    async with serving() as (node, lane):
        right, node.lane._get_pages = node.lane._get_pages, wrong
        with pytest.raises(CorruptData):
            await lane.get_pages(ask(1), LIMIT_S)
        assert not under_way(lane)
        node.lane.peers[0]._get_pages = right
        assert await lane.get_pages(ask(1), LIMIT_S) == expected(1)


async def test_too_few_pages_are_corrupt() -> None:
    async with serving() as (node, lane):
        calling = asyncio.ensure_future(lane.get_pages(ask(node.HELD, 5), LIMIT_S))
        await until(lambda: node.waiting)
        short = storage_pb2.PageAnswer(call=1, last=True)
        short.images.first_block = node.HELD
        short.images.pages = page(1)
        short.images.exists.append(True)
        node.lane.peers[0].send(short)
        with pytest.raises(CorruptData):
            await calling


# --- callers that go ----------------------------------------------------------------------------


async def test_a_deadline_passes_and_the_node_is_told() -> None:
    async with serving() as (node, lane):
        with pytest.raises(UnknownOutcome):
            await lane.get_pages(ask(node.HELD), 0.05)
        assert not under_way(lane)
        await until(lambda: node.lane.peers[0].cancelled == [1])
        await until(lambda: not node.waiting)
        assert await lane.get_pages(ask(1), LIMIT_S) == expected(1)
        assert len(node.lane.peers) == 1  # over the same connection


async def test_a_caller_that_is_cancelled_leaves_nothing() -> None:
    async with serving() as (node, lane):
        calling = [
            asyncio.ensure_future(lane.get_pages(ask(node.HELD + n), LIMIT_S)) for n in range(5)
        ]
        await until(lambda: node.waiting == 5)
        for task in calling[1:]:
            task.cancel()
        ended = await asyncio.gather(*calling[1:], return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in ended)
        assert under_way(lane) == 1
        await until(lambda: node.waiting == 1)
        node.released.set()
        assert await calling[0] == expected(node.HELD)
        assert not under_way(lane)


async def test_an_answer_that_nobody_waits_for_is_dropped() -> None:
    async with serving() as (node, lane):
        with pytest.raises(UnknownOutcome):
            await lane.get_pages(ask(node.HELD), 0.01)
        late = storage_pb2.PageAnswer(call=1, last=True)
        late.images.exists.append(False)
        node.lane.peers[0].send(late)
        assert await lane.get_pages(ask(1), LIMIT_S) == expected(1)


async def test_a_caller_cancelled_while_it_connects_spoils_nothing() -> None:
    async with serving() as (_node, lane):
        first = asyncio.ensure_future(lane.get_pages(ask(1), LIMIT_S))
        second = asyncio.ensure_future(lane.get_pages(ask(2), LIMIT_S))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == expected(2)


async def test_more_calls_than_the_limit_are_refused() -> None:
    async with serving() as (node, lane):
        held = [
            asyncio.ensure_future(lane.get_pages(ask(node.HELD), LIMIT_S)) for _ in range(MAX_CALLS)
        ]
        await until(lambda: node.waiting == MAX_CALLS)
        with pytest.raises(NotNow):
            await lane.get_pages(ask(1), LIMIT_S)
        node.released.set()
        await asyncio.gather(*held)
        assert await lane.get_pages(ask(1), LIMIT_S) == expected(1)


# --- nodes that go ------------------------------------------------------------------------------


async def test_a_node_that_is_killed_and_comes_back_is_found_again() -> None:
    async with serving() as (node, lane):
        assert await lane.get_pages(ask(1), LIMIT_S) == expected(1)
        calling = [asyncio.ensure_future(lane.get_pages(ask(node.HELD), LIMIT_S)) for _ in range(3)]
        await until(lambda: node.waiting == 3)
        port = node.lane.port
        await node.lane.stop()
        for each in await asyncio.gather(*calling, return_exceptions=True):
            assert isinstance(each, UnknownOutcome)
        with pytest.raises(Unreachable):
            await lane.get_pages(ask(1), LIMIT_S)
        await node.lane.start(port)
        assert await lane.get_pages(ask(1), LIMIT_S) == expected(1)
        assert not under_way(lane)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "", "nonsense", "127.0.0.1:x", "127.0.0.1:99999"]
)
async def test_an_address_where_nobody_is(address: str) -> None:
    lane = PageLane(NodeName("sn-1"), address)
    found = await asyncio.gather(
        *(lane.get_pages(ask(1), LIMIT_S) for _ in range(3)), return_exceptions=True
    )
    assert all(isinstance(each, Unreachable) for each in found)
    await lane.close()


async def test_a_node_that_takes_no_connection_is_given_up_in_time() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        fillers = [socket.socket() for _ in range(4)]  # what the kernel would take by itself
        for each in fillers:
            each.setblocking(False)
            each.connect_ex(address)
        lane = PageLane(NodeName("sn-1"), f"127.0.0.1:{address[1]}")
        with pytest.raises(Unreachable):
            await lane.get_pages(ask(1), 0.1)
        await lane.close()
        assert lane._connecting is None
        for each in fillers:
            each.close()


_NONSENSE = {
    "not protobuf": (b"\x00\x00\x00\x04\xff\xff\xff\xff", CorruptData),
    "oversize": ((MAX_FRAME_BYTES + 1).to_bytes(4, "big"), CorruptData),
    "HTTP": (b"HTTP/1.1 400 Bad Request\r\n", CorruptData),
}


@pytest.mark.parametrize(("data", "error"), _NONSENSE.values(), ids=_NONSENSE.keys())
async def test_nonsense_ends_the_connection_and_the_next_call_makes_another(
    data: bytes, error: type[BorealError]
) -> None:
    async with serving() as (node, lane):
        calling = [asyncio.ensure_future(lane.get_pages(ask(node.HELD), LIMIT_S)) for _ in range(2)]
        await until(lambda: node.waiting == 2)
        node.lane.peers[0].transport.write(data)
        for each in await asyncio.gather(*calling, return_exceptions=True):
            assert isinstance(each, error)
        assert await lane.get_pages(ask(1), LIMIT_S) == expected(1)
        assert len(node.lane.peers) == 2


async def test_a_node_that_does_not_follow_says_why() -> None:
    async with serving() as (node, lane):
        calling = asyncio.ensure_future(lane.get_pages(ask(node.HELD), LIMIT_S))
        await until(lambda: node.waiting)
        wire = error_to_wire(NotNow("not in the mood"))
        node.lane.peers[0].send(storage_pb2.PageAnswer(call=0, error=wire, last=True))
        with pytest.raises(Internal, match="not in the mood"):
            await calling


async def test_a_node_that_reads_nothing_is_not_written_to_without_end() -> None:
    async with serving() as (node, lane):
        await lane.get_pages(ask(1), LIMIT_S)
        peer = node.lane.peers[0]
        peer.transport.pause_reading()
        connection = lane._connection
        assert connection is not None
        large = ask(1)
        large.volume.volume_id = "v" * 200_000
        async with asyncio.timeout(LIMIT_S):
            while not connection._stuck:
                with pytest.raises(UnknownOutcome):
                    await lane.get_pages(large, 0.0)
        with pytest.raises(Unreachable):
            await lane.get_pages(ask(1), LIMIT_S)
        assert not under_way(lane)
        peer.transport.resume_reading()
        await until(lambda: not connection._stuck)
        assert await lane.get_pages(ask(1), LIMIT_S) == expected(1)


async def test_closing_gives_calls_their_grace() -> None:
    async with serving() as (node, lane):
        calling = [asyncio.ensure_future(lane.get_pages(ask(node.HELD), LIMIT_S)) for _ in range(2)]
        await until(lambda: node.waiting == 2)
        closing = asyncio.create_task(lane.close(grace_s=LIMIT_S))
        await asyncio.sleep(0)
        with pytest.raises(Unreachable):
            await lane.get_pages(ask(1), LIMIT_S)
        node.released.set()
        await closing
        assert await asyncio.gather(*calling) == [expected(node.HELD)] * 2


async def test_closing_without_grace_ends_calls() -> None:
    async with serving() as (node, lane):
        calling = asyncio.ensure_future(lane.get_pages(ask(node.HELD), LIMIT_S))
        await until(lambda: node.waiting)
        await lane.close()
        with pytest.raises(UnknownOutcome):
            await calling
        await until(lambda: not node.waiting)
