"""Goal: taking a volume over ends with one log, durable on four nodes, that holds every complete
record of the newest history; and it goes on for as long as it takes to get there.

Method: storage nodes in this process behind real gRPC, with the real segment rules; a log built
record by record. Catching up from peers, which nodes do by themselves, is done here by a task or
by hand. (The choice and the cut, being pure, have their tests in tests/quorum.)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from boreal.errors import (
    BelowLogStart,
    BorealError,
    CorruptData,
    CorruptWal,
    Internal,
    StaleEpoch,
    Unreachable,
)
from boreal.quorum import SIX_WAY, Lineage, SegmentState
from boreal.quorum.lease import LEASE_S
from boreal.rpc import storage_pb2
from boreal.types import PAGE_BYTES, Epoch, Lsn, NodeName, VolumeId
from compute_node.fleet import DEFAULT_LIMITS, Fleet
from compute_node.recovery import find_log_end, recover
from compute_node.storage_client import Deadlines
from tests.compute_node.fleet_node import LOG_START, FleetNode, running
from tests.support.wal_builder import WalBuilder, body

LIMITS = replace(DEFAULT_LIMITS, changes=Deadlines(call_s=1.0))
FIRST = Lineage.of([(1, LOG_START)])
_LIMIT_S = 10


class LogNode(FleetNode):
    """Its log may be told to fail by itself, as often as it is told to."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.log_failures: list[BorealError] = []
        self.dies_of: BorealError | None = None
        """It does not even answer the next read of its log, nor anything after that."""
        self.leaves_with: BorealError | None = None
        """The next read of its log is the last call it answers."""

    async def GetLog(  # noqa: N802 - named as the call is
        self, request: Any, context: Any
    ) -> AsyncIterator[storage_pb2.LogChunk]:
        if self.dies_of is not None:
            self.failure = self.dies_of
        if request.start_lsn < self.state.start:
            raise BelowLogStart("dropped", start_lsn=self.state.start)
        if self.log_failures:
            self.calls.append("GetLog")
            raise self.log_failures.pop(0)
        async for chunk in super().GetLog(request, context):
            yield chunk
        if self.leaves_with is not None:
            self.failure = self.leaves_with

    def holds(self, log: bytes | bytearray, lineage: Lineage = FIRST) -> None:
        self.log = bytes(log)
        scl = Lsn(LOG_START + len(log))
        self.state = SegmentState(
            promised=lineage.last.epoch, lineage=lineage, start=LOG_START, scl=scl, vdl=LOG_START
        )

    def drops(self, pages: int) -> None:
        """It keeps the log from so many pages after its beginning on."""
        known = self.state.append(self.state.promised, self.state.scl, 0, self.state.scl).state
        self.state = known.trim(Lsn(LOG_START + pages * PAGE_BYTES))

    def take_from(self, peer: LogNode) -> None:
        """Catch up, as far as the rules allow."""
        if peer.state.start > self.state.scl:
            return
        self.log = self.log[: self.state.scl - LOG_START]
        if peer.state.scl > self.state.scl and not (self.state.fenced or peer.state.fenced):
            self.state.catch_up_from(peer.state.lineage)
            self.log += peer.log[len(self.log) : peer.state.scl - LOG_START]
            self.state = replace(self.state, scl=peer.state.scl)


@asynccontextmanager
async def six(epoch: int = 2) -> AsyncIterator[tuple[Fleet, list[LogNode]]]:
    nodes = [LogNode(f"sn-{number}") for number in range(1, 7)]
    fleet = Fleet(VolumeId("v"), Epoch(epoch), limits=LIMITS)
    try:
        async with asyncio.timeout(_LIMIT_S), running(*nodes) as members:
            await fleet.set_members(members)
            yield fleet, nodes
    finally:
        await fleet.close()


@asynccontextmanager
async def catching_up(nodes: Sequence[LogNode], epoch: int) -> AsyncIterator[None]:
    """Those that adopted the history of `epoch` fill up from each other; nobody does before."""

    async def run() -> None:
        while True:
            there = [node for node in nodes if node.state.lineage.last.epoch == epoch]
            for node in there:
                for peer in there:
                    if peer.state.lineage == node.state.lineage:
                        node.take_from(peer)
            await asyncio.sleep(0.01)

    task = asyncio.create_task(run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool]) -> None:
    """Bounded by the limit of `six`."""
    while not condition():
        await asyncio.sleep(0.005)


async def until_called(node: LogNode, call: str, *, times: int) -> None:
    """So many times from now on."""
    before = node.calls.count(call)
    await until(lambda: node.calls.count(call) >= before + times)


def away(nodes: Sequence[LogNode]) -> None:
    for node in nodes:
        node.failure = Unreachable("away")


def back(nodes: Sequence[LogNode]) -> None:
    for node in nodes:
        node.failure = None


def wal(records: int, size: int = 100) -> WalBuilder:
    built = WalBuilder(LOG_START)
    for number in range(records):
        built.add(21, 0, body(bytes([number % 251]) * size))
    return built


# --- which log, and how much of it ---------------------------------------------------------------


async def test_all_that_was_written_is_taken_over() -> None:
    log = wal(5)
    async with six() as (fleet, nodes):
        for node in nodes:
            node.holds(log.data)
        plan = await recover(fleet, Epoch(2))
        assert plan.end == log.end
        assert plan.lineage == Lineage.of([(1, LOG_START), (2, log.end)])
        assert plan.carried_out(SIX_WAY, {NodeName(node.name): node.state for node in nodes})
        assert all(node.state.promised == 2 for node in nodes if node.calls.count("Adopt"))


async def test_a_newer_writers_log_wins_over_a_longer_one() -> None:
    shared, lost, won = wal(1), wal(9), wal(1)
    won.add(21, 0, body(b"the newer writer's" * 3))
    second = Lineage.of([(1, LOG_START), (2, shared.end)])
    async with six(3) as (fleet, nodes):
        nodes[0].holds(lost.data)
        nodes[1].holds(won.data, second)
        nodes[2].holds(shared.data, second)
        nodes[3].holds(shared.data[:500], second)  # adopted, not yet caught up
        away(nodes[4:])
        async with catching_up(nodes, 3):
            plan = await recover(fleet, Epoch(3))
        assert (plan.source, plan.end) == ("sn-2", won.end)
        assert plan.lineage == Lineage.of([(1, LOG_START), (2, shared.end), (3, won.end)])
        assert all(node.log == won.data for node in nodes[:4])


async def test_among_logs_of_one_writer_the_longest_wins() -> None:
    log = wal(20)
    async with six() as (fleet, nodes):
        for number, node in enumerate(nodes[:4]):
            node.holds(log.data[: len(log.data) - 96 * (number != 2)])
        away(nodes[4:])
        async with catching_up(nodes, 2):
            plan = await recover(fleet, Epoch(2))
        assert (plan.source, plan.end) == ("sn-3", log.end)


@pytest.mark.parametrize("torn_bytes", [1, 24, 130])
async def test_an_unfinished_record_is_cut_off(torn_bytes: int) -> None:
    log = wal(3)
    end = log.end
    whole = bytes(log.data)
    log.add(21, 0, body(bytes(200)))
    async with six() as (fleet, nodes):
        for node in nodes:
            node.holds(log.data[: len(whole) + torn_bytes])
        plan = await recover(fleet, Epoch(2))
        assert plan.end == end
        await until(lambda: all(node.state.lineage == plan.lineage for node in nodes))
        assert {node.state.scl for node in nodes} == {end}


async def test_a_first_record_that_is_unfinished_leaves_the_log_empty() -> None:
    log = wal(1, size=5000)
    async with six() as (fleet, nodes):
        for node in nodes:
            node.holds(log.data[:3000])
        plan = await recover(fleet, Epoch(2))
        assert plan.end == LOG_START
        assert plan.lineage == Lineage.of([(1, LOG_START), (2, LOG_START)])


@pytest.mark.parametrize("tail", [0, 24, 130])
async def test_nodes_may_keep_the_log_from_different_places_on(tail: int) -> None:
    log = wal(800)
    end, whole = log.end, len(log.data)
    log.add(21, 0, body(bytes(200)))
    async with six() as (fleet, nodes):
        for node, pages in zip(nodes, (0, 3, 9, 10, 10, 1), strict=True):
            node.holds(log.data[: whole + tail * (pages == 10)])
            node.drops(pages)
        nodes[0].holds(log.data[: 10 * PAGE_BYTES + 5])  # what it lacks is kept by the others
        async with catching_up(nodes, 2):
            plan = await recover(fleet, Epoch(2))
            assert plan.end == end
            await until(lambda: all(node.state.scl == end for node in nodes))
        assert sorted(node.state.start - LOG_START for node in nodes) == [
            *(0, 1 * PAGE_BYTES, 3 * PAGE_BYTES, 9 * PAGE_BYTES, 10 * PAGE_BYTES, 10 * PAGE_BYTES)
        ]


# --- a quorum, however long it takes -------------------------------------------------------------


async def test_it_waits_for_four_nodes() -> None:
    log = wal(3)
    async with six() as (fleet, nodes):
        for node in nodes:
            node.holds(log.data)
        away(nodes[3:])
        recovering = asyncio.create_task(recover(fleet, Epoch(2)))
        await until(lambda: nodes[0].calls.count("Fence") >= 2)
        assert not recovering.done()
        assert not nodes[0].calls.count("Adopt")
        back(nodes[3:4])
        assert (await recovering).end == log.end


async def test_it_waits_for_four_nodes_to_adopt() -> None:
    log = wal(3)
    async with six() as (fleet, nodes):
        for node in nodes:
            node.holds(log.data)
        away(nodes[4:])
        nodes[3].holds(log.data + bytes(8))  # the source
        nodes[3].leaves_with = Unreachable("away")
        recovering = asyncio.create_task(recover(fleet, Epoch(2)))
        await until(lambda: nodes[0].calls.count("Adopt") >= 2)
        assert not recovering.done()
        back(nodes[3:])
        assert (await recovering).source == "sn-4"
        assert nodes[0].calls.count("Fence") == 1  # the plan is made once


async def test_the_log_must_be_on_four_nodes_not_the_history_alone() -> None:
    log = wal(3)
    async with six() as (fleet, nodes):
        nodes[0].holds(log.data)
        away(nodes[4:])
        recovering = asyncio.create_task(recover(fleet, Epoch(2)))
        for behind in (1, 2, 3):
            await until_called(nodes[0], "GetPosition", times=2)
            assert not recovering.done()
            nodes[behind].take_from(nodes[0])
        assert (await recovering).end == log.end


async def test_a_node_that_comes_back_while_the_plan_is_carried_out_counts() -> None:
    log = wal(3)
    async with six() as (fleet, nodes):
        for node in (*nodes[:3], nodes[5]):
            node.holds(log.data)
        away(nodes[4:])
        recovering = asyncio.create_task(recover(fleet, Epoch(2)))
        await until(lambda: nodes[0].calls.count("GetPosition") >= 2)
        assert not recovering.done()
        back(nodes[5:])  # it heard neither the fence nor the history
        plan = await recovering
        assert nodes[5].state.lineage == plan.lineage


# --- sources that fail ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure", [CorruptData("checksum"), Unreachable("gone")], ids=lambda failure: failure.code
)
async def test_a_source_that_recovers_is_asked_again(failure: BorealError) -> None:
    log = wal(3)
    async with six() as (fleet, nodes):
        nodes[0].holds(log.data)
        nodes[0].log_failures = [failure]
        away(nodes[4:])  # without the source there is no write quorum
        async with catching_up(nodes, 2):
            plan = await recover(fleet, Epoch(2))
        assert (plan.source, plan.end) == ("sn-1", log.end)
        assert nodes[0].calls.count("GetLog") == 2


async def test_a_source_that_stays_away_is_decided_without() -> None:
    log = wal(4)
    short = wal(3)
    async with six() as (fleet, nodes):
        nodes[0].holds(log.data)
        nodes[0].dies_of = CorruptData("the disk is gone")
        for node in nodes[1:5]:
            node.holds(short.data)
        away(nodes[4:])
        recovering = asyncio.create_task(recover(fleet, Epoch(2)))
        await until(lambda: nodes[0].failure is not None)
        assert not any(node.calls.count("Adopt") for node in nodes)
        back(nodes[4:5])
        plan = await recovering
        assert plan.source != "sn-1"
        assert plan.end == short.end


async def test_a_log_that_came_short_is_not_taken_over() -> None:
    log = wal(3)
    async with six() as (fleet, nodes):
        for node in nodes:
            node.holds(log.data)
        nodes[5].state = replace(nodes[5].state, scl=Lsn(log.end + 8))  # it says so
        away(nodes[:1])
        nodes[4].hanging = True
        recovering = asyncio.create_task(recover(fleet, Epoch(2)))
        await until(lambda: nodes[5].calls.count("GetLog") >= 1)
        nodes[4].hanging = False
        back(nodes[:1])
        away(nodes[5:])
        assert (await recovering).end == log.end


# --- the former writer's lease -------------------------------------------------------------------


async def test_it_is_told_when_the_fenced_ones_lease_is_over() -> None:
    log = wal(3)
    async with six() as (fleet, nodes):
        for node, silent_ms in zip(nodes, (900, 700, 800, 750, 1000, 1100), strict=True):
            node.holds(log.data)
            node.writer_silent_ms = silent_ms
        away(nodes[4:])
        told: list[float] = []
        await recover(fleet, Epoch(2), on_fenced=told.append, clock=lambda: 1000.0)
        assert told == [pytest.approx(1000.0 + LEASE_S - 0.7)]


async def test_it_is_told_once_a_write_quorum_refuses_the_former_and_no_sooner() -> None:
    log = wal(3)
    async with six() as (fleet, nodes):
        for node in nodes:
            node.holds(log.data)
        away(nodes[3:])
        told: list[float] = []
        recovering = asyncio.create_task(recover(fleet, Epoch(2), on_fenced=told.append))
        await until(lambda: nodes[0].calls.count("Fence") >= 2)
        assert not told
        back(nodes[3:])
        await recovering
        assert len(told) == 1


# --- one recovery after another ------------------------------------------------------------------


async def test_a_second_recovery_goes_on_from_the_first() -> None:
    log = wal(3)
    async with six() as (fleet, nodes):
        for node in nodes:
            node.holds(log.data)
        first = await recover(fleet, Epoch(2))
        await until(lambda: all(node.state.lineage == first.lineage for node in nodes))
        assert (await recover(fleet, Epoch(3))).lineage == Lineage.of(
            [(1, LOG_START), (2, log.end), (3, log.end)]
        )
        assert fleet.epoch == 3


async def test_what_the_second_writer_wrote_is_in_the_thirds_log() -> None:
    log = wal(3)
    async with six() as (fleet, nodes):
        for node in nodes:
            node.holds(log.data)
        first = await recover(fleet, Epoch(2))
        log.add(21, 0, body(b"written under epoch 2"))
        for node in nodes[:2]:
            node.holds(log.data, first.lineage)
        away(nodes[:1])
        away(nodes[4:5])
        async with catching_up(nodes, 3):
            second = await recover(fleet, Epoch(3))
        assert (second.source, second.end) == ("sn-2", log.end)


async def test_an_interrupted_recovery_needs_another_epoch_and_then_ends_well() -> None:
    log = wal(3)
    async with six() as (fleet, nodes):
        nodes[0].holds(log.data)
        away(nodes[4:])
        recovering = asyncio.create_task(recover(fleet, Epoch(2)))
        await until(lambda: nodes[0].calls.count("GetPosition") >= 1)
        recovering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await recovering
        with pytest.raises(Internal, match="needs a new epoch"):
            await recover(fleet, Epoch(2))
        async with catching_up(nodes, 3):
            plan = await recover(fleet, Epoch(3))
        assert plan.lineage == Lineage.of([(1, LOG_START), (2, log.end), (3, log.end)])


async def test_a_stale_epoch_is_raised_at_once() -> None:
    async with six() as (fleet, nodes):
        nodes[4].state = nodes[4].state.fence(Epoch(9))
        away(nodes[:4])
        with pytest.raises(StaleEpoch) as raised:
            await recover(fleet, Epoch(2))
        assert raised.value.details["promised_epoch"] == 9


async def test_one_overtaken_while_it_carries_out_its_plan_is_told() -> None:
    async with six() as (fleet, nodes):
        nodes[0].holds(wal(3).data)
        recovering = asyncio.create_task(recover(fleet, Epoch(2)))
        await until(lambda: nodes[0].calls.count("GetPosition") >= 1)
        for node in nodes:
            node.state = node.state.fence(Epoch(3))
        with pytest.raises(StaleEpoch):
            await recovering


# --- the log's end -------------------------------------------------------------------------------


async def end_of(log: bytes | bytearray) -> tuple[Lsn, int]:
    """The end found, and how many reads it took."""
    async with six(1) as (fleet, nodes):
        nodes[0].holds(log)
        end = await find_log_end(fleet, NodeName("sn-1"), nodes[0].state)
        return end, nodes[0].calls.count("GetLog")


async def test_the_end_of_a_long_log_is_found_in_its_tail() -> None:
    log = wal(2000, size=250)
    assert len(log.data) > 3 * 64 * 1024
    assert await end_of(log.data) == (log.end, 1)


@pytest.mark.parametrize("unfinished_bytes", [0, 8, 70_000], ids=["whole", "torn", "half"])
async def test_a_last_record_longer_than_the_first_look_is_found(unfinished_bytes: int) -> None:
    log = wal(2000, size=250)
    before = log.end
    log.add(21, 0, body(bytes(150_000)))
    kept = log.data[: len(log.data) - unfinished_bytes]
    assert await end_of(kept) == ((before if unfinished_bytes else log.end), 2)


async def test_it_looks_back_to_the_very_start_of_the_log() -> None:
    log = WalBuilder(LOG_START)
    log.add(21, 0, body(bytes(300_000)))
    end, reads = await end_of(log.data)
    assert (end, reads) == (log.end, 3)  # 64 KiB, 256 KiB, all of it
    assert (await end_of(log.data[:-8]))[0] == LOG_START


@pytest.mark.parametrize("log", [b"\xff" * 100_000, bytes(5000)], ids=["garbage", "zeros"])
async def test_a_log_without_any_record_is_corrupt(log: bytes) -> None:
    with pytest.raises(CorruptWal) as raised:
        await end_of(log)
    assert raised.value.details["lsn"] == LOG_START
