"""Goal: a new writer serves as soon as its predecessor cannot any more, and no sooner.

Method: the wait for the former lease, on orders and a clock of the test's. (Promotions of real
instances are in test_agent.py.)
"""

from __future__ import annotations

import asyncio

from boreal.types import Epoch, VolumeId
from compute_node.orders import Order, OrderKind, Orders
from compute_node.promotion import FormerLease


def write(*, former_gone: bool) -> Order:
    return Order(
        kind=OrderKind.WRITE, volume=VolumeId("v"), epoch=Epoch(3), former_gone=former_gone
    )


async def test_a_lease_that_ran_out_is_not_waited_for() -> None:
    orders = Orders()
    orders.give(write(former_gone=False))
    former = FormerLease(orders, clock=lambda: 100.0)
    former.fenced(99.9)
    await former.ended()


async def test_one_that_is_gone_is_not_waited_for_and_may_go_meanwhile() -> None:
    orders = Orders()
    orders.give(write(former_gone=False))
    former = FormerLease(orders, clock=lambda: 100.0)
    former.fenced(1000.0)
    waiting = asyncio.create_task(former.ended())
    await asyncio.sleep(0)
    assert not waiting.done()
    orders.give(write(former_gone=True))
    await waiting
    await former.ended()


async def test_otherwise_it_takes_as_long_as_the_lease() -> None:
    orders = Orders()
    orders.give(write(former_gone=False))
    clock = asyncio.get_running_loop().time
    former = FormerLease(orders, clock=clock)
    until = clock() + 0.2
    former.fenced(until)
    await former.ended()
    assert clock() >= until - 0.001  # timers go to the millisecond
