"""Goal: a histogram tells how many observations were at or below each bound, and their sum.

Method: any values, counted the plain way beside it.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boreal.histogram import Durations, Sizes


@given(st.lists(st.integers(0, 2**40)))
def test_sizes_are_counted_below_their_bounds(values: list[int]) -> None:
    sizes = Sizes(4, 20)
    for value in values:
        sizes.observe(value)
    reading = sizes.reading()
    assert [bound for bound, _ in reading.buckets] == [2**width - 1 for width in range(4, 21)]
    for bound, count in reading.buckets:
        assert count == sum(value <= bound for value in values)
    assert (reading.observations, reading.total) == (len(values), sum(values))


@given(st.lists(st.floats(0, 3600)))
def test_durations_are_counted_below_their_bounds(values: list[float]) -> None:
    durations = Durations()
    for value in values:
        durations.observe(value)
    reading = durations.reading()
    assert (reading.buckets[0][0], reading.buckets[-1][0]) == (0.000128, 16.777216)
    for bound, count in reading.buckets:
        assert count == sum(int(value * 1e6) < bound * 1e6 for value in values)
    assert reading.observations == len(values)
    assert reading.total == pytest.approx(sum(values), abs=1e-6 * (len(values) + 1))


def test_the_widest_integers_have_their_place() -> None:
    sizes = Sizes(0, 10)
    sizes.observe(0)
    sizes.observe(2**64 - 1)
    assert sizes.reading().buckets[0] == (0.0, 1)
    assert sizes.reading().buckets[-1] == (1023.0, 1)
    assert sizes.reading().observations == 2
