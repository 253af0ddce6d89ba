"""Goal: a stock standby follows the feed to the ceiling and not beyond, across a promotion.

Method: a stock primary's WAL goes through WalStream into a log in memory; the feed hands it to
stock standbys, whose replay position and rows are compared. One of them is promoted, and its WAL is
taken from its cascading walsender, as a new writer's is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from boreal.errors import BelowLogStart, EngineError, Refused, Unreachable
from boreal.quorum import Lineage, TimelineStart
from boreal.types import PAGE_BYTES, Epoch, Lsn, Timeline, parse_lsn, wal_segment_start
from compute_node import wire
from compute_node.feed import Feed
from compute_node.feed_session import MAX_DATA_BYTES, timeline_after, timeline_history
from compute_node.replication_client import TimelineEnd, WalStream
from tests.compute_node.stock_standby import FEED_PORT, StockStandby, stock_standby
from tests.support.stock_postgres import StockPostgres, stock_postgres

SLOT = "boreal"


class LogInMemory:
    """A FeedSource, and the callback that fills it."""

    def __init__(self, system_identifier: int, start: Lsn) -> None:
        self.system_identifier = system_identifier
        self.start = start
        self.data = bytearray()
        self.lineage = Lineage.of([(1, start)])
        self.durable = start
        self._changed = asyncio.Condition()

    @property
    def end(self) -> Lsn:
        return Lsn(self.start + len(self.data))

    def on_wal(self, start: Lsn, data: bytes) -> None:
        assert start == self.end
        self.data += data

    async def set(self, *, durable: Lsn, lineage: Lineage | None = None) -> None:
        async with self._changed:
            self.durable = durable
            self.lineage = lineage or self.lineage
            self._changed.notify_all()

    def timelines(self) -> Sequence[TimelineStart]:
        return self.lineage.timelines()

    async def read(self, start: Lsn, end: Lsn) -> bytes:
        assert start < end <= self.durable
        if start < self.start:
            raise BelowLogStart("not kept here", start_lsn=self.start)
        return bytes(self.data[start - self.start : end - self.start])

    async def wait_beyond(self, lsn: Lsn) -> None:
        timelines = self.timelines()
        async with self._changed:
            await self._changed.wait_for(
                lambda: self.durable > lsn or self.timelines() != timelines
            )


async def until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Wait for a condition that may block."""
    async with asyncio.timeout(limit_s):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.02)


def lsn_of(server: StockPostgres, function: str) -> Lsn:
    with server.connect() as connection:
        row = connection.execute(f"SELECT {function}()".encode()).fetchone()
    assert row is not None
    return parse_lsn(row[0]) if row[0] else Lsn(0)


def replayed(standby: StockPostgres) -> Lsn:
    return lsn_of(standby, "pg_last_wal_replay_lsn")


def flushed_to(feed: Feed, lsn: Lsn) -> bool:
    return [standby.flushed for standby in feed.standbys] == [lsn]


def rows(server: StockPostgres) -> int:
    return int(server.run("SELECT count(*) FROM t")[0][0])


@asynccontextmanager
async def tailing(
    server: StockPostgres, log: LogInMemory, timeline: int = 1
) -> AsyncIterator[asyncio.Task[TimelineEnd]]:
    """Take a server's WAL into the log, acknowledging nothing."""
    stream = await WalStream.connect(socket_dir=server.socket_directory, port=5432, user="postgres")
    await stream.ensure_slot(SLOT)
    task = asyncio.create_task(
        stream.stream(slot=SLOT, start=log.end, timeline=Timeline(timeline), on_wal=log.on_wal)
    )
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await stream.close()


@asynccontextmanager
async def fed(standby: StockStandby, log: LogInMemory) -> AsyncIterator[Feed]:
    """A running standby behind a feed."""
    feed = await Feed.start(log, socket_dir=standby.socket_directory, port=FEED_PORT)
    try:
        await asyncio.to_thread(standby.start)
        yield feed
    finally:
        await feed.close()
        await asyncio.to_thread(standby.stop)


@pytest.fixture(scope="module")
def primary() -> Iterator[StockPostgres]:
    with stock_postgres({"wal_level": "replica"}) as server:
        server.run("CREATE TABLE t (i int)", "INSERT INTO t VALUES (1)", "CHECKPOINT")
        yield server


async def log_of(primary: StockPostgres) -> LogInMemory:
    identifier = primary.run("SELECT system_identifier FROM pg_control_system()")[0][0]
    start = wal_segment_start(lsn_of(primary, "pg_current_wal_flush_lsn"))
    return LogInMemory(int(identifier), start)


async def grown(primary: StockPostgres, log: LogInMemory) -> Lsn:
    """The end of the primary's WAL, once the log has it."""
    end = await asyncio.to_thread(lsn_of, primary, "pg_current_wal_flush_lsn")
    await until(lambda: log.end >= end)
    return end


async def test_standbys_replay_to_the_ceiling_and_follow_a_promotion(
    primary: StockPostgres,
) -> None:
    primary.stop()
    with stock_standby(primary) as chosen, stock_standby(primary) as other:
        primary.start()
        log = await log_of(primary)
        async with fed(chosen, log) as chosen_feed, fed(other, log) as other_feed:
            async with tailing(primary, log):
                await log.set(durable=await grown(primary, log))
                await until(lambda: replayed(chosen) == replayed(other) == log.durable)
                await check_the_ceiling(primary, log, chosen, chosen_feed)
                switch = log.durable
                await asyncio.to_thread(primary.run, "INSERT INTO t SELECT generate_series(1, 9)")
                await grown(primary, log)
            # The VDL of the former writer lay inside of a record, which is to be cut.
            await log.set(durable=Lsn(switch + 30))
            for feed in (chosen_feed, other_feed):
                await until(partial(flushed_to, feed, Lsn(switch + 30)))
            del log.data[switch - log.start :]
            await check_the_promotion(log, switch, chosen, other)


async def check_the_ceiling(
    primary: StockPostgres, log: LogInMemory, standby: StockStandby, feed: Feed
) -> None:
    ceiling, before = log.durable, rows(standby)
    await asyncio.to_thread(primary.run, "INSERT INTO t SELECT generate_series(1, 5000)")
    end = await grown(primary, log)
    middle = Lsn((ceiling + end) // 2)  # most likely inside of a record
    await log.set(durable=middle)
    await until(lambda: feed.standbys[0].flushed == middle)
    await asyncio.sleep(0.2)
    assert ceiling <= replayed(standby) <= middle
    assert lsn_of(standby, "pg_last_wal_receive_lsn") == middle
    assert rows(standby) == before
    await log.set(durable=end)
    await until(lambda: replayed(standby) == end)
    assert rows(standby) == before + 5000
    await until(lambda: feed.standbys[0].applied == end)
    assert feed.standbys[0].application_name == "sb"


async def check_the_promotion(
    log: LogInMemory, switch: Lsn, chosen: StockStandby, other: StockStandby
) -> None:
    """What the agent does with a new writer, seen from a reader that stays."""
    before, void = rows(chosen), bytearray()
    stream = await WalStream.connect(socket_dir=chosen.socket_directory, port=5432, user="postgres")
    await stream.ensure_slot(SLOT)
    former = asyncio.create_task(
        stream.stream(
            slot=SLOT, start=switch, timeline=Timeline(1), on_wal=lambda _, data: void.extend(data)
        )
    )
    await until(lambda: len(void) == 30)  # a standby passes on what it has, the void bytes too
    await asyncio.to_thread(chosen.run, "SELECT pg_promote()")
    ended = await asyncio.wait_for(former, 10)
    assert ended == TimelineEnd(next_timeline=Timeline(2), switch=switch)
    ours = asyncio.create_task(
        stream.stream(slot=SLOT, start=switch, timeline=Timeline(2), on_wal=log.on_wal)
    )
    commit = asyncio.create_task(
        asyncio.to_thread(chosen.run, "INSERT INTO t SELECT generate_series(1, 700)")
    )
    await until(lambda: log.end > switch)
    assert not (await asyncio.wait({commit}, timeout=0.2))[0], "acknowledged without a quorum"
    while not commit.done():
        stream.send_status(log.end)
        await asyncio.wait({commit}, timeout=0.02)
    end = await grown(chosen, log)
    await log.set(durable=end, lineage=Lineage.of([(1, log.start), (2, switch)]))
    await until(lambda: replayed(other) >= end)
    assert rows(other) == before + 700
    history = other.run("SELECT pg_read_file('pg_wal/00000002.history')")[0][0]
    assert history == timeline_history(log.timelines(), Timeline(2))
    ours.cancel()
    await asyncio.gather(ours, return_exceptions=True)
    await stream.close()


# --- the commands, asked by our own client -----------------------------------------------------


@asynccontextmanager
async def asking(log: LogInMemory, directory: Path) -> AsyncIterator[tuple[WalStream, Feed]]:
    feed = await Feed.start(log, socket_dir=directory, port=1)
    stream = await WalStream.connect(socket_dir=directory, port=1, user="anyone")
    try:
        yield stream, feed
    finally:
        await stream.close()
        await feed.close()
    with pytest.raises(Unreachable):
        await WalStream.connect(socket_dir=directory, port=1, user="anyone")


def small_log() -> LogInMemory:
    log = LogInMemory(7, Lsn(1000))
    log.on_wal(Lsn(1000), bytes(range(200)))
    log.durable = Lsn(1150)
    log.lineage = Lineage.of([(1, 1000), (2, 1100)])
    return log


async def test_it_says_who_it_is(tmp_path: Path) -> None:
    async with asking(small_log(), tmp_path) as (stream, _):
        identity = await stream.identify_system()
    assert (identity.system_identifier, identity.timeline, identity.flushed) == (7, 2, 1150)


async def test_a_timeline_is_streamed_to_its_end_then_the_next(tmp_path: Path) -> None:
    log, got = small_log(), bytearray()
    async with asking(log, tmp_path) as (stream, feed):
        ended = await stream.stream(
            slot=SLOT,
            start=Lsn(1040),
            timeline=Timeline(1),
            on_wal=lambda _, data: got.extend(data),
        )
        assert ended == TimelineEnd(next_timeline=Timeline(2), switch=Lsn(1100))
        assert got == log.data[40:100]
        # A start right at the end has nothing to give, and says so the same way.
        assert ended == await stream.stream(
            slot=SLOT,
            start=Lsn(1100),
            timeline=Timeline(1),
            on_wal=lambda _, data: got.extend(data),
        )
        rest = asyncio.create_task(
            stream.stream(
                slot=SLOT,
                start=Lsn(1100),
                timeline=Timeline(2),
                on_wal=lambda _, data: got.extend(data),
            )
        )
        await until(lambda: got == log.data[40:150])
        assert [standby.sent for standby in feed.standbys] == [1150]
        await log.set(durable=log.end)
        await until(lambda: got == log.data[40:])
        # A promotion elsewhere ends a timeline at the very byte that was sent last.
        await log.set(durable=log.end, lineage=log.lineage.extended(Epoch(3), log.end))
        ended = await asyncio.wait_for(rest, 5)
        assert ended == TimelineEnd(next_timeline=Timeline(3), switch=log.end)
        assert feed.standbys == ()


async def test_no_message_cuts_a_record_within_a_page(tmp_path: Path) -> None:
    """PostgreSQL decodes what it has of a page and does not look at that page again."""

    class Watched(LogInMemory):
        async def read(self, start: Lsn, end: Lsn) -> bytes:
            ends.append(end)
            return await super().read(start, end)

    ends: list[Lsn] = []
    log = Watched(7, Lsn(1000))
    log.on_wal(Lsn(1000), bytes(4 * MAX_DATA_BYTES))
    log.durable = log.end
    async with asking(log, tmp_path) as (stream, _):
        streaming = asyncio.create_task(
            stream.stream(slot=SLOT, start=Lsn(1040), timeline=Timeline(1), on_wal=None)
        )
        await until(lambda: ends[-1:] == [log.end])
        streaming.cancel()
        await asyncio.wait([streaming])
    assert len(ends) > 4
    assert all(end % PAGE_BYTES == 0 for end in ends[:-1])


@pytest.mark.parametrize(
    ("start", "timeline", "reason"),
    [(1120, 1, "not on timeline 1"), (1100, 9, "no timeline 9"), (900, 2, "not kept here")],
)
async def test_what_it_cannot_stream_it_refuses(
    tmp_path: Path, start: int, timeline: int, reason: str
) -> None:
    async with asking(small_log(), tmp_path) as (stream, _):
        with pytest.raises(EngineError, match=reason):
            await stream.stream(
                slot=SLOT,
                start=Lsn(start),
                timeline=Timeline(timeline),
                on_wal=lambda _start, _data: None,
            )


async def test_an_unknown_command_is_an_error_and_the_connection_lives(tmp_path: Path) -> None:
    async with asking(small_log(), tmp_path) as (stream, _):
        with pytest.raises(EngineError, match="CREATE_REPLICATION_SLOT"):
            await stream.ensure_slot("x")
        await stream.identify_system()


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\x08\0\x02\0\0", b"\0\0\0\x09\0\3\0\0\0"]
)
async def test_garbage_hurts_nobody_else(tmp_path: Path, garbage: bytes) -> None:
    async with asking(small_log(), tmp_path) as (stream, _):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / ".s.PGSQL.1"))
        writer.write(garbage)
        answer = await asyncio.wait_for(reader.read(), 5)
        assert answer.startswith(b"E")
        writer.close()
        await stream.identify_system()


async def test_a_standby_is_asked_until_it_has_replayed_all(tmp_path: Path) -> None:
    log = small_log()
    feed = await Feed.start(log, socket_dir=tmp_path, port=1)
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / ".s.PGSQL.1"))
    messages = wire.MessageReader()
    try:
        writer.write(wire.startup({"user": "x", "replication": "true"}))
        writer.write(wire.query("START_REPLICATION 0/44C TIMELINE 2"))
        asked = 0
        async with asyncio.timeout(10):
            while asked < 3:
                for kind, body in messages.feed(await reader.read(65536)):
                    if kind == wire.COPY_DATA and body[0] == wire.KEEPALIVE:
                        assert wire.read_keepalive(body) == (1150, True)
                        asked += 1
        writer.write(wire.standby_status(Lsn(1150), 0))
        await until(lambda: [standby.applied for standby in feed.standbys] == [1150])
    finally:
        writer.close()
        await feed.close()


# --- pure --------------------------------------------------------------------------------------


def test_timelines_and_their_history() -> None:
    timelines = Lineage.of([(1, 100), (4, 0x1_0000_0200), (5, 0x1_0000_0300)]).timelines()
    assert timeline_after(timelines, Timeline(1)) == (2, 0x1_0000_0200)
    assert timeline_after(timelines, Timeline(3)) is None
    with pytest.raises(Refused):
        timeline_after(timelines, Timeline(4))
    assert timeline_history(timelines, Timeline(1)) == ""
    assert timeline_history(timelines, Timeline(3)) == (
        "1\t1/200\tboreal volume epoch\n2\t1/300\tboreal volume epoch\n"
    )
