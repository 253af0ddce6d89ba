"""Goal: a control plane that is killed goes on where it was.

Method: the real process, killed and started again on the same directory; its members are played.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from boreal.cluster import free_ports
from boreal.errors import UnknownOutcome, Unreachable
from boreal.rpc import compute_pb2, control_pb2, control_pb2_grpc
from boreal.rpc.edge import open_channel
from tests.control_plane.members import Instance, Members, ordered, until

Order = control_pb2.Order
Event = control_pb2.Event


@asynccontextmanager
async def control_process(
    directory: Path, port: int, ends_by: signal.Signals
) -> AsyncIterator[Members]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "control_plane", "--insecure"),
        *(f"--data-dir={directory}", f"--port={port}"),
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
        created = await members.one.report()
        await members.created(created.volume)
        order = await members.one.start_over()
        assert (order.kind, order.volume.epoch) == (Order.WRITE, 2)
        incarnation = members.one.incarnation
    async with control_process(tmp_path, port, signal.SIGTERM) as members:
        status = await members.status()
        assert (status.volume_ready, status.writer, status.volume) == (True, "db-1", order.volume)
        assert len(status.storage) == 6
        assert not any(node.alive for node in status.storage)
        members.one.incarnation = incarnation
        assert await members.one.report() == order
        await members.all_storage()
        assert (await members.one.start_over()).volume.epoch == 3


async def test_a_planned_failover_goes_on_though_the_control_plane_is_killed_at_each_step(
    tmp_path: Path,
) -> None:
    (port,) = free_ports(1)
    lives: dict[str, Instance] = {}

    @asynccontextmanager
    async def next_life(ends_by: signal.Signals = signal.SIGKILL) -> AsyncIterator[Members]:
        async with control_process(tmp_path, port, ends_by) as members:
            for instance in (members.one, members.two, members.three):
                last = lives.get(instance.name, instance)
                instance.incarnation, instance.state = last.incarnation, last.state
                lives[instance.name] = instance
            await members.all_storage()
            yield members

    async with next_life() as members:
        await members.serving()
        asked = asyncio.create_task(members.failover("db-3"))
        await until(lambda: ordered(members.one, Order.YIELD))
    (outcome,) = await asyncio.gather(asked, return_exceptions=True)
    assert isinstance(outcome, BaseException)  # whoever asked does not know
    async with next_life() as members:
        assert await ordered(members.one, Order.YIELD)
        await members.one.start_over()
    async with next_life() as members:
        await members.one.report(compute_pb2.RESTORING)
        order = await members.three.report()
        assert (order.kind, order.volume.epoch, order.former_gone) == (Order.WRITE, 3, True)
    async with next_life() as members:
        order = await members.three.report(compute_pb2.PROMOTING)
        assert (order.kind, order.volume.epoch) == (Order.WRITE, 3)
        await members.three.report(compute_pb2.WRITER)
    async with next_life(signal.SIGTERM) as members:
        assert (await members.status()).writer == "db-3"
        order = await members.three.report()
        assert (order.kind, order.volume.epoch) == (Order.WRITE, 3)
        order = await members.one.report()
        assert (order.kind, order.volume.epoch) == (Order.READ, 3)
        assert await members.failover_events() == [
            (Event.FAILOVER_STARTED, "db-3"),
            (Event.FAILOVER_COMPLETED, "db-3"),
        ]


async def test_a_writer_lost_while_the_control_plane_was_down_is_replaced(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    async with control_process(tmp_path, port, signal.SIGKILL) as members:
        await members.serving()
    async with control_process(tmp_path, port, signal.SIGTERM) as members:
        members.two.state = compute_pb2.READER

        async def taken_over() -> bool:
            await members.all_storage()
            return await ordered(members.two, Order.WRITE)

        await until(taken_over)
        assert (await members.failover_events())[-1] == (Event.FAILOVER_STARTED, "db-2")
