"""Goal: every system gets every load, in an order that favours none. Method: the plan is values."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import pytest

from bench.plan import Plan, Script, SystemName


@pytest.fixture
def plan() -> Plan:
    return Plan(
        scripts=tuple(Script),
        clients=(1, 16, 64),
        systems=tuple(SystemName),
        scale=20,
        seconds=20,
    )


def test_every_system_gets_every_load_once(plan: Plan) -> None:
    counts = Counter(plan.measurements())
    assert set(counts.values()) == {1}
    assert len(counts) == 3 * 3 * 5


def test_the_systems_take_turns_within_a_load(plan: Plan) -> None:
    cells = [cell for cell, _ in groupby(plan.measurements(), key=lambda pair: pair[0])]
    assert cells == list(plan.cells)


def test_none_is_always_first(plan: Plan) -> None:
    groups = groupby(plan.measurements(), key=lambda pair: pair[0])
    assert {next(group)[1] for _, group in groups} == set(plan.systems)


def test_the_estimate_covers_the_loads(plan: Plan) -> None:
    assert plan.estimate_s() > 3 * 3 * 5 * plan.seconds


def test_every_script_is_one_of_pgbenchs() -> None:
    assert Script.TPCB_LIKE.options == ("--builtin=tpcb-like",)
    assert Script.CONNECT.options == ("--builtin=select-only", "--connect")
