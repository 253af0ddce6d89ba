"""Between the messages of control.proto and the control plane's own values."""

from __future__ import annotations

from boreal.errors import MalformedRequest
from boreal.rpc import compute_pb2, control_pb2
from boreal.rpc.edge import volume_ref
from boreal.types import InstanceName, Lsn, NodeName
from control_plane.events import Event, EventKind
from control_plane.roll import InstanceReport
from control_plane.routing import Route
from control_plane.state import InstanceMember, StorageMember
from control_plane.view import InstanceState, Order, OrderKind

_ORDER_KIND = {
    OrderKind.WAIT: control_pb2.Order.WAIT,
    OrderKind.CREATE_VOLUME: control_pb2.Order.CREATE_VOLUME,
    OrderKind.READ: control_pb2.Order.READ,
    OrderKind.WRITE: control_pb2.Order.WRITE,
    OrderKind.YIELD: control_pb2.Order.YIELD,
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
    compute_pb2.YIELDING: InstanceState.YIELDING,
}
_EVENT_KIND = {
    EventKind.FAILOVER_STARTED: control_pb2.Event.FAILOVER_STARTED,
    EventKind.FAILOVER_COMPLETED: control_pb2.Event.FAILOVER_COMPLETED,
    EventKind.FAILOVER_FAILED: control_pb2.Event.FAILOVER_FAILED,
    EventKind.INSTANCE_ADDED: control_pb2.Event.INSTANCE_ADDED,
    EventKind.INSTANCE_REMOVED: control_pb2.Event.INSTANCE_REMOVED,
    EventKind.INSTANCE_LOST: control_pb2.Event.INSTANCE_LOST,
    EventKind.INSTANCE_RESTARTED: control_pb2.Event.INSTANCE_RESTARTED,
    EventKind.VOLUME_CREATED: control_pb2.Event.VOLUME_CREATED,
}


def storage_member(node: control_pb2.StorageNode) -> StorageMember:
    """A storage node as it reports; MalformedRequest if something is missing."""
    addresses = node.addresses
    if not (node.name and node.zone and addresses.log and addresses.frames and addresses.pages):
        raise MalformedRequest("a storage node reports its name, its zone and three addresses")
    return StorageMember(
        name=NodeName(node.name),
        zone=node.zone,
        log_address=addresses.log,
        frames_address=addresses.frames,
        pages_address=addresses.pages,
        page_frames_address=addresses.page_frames,
    )


def storage_node(member: StorageMember) -> control_pb2.StorageNode:
    """The message form of a storage node."""
    return control_pb2.StorageNode(
        name=member.name,
        zone=member.zone,
        addresses=control_pb2.StorageAddresses(
            log=member.log_address,
            frames=member.frames_address,
            pages=member.pages_address,
            page_frames=member.page_frames_address,
        ),
    )


def instance(
    request: control_pb2.ComputeHeartbeatRequest,
) -> tuple[InstanceMember, InstanceReport]:
    """A compute node as it reports; MalformedRequest if something is missing."""
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
        incarnation=status.incarnation,
        state=state,
        replay=Lsn(status.replay_lsn),
        tier=status.tier,
        takes_clients=status.takes_clients,
        handover=status.handover,
    )


def order(standing: Order) -> control_pb2.Order:
    """The message form of an order."""
    wire = control_pb2.Order(
        kind=_ORDER_KIND[standing.kind],
        reason=standing.reason,
        former_gone=standing.former_gone,
    )
    if standing.volume is not None and standing.epoch is not None:
        wire.volume.CopyFrom(volume_ref(standing.volume, standing.epoch))
    return wire


def route(found: Route) -> control_pb2.Route:
    """The message form of a route."""
    return control_pb2.Route(
        instance=found.instance,
        writer=found.writer,
        host=found.place.host,
        postgres_port=found.place.postgres_port,
        handover=found.place.handover,
    )


def event(told: Event) -> control_pb2.Event:
    """The message form of an event."""
    return control_pb2.Event(
        id=told.id,
        unix_ms=told.unix_ms,
        kind=_EVENT_KIND[told.kind],
        instance=told.instance,
        message=told.message,
        took_ms=told.took_ms,
    )
