"""Back-pressure: how the writer is kept from running away from the page index."""

from __future__ import annotations

from dataclasses import dataclass

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """When and how much a node delays the acks of appends. Pure.

    What an ack tells is durable before; only the writer learns of it later. It counts four acks of
    six, so one node whose index lags slows nobody, and three that lag slow the writer.

    The delay grows with the lag from none at `soft_bytes` to its most at twice that. At its most a
    commit waits for `most_delay_s`, and a writer that fills its batches is let through at
    `least_bytes_per_s`: bounded, so that a page process that is dead slows a volume but never
    stops it.
    """

    soft_bytes: int = 32 * _MIB
    most_delay_s: float = 0.05
    least_bytes_per_s: int = 2 * _MIB

    def delay_s(self, lag_bytes: int, append_bytes: int) -> float:
        """How long to hold back the ack of `append_bytes`, by a node whose index lags so much."""
        excess = lag_bytes - self.soft_bytes
        if excess <= 0:
            return 0.0
        share = min(1.0, excess / self.soft_bytes)
        return share * (self.most_delay_s + append_bytes / self.least_bytes_per_s)
