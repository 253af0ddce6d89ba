"""Goal: an error raised in a handler is the same at the caller, and every other way a call can end
is told as what it is: refused, failed, or of unknown outcome.

Method: one real gRPC server with a handler of each of the four kinds that does what the test says,
one real channel to it; every class of the error tree goes through each.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from boreal.errors import (
    BY_CODE,
    BorealError,
    EngineError,
    Internal,
    LogGap,
    MalformedRequest,
    QuorumUnavailable,
    UnknownOutcome,
    Unreachable,
)
from boreal.quorum import Lineage
from boreal.rpc import common_pb2, compute_pb2, compute_pb2_grpc, storage_pb2, storage_pb2_grpc
from boreal.rpc.edge import (
    calling,
    error_from_wire,
    error_to_wire,
    fork_from_wire,
    fork_to_wire,
    lineage_from_wire,
    lineage_to_wire,
    make_server,
    open_channel,
)
from boreal.types import Fork, RelationFork

_DEADLINE_S = 5.0
_Do = Callable[[Any], Awaitable[None]]
KINDS = sorted(BY_CODE.values(), key=lambda kind: kind.__name__)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


class FutureError(BorealError):
    """As a peer of a later version might raise: this one's table does not have it."""

    status = "ABORTED"


async def _nothing(_context: Any) -> None:
    pass


@dataclass(eq=False)
class Peer:
    """Does what it is told in a handler of each kind, after one answer where it streams."""

    do: _Do = _nothing
    entered: asyncio.Event = field(default_factory=asyncio.Event)

    def add_to(self, server: grpc.aio.Server) -> None:
        log = {
            "Fence": grpc.unary_unary_rpc_method_handler(
                self.fence,
                storage_pb2.FenceRequest.FromString,
                storage_pb2.Position.SerializeToString,
            ),
            "GetLog": grpc.unary_stream_rpc_method_handler(
                self.get_log,
                storage_pb2.GetLogRequest.FromString,
                storage_pb2.LogChunk.SerializeToString,
            ),
            "Append": grpc.stream_stream_rpc_method_handler(
                self.append,
                storage_pb2.AppendRequest.FromString,
                storage_pb2.AppendResponse.SerializeToString,
            ),
        }
        bundles = {
            "PutContent": grpc.stream_unary_rpc_method_handler(
                self.put_content,
                storage_pb2.PutContentRequest.FromString,
                storage_pb2.PutContentResponse.SerializeToString,
            )
        }
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler("boreal.StorageLog", log),
                grpc.method_handlers_generic_handler("boreal.Bundles", bundles),
            )
        )

    async def _do(self, context: Any) -> None:
        self.entered.set()
        await self.do(context)

    async def fence(self, request: Any, context: Any) -> storage_pb2.Position:
        await self._do(context)
        return storage_pb2.Position(scl=7)

    async def get_log(self, request: Any, context: Any) -> AsyncIterator[storage_pb2.LogChunk]:
        yield storage_pb2.LogChunk(data=b"first")
        await self._do(context)
        yield storage_pb2.LogChunk(data=b"second")

    async def put_content(
        self, request_iterator: AsyncIterator[Any], context: Any
    ) -> storage_pb2.PutContentResponse:
        async for _ in request_iterator:
            await self._do(context)
        return storage_pb2.PutContentResponse()

    async def append(
        self, request_iterator: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[storage_pb2.AppendResponse]:
        async for _ in request_iterator:
            yield storage_pb2.AppendResponse()
            await self._do(context)


def raising(error: Exception) -> _Do:
    async def do(_context: Any) -> None:
        raise error

    return do


async def hanging(_context: Any) -> None:
    await asyncio.Event().wait()


# --- calls of each kind --------------------------------------------------------------------------


@dataclass(frozen=True)
class Caller:
    """A channel, with one call of each kind. Each returns what came before the call failed."""

    log: Any
    bundles: Any

    async def unary(self, got: list[Any], timeout_s: float) -> None:
        got.append(await self.log.Fence(storage_pb2.FenceRequest(), timeout=timeout_s))

    async def stream_out(self, got: list[Any], timeout_s: float) -> None:
        async for chunk in self.log.GetLog(storage_pb2.GetLogRequest(), timeout=timeout_s):
            got.append(chunk)  # noqa: PERF401 - kept when the stream fails on the way

    async def stream_in(self, got: list[Any], timeout_s: float) -> None:
        requests = iter([storage_pb2.PutContentRequest()])
        got.append(await self.bundles.PutContent(requests, timeout=timeout_s))

    async def stream_both(self, got: list[Any], timeout_s: float) -> None:
        requests = iter([storage_pb2.AppendRequest()])
        async for response in self.log.Append(requests, timeout=timeout_s):
            got.append(response)  # noqa: PERF401 - kept when the stream fails on the way


CALLS = {
    "unary": (Caller.unary, 0, 1),
    "stream out": (Caller.stream_out, 1, 2),
    "stream in": (Caller.stream_in, 0, 1),
    "stream both": (Caller.stream_both, 1, 1),
}
"""By name: the call, and how many answers come before it fails and when it does not."""
every_call = pytest.mark.parametrize("name", CALLS)


@asynccontextmanager
async def calls_to(address: str) -> AsyncIterator[Caller]:
    channel = open_channel(address)
    try:
        log: Any = storage_pb2_grpc.StorageLogStub(channel)
        yield Caller(log=log, bundles=storage_pb2_grpc.BundlesStub(channel))
    finally:
        await channel.close(None)


@asynccontextmanager
async def serving(peer: Peer) -> AsyncIterator[str]:
    server = make_server()
    peer.add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def failure(
    caller: Caller, name: str = "unary", *, timeout_s: float = _DEADLINE_S
) -> BorealError:
    call, before, _ = CALLS[name]
    got: list[Any] = []
    with pytest.raises(BorealError) as raised, calling("sn-1", name):
        await call(caller, got, timeout_s)
    assert len(got) == before
    return raised.value


@every_call
async def test_a_call_that_succeeds_is_left_alone(name: str) -> None:
    call, _, answers = CALLS[name]
    got: list[Any] = []
    async with serving(Peer()) as address, calls_to(address) as caller:
        with calling("sn-1", name):
            await call(caller, got, _DEADLINE_S)
    assert len(got) == answers


# --- our own errors -----------------------------------------------------------------------------


@every_kind
def test_every_error_survives_inside_a_message(kind: type[BorealError]) -> None:
    sent = kind("what happened: «ähm»\nand what to do", scl=2**63, promised_epoch=0)
    wire = common_pb2.Error.FromString(error_to_wire(sent).SerializeToString())
    got = error_from_wire(wire)
    assert type(got) is kind
    assert (got.message, got.details) == (sent.message, sent.details)


async def test_every_error_survives_as_a_status_of_every_kind_of_call() -> None:
    peer = Peer()
    async with serving(peer) as address, calls_to(address) as caller:
        for kind in KINDS:
            sent = kind("what happened: «ähm»\nand what to do", scl=2**63, promised_epoch=0)
            peer.do = raising(sent)
            for name in CALLS:
                got = await failure(caller, name)
                assert type(got) is kind, name
                assert (got.message, got.details) == (sent.message, sent.details)


@every_kind
def test_every_error_maps_to_a_status_there_is(kind: type[BorealError]) -> None:
    assert getattr(grpc.StatusCode, kind.status) is not grpc.StatusCode.OK


async def test_the_status_is_the_errors_own() -> None:
    peer = Peer(raising(LogGap("send from there", scl=5)))
    async with serving(peer) as address, calls_to(address) as caller:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await caller.log.Fence(storage_pb2.FenceRequest(), timeout=_DEADLINE_S)
    assert raised.value.code() is grpc.StatusCode.OUT_OF_RANGE
    assert raised.value.details() == "send from there"


def test_a_sqlstate_stays_at_home() -> None:
    got = error_from_wire(error_to_wire(EngineError("no such slot", sqlstate="42704")))
    assert isinstance(got, EngineError)
    assert (got.message, got.sqlstate) == ("no such slot", "")


@every_call
async def test_an_error_of_a_later_version_is_internal(name: str) -> None:
    peer = Peer(raising(FutureError("new here")))
    async with serving(peer) as address, calls_to(address) as caller:
        got = await failure(caller, name)
    assert type(got) is Internal
    assert got.message == "FutureError: new here"


def test_an_unknown_code_inside_a_message_is_internal() -> None:
    for code in ("FutureError", "", "Exception"):
        got = error_from_wire(common_pb2.Error(code=code, message="new here"))
        assert type(got) is Internal
        assert "new here" in got.message


async def test_an_error_with_much_to_say_keeps_its_class() -> None:
    peer = Peer(raising(QuorumUnavailable("reason; " * 2500, needed=4)))
    async with serving(peer) as address, calls_to(address) as caller:
        assert type(await failure(caller)) is QuorumUnavailable


# --- everything else ----------------------------------------------------------------------------


@every_call
async def test_an_unexpected_exception_is_internal(name: str) -> None:
    peer = Peer(raising(KeyError("missing")))
    async with serving(peer) as address, calls_to(address) as caller:
        got = await failure(caller, name)
        assert type(got) is Internal
        assert got.message == "KeyError: 'missing'"
        peer.do = _nothing  # and the server goes on
        await caller.unary([], _DEADLINE_S)


@every_call
async def test_a_deadline_that_passes_is_an_unknown_outcome(name: str) -> None:
    async with serving(Peer(hanging)) as address, calls_to(address) as caller:
        got = await failure(caller, name, timeout_s=0.2)
    assert type(got) is UnknownOutcome
    assert "sn-1" in got.message


@every_call
async def test_a_peer_nobody_listens_at_is_unreachable(name: str) -> None:
    with socket.socket() as bound:  # held, so that no one else takes the port
        bound.bind(("127.0.0.1", 0))
        async with calls_to(f"127.0.0.1:{bound.getsockname()[1]}") as caller:
            call, _, _ = CALLS[name]
            with pytest.raises(Unreachable, match="sn-1"), calling("sn-1", name):
                await call(caller, [], _DEADLINE_S)


async def test_a_peer_that_comes_back_is_found_again() -> None:
    async with serving(Peer()) as address, calls_to(address) as caller:
        await caller.unary([], _DEADLINE_S)
    async with calls_to(address) as caller:
        with pytest.raises(Unreachable), calling("sn-1", "Fence"):
            await caller.unary([], _DEADLINE_S)
        server = make_server()
        Peer().add_to(server)
        assert server.add_insecure_port(address)
        await server.start()
        got: list[Any] = []
        async with asyncio.timeout(_DEADLINE_S):
            while not got:
                with suppress(Unreachable), calling("sn-1", "Fence"):
                    await caller.unary(got, _DEADLINE_S)
                await asyncio.sleep(0.02)
        await server.stop(None)


async def test_a_call_the_peer_does_not_know_is_internal() -> None:
    async with serving(Peer()) as address:
        channel = open_channel(address)
        unknown: Any = channel.unary_unary("/boreal.StorageLog/Repaint", None, None)
        with pytest.raises(Internal, match="UNIMPLEMENTED"), calling("sn-1", "Repaint"):
            await unknown(b"", timeout=_DEADLINE_S)
        await channel.close(None)


async def test_a_status_set_by_hand_is_passed_on() -> None:
    async def abort(context: Any) -> None:
        await context.abort(grpc.StatusCode.NOT_FOUND, "by hand")

    async with serving(Peer(abort)) as address, calls_to(address) as caller:
        for name in CALLS:
            got = await failure(caller, name)
            assert type(got) is Internal
            assert "NOT_FOUND: by hand" in got.message


async def test_a_caller_that_gives_up_ends_the_handler() -> None:
    ended = asyncio.Event()

    async def until_cancelled(_context: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    peer = Peer(until_cancelled)
    async with serving(peer) as address, calls_to(address) as caller:
        task = asyncio.create_task(caller.unary([], _DEADLINE_S))
        async with asyncio.timeout(_DEADLINE_S):
            await peer.entered.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await ended.wait()


async def test_a_cancellation_is_never_lost() -> None:
    """At whatever moment of a call that fails it comes. Without help gRPC loses one in 25."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{silent.getsockname()[1]}"

        async def reports() -> AsyncIterator[compute_pb2.FollowerReport]:
            yield compute_pb2.FollowerReport()
            await asyncio.Event().wait()

        async def again_and_again() -> None:
            async with open_channel(address) as channel:
                stub = compute_pb2_grpc.ComputeStub(channel)
                while True:
                    with suppress(BorealError), calling(address, "Follow"):
                        call = stub.Follow(reports())
                        try:
                            await anext(aiter(call))
                        finally:
                            call.cancel()
                    await asyncio.sleep(0)

        chance = random.Random(5)
        for _ in range(200):
            task = asyncio.create_task(again_and_again())
            await asyncio.sleep(0.01 * chance.random())
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                async with asyncio.timeout(_DEADLINE_S):
                    await task


async def test_a_connection_that_breaks_under_a_call_is_an_unknown_outcome() -> None:
    peer = Peer(hanging)
    async with (
        serving(peer) as address,
        cuttable(address) as (front, cut),
        calls_to(front) as caller,
    ):
        task = asyncio.create_task(failure(caller))
        await asyncio.wait_for(peer.entered.wait(), _DEADLINE_S)
        cut()
        assert type(await task) is UnknownOutcome


@asynccontextmanager
async def cuttable(address: str) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """A way to `address` whose connections can be cut."""
    host, _, port = address.partition(":")
    writers: list[asyncio.StreamWriter] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward, backward = await asyncio.open_connection(host, int(port))
        writers.extend((writer, backward))
        await asyncio.gather(pump(reader, backward), pump(onward, writer))

    def cut() -> None:
        for writer in writers:
            writer.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", cut
    finally:
        cut()
        server.close()
        await server.wait_closed()


# --- types --------------------------------------------------------------------------------------


def test_a_lineage_comes_back() -> None:
    lineage = Lineage.of([(1, 100), (3, 100), (7, 2**63)])
    assert lineage_from_wire(lineage_to_wire(lineage)) == lineage


@pytest.mark.parametrize("pairs", [[], [(2, 100), (1, 200)], [(1, 200), (2, 100)]])
def test_what_is_no_lineage_is_malformed(pairs: list[tuple[int, int]]) -> None:
    wire = [common_pb2.EpochStart(epoch=epoch, start_lsn=start) for epoch, start in pairs]
    with pytest.raises(MalformedRequest):
        lineage_from_wire(wire)


@pytest.mark.parametrize("fork", list(Fork))
def test_a_fork_comes_back(fork: Fork) -> None:
    relation = RelationFork(1663, 5, 2**32 - 1, fork)
    assert fork_from_wire(fork_to_wire(relation)) == relation


def test_a_fork_there_is_not_is_malformed() -> None:
    with pytest.raises(MalformedRequest, match="fork 4"):
        fork_from_wire(common_pb2.RelationFork(fork=4))
