"""The control plane over gRPC, as members and people see it.

Method: the real process, killed and started again on the same directory; and the service in this
process with a clock of its own, for what depends on time.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from boreal.cluster import free_ports
from boreal.errors import BadUsage, MalformedRequest, Refused, UnknownOutcome, Unreachable
from boreal.rpc import common_pb2, compute_pb2, control_pb2, control_pb2_grpc
from boreal.rpc.edge import calling, make_server, open_channel
from boreal.types import VolumeId
from control_plane.coordinator import Coordinator
from control_plane.service import ControlService
from control_plane.state import ControlState

Order = control_pb2.Order


class Members:
    """Plays six storage nodes and one compute node at a control plane's door."""

    def __init__(self, stub: control_pb2_grpc.ControlAsyncStub) -> None:
        self.stub = stub
        self.incarnation = "first"
        self.state = compute_pb2.WAITING

    async def storage(self, number: int, *volumes: str) -> list[str]:
        node = control_pb2.StorageNode(
            name=f"sn-{number}",
            zone="abc"[(number - 1) // 2 % 3],
            addresses=control_pb2.StorageAddresses(
                log=f"h:{number}1", frames=f"h:{number}2", pages=f"h:{number}3"
            ),
        )
        request = control_pb2.StorageHeartbeatRequest(
            node=node,
            incarnation="i",
            pid=number,
            segments=[
                control_pb2.SegmentReport(volume_id=volume, promised_epoch=1, scl=9)
                for volume in volumes
            ],
        )
        with calling("control", "StorageHeartbeat"):
            answer = await self.stub.StorageHeartbeat(request, timeout=5)
        return [member.name for member in answer.members]

    async def all_storage(self) -> None:
        for number in range(1, 7):
            await self.storage(number)

    async def compute(self) -> control_pb2.Order:
        request = control_pb2.ComputeHeartbeatRequest(
            address="h:1",
            postgres_port=5,
            pid=77,
            status=compute_pb2.ComputeStatus(
                instance="db-1", incarnation=self.incarnation, state=self.state, vdl=3
            ),
        )
        with calling("control", "ComputeHeartbeat"):
            return (await self.stub.ComputeHeartbeat(request, timeout=5)).order

    async def created(self, volume: common_pb2.VolumeRef) -> None:
        request = control_pb2.VolumeCreatedRequest(
            volume=volume, instance="db-1", system_identifier=2**64 - 1
        )
        with calling("control", "VolumeCreated"):
            await self.stub.VolumeCreated(request, timeout=5)

    async def status(self) -> control_pb2.ClusterStatus:
        with calling("control", "GetStatus"):
            return await self.stub.GetStatus(control_pb2.GetClusterStatusRequest(), timeout=5)


class ManualClock:
    """Time passes when told to."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def members(tmp_path: Path, clock: ManualClock) -> AsyncIterator[Members]:
    state = ControlState.open(tmp_path / "control.db")
    names = iter(["vol-1", "vol-2", "vol-3"])
    service = ControlService(Coordinator(state, clock, lambda: VolumeId(next(names))))
    server = make_server()
    control_pb2_grpc.add_ControlServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        yield Members(control_pb2_grpc.ControlStub(channel))
    await server.stop(None)
    state.close()


async def test_from_nothing_to_a_writer(members: Members) -> None:
    waiting = await members.compute()
    assert (waiting.kind, waiting.HasField("volume")) == (Order.WAIT, False)
    assert "0 of 6" in waiting.reason
    await members.all_storage()
    order = await members.compute()
    assert (order.kind, order.volume.epoch) == (Order.CREATE_VOLUME, 1)
    assert await members.compute() == order
    members.state = compute_pb2.CREATING
    await members.created(order.volume)
    await members.created(order.volume)
    members.incarnation, members.state = "second", compute_pb2.WAITING
    order = await members.compute()
    assert (order.kind, order.volume.epoch) == (Order.WRITE, 2)
    members.state = compute_pb2.WRITER
    assert await members.compute() == order
    members.incarnation, members.state = "third", compute_pb2.WAITING
    assert (await members.compute()).volume.epoch == 3


async def test_a_creation_cut_short_starts_over_with_another_volume(members: Members) -> None:
    await members.all_storage()
    first = await members.compute()
    members.incarnation = "second"
    second = await members.compute()
    assert second.kind == Order.CREATE_VOLUME
    assert second.volume.volume_id != first.volume.volume_id
    with pytest.raises(Refused, match="given up"):
        await members.created(first.volume)


async def test_status_tells_who_is_silent(members: Members, clock: ManualClock) -> None:
    await members.all_storage()
    order = await members.compute()
    clock.now += 1.5
    await members.storage(1, order.volume.volume_id)
    clock.now += 1.0
    status = await members.status()
    assert [(each.node.name, each.alive) for each in status.storage] == [
        (f"sn-{n}", n == 1) for n in range(1, 7)
    ]
    assert [each.silent_ms for each in status.storage] == [1000, *[2500] * 5]
    assert status.storage[0].segments[0].scl == 9
    assert (status.volume.volume_id, status.volume_ready) == (order.volume.volume_id, False)
    (instance,) = status.instances
    assert (instance.alive, instance.silent_ms, instance.pid) == (False, 2500, 77)
    assert instance.status.vdl == 3


async def test_no_epoch_without_a_write_quorum(members: Members, clock: ManualClock) -> None:
    await members.all_storage()
    await members.created((await members.compute()).volume)
    clock.now += 10
    for number in (1, 2, 3):
        await members.storage(number)
    members.incarnation = "second"
    order = await members.compute()
    assert order.kind == Order.WAIT
    assert "3 of 6" in order.reason
    await members.storage(4)
    assert (await members.compute()).kind == Order.WRITE


async def test_members_are_told_and_there_are_six(members: Members) -> None:
    assert await members.storage(2) == ["sn-2"]
    assert await members.storage(1) == ["sn-1", "sn-2"]
    await members.all_storage()
    with pytest.raises(BadUsage, match="one too many"):
        await members.storage(7)


async def test_malformed_reports_are_refused(members: Members) -> None:
    await members.all_storage()
    with pytest.raises(MalformedRequest), calling("control", "StorageHeartbeat"):
        await members.stub.StorageHeartbeat(control_pb2.StorageHeartbeatRequest(), timeout=5)
    with pytest.raises(MalformedRequest), calling("control", "VolumeCreated"):
        await members.stub.VolumeCreated(control_pb2.VolumeCreatedRequest(), timeout=5)
    members.incarnation = ""
    with pytest.raises(MalformedRequest):
        await members.compute()
    members.incarnation, members.state = "x", 99  # type: ignore[assignment]
    with pytest.raises(MalformedRequest):
        await members.compute()
    assert not (await members.status()).instances


# --- the process ---------------------------------------------------------------------------------


@asynccontextmanager
async def control_process(
    directory: Path, port: int, ends_by: signal.Signals
) -> AsyncIterator[Members]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "control_plane", f"--data-dir={directory}", f"--port={port}"
    )
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            members = Members(control_pb2_grpc.ControlStub(channel))
            async with asyncio.timeout(20):
                while not await answers(members):
                    await asyncio.sleep(0.05)
            yield members
    finally:
        process.send_signal(ends_by)
        code = await process.wait()
    assert code == (0 if ends_by is signal.SIGTERM else -ends_by)


async def answers(members: Members) -> bool:
    try:
        await members.status()
    except (Unreachable, UnknownOutcome):
        return False
    return True


async def test_a_killed_control_plane_continues(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    async with control_process(tmp_path, port, signal.SIGKILL) as members:
        await members.all_storage()
        created = await members.compute()
        await members.created(created.volume)
        order = await members.compute()
        assert (order.kind, order.volume.epoch) == (Order.WRITE, 2)
    async with control_process(tmp_path, port, signal.SIGTERM) as members:
        status = await members.status()
        assert (status.volume_ready, status.writer, status.volume) == (True, "db-1", order.volume)
        assert len(status.storage) == 6
        assert not any(node.alive for node in status.storage)
        assert await members.compute() == order
        members.incarnation = "second"
        await members.all_storage()
        assert (await members.compute()).volume.epoch == 3
