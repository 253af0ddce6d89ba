"""Goal: whoever waits for orders sees the newest, never an old one twice, and none is forgotten.

Method: the messages there and back; orders given before, while and after somebody waits.
"""

from __future__ import annotations

import asyncio

import pytest

from boreal.errors import MalformedRequest
from boreal.rpc import control_pb2
from boreal.types import Epoch, VolumeId
from compute_node.orders import Order, OrderKind, Orders, order_from_wire, order_to_wire

READ = Order(kind=OrderKind.READ, volume=VolumeId("v"), epoch=Epoch(3))
WRITE = Order(kind=OrderKind.WRITE, volume=VolumeId("v"), epoch=Epoch(4))
GONE = Order(kind=OrderKind.WRITE, volume=VolumeId("v"), epoch=Epoch(4), former_gone=True)
WAIT = Order(kind=OrderKind.WAIT, reason="too few storage nodes")


@pytest.mark.parametrize("order", [READ, WRITE, GONE, WAIT])
def test_an_order_travels_there_and_back(order: Order) -> None:
    wire = control_pb2.Order.FromString(order_to_wire(order).SerializeToString())
    assert order_from_wire(wire) == order


@pytest.mark.parametrize("kind", [control_pb2.Order.KIND_UNSPECIFIED, 77])
def test_an_order_of_no_known_kind_is_refused(kind: int) -> None:
    wire = control_pb2.Order.FromString(bytes([8, kind]))
    with pytest.raises(MalformedRequest):
        order_from_wire(wire)


async def test_an_order_given_before_is_there_at_once() -> None:
    orders = Orders()
    orders.give(READ)
    assert await orders.other_than(None) == READ


async def test_whoever_waits_sees_the_newest_and_none_twice() -> None:
    orders = Orders()
    first, second = (asyncio.create_task(orders.other_than(None)) for _ in range(2))
    await asyncio.sleep(0)
    assert not first.done()
    orders.give(READ)
    assert await first == await second == READ
    next_one = asyncio.create_task(orders.other_than(READ))
    await asyncio.sleep(0)
    orders.give(READ)
    await asyncio.sleep(0)
    assert not next_one.done()
    orders.give(WRITE)
    orders.give(GONE)  # before the waiter ran: the one in between is void
    assert await next_one == GONE
