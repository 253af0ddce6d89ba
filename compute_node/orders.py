"""The control plane's standing order to one incarnation of a compute node."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import Enum

from boreal.errors import MalformedRequest
from boreal.rpc import control_pb2
from boreal.rpc.edge import volume_ref
from boreal.types import Epoch, VolumeId

_NO_VOLUME = VolumeId("")
_NO_EPOCH = Epoch(0)


class OrderKind(Enum):
    """Order.Kind of control.proto; names as there."""

    WAIT = "wait"
    CREATE_VOLUME = "create the volume"
    READ = "read"
    WRITE = "write"
    YIELD = "yield"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What an incarnation is to do. See control.proto for the meaning of each kind."""

    kind: OrderKind
    volume: VolumeId = _NO_VOLUME
    epoch: Epoch = _NO_EPOCH
    reason: str = ""
    former_gone: bool = False


def order_from_wire(wire: control_pb2.Order) -> Order:
    """Read it; MalformedRequest if it is of no kind known here."""
    try:
        kind = OrderKind[control_pb2.Order.Kind.Name(wire.kind)]
    except (KeyError, ValueError):
        raise MalformedRequest(f"an order of kind {wire.kind} makes no sense here") from None
    return Order(
        kind=kind,
        volume=VolumeId(wire.volume.volume_id),
        epoch=Epoch(wire.volume.epoch),
        reason=wire.reason,
        former_gone=wire.former_gone,
    )


def order_to_wire(order: Order) -> control_pb2.Order:
    """The message it came in."""
    wire = control_pb2.Order(
        kind=control_pb2.Order.Kind.Value(order.kind.name),
        reason=order.reason,
        former_gone=order.former_gone,
    )
    if order.volume:
        wire.volume.CopyFrom(volume_ref(order.volume, order.epoch))
    return wire


class Orders:
    """The orders of one incarnation: the newest stands, what it replaced is void."""

    def __init__(self) -> None:
        self.current: Order | None = None
        """None: no word yet."""
        self._changed = asyncio.Event()

    def give(self, order: Order) -> None:
        """This is the standing order from now on."""
        if order != self.current:
            self.current = order
            self._changed.set()
            self._changed = asyncio.Event()

    async def other_than(self, known: Order | None) -> Order:
        """The standing order, once there is one and it is another than `known`."""
        while self.current is None or self.current == known:
            await self._changed.wait()
        return self.current
