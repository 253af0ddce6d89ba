"""Goal: a hot standby behind the live log has every commit, keeps what its queries see, and goes
over to a new writer's timeline without a restart.

Method: stock PostgreSQL at both ends. A primary's WAL goes, as the writer's does, through WalStream
into a window and to a publisher; the reader's follower, source and feed hand it to a standby. Then
another standby is promoted and takes the first one's place.
"""

# ruff: noqa: N802 - the methods are named as the calls are

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from boreal.quorum import Lineage
from boreal.rpc import storage_pb2
from boreal.types import Epoch, InstanceName, Lsn, Timeline, parse_lsn
from compute_node.feed import Feed
from compute_node.fleet import Fleet
from compute_node.follower import Follower, Progress
from compute_node.log_source import LogSource, view_log
from compute_node.replication_client import TimelineEnd, WalStream
from tests.compute_node.fleet_node import LOG_START, FleetNode, running
from tests.compute_node.live_log import VOLUME, LiveWriter, WrittenLog
from tests.compute_node.stock_standby import FEED_PORT, StockStandby, stock_standby
from tests.support.stock_postgres import StockPostgres, stock_postgres

SLOT = "boreal"


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that may block."""
    async with asyncio.timeout(30):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.01)


def lsn_of(server: StockPostgres, function: str) -> Lsn:
    value = server.run(f"SELECT {function}()::text")[0][0]
    return parse_lsn(value) if value else Lsn(0)


def rows(server: StockPostgres) -> int:
    return int(server.run("SELECT count(*) FROM t")[0][0])


class RealNode(FleetNode):
    """Holds the log of a real PostgreSQL."""

    def __init__(self, name: str, system_identifier: int) -> None:
        super().__init__(name)
        self._system_identifier = system_identifier

    def _position(self) -> storage_pb2.Position:
        position = super()._position()
        position.system_identifier = self._system_identifier
        return position

    async def GetLog(self, request: Any, context: Any) -> AsyncIterator[storage_pb2.LogChunk]:
        await self._enter("GetLog", request.volume)
        data = self.log[request.start_lsn - LOG_START : request.end_lsn - LOG_START]
        for at in range(0, len(data), 1 << 18):
            chunk = data[at : at + (1 << 18)]
            yield storage_pb2.LogChunk(start_lsn=request.start_lsn + at, data=chunk)


class RealLog(WrittenLog):
    """A real PostgreSQL's log, as far as it is known."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._builder.data = bytearray(data)
        self.ends = [Lsn(LOG_START + len(data))]


class RealWriter(LiveWriter):
    """Ships a PostgreSQL's WAL: three storage nodes and the followers have it at once."""

    def __init__(
        self, log: RealLog, nodes: list[RealNode], *, lineage: Lineage, start: Lsn
    ) -> None:
        super().__init__(log, epoch=lineage.last.epoch, start=start)
        self.lineage = lineage
        self.nodes = nodes
        self.stream: WalStream | None = None

    def on_wal(self, start: Lsn, data: bytes) -> None:
        self.window.push(start, data)
        self.window.raise_floor(self.window.end)
        self.log._builder.data += data
        self.log.ends.append(self.window.end)
        for node in self.nodes:
            node.log += data
            state = node.state
            node.state = state.append(self.epoch, start, len(data), self.window.end).state
        if self.stream is not None:
            self.stream.send_status(self.window.end)
        self.publisher.durable(self.window.end)

    @asynccontextmanager
    async def shipping(self, server: StockPostgres) -> AsyncIterator[WalStream]:
        stream = self.stream = await WalStream.connect(
            socket_dir=server.socket_directory, port=5432, user="postgres"
        )
        await stream.ensure_slot(SLOT)
        timeline = self.lineage.timelines()[-1].timeline
        task = asyncio.create_task(
            stream.stream(slot=SLOT, start=self.window.end, timeline=timeline, on_wal=self.on_wal)
        )
        try:
            yield stream
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await stream.close()


class StandbyReader:
    """A standby, its feed, source and follower."""

    def __init__(self, standby: StockStandby, fleet: Fleet, source: LogSource, feed: Feed) -> None:
        self.standby, self.fleet, self.source, self.feed = standby, fleet, source, feed
        self.follower = Follower(
            InstanceName(standby.socket_directory.name), VOLUME, source, self.progress
        )

    @property
    def replayed(self) -> Lsn:
        return max((s.applied for s in self.feed.standbys), default=Lsn(0))

    def progress(self) -> Progress:
        xmin = max((s.oldest_xmin for s in self.feed.standbys), default=0)
        return Progress(replay=self.replayed, floor=self.replayed, oldest_xmin=xmin, lag_us=0)


@asynccontextmanager
async def standing_by(
    standby: StockStandby, members: list[Any], durable: Lsn
) -> AsyncIterator[StandbyReader]:
    fleet = Fleet(VOLUME, Epoch(1))
    await fleet.set_members(members)
    source = LogSource(fleet, view_log(await fleet.positions(within_s=20)), durable=durable)
    feed = await Feed.start(source, socket_dir=standby.socket_directory, port=FEED_PORT)
    reader = StandbyReader(standby, fleet, source, feed)
    tasks = [asyncio.create_task(source.poll()), asyncio.create_task(reader.follower.run())]
    try:
        await asyncio.to_thread(standby.start, {"hot_standby_feedback": "on"})
        yield reader
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await feed.close()
        await asyncio.to_thread(standby.stop)
        await fleet.close()


async def test_a_standby_follows_the_live_log_and_a_new_writer() -> None:
    with stock_postgres({"wal_level": "replica"}) as primary:
        primary.run("CREATE TABLE t (i int)", "INSERT INTO t VALUES (1)", "CHECKPOINT")
        identifier = int(primary.run("SELECT system_identifier FROM pg_control_system()")[0][0])
        primary.stop()
        with stock_standby(primary) as chosen, stock_standby(primary) as other:
            primary.start()
            start = lsn_of(primary, "pg_current_wal_flush_lsn")
            first, wal = primary.wal()
            log = RealLog(wal[LOG_START - first : start - first])
            nodes = [RealNode(f"sn-{number}", identifier) for number in range(1, 4)]
            one = Lineage.of([(1, LOG_START)])
            for node in nodes:
                node.log = log.data
                node.state = node.state.append(Epoch(1), LOG_START, len(log.data), start).state
            async with (
                running(*nodes) as members,
                standing_by(chosen, members, start) as successor,
                standing_by(other, members, start) as reader,
            ):
                writer = RealWriter(log, nodes, lineage=one, start=start)
                async with writer.serving(), writer.shipping(primary) as stream:
                    for each in (successor, reader):
                        each.follower.writer_at(writer.address)
                    await check_commits(primary, reader)
                    await check_feedback(primary, reader, writer, stream)
                    await until(lambda: successor.replayed >= writer.window.end)
                    switch = writer.window.end
                primary.stop()
                await check_the_new_writer(
                    log, nodes, one.extended(Epoch(2), switch), successor, reader
                )


async def check_commits(primary: StockPostgres, reader: StandbyReader) -> None:
    for count in (1, 10, 20_000):
        before = rows(primary)
        await asyncio.to_thread(primary.run, f"INSERT INTO t SELECT generate_series(1, {count})")
        end = await asyncio.to_thread(lsn_of, primary, "pg_current_wal_flush_lsn")
        await until(lambda end=end: reader.source.durable >= end)  # type: ignore[misc]
        # It says so by itself as soon as it has replayed, not with its next status.
        await until(lambda: reader.replayed >= reader.source.durable)
        assert await asyncio.to_thread(rows, reader.standby) == before + count


async def check_feedback(
    primary: StockPostgres, reader: StandbyReader, writer: RealWriter, stream: WalStream
) -> None:
    def kept() -> Any:
        return primary.run(
            f"SELECT xmin::text FROM pg_replication_slots WHERE slot_name = '{SLOT}'"
        )[0][0]

    with reader.standby.connect() as session:
        session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        session.execute("SELECT count(*) FROM t")
        row = session.execute("SELECT pg_snapshot_xmin(pg_current_snapshot())::text").fetchone()
        assert row is not None
        for _ in range(3):
            await asyncio.to_thread(primary.run, "INSERT INTO t VALUES (0)")
        await until(lambda: writer.publisher.oldest_xmin() == int(row[0]))
        stream.send_feedback(writer.publisher.oldest_xmin())
        await until(lambda: kept() == row[0])


async def check_the_new_writer(
    log: RealLog,
    nodes: list[RealNode],
    lineage: Lineage,
    successor: StandbyReader,
    reader: StandbyReader,
) -> None:
    """What the agent does with a new writer, seen from a reader that stays."""
    switch, before, pid = lineage.last.start, rows(reader.standby), reader.standby.pid
    for node in nodes:
        node.state = node.state.adopt(lineage.last.epoch, lineage)
    chosen = successor.standby
    stream = await WalStream.connect(socket_dir=chosen.socket_directory, port=5432, user="postgres")
    await stream.ensure_slot(SLOT)
    former = asyncio.create_task(
        stream.stream(slot=SLOT, start=switch, timeline=Timeline(1), on_wal=None)
    )
    await until(lambda: successor.replayed == switch)
    await asyncio.to_thread(chosen.run, "SELECT pg_promote()")
    ended = await asyncio.wait_for(former, 10)
    assert ended == TimelineEnd(next_timeline=Timeline(2), switch=switch)
    await stream.close()
    writer = RealWriter(log, nodes, lineage=lineage, start=switch)
    async with writer.serving():
        reader.follower.writer_at(writer.address)
        async with writer.shipping(chosen):
            await asyncio.to_thread(chosen.run, "INSERT INTO t SELECT generate_series(1, 700)")
            await until(lambda: reader.replayed >= lsn_of(chosen, "pg_current_wal_flush_lsn"))
            assert rows(reader.standby) == before + 700
            assert reader.standby.pid == pid
            assert [timeline for timeline, _ in reader.source.timelines()] == [1, 2]
