"""The writer's lease: how long it may go on serving reads without asking anybody.

That a deposed writer *acknowledges* nothing is the quorum's work. But it could still answer queries
from what it has in memory, with data that its successor changed since. So it serves only while it
holds its lease, and its successor admits nobody before that has run out.

Nobody grants the lease: it follows from what the storage nodes acknowledged. Whoever takes the
volume over fences `rule.write` of the nodes, and so leaves `copies - write` of them at most. Of any
one more than that, at least one was fenced; and had the writer's message before it was. So:

- the writer holds its lease until the (copies - write + 1)-th latest *send* time of messages that
  nodes have acknowledged, plus LEASE_S;
- a node tells in its answer to Fence how long ago it last took a message of a writer; no lease of
  the fenced one reaches further than the shortest of these silences says.

Each side reads its own monotonic clock and none is compared with another; only their rates must
agree, to within DRIFT. Pure: times are seconds of the caller's monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable

from boreal.quorum.rule import QuorumRule

LEASE_S = 1.5
DRIFT = 0.01
"""The writer's clock may be slower than its successor's by this share."""


def held_until(rule: QuorumRule, contacts: Iterable[float]) -> float | None:
    """Until when a writer holds its lease; None if too few nodes acknowledged anything.

    `contacts` has for each node when the last message was *sent* that the node acknowledged.
    """
    latest = sorted(contacts, reverse=True)
    needed = rule.copies - rule.write + 1
    return latest[needed - 1] + LEASE_S * (1 - DRIFT) if len(latest) >= needed else None


def former_holds_until(answered_at: float, silent_s: Iterable[float]) -> float:
    """Until when a writer that was fenced may at most hold its lease.

    `answered_at` is when the answers of a write quorum to Fence were in, `silent_s` what each said
    of how long, at the least, it had not heard from the writer it now refuses.
    """
    return answered_at + max(0.0, LEASE_S - min(silent_s, default=0.0))
