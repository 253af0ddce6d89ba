"""Goal: page processes that share a machine are not woken at the same instant, and none is late."""

from __future__ import annotations

import itertools

import pytest

from boreal.types import NodeName
from storage_node.page_supervisor import TURN_SECONDS, until_turn


@pytest.mark.parametrize("now", [0.0, 17.13, 86_400.05])
def test_six_nodes_take_turns(now: float) -> None:
    waits = [until_turn(NodeName(f"sn-{number}"), now) for number in range(1, 7)]
    assert all(0 < wait <= TURN_SECONDS for wait in waits)
    turns = sorted((now + wait) % TURN_SECONDS for wait in waits)
    gaps = [after - before for before, after in itertools.pairwise(turns)]
    assert min(gaps) > TURN_SECONDS / 15


def test_turns_come_round_at_even_times() -> None:
    name = NodeName("sn-4")
    first = 5.0 + until_turn(name, 5.0)
    assert until_turn(name, first + 0.001) == pytest.approx(TURN_SECONDS - 0.001)
    assert until_turn(name, first - 0.001) == pytest.approx(0.001)
