"""Goal: the lag is how long the oldest log that was given waits; the memory for it is bounded.

Method: the measure on values; at random against a plain list of everything that was given.
"""

from __future__ import annotations

import random

import pytest

from boreal.types import Lsn
from compute_node.replay import ReplayLag


def test_nothing_given_is_no_lag() -> None:
    lag = ReplayLag()
    assert lag.lag_us(50.0) == 0
    lag.replay(Lsn(100))
    lag.given(Lsn(100), 60.0)  # replayed before we were told that it is durable
    assert lag.lag_us(70.0) == 0


def test_the_oldest_that_waits_counts() -> None:
    lag = ReplayLag()
    lag.given(Lsn(100), 1.0)
    lag.given(Lsn(200), 2.0)
    assert lag.lag_us(2.5) == 1_500_000
    lag.replay(Lsn(99))
    assert lag.lag_us(2.5) == 1_500_000
    lag.replay(Lsn(100))
    assert lag.lag_us(2.5) == 500_000
    lag.replay(Lsn(200))
    assert (lag.lag_us(9.0), lag.replayed) == (0, 200)


@pytest.mark.parametrize("seed", range(20))
def test_against_a_plain_list(seed: int) -> None:
    seeded = random.Random(seed)
    lag, given = ReplayLag(), list[tuple[int, float]]()
    now, end, replayed = 0.0, 0, 0
    for _ in range(3000):
        now += seeded.expovariate(1000.0)
        if seeded.random() < 0.7:
            end += seeded.randrange(1, 500)
            lag.given(Lsn(end), now)
            given.append((end, now))
        else:
            replayed = seeded.randrange(replayed, end + 1)
            lag.replay(Lsn(replayed))
        oldest = next((at for upto, at in given if upto > replayed), None)
        expected = 0.0 if oldest is None else now - oldest
        # What came within 5 ms counts as having come together.
        assert expected * 1e6 - 1 <= lag.lag_us(now) <= (expected + 0.005) * 1e6 + 1


def test_the_memory_is_bounded() -> None:
    lag = ReplayLag()
    for number in range(10_000):
        lag.given(Lsn(number + 1), number * 0.01)
    assert lag.lag_us(100.0) == 100_000_000
    lag.replay(Lsn(9_999))
    assert lag.lag_us(100.0) > 0
    lag.replay(Lsn(10_000))
    assert lag.lag_us(100.0) == 0
