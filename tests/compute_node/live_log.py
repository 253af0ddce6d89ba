"""Writers that are followed, and readers that follow them: both over real gRPC, in this process.

A writer here is what the agent has of one: the shipper's window and a publisher. Storage nodes are
FleetNodes that hold its log.
"""

# ruff: noqa: N802 - the methods are named as the calls are

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, NoReturn

from boreal.quorum import Lineage
from boreal.rpc import compute_pb2, compute_pb2_grpc
from boreal.rpc.edge import make_server, volume_ref
from boreal.types import Epoch, InstanceName, Lsn, VolumeId
from boreal.wal import Rmgr
from compute_node.fleet import Fleet
from compute_node.follower import Follower, Progress
from compute_node.log_source import LogSource, view_log
from compute_node.publisher import Publisher
from compute_node.shipping.window import LogWindow
from tests.compute_node.fleet_node import LOG_START, FleetNode, running
from tests.support.wal_builder import WalBuilder, body

VOLUME = VolumeId("v")
WINDOW_BYTES = 32 * 1024 * 1024
LIMIT_S = 20


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.002)


class WrittenLog:
    """A log that grows by records, and where they end."""

    def __init__(self) -> None:
        self._builder = WalBuilder(LOG_START)
        self.ends = [LOG_START]

    def write(self, *lengths: int) -> Lsn:
        """Add records with so much data; return the end of the last."""
        for number, length in enumerate(lengths):
            content = bytes([(len(self.ends) + number) % 256]) * length
            self.ends.append(self._builder.add(Rmgr.LOGICALMSG, 0, body(content))[1])
        return self.end

    @property
    def data(self) -> bytes:
        return bytes(self._builder.data)

    @property
    def end(self) -> Lsn:
        return self.ends[-1]

    def bytes_at(self, start: int, end: int) -> bytes:
        return bytes(memoryview(self._builder.data)[start - LOG_START : end - LOG_START])


class LiveWriter(compute_pb2_grpc.ComputeServicer):
    """A writer incarnation that begins at `start`, with the Follow of its agent's service."""

    def __init__(
        self, log: WrittenLog, *, epoch: int = 1, start: Lsn = LOG_START, **clock: Any
    ) -> None:
        self.log = log
        self.epoch = Epoch(epoch)
        self.window = LogWindow(start, WINDOW_BYTES)
        self.publisher = Publisher(VOLUME, self.epoch, start, self.window, **clock)
        self.address = ""

    def push(self) -> Lsn:
        """Take in what was written since; nothing more of it is durable yet."""
        end = self.log.end
        while self.window.end < end:
            upto = min(end, self.window.end + 1024 * 1024)
            self.window.push(self.window.end, self.log.bytes_at(self.window.end, upto))
            self.window.raise_floor(self.window.end)
        return end

    def commit(self, *lengths: int) -> Lsn:
        """Write records and have them durable."""
        self.log.write(*lengths)
        end = self.push()
        self.publisher.durable(end)
        return end

    async def Follow(
        self, request_iterator: AsyncIterator[compute_pb2.FollowerReport], context: Any
    ) -> AsyncIterator[compute_pb2.LogPiece]:
        async for piece in self.publisher.follow(request_iterator):
            yield piece

    async def GetStatus(self, request: Any, context: Any) -> compute_pb2.ComputeStatus:
        raise AssertionError("nobody asks")

    async def TakeBundle(self, request: Any, context: Any) -> compute_pb2.TakeBundleResponse:
        raise AssertionError("nobody asks")

    async def Verify(self, request: Any, context: Any) -> AsyncIterator[compute_pb2.VerifyEvent]:
        raise AssertionError("nobody asks")
        yield  # makes it a stream

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[LiveWriter]:
        server = make_server()
        compute_pb2_grpc.add_ComputeServicer_to_server(self, server)
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            yield self
        finally:
            await server.stop(None)


def report(epoch: int = 1, start: int = LOG_START, **others: Any) -> compute_pb2.FollowerReport:
    """A first report."""
    others = {"instance": "db-2", "volume": volume_ref(VOLUME, epoch), "from_lsn": start, **others}
    return compute_pb2.FollowerReport(**others)


class Storage:
    """Three storage nodes, a read quorum, that hold a log."""

    def __init__(self, log: WrittenLog) -> None:
        self.log = log
        self.nodes = [FleetNode(f"sn-{number}") for number in range(1, 4)]

    def hold(self, upto: Lsn, *, vdl: Lsn | None = None) -> None:
        """They have the log up to there, and were told that `vdl` (else all of it) is durable."""
        for node in self.nodes:
            node.log = self.log.bytes_at(LOG_START, upto)
            node.state = replace(node.state, scl=upto, vdl=upto if vdl is None else vdl)

    def adopt(self, lineage: Lineage) -> None:
        """A recovery: they promise the lineage's epoch and follow it."""
        for node in self.nodes:
            node.state = node.state.adopt(lineage.last.epoch, lineage)
            node.log = node.log[: node.state.scl - LOG_START]

    def asked(self, call: str) -> int:
        return sum(node.calls.count(call) for node in self.nodes)


class LiveReader:
    """A reader: its source and its follower, with `poll` and `run` under way."""

    def __init__(self, source: LogSource, fleet: Fleet, silence_s: float) -> None:
        self._tasks: list[asyncio.Task[NoReturn]] = []
        self.source = source
        self.fleet = fleet
        self.progress = Progress(replay=LOG_START, floor=LOG_START, oldest_xmin=0, lag_us=0)
        self.follower = Follower(
            InstanceName("db-2"), VOLUME, source, lambda: self.progress, silence_s=silence_s
        )

    def begin(self) -> None:
        """Do what a reader does."""
        for work in (self.source.poll(), self.follower.run()):
            self._tasks.append(asyncio.create_task(work))

    async def ended(self) -> None:
        """Wait until something ends it, and raise that."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            self._tasks.remove(task)
            task.result()

    async def end(self) -> None:
        """Do it no longer; raise what ended it before."""
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if not isinstance(outcome, asyncio.CancelledError):
                raise outcome
        self._tasks.clear()

    async def log(self, start: Lsn = LOG_START, *, step: int = 128 * 1024) -> bytes:
        """All that may be read, as the feed reads it."""
        log = bytearray()
        while start + len(log) < self.source.durable:
            at = Lsn(start + len(log))
            log += await self.source.read(at, min(self.source.durable, Lsn(at + step)))
        return bytes(log)


@asynccontextmanager
async def reading(storage: Storage, *, silence_s: float = 3.0) -> AsyncIterator[LiveReader]:
    """A reader of a volume, restored from a bundle at its beginning."""
    fleet = Fleet(VOLUME, Epoch(1))
    try:
        async with asyncio.timeout(LIMIT_S), running(*storage.nodes) as members:
            await fleet.set_members(members)
            positions = await fleet.positions(within_s=LIMIT_S)
            view = view_log(positions)
            source = LogSource(fleet, view, durable=LOG_START)
            reader = LiveReader(source, fleet, silence_s)
            reader.begin()
            try:
                yield reader
            finally:
                await reader.end()
    finally:
        await fleet.close()
