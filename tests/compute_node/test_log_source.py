"""Goal: the feed is told of durable bytes of the newest history only, and of each byte for good.

Method: positions as values for the view; for the source, storage nodes in this process behind real
gRPC, with a log that tells its bytes apart.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from boreal.errors import BorealError, CorruptData, QuorumUnavailable, StaleEpoch, Unreachable
from boreal.quorum import Lineage, SegmentState, TimelineStart
from boreal.types import Epoch, Lsn, NodeName, Timeline, VolumeId
from compute_node.fleet import Fleet
from compute_node.log_source import Held, LogSource, view_log
from compute_node.storage_client import SegmentPosition
from tests.compute_node.fleet_node import LOG_START, SYSTEM_IDENTIFIER, FleetNode, running

LOG = bytes(range(251)) * 20
END = Lsn(LOG_START + len(LOG))
ONE = Lineage.of([(1, LOG_START)])
TWO = Lineage.of([(1, LOG_START), (2, LOG_START + 1000)])
_LIMIT_S = 10


def state(lineage: Lineage, length: int) -> SegmentState:
    scl = Lsn(LOG_START + length)
    return SegmentState(
        promised=lineage.last.epoch, lineage=lineage, start=LOG_START, scl=scl, vdl=LOG_START
    )


def positions(*states: SegmentState, system: int = 7) -> dict[NodeName, SegmentPosition]:
    return {
        NodeName(f"sn-{number}"): SegmentPosition(state=each, system_identifier=system)
        for number, each in enumerate(states, start=1)
    }


# --- the view -----------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [0, 1, 2])
def test_less_than_a_read_quorum_tells_nothing(answers: int) -> None:
    with pytest.raises(QuorumUnavailable) as raised:
        view_log(positions(*[state(ONE, 500)] * answers))
    assert raised.value.details == {"answered": answers, "needed": 3}


def test_the_view_is_that_of_the_nodes_of_one_history() -> None:
    view = view_log(positions(state(ONE, 500), state(ONE, 700), state(ONE, 0)))
    assert view.lineage == ONE
    assert view.holders == {
        "sn-1": Held(LOG_START, Lsn(LOG_START + 500)),
        "sn-2": Held(LOG_START, Lsn(LOG_START + 700)),
        "sn-3": Held(LOG_START, LOG_START),
    }
    assert view.system_identifier == 7


def test_a_newer_history_wins_over_a_longer_log_and_the_old_one_is_not_read_from() -> None:
    view = view_log(positions(state(ONE, 5000), state(TWO, 1500), state(TWO, 1000)))
    assert view.lineage == TWO
    assert {name: held.scl for name, held in view.holders.items()} == {
        "sn-2": LOG_START + 1500,
        "sn-3": LOG_START + 1000,
    }


def test_who_adopted_but_lacks_bytes_below_the_newest_start_speaks_for_the_older_epoch() -> None:
    # Position is (log epoch, SCL): sn-3 has not reached epoch 2's start, so sn-1 is ahead of it.
    view = view_log(positions(state(ONE, 900), state(ONE, 900), state(TWO, 800)))
    assert view.lineage == ONE
    assert set(view.holders) == {"sn-1", "sn-2"}


def test_a_fenced_node_still_tells_its_history() -> None:
    view = view_log(positions(*[state(TWO, 1500).fence(Epoch(3))] * 3))
    assert view.lineage == TWO
    assert len(view.holders) == 3


# --- the source ---------------------------------------------------------------------------------


@asynccontextmanager
async def source_of(
    lineage: Lineage = ONE, *, durable: int = 500, epoch: int | None = None
) -> AsyncIterator[tuple[LogSource, list[FleetNode]]]:
    """Three nodes, a read quorum, that hold LOG; `durable` bytes of it are known to be."""
    nodes = [FleetNode(f"sn-{number}") for number in range(1, 4)]
    for node in nodes:
        node.log, node.state = LOG, state(lineage, len(LOG))
    fleet = Fleet(VolumeId("v"), Epoch(epoch or lineage.last.epoch))
    try:
        async with asyncio.timeout(_LIMIT_S), running(*nodes) as members:
            await fleet.set_members(members)
            view = view_log(await fleet.positions())
            yield LogSource(fleet, view, durable=Lsn(LOG_START + durable)), nodes
    finally:
        await fleet.close()


async def until(condition: Callable[[], bool]) -> None:
    """Bounded by the limit of `source_of`."""
    while not condition():
        await asyncio.sleep(0.005)


async def test_durable_grows_and_never_shrinks() -> None:
    async with source_of() as (source, _nodes):
        assert source.durable == LOG_START + 500
        for told, durable in ((600, 600), (550, 600), (0, 600), (600, 600), (601, 601)):
            await source.extend(Lsn(LOG_START + told))
            assert source.durable == LOG_START + durable


async def test_durable_never_shrinks_when_extended_from_many_sides() -> None:
    async with source_of() as (source, _nodes):
        seen = []

        async def extend(length: int) -> None:
            await source.extend(Lsn(LOG_START + length))
            seen.append(source.durable)

        await asyncio.gather(*(extend(length) for length in (900, 600, 1200, 700, 1100)))
        assert seen == sorted(seen)
        assert source.durable == LOG_START + 1200


async def test_what_cannot_be_looked_up_is_not_told_as_durable() -> None:
    async with source_of() as (source, nodes):
        nodes[0].failure = Unreachable("away")
        extending = asyncio.create_task(source.extend(Lsn(LOG_START + 900)))
        await until(lambda: nodes[1].calls.count("GetPosition") > 2)
        assert source.durable == LOG_START + 500
        nodes[0].failure = None
        await extending
        assert source.durable == LOG_START + 900


async def test_a_timeline_is_told_once_it_holds_a_durable_byte() -> None:
    lineage = Lineage.of([(1, LOG_START), (2, LOG_START + 1000), (5, LOG_START + 1000)])
    first = TimelineStart(Timeline(1), LOG_START)
    second = TimelineStart(Timeline(2), Lsn(LOG_START + 1000))
    async with source_of(lineage, durable=999) as (source, _nodes):
        assert source.timelines() == [first]
        await source.extend(Lsn(LOG_START + 1000))
        assert source.timelines() == [first]
        await source.extend(Lsn(LOG_START + 1001))
        assert source.timelines() == [first, second]


async def test_an_empty_volume_has_no_timeline_yet() -> None:
    async with source_of(durable=0) as (source, _nodes):
        assert source.timelines() == []


async def test_a_writer_that_took_over_is_learned_of_with_what_it_wrote() -> None:
    async with source_of(durable=1000, epoch=2) as (source, nodes):
        for node in nodes:
            node.state = state(TWO, len(LOG))
        assert len(source.timelines()) == 1
        await source.extend(Lsn(LOG_START + 1008))
        assert [t.timeline for t in source.timelines()] == [1, 2]


async def test_the_volume_is_named_by_its_system_identifier() -> None:
    async with source_of() as (source, _nodes):
        assert source.system_identifier == SYSTEM_IDENTIFIER


async def test_waiting_ends_once_durable_is_past_the_lsn() -> None:
    async with source_of() as (source, _nodes):
        await source.wait_beyond(Lsn(LOG_START + 499))  # at once
        waiting = [
            asyncio.create_task(source.wait_beyond(Lsn(LOG_START + length)))
            for length in (500, 600, 700)
        ]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        await source.extend(Lsn(LOG_START + 600))
        await waiting[0]
        assert [task.done() for task in waiting] == [True, False, False]  # 600 is not past 600
        await source.extend(Lsn(LOG_START + 701))
        await asyncio.gather(*waiting)


async def test_waiting_can_be_given_up() -> None:
    async with source_of() as (source, _nodes):
        waiting = asyncio.create_task(source.wait_beyond(END))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await source.extend(Lsn(LOG_START + 501))
        await source.wait_beyond(Lsn(LOG_START + 500))


# --- reading ------------------------------------------------------------------------------------


async def test_the_logs_bytes_come_from_a_node_that_has_them() -> None:
    async with source_of() as (source, nodes):
        nodes[0].state = state(ONE, 100)
        nodes[1].state = state(ONE, 200)
        await source.extend(source.durable)
        assert await source.read(Lsn(LOG_START + 50), Lsn(LOG_START + 3050)) == LOG[50:3050]
        assert [node.calls.count("GetLog") for node in nodes] == [0, 0, 1]


async def test_only_those_are_read_whose_log_reaches_down_far_enough() -> None:
    async with source_of() as (source, nodes):
        for node, start in zip(nodes, (200, 101, 100), strict=True):
            node.state = node.state.append(Epoch(1), node.state.scl, 0, node.state.scl).state
            node.state = node.state.trim(Lsn(LOG_START + start))
        await source.extend(source.durable)
        assert await source.read(Lsn(LOG_START + 100), Lsn(LOG_START + 500)) == LOG[100:500]
        assert [node.calls.count("GetLog") for node in nodes] == [0, 0, 1]
        for node in nodes[1:]:
            node.failure = Unreachable("away")
        assert await source.read(Lsn(LOG_START + 200), Lsn(LOG_START + 500)) == LOG[200:500]


async def test_nothing_is_read_from_another_history() -> None:
    async with source_of(TWO, durable=1500) as (source, nodes):
        for node in nodes[:2]:
            node.state, node.log = replace(state(ONE, len(LOG)), promised=Epoch(2)), b"x" * len(LOG)
        await source.extend(source.durable)
        assert await source.read(LOG_START, Lsn(LOG_START + 1500)) == LOG[:1500]
        assert [node.calls.count("GetLog") for node in nodes] == [0, 0, 1]


@pytest.mark.parametrize(
    "failure", [CorruptData("checksum"), Unreachable("away")], ids=lambda failure: failure.code
)
async def test_another_node_is_asked_when_one_fails(failure: BorealError) -> None:
    async with source_of() as (source, nodes):
        nodes[0].failure = nodes[1].failure = failure
        assert await source.read(LOG_START, Lsn(LOG_START + 500)) == LOG[:500]


async def test_it_waits_for_a_node_to_have_the_bytes() -> None:
    async with source_of() as (source, nodes):
        for node in nodes:
            node.state = state(ONE, 100)
        await source.extend(source.durable)
        asked = nodes[0].calls.count("GetPosition")
        reading = asyncio.create_task(source.read(LOG_START, Lsn(LOG_START + 500)))
        await until(lambda: nodes[0].calls.count("GetPosition") > asked)
        assert not reading.done()
        nodes[1].state = state(ONE, 500)
        assert await reading == LOG[:500]


async def test_a_newer_epoch_ends_a_read_at_once() -> None:
    async with source_of() as (source, nodes):
        for node in nodes:
            node.state = node.state.fence(Epoch(2))
        with pytest.raises(StaleEpoch):
            await source.read(LOG_START, Lsn(LOG_START + 500))
        assert sum(node.calls.count("GetLog") for node in nodes) == 1
