"""Goal: followers get each durable byte once, told as durable only up to a record's end, and cost
the writer nothing while there are none.

Method: a publisher over a window of a built log, behind real gRPC; followers are bare stubs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from boreal.errors import BorealError, MalformedRequest, NotWriter, StaleEpoch, UnknownVolume
from boreal.rpc import compute_pb2, compute_pb2_grpc
from boreal.rpc.edge import calling, open_channel, volume_ref
from boreal.types import InstanceName, Lsn, VolumeId
from compute_node.publisher import BACKLOG_BYTES, HEARD_S, MAX_PIECE_BYTES, Publisher
from tests.compute_node.fleet_node import LOG_START
from tests.compute_node.live_log import VOLUME, LiveWriter, WrittenLog, report, until

_MIB = 1024 * 1024


class Stub:
    """A bare follower: what it was sent, put together."""

    def __init__(self, call: Any, start: Lsn) -> None:
        self.call = call
        self.start = self.end = start
        self.data = b""
        self.durable = Lsn(0)
        self.pieces: list[tuple[int, int, int]] = []

    async def take(self) -> Any:
        """The next piece, checked."""
        with calling("the writer", "Follow"):
            piece: Any = await self.call.read()
        if not piece:  # what grpc.aio gives once a stream has ended well
            raise EOFError("the writer ended the stream")
        assert len(piece.data) <= MAX_PIECE_BYTES
        self.pieces.append((piece.start_lsn, len(piece.data), piece.durable_lsn))
        if piece.data:
            if piece.start_lsn != self.end:  # it fell behind
                self.start, self.data = Lsn(piece.start_lsn), b""
            self.data += piece.data
            self.end = Lsn(piece.start_lsn + len(piece.data))
        self.durable = max(self.durable, Lsn(piece.durable_lsn))
        return piece

    async def told(self, durable: Lsn) -> None:
        """Read on until told that `durable` is."""
        while self.durable < durable:
            await self.take()


@asynccontextmanager
async def following(
    writer: LiveWriter, first: compute_pb2.FollowerReport | None = None
) -> AsyncIterator[Stub]:
    first = report() if first is None else first
    async with asyncio.timeout(20), open_channel(writer.address) as channel:
        stub: Any = compute_pb2_grpc.ComputeStub(channel)
        call = stub.Follow()
        await call.write(first)
        try:
            yield Stub(call, Lsn(first.from_lsn))
        finally:
            call.cancel()


async def refusal(writer: LiveWriter, first: compute_pb2.FollowerReport) -> BorealError:
    """Why it may not follow."""
    async with following(writer, first) as follower:
        with pytest.raises(BorealError) as raised:
            await follower.take()
    return raised.value


# --- pieces --------------------------------------------------------------------------------------


async def test_what_gets_durable_is_sent_up_to_a_records_end() -> None:
    writer = LiveWriter(WrittenLog())
    async with writer.serving(), following(writer) as follower:
        for lengths in ((10,), (300, 20), (9000,), (40, 40, 20_000, 40)):
            end = writer.commit(*lengths)
            await follower.told(end)
            assert follower.end == follower.durable == end
        writer.log.write(100)
        inside = Lsn(writer.push() - 16)
        writer.publisher.durable(inside)
        writer.publisher.durable(writer.commit(50))
        await follower.told(writer.log.end)
        assert follower.data == writer.log.bytes_at(LOG_START, writer.log.end)
        assert {durable for _, _, durable in follower.pieces} <= set(writer.log.ends)


async def test_a_record_that_is_durable_in_part_is_not_told() -> None:
    writer = LiveWriter(WrittenLog())
    async with writer.serving(), following(writer) as follower:
        before = writer.commit(10)
        await follower.told(before)
        writer.log.write(50_000)
        end = writer.push()
        for inside in range(before + 8, end, 4096):
            writer.publisher.durable(Lsn(inside))
            await asyncio.sleep(0)
        writer.publisher.durable(end)
        await follower.told(end)
        assert {durable for _, _, durable in follower.pieces} - {LOG_START} == {before, end}


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 300), st.integers(7000, 30_000)), min_size=1),
    data=st.data(),
)
async def test_any_log_and_any_vdls(lengths: list[int], data: st.DataObject) -> None:
    writer = LiveWriter(WrittenLog())
    writer.log.write(*lengths)
    end = writer.push()
    vdls = sorted(data.draw(st.lists(st.integers(LOG_START, end), max_size=30)))
    join_at = data.draw(st.integers(0, len(vdls)))
    for vdl in vdls[:join_at]:
        writer.publisher.durable(Lsn(vdl))
    async with writer.serving(), following(writer) as follower:
        for vdl in vdls[join_at:]:
            writer.publisher.durable(Lsn(vdl))
            if data.draw(st.booleans()):
                await follower.told(max(e for e in writer.log.ends if e <= vdl))
        writer.publisher.durable(end)
        await follower.told(end)
        assert follower.data == writer.log.data
        assert {durable for _, _, durable in follower.pieces} <= set(writer.log.ends)


async def test_who_joins_late_is_told_at_once() -> None:
    writer = LiveWriter(WrittenLog())
    end = writer.commit(*[60] * 1000)
    async with writer.serving(), following(writer, report(start=end)) as follower:
        assert (await follower.take()).durable_lsn == end
        assert follower.data == b""
        last = writer.commit(10)
        await follower.told(last)
        assert follower.data == writer.log.bytes_at(end, last)


async def test_a_long_stretch_comes_in_pieces_and_is_told_with_the_last() -> None:
    writer = LiveWriter(WrittenLog())
    end = writer.commit(*[10_000] * 400)
    async with writer.serving(), following(writer) as follower:
        await follower.told(end)
        assert follower.data == writer.log.data
        assert len(follower.pieces) == -(-(end - LOG_START) // MAX_PIECE_BYTES)
        assert [durable for _, _, durable in follower.pieces[:-1]] == [0] * 3
        second = writer.commit(3 * _MIB)
        await follower.told(second)
        assert {durable for _, _, durable in follower.pieces} == {0, end, second}


async def test_what_was_dropped_from_memory_is_left_to_storage() -> None:
    writer = LiveWriter(WrittenLog(), start=LOG_START)
    for _ in range(40):
        writer.commit(_MIB)
    assert writer.window.start > LOG_START
    async with writer.serving(), following(writer) as follower:
        piece = await follower.take()
        assert (piece.start_lsn, piece.data) == (writer.log.end, b"")
        assert piece.durable_lsn == writer.log.end
        end = writer.commit(100)
        await follower.told(end)
        assert follower.data == writer.log.bytes_at(piece.start_lsn, end)


async def test_a_slow_follower_holds_up_nobody_and_skips_what_is_too_much() -> None:
    writer = LiveWriter(WrittenLog())
    async with (
        writer.serving(),
        following(writer, report(instance="db-3")) as quick,
        following(writer) as slow,
    ):
        await asyncio.gather(quick.told(writer.commit(10)), slow.told(writer.log.end))
        for _ in range(40):
            await quick.told(writer.commit(_MIB))
        assert quick.data == writer.log.data
        sent = {each.instance: each.sent for each in writer.publisher.followers}
        assert sent[InstanceName("db-2")] < sent[InstanceName("db-3")] - BACKLOG_BYTES
        await slow.told(writer.log.end)
        assert len(slow.pieces) < 30
        last = writer.commit(10)
        await slow.told(last)
        assert slow.data == writer.log.bytes_at(slow.start, last)


async def test_nothing_is_done_while_nobody_follows() -> None:
    class Untouchable:
        start = end = LOG_START

        def read(self, start: Lsn, end: Lsn) -> bytes:
            raise AssertionError("nobody wants it")

    writer = LiveWriter(WrittenLog())
    publisher = Publisher(VOLUME, writer.epoch, LOG_START, Untouchable())
    for _ in range(100):
        publisher.durable(writer.commit(10))
    assert publisher.followers == ()


async def test_an_idle_writer_gives_signs_of_life() -> None:
    writer = LiveWriter(WrittenLog())
    async with writer.serving(), following(writer) as follower:
        end = writer.commit(10)
        await follower.told(end)
        piece = await follower.take()
        assert (piece.start_lsn, piece.data, piece.durable_lsn) == (end, b"", end)


# --- who may follow ------------------------------------------------------------------------------


async def test_who_knows_an_older_writer_is_told_of_the_newer() -> None:
    writer = LiveWriter(WrittenLog(), epoch=5)
    async with writer.serving():
        error = await refusal(writer, report(epoch=4))
    assert isinstance(error, StaleEpoch)
    assert error.details == {"promised_epoch": 5}


async def test_who_knows_a_newer_writer_is_not_served() -> None:
    writer = LiveWriter(WrittenLog(), epoch=5)
    async with writer.serving():
        assert isinstance(await refusal(writer, report(epoch=6)), NotWriter)


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"volume": volume_ref(VolumeId("another"), 1)}, UnknownVolume),
        ({"instance": ""}, MalformedRequest),
        ({"from_lsn": LOG_START + 1}, MalformedRequest),
    ],
)
async def test_other_mistakes(wrong: dict[str, Any], kind: type[BorealError]) -> None:
    writer = LiveWriter(WrittenLog())
    async with writer.serving():
        assert isinstance(await refusal(writer, report(**wrong)), kind)


async def test_a_closed_writer_ends_every_stream() -> None:
    writer = LiveWriter(WrittenLog())
    async with writer.serving(), following(writer) as follower:
        await follower.told(writer.commit(10))
        writer.publisher.close()
        with pytest.raises(NotWriter):
            await follower.take()
        await until(lambda: writer.publisher.followers == ())
        assert isinstance(await refusal(writer, report()), NotWriter)


async def test_a_readers_second_stream_ends_the_first() -> None:
    writer = LiveWriter(WrittenLog())
    async with writer.serving(), following(writer) as first:
        await first.told(writer.commit(10))
        async with following(writer) as second:
            await second.told(writer.log.end)
            with pytest.raises(EOFError):
                await first.take()
            assert len(writer.publisher.followers) == 1
            await second.told(writer.commit(10))


async def test_a_follower_that_leaves_is_forgotten_as_one() -> None:
    writer = LiveWriter(WrittenLog())
    async with writer.serving():
        async with following(writer) as follower:
            await follower.told(writer.commit(10))
            assert [each.instance for each in writer.publisher.followers] == ["db-2"]
        await until(lambda: writer.publisher.followers == ())
        writer.commit(10)


# --- what followers say --------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_floors_and_transactions_of_readers_count_until_they_are_silent_for_long() -> None:
    clock = Clock()
    writer = LiveWriter(WrittenLog(), clock=clock)
    publisher = writer.publisher
    async with writer.serving():
        assert publisher.floor() == 0, "who its readers are it cannot know yet"
        clock.now += HEARD_S
        assert (publisher.floor(), publisher.oldest_xmin()) == (None, 0)
        first = report(floor_lsn=700, oldest_xmin=(1 << 32) + 5)
        async with (
            following(writer, first),
            following(writer, report(instance="db-3", floor_lsn=900)) as other,
        ):
            await until(lambda: len(publisher.followers) == 2)
            assert (publisher.floor(), publisher.oldest_xmin()) == (700, (1 << 32) + 5)
            clock.now += HEARD_S - 1
            await other.call.write(report(instance="db-3", floor_lsn=950, oldest_xmin=7))
            await until(lambda: publisher.oldest_xmin() == 7)
            assert publisher.floor() == 700
            clock.now += 2
            assert (publisher.floor(), publisher.oldest_xmin()) == (950, 7)
        await until(lambda: publisher.followers == ())
        assert publisher.floor() == 950, "its PostgreSQL may still be there"
        clock.now += HEARD_S
        assert (publisher.floor(), publisher.oldest_xmin()) == (None, 0)


async def test_status_of_followers() -> None:
    writer = LiveWriter(WrittenLog())
    first = report(replay_lsn=1, floor_lsn=2, oldest_xmin=3, lag_us=4)
    async with writer.serving(), following(writer, first) as follower:
        await follower.told(writer.commit(10))
        (status,) = writer.publisher.followers
        assert (status.sent, status.replay, status.floor) == (writer.log.end, 1, 2)
        assert (status.oldest_xmin, status.lag_us) == (3, 4)
        await follower.call.write(report(replay_lsn=11, floor_lsn=12, lag_us=14))
        await until(lambda: writer.publisher.followers[0].replay == 11)
