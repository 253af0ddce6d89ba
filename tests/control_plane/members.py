"""Storage nodes and compute nodes as the control plane sees them: by what they report."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from boreal.rpc import common_pb2, compute_pb2, control_pb2, control_pb2_grpc
from boreal.rpc.edge import calling

Order = control_pb2.Order
Event = control_pb2.Event


class Instance:
    """Plays one compute node at a control plane's door."""

    def __init__(self, stub: control_pb2_grpc.ControlAsyncStub, name: str) -> None:
        self.stub = stub
        self.name = name
        self.incarnation = f"{name} first"
        self.state: compute_pb2.ComputeState.ValueType = compute_pb2.WAITING
        self.known: control_pb2.Order | None = None

    def request(self, wait_ms: int = 0) -> control_pb2.ComputeHeartbeatRequest:
        number = int(self.name[3:])
        return control_pb2.ComputeHeartbeatRequest(
            address=f"host-{number}:1",
            postgres_port=5000 + number,
            pid=76 + number,
            status=compute_pb2.ComputeStatus(
                instance=self.name,
                incarnation=self.incarnation,
                state=self.state,
                vdl=3,
                takes_clients=self.state in {compute_pb2.READER, compute_pb2.WRITER},
                handover=f"/run/{self.name}",
                tier=number,
            ),
            known=self.known,
            wait_ms=wait_ms,
        )

    async def call(self, wait_ms: int = 0) -> control_pb2.ComputeHeartbeatResponse:
        with calling("control", "ComputeHeartbeat"):
            answer = await self.stub.ComputeHeartbeat(self.request(wait_ms), timeout=10)
        self.known = answer.order
        return answer

    async def report(
        self, state: compute_pb2.ComputeState.ValueType | None = None
    ) -> control_pb2.Order:
        self.state = self.state if state is None else state
        return (await self.call()).order

    async def start_over(self) -> control_pb2.Order:
        self.incarnation += " and next"
        self.known = None
        return await self.report(compute_pb2.WAITING)


class Members:
    """Plays six storage nodes and up to three compute nodes."""

    def __init__(self, stub: control_pb2_grpc.ControlAsyncStub) -> None:
        self.stub = stub
        self.one, self.two, self.three = (Instance(stub, f"db-{n}") for n in (1, 2, 3))

    async def storage(self, number: int, *volumes: str) -> list[str]:
        node = control_pb2.StorageNode(
            name=f"sn-{number}",
            zone="abc"[(number - 1) // 2 % 3],
            addresses=control_pb2.StorageAddresses(
                log=f"h:{number}1",
                frames=f"h:{number}2",
                pages=f"h:{number}3",
                page_frames=f"h:{number}4",
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

    async def created(self, volume: common_pb2.VolumeRef) -> None:
        request = control_pb2.VolumeCreatedRequest(
            volume=volume, instance="db-1", system_identifier=2**64 - 1
        )
        with calling("control", "VolumeCreated"):
            await self.stub.VolumeCreated(request, timeout=5)

    async def serving(self) -> None:
        """db-1 serves under epoch 2, db-2 and db-3 read."""
        await self.all_storage()
        await self.created((await self.one.report()).volume)
        await self.one.start_over()
        for reader in (self.two, self.three):
            await reader.report(compute_pb2.READER)
        assert (await self.one.report(compute_pb2.WRITER)).kind == Order.WRITE

    async def status(self) -> control_pb2.ClusterStatus:
        with calling("control", "GetStatus"):
            return await self.stub.GetStatus(control_pb2.GetClusterStatusRequest(), timeout=5)

    async def failover(self, target: str = "") -> control_pb2.FailoverResponse:
        with calling("control", "Failover"):
            return await self.stub.Failover(control_pb2.FailoverRequest(target=target), timeout=30)

    async def remove(self, name: str) -> None:
        with calling("control", "RemoveInstance"):
            await self.stub.RemoveInstance(
                control_pb2.RemoveInstanceRequest(instance=name), timeout=30
            )

    async def events(self, after: int = 0) -> list[control_pb2.Event]:
        with calling("control", "ListEvents"):
            answer = await self.stub.ListEvents(
                control_pb2.ListEventsRequest(after=after), timeout=5
            )
        return list(answer.events)

    async def failover_events(self) -> list[tuple[int, str]]:
        failovers = {Event.FAILOVER_STARTED, Event.FAILOVER_COMPLETED, Event.FAILOVER_FAILED}
        return [
            (event.kind, event.instance) for event in await self.events() if event.kind in failovers
        ]


async def ordered(instance: Instance, kind: control_pb2.Order.Kind.ValueType) -> bool:
    return (await instance.report()).kind == kind


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await true():
            await asyncio.sleep(0.01)
