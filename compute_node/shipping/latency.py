"""How long appends take: percentiles of the last seconds, in bounded memory."""

from __future__ import annotations

WINDOW_S = 5.0
_BITS = 5
_STEP = 1 << (_BITS - 1)
"""Buckets for each doubling of the latency: a figure is right to 1/16."""
_BUCKETS = _STEP * 34
"""The last one begins at more than an hour."""


def _bucket(latency_us: int) -> int:
    shift = max(0, latency_us.bit_length() - _BITS)
    return min(shift * _STEP + (latency_us >> shift), _BUCKETS - 1)


def _bucket_us(bucket: int) -> int:
    """The highest latency that falls into it."""
    shift = max(0, bucket // _STEP - 1)
    return ((bucket - shift * _STEP + 1) << shift) - 1


class Latencies:
    """A histogram over the last one to two windows of WINDOW_S. `now` is a monotonic clock's."""

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self._former = [0] * _BUCKETS
        self._until = float("-inf")

    def add(self, latency_s: float, now: float) -> None:
        """One more. Part of the commit path."""
        if now >= self._until:
            self._turn(now)
        self._counts[_bucket(int(latency_s * 1e6))] += 1

    def percentiles_us(self, now: float, *shares: float) -> list[int]:
        """The latency that each of `shares`, ascending, of those kept did not exceed; 0: none."""
        if now >= self._until:
            self._turn(now)
        counts = [new + old for new, old in zip(self._counts, self._former, strict=True)]
        goals = [share * sum(counts) for share in shares]
        found: list[int] = []
        seen = 0
        for bucket, count in enumerate(counts):
            seen += count
            while count and len(found) < len(goals) and seen >= goals[len(found)]:
                found.append(_bucket_us(bucket))
        return found or [0] * len(shares)

    def _turn(self, now: float) -> None:
        recent = now < self._until + WINDOW_S
        self._former = self._counts if recent else [0] * _BUCKETS
        self._counts = [0] * _BUCKETS
        self._until = now + WINDOW_S
