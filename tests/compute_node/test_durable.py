"""Goal: each arrival of log is timed until it is durable, in bounded memory."""

from __future__ import annotations

from boreal.types import Lsn
from compute_node.shipping import durable
from compute_node.shipping.durable import Durability


def test_arrivals_are_timed_until_the_vdl_passes_them() -> None:
    durability = Durability()
    durability.arrived(Lsn(100), 1.0)
    durability.arrived(Lsn(200), 1.25)
    durability.arrived(Lsn(300), 1.5)
    durability.durable(Lsn(99), 1.5)
    assert durability.took.reading().observations == 0
    durability.durable(Lsn(250), 1.75)
    assert durability.took.reading().observations == 2
    assert durability.took.reading().total == 0.75 + 0.5
    durability.durable(Lsn(300), 2.0)
    assert durability.took.reading().total == 0.75 + 0.5 + 0.5


def test_with_too_many_under_way_further_ones_are_not_timed() -> None:
    durability = Durability()
    for end in range(1, durable.MOST_MARKS + 10):
        durability.arrived(Lsn(end), 0.0)
    durability.durable(Lsn(durable.MOST_MARKS + 10), 1.0)
    assert durability.took.reading().observations == durable.MOST_MARKS
