"""Goal: WalStream delivers exactly PostgreSQL's WAL, and a commit waits for its status.

Method: against a stock PostgreSQL; the bytes it delivers are compared with those in pg_wal.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from boreal.errors import EngineError, MalformedRequest, OversizeRequest, StaleEpoch, Unreachable
from boreal.types import Lsn, Timeline, parse_lsn, wal_segment_start
from compute_node import wire
from compute_node.replication_client import WalStream
from tests.support.stock_postgres import StockPostgres, stock_postgres

SLOT = "boreal"


@pytest.fixture(scope="module")
def primary() -> Iterator[StockPostgres]:
    with stock_postgres({"wal_level": "replica"}) as server:
        server.run("CREATE TABLE t (i int)")
        yield server


@asynccontextmanager
async def stream_of(primary: StockPostgres) -> AsyncIterator[WalStream]:
    async with asyncio.timeout(10):
        # The walsender of the stream before may still hold the slot.
        while primary.run("SELECT 1 FROM pg_stat_activity WHERE backend_type = 'walsender'"):
            await asyncio.sleep(0.01)
    stream = await WalStream.connect(
        socket_dir=primary.socket_directory, port=5432, user="postgres"
    )
    try:
        yield stream
    finally:
        await stream.close()


class Collector:
    """Takes WAL in; checks that it is contiguous."""

    def __init__(self, start: Lsn) -> None:
        self.start, self.data, self.calls = start, bytearray(), 0
        self._grew = asyncio.Event()

    @property
    def end(self) -> Lsn:
        return Lsn(self.start + len(self.data))

    def __call__(self, start: Lsn, data: bytes) -> None:
        assert start == self.end
        self.data += data
        self.calls += 1
        self._grew.set()

    async def reached(self, lsn: Lsn) -> None:
        async with asyncio.timeout(10):
            while self.end < lsn:
                self._grew.clear()
                await self._grew.wait()


def flushed(primary: StockPostgres) -> Lsn:
    return parse_lsn(str(primary.run("SELECT pg_current_wal_flush_lsn()")[0][0]))


@asynccontextmanager
async def collecting(
    stream: WalStream, start: Lsn
) -> AsyncIterator[tuple[Collector, asyncio.Task[object]]]:
    await stream.ensure_slot(SLOT)
    collector = Collector(start)
    task: asyncio.Task[object] = asyncio.create_task(
        stream.stream(slot=SLOT, start=start, timeline=Timeline(1), on_wal=collector)
    )
    try:
        yield collector, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_it_delivers_what_is_in_pg_wal(primary: StockPostgres) -> None:
    async with stream_of(primary) as stream:
        identity = await stream.identify_system()
        rows = primary.run("SELECT system_identifier FROM pg_control_system()")
        assert (identity.system_identifier, identity.timeline) == (rows[0][0], 1)
        async with collecting(stream, wal_segment_start(identity.flushed)) as (collector, _):
            await asyncio.to_thread(
                primary.run, "INSERT INTO t SELECT generate_series(1, 100000)", "SELECT 1"
            )
            end = await asyncio.to_thread(flushed, primary)
            await collector.reached(end)
        first, wal = primary.wal()
        assert collector.data == wal[collector.start - first : collector.end - first]


async def test_a_slot_is_made_once_and_reserves_wal(primary: StockPostgres) -> None:
    async with stream_of(primary) as stream:
        await stream.ensure_slot("other")
        await stream.ensure_slot("other")
        rows = primary.run(
            "SELECT restart_lsn IS NOT NULL FROM pg_replication_slots WHERE slot_name = 'other'"
        )
        assert rows == [(True,)]


async def test_a_commit_waits_for_the_status(primary: StockPostgres) -> None:
    primary.run("ALTER SYSTEM SET synchronous_standby_names = 'boreal'", "SELECT pg_reload_conf()")
    try:
        async with stream_of(primary) as stream:
            flush = (await stream.identify_system()).flushed
            stream.send_status(flush)
            async with collecting(stream, flush) as (collector, _):
                for level in ("on", "remote_write", "remote_apply"):
                    before = collector.end
                    commit = asyncio.create_task(
                        asyncio.to_thread(
                            primary.run,
                            "SELECT set_config('synchronous_commit', '" + level + "', false)",
                            "INSERT INTO t VALUES (0)",
                        )
                    )
                    await collector.reached(Lsn(before + 1))
                    done, _ = await asyncio.wait({commit}, timeout=0.3)
                    assert not done, f"{level}: acknowledged before it was durable"
                    stream.send_status(collector.end)
                    await asyncio.wait_for(commit, 5)
    finally:
        primary.run("ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()")


async def test_what_readers_still_see_is_kept_by_the_slot(primary: StockPostgres) -> None:
    def kept() -> str:
        query = "SELECT coalesce(xmin::text, '') FROM pg_replication_slots WHERE slot_name = %s"
        return str(primary.run(query.replace("%s", f"'{SLOT}'"))[0][0])

    async def keeps(xmin: str) -> None:
        async with asyncio.timeout(10):
            while await asyncio.to_thread(kept) != xmin:
                await asyncio.sleep(0.01)

    oldest = int(primary.run("SELECT pg_current_xact_id()::text::int8")[0][0])
    async with stream_of(primary) as stream:
        flush = (await stream.identify_system()).flushed
        stream.send_feedback(oldest)  # told once streaming has begun
        async with collecting(stream, flush):
            await keeps(str(oldest))
            newer = int(primary.run("SELECT pg_current_xact_id()::text::int8")[0][0])
            stream.send_feedback(newer)
            await keeps(str(newer))
            stream.send_feedback(0)
            await keeps("")


def test_feedback_tells_the_epoch_of_a_transaction_id() -> None:
    sent = wire.hot_standby_feedback((3 << 32) + 17, 0)
    ((kind, body),) = wire.MessageReader().feed(sent)
    assert kind == wire.COPY_DATA
    assert wire.read_hot_standby_feedback(body) == wire.HotStandbyFeedback(17, 3, 0, 0)


async def test_paused_reading_delivers_nothing_until_resumed(primary: StockPostgres) -> None:
    async with stream_of(primary) as stream:
        flush = (await stream.identify_system()).flushed
        async with collecting(stream, flush) as (collector, _):
            await asyncio.to_thread(primary.run, "INSERT INTO t VALUES (1)")
            await collector.reached(Lsn(flush + 1))
            stream.pause_reading()
            taken = collector.end
            await asyncio.to_thread(primary.run, "INSERT INTO t SELECT generate_series(1, 50000)")
            await asyncio.sleep(0.1)
            assert collector.end == taken
            stream.resume_reading()
            await collector.reached(await asyncio.to_thread(flushed, primary))
            assert collector.calls < 200


async def test_what_the_callback_raises_comes_out_of_the_stream(primary: StockPostgres) -> None:
    def refuse(start: Lsn, data: bytes) -> None:
        raise StaleEpoch("superseded", promised_epoch=9)

    async with stream_of(primary) as stream:
        await stream.ensure_slot(SLOT)
        with pytest.raises(StaleEpoch):
            await stream.stream(
                slot=SLOT,
                start=wal_segment_start(flushed(primary)),
                timeline=Timeline(1),
                on_wal=refuse,
            )


async def test_refusals_are_typed(primary: StockPostgres, tmp_path: Path) -> None:
    with pytest.raises(Unreachable):
        await WalStream.connect(socket_dir=tmp_path, port=1, user="postgres")
    with pytest.raises(EngineError) as refused:
        await WalStream.connect(socket_dir=primary.socket_directory, port=5432, user="nobody")
    assert refused.value.sqlstate == "28000"
    async with stream_of(primary) as stream:
        await stream.ensure_slot(SLOT)
        with pytest.raises(EngineError, match="ahead of the WAL flush position"):
            await stream.stream(
                slot=SLOT, start=Lsn(1 << 40), timeline=Timeline(1), on_wal=Collector(Lsn(0))
            )


async def test_the_end_of_the_server_ends_the_stream(primary: StockPostgres) -> None:
    """A clean stop waits until all WAL is reported durable; so this also shows that it is."""
    async with stream_of(primary) as stream:
        flush = (await stream.identify_system()).flushed
        async with collecting(stream, flush) as (collector, task):
            stopped = asyncio.create_task(asyncio.to_thread(primary.stop))
            while not task.done():
                stream.send_status(collector.end)
                await asyncio.wait({task}, timeout=0.02)
            with pytest.raises(Unreachable):
                await task
            await stopped
        first, wal = primary.wal()
        assert wal[collector.end - first :].strip(b"\0") == b""  # the shutdown checkpoint was sent


def test_a_reader_that_is_fed_byte_by_byte_reads_the_same_messages() -> None:
    stream = wire.query("SELECT 1") + wire.copy_both() + wire.message(wire.COPY_DATA, b"k" * 300)
    whole = [(kind, bytes(body)) for kind, body in wire.MessageReader().feed(stream)]
    reader = wire.MessageReader()
    piecewise = [
        (kind, bytes(body))
        for n in range(len(stream))
        for kind, body in reader.feed(stream[n : n + 1])
    ]
    assert piecewise == whole
    assert [kind for kind, _ in whole] == [wire.QUERY, wire.COPY_BOTH, wire.COPY_DATA]


@pytest.mark.parametrize(
    ("garbage", "error"),
    [(b"HTTP/1.1 200 OK\r\n", OversizeRequest), (b"d\0\0\0\1xxxx", MalformedRequest)],
)
def test_what_is_not_the_protocol_is_refused(garbage: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        list(wire.MessageReader().feed(garbage))


@pytest.mark.parametrize("read", [wire.read_xlog_data, wire.read_keepalive, wire.read_data_row])
def test_a_message_cut_short_is_refused(read: object) -> None:
    assert callable(read)
    with pytest.raises(MalformedRequest):
        read(memoryview(b"w\0"))
