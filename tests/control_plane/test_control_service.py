"""The control plane over gRPC, as members and people see it.

Method: the service in this process, with a clock of its own for what depends on time. (Its own
process, killed and started again: test_control_process.py.)
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from boreal.errors import (
    BadUsage,
    Failed,
    MalformedRequest,
    NotNow,
    Refused,
)
from boreal.rpc import compute_pb2, control_pb2, control_pb2_grpc
from boreal.rpc.edge import calling, make_server, open_channel
from boreal.types import VolumeId
from control_plane import service as service_module
from control_plane.coordinator import Coordinator
from control_plane.pulse import Pulse
from control_plane.service import ControlService
from control_plane.state import ControlState
from tests.control_plane.members import Instance, Members, ordered, until

Order = control_pb2.Order
Event = control_pb2.Event


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
def state(tmp_path: Path) -> Iterator[ControlState]:
    state = ControlState.open(tmp_path / "control.db")
    yield state
    state.close()


@pytest.fixture
def pulse() -> Pulse:
    return Pulse()


@pytest.fixture
def coordinator(state: ControlState, clock: ManualClock, pulse: Pulse) -> Coordinator:
    names = iter(["vol-1", "vol-2", "vol-3"])
    return Coordinator(state, clock, lambda: VolumeId(next(names)), on_change=pulse.beat)


@pytest.fixture
async def address(coordinator: Coordinator, pulse: Pulse) -> AsyncIterator[str]:
    service = ControlService(coordinator, pulse)
    server = make_server()
    control_pb2_grpc.add_ControlServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    watching = asyncio.create_task(service.keep_watch())
    yield f"127.0.0.1:{port}"
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    await server.stop(None)


@pytest.fixture
async def members(address: str) -> AsyncIterator[Members]:
    async with open_channel(address) as channel:
        yield Members(control_pb2_grpc.ControlStub(channel))


async def test_from_nothing_to_a_writer(members: Members) -> None:
    waiting = await members.one.report()
    assert (waiting.kind, waiting.HasField("volume")) == (Order.WAIT, False)
    assert "0 of 6" in waiting.reason
    await members.all_storage()
    order = await members.one.report()
    assert (order.kind, order.volume.epoch) == (Order.CREATE_VOLUME, 1)
    assert await members.one.report() == order
    members.one.state = compute_pb2.CREATING
    await members.created(order.volume)
    await members.created(order.volume)
    members.one.incarnation, members.one.state = "second", compute_pb2.WAITING
    order = await members.one.report()
    assert (order.kind, order.volume.epoch) == (Order.WRITE, 2)
    members.one.state = compute_pb2.WRITER
    assert await members.one.report() == order
    members.one.incarnation, members.one.state = "third", compute_pb2.WAITING
    assert (await members.one.report()).volume.epoch == 3


async def test_a_creation_cut_short_starts_over_with_another_volume(members: Members) -> None:
    await members.all_storage()
    first = await members.one.report()
    members.one.incarnation = "second"
    second = await members.one.report()
    assert second.kind == Order.CREATE_VOLUME
    assert second.volume.volume_id != first.volume.volume_id
    with pytest.raises(Refused, match="given up"):
        await members.created(first.volume)


async def test_status_tells_who_is_silent(members: Members, clock: ManualClock) -> None:
    await members.all_storage()
    order = await members.one.report()
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
    await members.created((await members.one.report()).volume)
    clock.now += 10
    for number in (1, 2, 3):
        await members.storage(number)
    members.one.incarnation = "second"
    order = await members.one.report()
    assert order.kind == Order.WAIT
    assert "3 of 6" in order.reason
    await members.storage(4)
    assert (await members.one.report()).kind == Order.WRITE


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
    members.one.incarnation = ""
    with pytest.raises(MalformedRequest):
        await members.one.report()
    members.one.incarnation, members.one.state = "x", 99  # type: ignore[assignment]
    with pytest.raises(MalformedRequest):
        await members.one.report()
    assert not (await members.status()).instances


# --- orders -------------------------------------------------------------------------------------


async def test_an_order_comes_as_soon_as_there_is_another(
    members: Members, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "_LONGEST_POLL_S", 1000.0)  # else it might come by itself
    await members.serving()
    await members.two.report()
    waiting = asyncio.create_task(members.two.call(wait_ms=1_000_000))
    await members.one.start_over()
    answer = await waiting
    assert (answer.order.kind, answer.order.volume.epoch) == (Order.WRITE, 3)
    assert answer.order.former_gone
    # One that does not know any order is told at once.
    members.three.known = None
    assert (await members.three.call(wait_ms=1_000_000)).order.kind == Order.READ


async def test_an_order_that_stays_is_said_again_in_the_end(members: Members) -> None:
    await members.serving()
    order = await members.two.report()
    answer = await members.two.call(wait_ms=50)
    assert answer.order == order
    assert [node.name for node in answer.members] == [f"sn-{n}" for n in range(1, 7)]
    assert [each.status.instance for each in answer.instances] == ["db-1", "db-2", "db-3"]
    writer = answer.instances[0]
    assert (writer.address, writer.status.state) == ("host-1:1", compute_pb2.WRITER)


async def test_a_call_that_waits_is_told_if_another_life_follows(members: Members) -> None:
    await members.serving()
    await members.two.report()
    former = Instance(members.stub, "db-2")
    former.known, former.state = members.two.known, members.two.state
    waiting = asyncio.create_task(former.call(wait_ms=900))
    await asyncio.sleep(0.1)
    await members.two.start_over()
    with pytest.raises(Refused, match="another incarnation"):
        await waiting
    with pytest.raises(Refused, match="another incarnation"):
        await former.call()


CALLER = """
import asyncio, sys
from boreal.rpc import control_pb2, control_pb2_grpc
from boreal.rpc.edge import open_channel

async def main():
    request = control_pb2.ComputeHeartbeatRequest.FromString(bytes.fromhex(sys.argv[2]))
    async with open_channel(sys.argv[1]) as channel:
        await control_pb2_grpc.ControlStub(channel).ComputeHeartbeat(request, timeout=100)

asyncio.run(main())
"""


async def test_a_killed_agent_is_noticed_by_its_call(
    members: Members,
    address: str,
    coordinator: Coordinator,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service_module, "_LONGEST_POLL_S", 1000.0)
    await members.serving()
    await members.one.report()
    clock.now += 0.001  # what is heard now is the call
    call = members.one.request(wait_ms=1_000_000).SerializeToString().hex()
    agent = await asyncio.create_subprocess_exec(sys.executable, "-c", CALLER, address, call)
    name = coordinator.state.current.writer

    async def called() -> bool:
        return name is not None and coordinator.instance_silence(name.instance).ms == 0

    async def cut() -> bool:
        return name is not None and coordinator.instance_silence(name.instance).cut_ms is not None

    await until(called)
    assert not await cut()
    agent.kill()
    await agent.wait()
    await until(cut)
    assert (await members.two.report()).kind == Order.READ
    clock.now += 0.5
    assert (await members.two.report()).kind == Order.WRITE


# --- routing ------------------------------------------------------------------------------------


class Routes:
    """Follows the routing as an endpoint does."""

    def __init__(self, stub: control_pb2_grpc.ControlAsyncStub) -> None:
        self.stream = stub.WatchRouting(control_pb2.WatchRoutingRequest())

    async def next(self) -> list[tuple[str, bool]]:
        async with asyncio.timeout(10):
            read = await self.stream.read()
        assert isinstance(read, control_pb2.Routing)
        self.last = read
        return [(route.instance, route.writer) for route in self.last.routes]


async def test_routes_follow_the_roles(members: Members, clock: ManualClock) -> None:
    routes = Routes(members.stub)
    assert await routes.next() == []
    await members.serving()
    assert await routes.next() == [("db-2", False)]
    assert await routes.next() == [("db-2", False), ("db-3", False)]
    assert await routes.next() == [("db-1", True), ("db-2", False), ("db-3", False)]
    (first, *_) = routes.last.routes
    assert (first.host, first.postgres_port, first.handover) == ("host-1", 5001, "/run/db-1")
    # Silent: the readers are left out, the writer that nobody can replace keeps its route.
    clock.now += 3
    assert await routes.next() == [("db-1", True)]
    await members.two.report()
    assert await routes.next() == [("db-1", True), ("db-2", False)]
    await members.all_storage()
    order = await members.two.report()
    assert (order.kind, order.volume.epoch) == (Order.WRITE, 3)
    assert await routes.next() == [("db-2", False)]
    await members.two.report(compute_pb2.PROMOTING)
    assert await routes.next() == []
    await members.two.report(compute_pb2.WRITER)
    assert await routes.next() == [("db-2", True)]
    # The former writer thinks it is one still.
    assert (await members.one.report()).kind == Order.READ
    routes.stream.cancel()
    again = Routes(members.stub)
    assert await again.next() == [("db-2", True)]
    again.stream.cancel()


# --- what people ask ----------------------------------------------------------------------------


async def test_a_planned_failover_is_answered_when_the_new_writer_serves(
    members: Members, clock: ManualClock
) -> None:
    await members.serving()
    asked = asyncio.create_task(members.failover("db-3"))
    await until(lambda: ordered(members.one, Order.YIELD))
    with pytest.raises(NotNow, match="under way"):
        await members.failover("db-2")
    await members.one.report(compute_pb2.YIELDING)
    await members.one.start_over()
    order = await members.three.report()
    assert (order.kind, order.volume.epoch, order.former_gone) == (Order.WRITE, 3, True)
    assert not asked.done()
    await members.three.report(compute_pb2.PROMOTING)
    await members.three.report(compute_pb2.WRITER)
    answer = await asked
    assert (answer.writer, answer.epoch) == ("db-3", 3)
    assert await members.failover_events() == [
        (Event.FAILOVER_STARTED, "db-3"),
        (Event.FAILOVER_COMPLETED, "db-3"),
    ]
    last = (await members.events())[-1]
    assert (last.took_ms, await members.events(last.id)) == (answer.took_ms, [])


async def test_a_failover_that_fails_says_why(members: Members, clock: ManualClock) -> None:
    await members.serving()
    for target in ("db-1", "db-9"):
        with pytest.raises(BadUsage):
            await members.failover(target)
    asked = asyncio.create_task(members.failover())  # db-2 by its tier
    await until(lambda: ordered(members.one, Order.YIELD))
    await members.two.start_over()
    with pytest.raises(Failed, match="db-2 is waiting, not a reader"):
        await asked
    assert (await members.one.report()).kind == Order.WRITE
    assert await members.failover_events() == [
        (Event.FAILOVER_STARTED, "db-2"),
        (Event.FAILOVER_FAILED, "db-2"),
    ]


async def test_a_stopped_reader_is_removed_once_it_is_known_to_be_gone(
    members: Members, clock: ManualClock
) -> None:
    await members.serving()
    with pytest.raises(BadUsage, match="alive"):
        await members.remove("db-2")
    await members.two.report(compute_pb2.STOPPING)
    call = members.stub.ComputeHeartbeat(members.two.request(wait_ms=900))
    removing = asyncio.create_task(members.remove("db-2"))
    await asyncio.sleep(0.1)
    call.cancel()

    async def removed() -> bool:
        clock.now += 0.1
        return removing.done()

    await until(removed)
    await removing
    assert [each.status.instance for each in (await members.status()).instances] == [
        "db-1",
        "db-3",
    ]
    assert (await members.events())[-1].kind == Event.INSTANCE_REMOVED
