"""Goal: a reader has each durable byte, and none that may be cut, whatever becomes of its writer.

Method: writers behind real gRPC that come, go, fall silent and are superseded; storage nodes behind
real gRPC; what the reader may hand to PostgreSQL is compared with the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from boreal.errors import CorruptWal, Internal, StaleEpoch
from boreal.quorum import Lineage
from boreal.rpc import compute_pb2
from boreal.types import Epoch, Lsn
from compute_node.follower import Progress
from compute_node.log_source import LIVE_BYTES
from tests.compute_node.fleet_node import LOG_START
from tests.compute_node.live_log import LiveReader, LiveWriter, Storage, WrittenLog, reading, until

_MIB = 1024 * 1024


async def caught_up(reader: LiveReader, log: WrittenLog) -> None:
    await until(lambda: reader.source.durable >= log.end)
    assert reader.source.durable == log.end


# --- with a writer -------------------------------------------------------------------------------


async def test_what_the_writer_commits_is_there_without_asking_storage() -> None:
    log = WrittenLog()
    storage, writer = Storage(log), LiveWriter(log)
    async with writer.serving(), reading(storage) as reader:
        reader.follower.writer_at(writer.address)
        for lengths in ((100,), (20_000, 30), (1,), (3 * _MIB, 1)):
            writer.commit(*lengths)
            await caught_up(reader, log)
        assert await reader.log() == log.data
        assert storage.asked("GetLog") == 0


async def test_what_was_before_it_joined_comes_from_storage() -> None:
    log = WrittenLog()
    storage, writer = Storage(log), LiveWriter(log)
    for _ in range(12):
        writer.commit(_MIB)
    storage.hold(log.end, vdl=LOG_START)
    async with writer.serving(), reading(storage) as reader:
        reader.follower.writer_at(writer.address)
        await caught_up(reader, log)
        writer.commit(100)
        await caught_up(reader, log)
        assert reader.source.live_end == log.end
        assert await reader.log() == log.data
        assert 12 <= storage.asked("GetLog") <= 14, "in large pieces"


async def test_memory_is_bounded_and_the_rest_comes_from_storage() -> None:
    log = WrittenLog()
    storage, writer = Storage(log), LiveWriter(log)
    async with writer.serving(), reading(storage) as reader:
        reader.follower.writer_at(writer.address)
        for _ in range(LIVE_BYTES // _MIB + 4):
            writer.commit(_MIB)
            await caught_up(reader, log)
        storage.hold(log.end)
        assert await reader.log() == log.data
        assert 3 <= storage.asked("GetLog") <= 7


async def test_where_the_reader_stands_gets_to_the_writer() -> None:
    log = WrittenLog()
    storage, writer = Storage(log), LiveWriter(log)
    async with writer.serving(), reading(storage) as reader:
        reader.progress = Progress(replay=Lsn(5), floor=Lsn(4), oldest_xmin=3, lag_us=2)
        reader.follower.writer_at(writer.address)
        await until(lambda: len(writer.publisher.followers) == 1)
        assert writer.publisher.followers[0].replay == 5
        reader.progress = Progress(replay=Lsn(15), floor=Lsn(14), oldest_xmin=13, lag_us=12)
        await until(lambda: writer.publisher.followers[0].replay == 15)
        (status,) = writer.publisher.followers
        assert (status.floor, status.oldest_xmin, status.lag_us) == (14, 13, 12)
        reader.follower.writer_at(None)
        await until(lambda: writer.publisher.followers == ())


# --- without one ---------------------------------------------------------------------------------


async def test_without_a_writer_storage_tells_how_far_the_log_goes() -> None:
    log = WrittenLog()
    storage = Storage(log)
    async with reading(storage) as reader:
        joined = asyncio.create_task(reader.source.first_told())
        assert await joined == LOG_START
        for lengths in ((100,), (20_000, 30), (3 * _MIB,)):
            before = log.end
            end = log.write(*lengths)
            storage.hold(Lsn(end - 8))
            await asyncio.sleep(0)
            await until(lambda end=end: storage.nodes[0].state.scl == end - 8)  # type: ignore[misc]
            assert before <= reader.source.durable < end
            storage.hold(end)
            await caught_up(reader, log)
        assert await reader.log() == log.data


async def test_storage_is_asked_for_the_last_page_only() -> None:
    log = WrittenLog()
    storage = Storage(log)
    storage.hold(log.write(*[50] * 2000))
    async with reading(storage) as reader:
        await caught_up(reader, log)
        assert storage.asked("GetLog") == 1


async def test_a_log_that_no_writer_told_of_is_durable_only_on_four_nodes() -> None:
    log = WrittenLog()
    storage = Storage(log)
    end = log.write(100, 200)
    storage.hold(end, vdl=LOG_START)
    async with reading(storage) as reader:
        asked = storage.asked("GetPosition")
        await until(lambda: storage.asked("GetPosition") > asked + 3)
        assert reader.source.durable == LOG_START


# --- the writer goes -----------------------------------------------------------------------------


async def test_a_writer_that_goes_in_the_middle_of_a_piece() -> None:
    log = WrittenLog()
    storage, writer = Storage(log), LiveWriter(log)
    async with reading(storage) as reader:
        async with writer.serving():
            reader.follower.writer_at(writer.address)
            writer.commit(100)
            await caught_up(reader, log)
            writer.commit(7 * _MIB)
            storage.hold(log.end)
            await until(lambda: reader.source.live_end > log.ends[-2] + _MIB)
        # What came of the record is of no use by itself; storage has the rest.
        await caught_up(reader, log)
        assert await reader.log() == log.data
        end = log.write(300)
        writer.push()
        storage.hold(end)
        await caught_up(reader, log)
        async with writer.serving():
            writer.publisher.durable(end)
            reader.follower.writer_at(writer.address)
            writer.commit(17)
            await caught_up(reader, log)
            assert await reader.log() == log.data


async def test_a_writer_that_falls_silent_is_lost_and_found() -> None:
    class Frozen(LiveWriter):
        frozen = False

        async def Follow(  # noqa: N802
            self, request_iterator: AsyncIterator[compute_pb2.FollowerReport], context: Any
        ) -> AsyncIterator[compute_pb2.LogPiece]:
            async for piece in super().Follow(request_iterator, context):
                while self.frozen:
                    await asyncio.sleep(0.01)
                yield piece

    log = WrittenLog()
    storage, writer = Storage(log), Frozen(log)
    async with writer.serving(), reading(storage, silence_s=1.5) as reader:
        reader.follower.writer_at(writer.address)
        writer.commit(100)
        await caught_up(reader, log)
        writer.frozen = True
        storage.hold(writer.commit(100))
        await caught_up(reader, log)
        writer.frozen = False
        writer.commit(100)
        await caught_up(reader, log)
        assert await reader.log() == log.data


async def test_a_new_writer_cuts_above_what_was_fed_and_goes_on() -> None:
    log = WrittenLog()
    storage, first = Storage(log), LiveWriter(log)
    async with first.serving(), reading(storage) as reader:
        reader.follower.writer_at(first.address)
        fed = first.commit(100, 2000)
        await caught_up(reader, log)
        # These the reader never heard of; recovery found them, and cut what followed.
        cut = log.write(5000, 40)
        storage.hold(cut, vdl=fed)
        lineage = Lineage.of([(1, LOG_START), (2, cut)])
        storage.adopt(lineage)
        second = LiveWriter(log, epoch=2, start=cut)
        async with second.serving():
            reader.follower.writer_at(second.address)
            await until(lambda: reader.source.durable == cut)
            assert [timeline for timeline, _ in reader.source.timelines()] == [1]
            second.commit(700)
            storage.hold(log.end, vdl=fed)
            await caught_up(reader, log)
            assert reader.source.timelines() == list(lineage.timelines())
            assert await reader.log() == log.data
            assert reader.source.epoch == reader.fleet.epoch == 2
            # The former writer has nothing to say any more.
            reader.follower.writer_at(first.address)
            first.publisher.durable(first.push())
            await asyncio.sleep(0.1)
            assert first.publisher.followers == ()


async def test_the_feed_is_woken_by_a_new_lineage() -> None:
    log = WrittenLog()
    storage = Storage(log)
    storage.hold(log.write(100))
    async with reading(storage) as reader:
        await caught_up(reader, log)
        waiting = asyncio.create_task(reader.source.wait_beyond(log.end))
        await asyncio.sleep(0)
        storage.adopt(Lineage.of([(1, LOG_START), (2, log.end)]))
        await asyncio.wait_for(waiting, 10)
        assert reader.source.epoch == 2


async def test_a_history_without_what_was_fed_ends_the_reader() -> None:
    log = WrittenLog()
    storage = Storage(log)
    storage.hold(log.write(100, 200))
    async with reading(storage) as reader:
        await caught_up(reader, log)
        storage.adopt(Lineage.of([(1, LOG_START), (2, log.ends[1])]))
        with pytest.raises(Internal, match="parts at"):
            await reader.ended()


async def test_other_bytes_than_before_are_refused() -> None:
    log = WrittenLog()
    storage, writer = Storage(log), LiveWriter(log)
    async with writer.serving(), reading(storage) as reader:
        reader.follower.writer_at(writer.address)
        writer.commit(1000)
        await caught_up(reader, log)
        with pytest.raises(CorruptWal):
            reader.source.live(log.ends[-2], b"other bytes", log.end)


async def test_who_is_no_reader_any_more_takes_no_epoch_from_storage() -> None:
    """A promotion acts under its own epoch: a newer one is another's."""
    log = WrittenLog()
    storage = Storage(log)
    storage.hold(log.write(100))
    async with reading(storage) as reader:
        await caught_up(reader, log)
        for node in storage.nodes:
            node.state = node.state.fence(Epoch(2))
        await until(lambda: reader.fleet.epoch == 2)
        await reader.end()
        for node in storage.nodes:
            node.state = node.state.fence(Epoch(3))
        with pytest.raises(StaleEpoch):
            await reader.source.extend(log.end)
        with pytest.raises(StaleEpoch):
            await reader.source.read(LOG_START, Lsn(LOG_START + 1))
        assert reader.fleet.epoch == 2


# --- everything at once --------------------------------------------------------------------------

_STEP = st.one_of(
    st.tuples(st.just("commit"), st.integers(1, 40_000)),
    st.tuples(st.just("stored"), st.integers(1, 40_000)),
    st.tuples(st.just("writer"), st.booleans()),
    st.tuples(st.just("failover"), st.integers(0, 3)),
    st.tuples(st.just("read"), st.just(0)),
)


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(_STEP, max_size=25))
async def test_whatever_happens_the_log_is_right(steps: list[tuple[str, Any]]) -> None:
    log = WrittenLog()
    storage, writer = Storage(log), LiveWriter(log)
    lineage = Lineage.of([(1, LOG_START)])
    async with reading(storage) as reader:
        serving = writer.serving()
        await serving.__aenter__()
        reader.follower.writer_at(writer.address)
        for step, detail in steps:
            if step == "commit":
                writer.commit(detail)
                storage.hold(log.end, vdl=LOG_START)
            elif step == "stored":
                log.write(detail)
                storage.hold(log.end)
            elif step == "writer":
                reader.follower.writer_at(writer.address if detail else None)
            elif step == "failover":
                log.write(*[50] * detail)
                storage.hold(log.end, vdl=LOG_START)
                await serving.__aexit__(None, None, None)
                lineage = lineage.extended(Epoch(lineage.last.epoch + 1), log.end)
                storage.adopt(lineage)
                writer = LiveWriter(log, epoch=lineage.last.epoch, start=log.end)
                serving = writer.serving()
                await serving.__aenter__()
                reader.follower.writer_at(writer.address)
            else:
                await asyncio.sleep(0.01)
            assert reader.source.durable in log.ends
            assert await reader.log() == log.bytes_at(LOG_START, reader.source.durable)
        reader.follower.writer_at(writer.address)
        writer.commit(1)
        storage.hold(log.end)
        await caught_up(reader, log)
        assert await reader.log() == log.data
        assert reader.source.timelines() == list(lineage.timelines())
        await serving.__aexit__(None, None, None)
