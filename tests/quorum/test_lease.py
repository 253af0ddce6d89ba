"""Goal: when the lease of a fenced writer has run out by its successor's reckoning, that writer
does not hold it by its own, however messages, fences and silences fall.

Method: the two rules on values; then histories drawn at random, in which a writer's messages are
taken by some nodes and answered to it late or never, and a successor fences any four of the six.
"""

from __future__ import annotations

import random

import pytest

from boreal.quorum import SIX_WAY
from boreal.quorum.lease import DRIFT, LEASE_S, former_holds_until, held_until

HELD_S = LEASE_S * (1 - DRIFT)


@pytest.mark.parametrize(
    ("contacts", "until"),
    [
        ([], None),
        ([10.0, 11.0], None),
        ([10.0, 11.0, 12.0], 10.0),
        ([1.0, 2.0, 10.0, 11.0, 12.0], 10.0),
        ([12.0, 12.0, 12.0, 0.0, 0.0, 0.0], 12.0),
        ([9.0, 12.0, 8.0, 11.0, 7.0, 10.0], 10.0),
    ],
)
def test_the_third_latest_contact_counts(contacts: list[float], until: float | None) -> None:
    expected = None if until is None else pytest.approx(until + HELD_S)
    assert held_until(SIX_WAY, contacts) == expected


@pytest.mark.parametrize(
    ("silent_s", "wait_s"),
    [
        ([9.0, 9.0, 9.0, 9.0], 0.0),
        ([9.0, 9.0, 9.0, 0.0], LEASE_S),
        ([0.5, 9.0, 0.7, 0.6], LEASE_S - 0.5),
        ([], LEASE_S),
    ],
)
def test_the_shortest_silence_counts(silent_s: list[float], wait_s: float) -> None:
    assert former_holds_until(100.0, silent_s) == pytest.approx(100.0 + wait_s)


@pytest.mark.parametrize("seed", range(300))
def test_the_former_lease_is_over_when_the_successor_says_so(seed: int) -> None:
    seeded = random.Random(seed)
    fenced_at = [seeded.uniform(5.0, 5.5) for _ in range(6)]
    taken_at = [0.0] * 6
    contacts: dict[int, float] = {}
    for _ in range(seeded.randrange(200)):
        node, sent = seeded.randrange(6), seeded.uniform(0.0, 6.0)
        arrives = sent + seeded.expovariate(5.0)
        fenced = node < 4 and arrives >= fenced_at[node]
        if fenced:
            continue
        taken_at[node] = max(taken_at[node], arrives)
        if seeded.random() < 0.9:  # else the answer is lost
            contacts[node] = max(contacts.get(node, 0.0), sent)
    silent_s = [fenced_at[node] - taken_at[node] for node in range(4)]
    answered_at = max(fenced_at[:4]) + seeded.uniform(0.0, 0.1)
    holds_until = held_until(SIX_WAY, contacts.values())
    if holds_until is not None:
        assert holds_until <= former_holds_until(answered_at, silent_s)
