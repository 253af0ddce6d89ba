"""The Control service: messages in, messages out; the coordinator does the thinking."""

from __future__ import annotations

import os
from typing import Any

from grpc import aio

from boreal.errors import MalformedRequest
from boreal.rpc import compute_pb2, control_pb2, control_pb2_grpc
from boreal.rpc.edge import volume_ref
from boreal.types import Epoch, InstanceName, Lsn, NodeName, VolumeId
from control_plane.coordinator import Coordinator, InstanceReport
from control_plane.decide import CREATION_EPOCH, InstanceState, Order, OrderKind
from control_plane.state import InstanceMember, StorageMember

_Context = aio.ServicerContext[Any, Any]

_ORDER_KIND = {
    OrderKind.WAIT: control_pb2.Order.WAIT,
    OrderKind.CREATE_VOLUME: control_pb2.Order.CREATE_VOLUME,
    OrderKind.READ: control_pb2.Order.READ,
    OrderKind.WRITE: control_pb2.Order.WRITE,
}
_INSTANCE_STATE = {
    compute_pb2.COMPUTE_STATE_UNSPECIFIED: InstanceState.WAITING,
    compute_pb2.WAITING: InstanceState.WAITING,
    compute_pb2.CREATING: InstanceState.CREATING,
    compute_pb2.RESTORING: InstanceState.RESTORING,
    compute_pb2.READER: InstanceState.READER,
    compute_pb2.PROMOTING: InstanceState.PROMOTING,
    compute_pb2.WRITER: InstanceState.WRITER,
    compute_pb2.STOPPING: InstanceState.STOPPING,
}


class ControlService(control_pb2_grpc.ControlServicer):
    """Control of control.proto. Keeps each member's last report, only to show it."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._storage: dict[str, control_pb2.StorageHeartbeatRequest] = {}
        self._compute: dict[str, control_pb2.ComputeHeartbeatRequest] = {}

    async def StorageHeartbeat(
        self, request: control_pb2.StorageHeartbeatRequest, _context: _Context
    ) -> control_pb2.StorageHeartbeatResponse:
        """A storage node reports."""
        promised = tuple(
            (VolumeId(segment.volume_id), Epoch(segment.promised_epoch))
            for segment in request.segments
        )
        self._coordinator.storage_reported(_storage_member(request.node), promised)
        self._storage[request.node.name] = request
        return control_pb2.StorageHeartbeatResponse(members=self._members())

    async def ComputeHeartbeat(
        self, request: control_pb2.ComputeHeartbeatRequest, _context: _Context
    ) -> control_pb2.ComputeHeartbeatResponse:
        """A compute node reports."""
        member, report = _instance(request)
        order = self._coordinator.instance_reported(member, report)
        self._compute[member.name] = request
        return control_pb2.ComputeHeartbeatResponse(
            order=_order_to_wire(order), members=self._members()
        )

    async def VolumeCreated(
        self, request: control_pb2.VolumeCreatedRequest, _context: _Context
    ) -> control_pb2.VolumeCreatedResponse:
        """The volume is ready."""
        if not request.volume.volume_id or not request.system_identifier:
            raise MalformedRequest("VolumeCreated names the volume and its system identifier")
        self._coordinator.volume_created(
            VolumeId(request.volume.volume_id), request.system_identifier
        )
        return control_pb2.VolumeCreatedResponse()

    async def GetStatus(
        self, _request: control_pb2.GetClusterStatusRequest, _context: _Context
    ) -> control_pb2.ClusterStatus:
        """Everything known, as of now."""
        view = self._coordinator.view()
        volume = view.volume or (view.creation.volume if view.creation else VolumeId(""))
        epoch = view.writer.epoch if view.writer else CREATION_EPOCH if volume else 0
        return control_pb2.ClusterStatus(
            volume=volume_ref(volume, epoch),
            volume_ready=view.volume is not None,
            writer=view.writer.instance if view.writer else "",
            storage=[self._storage_status(node) for node in self._members()],
            instances=[
                self._instance_status(member)
                for member in self._coordinator.state.current.instances.values()
            ],
            pid=os.getpid(),
        )

    def _members(self) -> list[control_pb2.StorageNode]:
        return [
            control_pb2.StorageNode(
                name=member.name,
                zone=member.zone,
                addresses=control_pb2.StorageAddresses(
                    log=member.log_address,
                    frames=member.frames_address,
                    pages=member.pages_address,
                ),
            )
            for member in self._coordinator.state.current.storage.values()
        ]

    def _storage_status(self, node: control_pb2.StorageNode) -> control_pb2.StorageNodeStatus:
        silence = self._coordinator.silence(node.name)
        last = self._storage.get(node.name, control_pb2.StorageHeartbeatRequest())
        return control_pb2.StorageNodeStatus(
            node=node,
            alive=silence.alive,
            silent_ms=silence.ms,
            pid=last.pid,
            segments=last.segments,
        )

    def _instance_status(self, member: InstanceMember) -> control_pb2.InstanceStatus:
        silence = self._coordinator.silence(member.name)
        last = self._compute.get(member.name)
        return control_pb2.InstanceStatus(
            address=member.address,
            postgres_port=member.postgres_port,
            alive=silence.alive,
            silent_ms=silence.ms,
            pid=last.pid if last else 0,
            status=last.status if last else compute_pb2.ComputeStatus(instance=member.name),
        )


def _storage_member(node: control_pb2.StorageNode) -> StorageMember:
    addresses = node.addresses
    if not (node.name and node.zone and addresses.log and addresses.frames and addresses.pages):
        raise MalformedRequest("a storage node reports its name, its zone and three addresses")
    return StorageMember(
        name=NodeName(node.name),
        zone=node.zone,
        log_address=addresses.log,
        frames_address=addresses.frames,
        pages_address=addresses.pages,
    )


def _instance(
    request: control_pb2.ComputeHeartbeatRequest,
) -> tuple[InstanceMember, InstanceReport]:
    status = request.status
    if not (status.instance and status.incarnation and request.address):
        raise MalformedRequest("a compute node reports its name, incarnation and address")
    state = _INSTANCE_STATE.get(status.state)
    if state is None:
        raise MalformedRequest(f"{status.state} is no state of a compute node")
    member = InstanceMember(
        name=InstanceName(status.instance),
        address=request.address,
        postgres_port=request.postgres_port,
    )
    return member, InstanceReport(
        incarnation=status.incarnation, state=state, replay=Lsn(status.replay_lsn)
    )


def _order_to_wire(order: Order) -> control_pb2.Order:
    wire = control_pb2.Order(kind=_ORDER_KIND[order.kind], reason=order.reason)
    if order.volume is not None and order.epoch is not None:
        wire.volume.CopyFrom(volume_ref(order.volume, order.epoch))
    return wire
