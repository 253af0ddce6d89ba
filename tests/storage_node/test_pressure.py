"""A node whose page index lags slows its writer, a little, bounded, and only while it lags.

The rule on values; then a real node whose page process is stopped by a signal, so that its index
stays where it is.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from boreal.errors import ProcessFailed
from boreal.frames import frame
from boreal.rpc import control_pb2
from boreal.types import WAL_SEGMENT_BYTES, Lsn
from boreal.waiting import wait_until
from storage_node.config import VolumeLayout
from storage_node.pressure import Pressure
from storage_node.shared_state import SharedState
from tests.storage_node.node_process import (
    VOLUME,
    FakeControl,
    LaneClient,
    LogClient,
    NodeProcess,
    fake_control,
    lane_client,
    log_client,
)

START = Lsn(3 * WAL_SEGMENT_BYTES)
MIB = 1 << 20


@pytest.mark.parametrize(
    ("lag", "size", "delay_s"),
    [
        (0, 100, 0.0),
        (1000, 100, 0.0),
        (1500, 0, 0.025),
        (2000, 0, 0.05),
        (9000, 0, 0.05),
        (2000, 400, 0.45),
        (1500, 400, 0.225),
    ],
)
def test_the_delay_grows_with_the_lag_up_to_its_most(lag: int, size: int, delay_s: float) -> None:
    pressure = Pressure(soft_bytes=1000, most_delay_s=0.05, least_bytes_per_s=1000)
    assert pressure.delay_s(lag, size) == pytest.approx(delay_s)


class LaggingNode(NodeProcess):
    """Slows its writer from 1 MiB of lag on."""

    def command(self) -> list[str]:
        return [*super().command(), "--index-lag-mib", "1"]

    @property
    def page_process(self) -> psutil.Process:
        def started() -> list[psutil.Process]:
            return psutil.Process(self.pid).children()

        (child,) = wait_until(
            started, timeout_s=15, otherwise=lambda: ProcessFailed("it has no page process")
        )
        return child

    @property
    def shared(self) -> Path:
        return VolumeLayout(root=self.data_dir / "volumes" / VOLUME).shared


@pytest_asyncio.fixture
async def control() -> AsyncIterator[tuple[FakeControl, str]]:
    async with fake_control() as running:
        yield running


@pytest_asyncio.fixture
async def node(control: tuple[FakeControl, str], tmp_path: Path) -> AsyncIterator[LaggingNode]:
    node = LaggingNode("sn-1", tmp_path, control[1])
    await asyncio.to_thread(node.start)
    try:
        yield node
    finally:
        node.stop()


async def timed(lane: LaneClient, client: LogClient, at: int, size: int) -> tuple[Lsn, float]:
    started = time.perf_counter()
    at = await lane.append(client.request(1, at, bytes(size), at))
    return Lsn(at), time.perf_counter() - started


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(15):
        while not await condition():
            await asyncio.sleep(0.02)


def report_of(control: FakeControl) -> control_pb2.SegmentReport:
    (report,) = control.reports["sn-1"].segments
    return report


async def test_acks_wait_while_the_index_lags_and_no_longer(
    node: LaggingNode, control: tuple[FakeControl, str]
) -> None:
    page_process = node.page_process
    async with log_client(node.address) as client, lane_client(node.frames_port) as lane:
        await client.create(1, START)
        page_process.send_signal(signal.SIGSTOP)
        try:
            at, _ = await timed(lane, client, START, MIB)
            quick = [await timed(lane, client, at, 0) for _ in range(5)]
            at, _ = await timed(lane, client, at, MIB)  # from here on the lag is at its most
            waited = [(await timed(lane, client, at + n, 1))[1] for n in range(5)]
            at = Lsn(at + 5)
            assert min(waited) >= 0.05
            assert min(waited) < 0.2
            assert (await client.position(1)).scl == at, "what is not told is durable all the same"

            async def told() -> bool:
                return report_of(control[0]).ack_delay_us > 45_000

            await until(told)
            assert report_of(control[0]).start_lsn == START

            # Neither a heartbeat nor a fence is held back.
            beats = [(await timed(lane, client, at, 0))[1] for _ in range(5)]
            assert min(beats) < 0.05
            assert quick
        finally:
            page_process.send_signal(signal.SIGCONT)
        shared = SharedState(node.shared)
        shared.indexed = at  # as the page process would
        assert min([(await timed(lane, client, at + n, 1))[1] for n in range(5)]) < 0.05
        shared.close()


async def test_an_index_that_stopped_for_good_slows_nobody(node: LaggingNode) -> None:
    async with log_client(node.address) as client, lane_client(node.frames_port) as lane:
        await client.create(1, START)
        at = START
        for _ in range(3):
            at, _ = await timed(lane, client, at, MIB)
        shared = SharedState(node.shared)
        shared.failure = "met a record it must not pass"
        assert min([(await timed(lane, client, at + n, 1))[1] for n in range(5)]) < 0.05
        shared.close()


async def test_answers_stay_in_order_while_one_of_them_waits(node: LaggingNode) -> None:
    async with log_client(node.address) as client, lane_client(node.frames_port) as lane:
        await client.create(1, START)
        at = START
        for _ in range(3):
            at, _ = await timed(lane, client, at, MIB)
        for number in range(4):
            request = client.request(1, at + number, b"\0", 0)
            lane.send(frame(request.SerializeToString()))
            await asyncio.sleep(0.005)  # so that each comes by itself
        lane.send(frame(client.request(0, at, b"", 0).SerializeToString()))
        answers = [await lane.receive() for _ in range(5)]
        assert [answer.ack.scl for answer in answers] == [at + 1, at + 2, at + 3, at + 4, 0]
        assert answers[4].error.code == "StaleEpoch"


async def test_a_dead_page_process_slows_but_never_stops_the_writer(
    node: LaggingNode, control: tuple[FakeControl, str]
) -> None:
    async with log_client(node.address) as client, lane_client(node.frames_port) as lane:
        await client.create(1, START)
        node.page_process.kill()
        at = START
        for _ in range(6):
            at, took_s = await timed(lane, client, at, MIB)
            assert took_s < 2.0

        async def told() -> bool:
            for child in psutil.Process(node.pid).children():
                child.kill()
            return "not running" in report_of(control[0]).failure

        await until(told)
