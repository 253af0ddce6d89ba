"""Goal: percentiles of the last seconds, right to a few percent, in memory that does not grow."""

import random

import pytest

from compute_node.shipping.latency import WINDOW_S, Latencies


def test_none_is_told_of_nothing() -> None:
    assert Latencies().percentiles_us(0.0, 0.5, 0.99) == [0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_percentiles_are_right_to_a_sixteenth(seed: int) -> None:
    choose = random.Random(seed)
    sample = [choose.lognormvariate(7, 2) / 1e6 for _ in range(3000)]
    latencies = Latencies()
    for latency_s in sample:
        latencies.add(latency_s, 1.0)
    told = latencies.percentiles_us(1.0, 0.01, 0.5, 0.99, 1.0)
    sample.sort()
    for share, latency_us in zip((0.01, 0.5, 0.99, 1.0), told, strict=True):
        exact_us = sample[max(0, round(share * len(sample)) - 1)] * 1e6
        assert exact_us * 0.93 - 1 <= latency_us <= exact_us * 1.07 + 1


def test_one_and_the_extremes() -> None:
    latencies = Latencies()
    latencies.add(0.000_003, 0.0)
    assert latencies.percentiles_us(0.0, 0.5, 0.99) == [3, 3]
    latencies.add(0.0, 0.0)
    latencies.add(1e9, 0.0)
    assert latencies.percentiles_us(0.0, 0.01)[0] == 0
    assert latencies.percentiles_us(0.0, 1.0)[0] >= 3_600_000_000


def test_what_is_older_than_two_windows_is_forgotten() -> None:
    latencies = Latencies()
    latencies.add(1.0, 0.0)
    latencies.add(0.001, WINDOW_S)
    assert latencies.percentiles_us(WINDOW_S, 1.0)[0] >= 1_000_000
    assert latencies.percentiles_us(2 * WINDOW_S, 1.0)[0] < 1_100
    assert latencies.percentiles_us(4 * WINDOW_S, 1.0) == [0]
