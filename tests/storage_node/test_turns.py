"""Goal: work that has time gives way as much as others are waiting. Method: clocks set by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from storage_node.turns import TURN_S, Turns


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def turns(reads: Callable[[], int] = lambda: 0) -> tuple[Turns, Clock, Clock]:
    wall, worked = Clock(), Clock()
    return Turns(reads, wall, worked), wall, worked


def test_alone_it_never_rests() -> None:
    mine, wall, worked = turns()
    for clock in (wall, worked):
        clock.now += 1.5 * TURN_S
    assert mine.over
    assert mine.rest_s == 0


def test_the_longer_it_waits_the_longer_it_rests() -> None:
    mine, wall, worked = turns()
    rests = []
    for waited in (1, 2, 3):
        wall.now += 1.5 * TURN_S
        worked.now += TURN_S / 10
        assert mine.over
        rests.append(mine.rest_s / waited)
    assert rests == pytest.approx([rests[0]] * 3)
    assert rests[0] > TURN_S


def test_a_rest_is_bounded() -> None:
    mine, wall, _ = turns()
    wall.now += 3600
    assert 0 < mine.rest_s < 1


async def test_it_rests_longer_while_pages_are_read() -> None:
    reads = [0]
    mine, wall, worked = turns(lambda: reads[0])
    for clock in (wall, worked):
        clock.now += 1.5 * TURN_S
    reads[0] += 1
    assert mine.rest_s > 10 * TURN_S
    await mine.give_way()
    assert mine.rest_s == 0


async def test_a_turn_begins_after_the_rest() -> None:
    mine, wall, _ = turns()
    wall.now += 1.5 * TURN_S
    await mine.give_way()
    assert not mine.over
    assert mine.rest_s == 0
