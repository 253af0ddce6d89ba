"""Reads when a node is slow, hangs, or fails.

Goal: one bad node does not show in the tail of page reads; a node that recovers is used again; when
all nodes are slow, hedges do not multiply the load. Method: real node processes, one of them
stopped in mid-service; the budget and the health of a node, being pure, by their values.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace

import pytest

from boreal.rpc import control_pb2
from boreal.types import PAGE_BYTES, BlockNumber, Epoch, Fork, Lsn, NodeName, RelationFork, VolumeId
from compute_node.fleet import DEFAULT_LIMITS, Fleet
from compute_node.read_path import HedgeBudget, Hedging, NodeHealth, Patience
from tests.compute_node.fleet_node import FleetNode, running

HEAP = RelationFork(1663, 5, 16384, Fork.MAIN)
LSN = Lsn(1000)
HEDGING = Hedging(first_s=0.05, least_s=0.02, burst=64)
LIMITS = replace(
    DEFAULT_LIMITS,
    pages=Patience(attempt_s=3.0, total_s=30.0, hedging=HEDGING),
    windows=Patience(attempt_s=3.0, total_s=30.0, hedging=HEDGING),
)


@contextmanager
def node_process() -> Iterator[tuple[subprocess.Popen[str], control_pb2.StorageNode]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.compute_node.page_node"], stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            address = f"127.0.0.1:{int(process.stdout.readline())}"
            addresses = control_pb2.StorageAddresses(
                log="-", frames="-", pages="-", page_frames=address
            )
            yield process, control_pb2.StorageNode(name=address, addresses=addresses)
        finally:
            process.kill()


@asynccontextmanager
async def three() -> AsyncIterator[tuple[Fleet, dict[NodeName, subprocess.Popen[str]]]]:
    fleet = Fleet(VolumeId("v"), Epoch(1), limits=LIMITS)
    with ExitStack() as stack:
        nodes = [stack.enter_context(node_process()) for _ in range(3)]
        try:
            await fleet.set_members([member for _process, member in nodes])
            yield fleet, {NodeName(member.name): process for process, member in nodes}
        finally:
            await fleet.close()


async def read(fleet: Fleet, block: int, count: int = 1) -> float:
    """Seconds it took."""
    started = time.monotonic()
    pages = await fleet.get_pages(HEAP, BlockNumber(block), count, LSN)
    numbers = range(block, block + count)
    assert pages == [bytes([number % 255 + 1]) * PAGE_BYTES for number in numbers]
    return time.monotonic() - started


@pytest.mark.parametrize("count", [1, 16])
async def test_a_stopped_node_does_not_show_in_the_tail(count: int) -> None:
    async with three() as (fleet, processes):
        for block in range(60):
            await read(fleet, block, count)
        path = fleet.page_reads if count == 1 else fleet.window_reads
        fastest = path.order(fleet.members)[0]
        processes[fastest].send_signal(signal.SIGSTOP)
        took_s = sorted([await read(fleet, block, count) for block in range(300)])
        # Without hedges the first read would wait its whole attempt of three seconds.
        assert took_s[-1] < 2.0
        assert took_s[int(0.97 * len(took_s))] < 0.5
        known = path.health(fastest)
        assert known.latency_s >= HEDGING.least_s

        processes[fastest].send_signal(signal.SIGCONT)
        async with asyncio.timeout(30):
            while path.health(fastest).latency_s == known.latency_s:
                await read(fleet, 1, count)  # a probe finds it well again


async def test_reads_under_way_on_a_node_that_stops_all_get_away() -> None:
    async with three() as (fleet, processes):
        for block in range(60):
            await read(fleet, block)
        for process in list(processes.values())[:2]:  # two of three: a zone, say
            process.send_signal(signal.SIGSTOP)
        took_s = sorted(await asyncio.gather(*(read(fleet, block) for block in range(40))))
        assert took_s[20] < 2.0
        assert took_s[-1] < 5.0  # hedges are rationed: some may wait for their attempt to end


async def test_windows_under_way_together_go_to_several_nodes() -> None:
    nodes = [FleetNode(f"sn-{number}") for number in range(1, 4)]
    fleet = Fleet(VolumeId("v"), Epoch(1), limits=LIMITS)
    try:
        async with running(*nodes) as members:
            await fleet.set_members(members)
            for _ in range(10):
                await asyncio.gather(
                    *(fleet.get_pages(HEAP, BlockNumber(n * 8), 8, LSN) for n in range(6))
                )
            assert all(node.calls.count("GetPages") >= 6 for node in nodes)
    finally:
        await fleet.close()


async def test_an_answer_that_lost_is_cancelled() -> None:
    nodes = [FleetNode(f"sn-{number}") for number in range(1, 4)]
    fleet = Fleet(VolumeId("v"), Epoch(1), limits=LIMITS)
    try:
        async with running(*nodes) as members:
            await fleet.set_members(members)
            for node in nodes[:2]:
                node.hanging = True
            assert await fleet.get_pages(HEAP, BlockNumber(0), 1, LSN) == [None]
            names = [NodeName(node.name) for node in nodes]
            assert [fleet.page_reads.health(name).under_way for name in names] == [0, 0, 0]
            for node in nodes:
                node.hanging = False
    finally:
        await fleet.close()


# --- values -------------------------------------------------------------------------------------


def test_the_delay_is_that_of_nearly_all_answers() -> None:
    budget = HedgeBudget(Hedging(first_s=0.05, least_s=0.005, most_s=0.5))
    assert budget.delay_s == 0.05
    for _ in range(8):
        for latency_ms in (*[10] * 14, 80, 30):
            budget.answered(latency_ms / 1000)
    assert 0.03 <= budget.delay_s <= 0.08
    for _ in range(128):
        budget.answered(0.0001)
    assert budget.delay_s == 0.005
    for _ in range(128):
        budget.answered(9.0)
    assert budget.delay_s == 0.5


def test_hedges_are_a_bounded_share_of_reads() -> None:
    budget = HedgeBudget(Hedging(share=0.1, burst=5))
    assert [budget.spend() for _ in range(7)] == [True] * 5 + [False] * 2
    made = 0
    for _ in range(1000):
        budget.answered(1.0)
        made += budget.spend()
    assert 95 <= made <= 100


def test_a_node_is_at_least_as_slow_as_one_has_waited_for_it() -> None:
    known = NodeHealth().answered(0.001).asked().waited_for(0.02)
    assert known.latency_s == 0.02
    assert known.expected_s == 0.04
    assert known.waited_for(0.01) == known
    assert known.ended().answered(0.001).latency_s < 0.02
