"""What a run of failovers found: its rounds, what clients noticed, what does not hold. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from bench.faults import Kind
from bench.ledger import Ack, Sight, lost, out_of_order, shared_timelines, stale

_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run."""

    kinds: Sequence[Kind]
    """Of the rounds, in order."""
    readers: int
    scale: int
    load_clients: int
    load_rate: int
    """Transactions a second that pgbench attempts; 0: as many as it can."""
    ledger_clients: int
    pause_s: float
    """Of undisturbed load before each round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One failover."""

    number: int
    kind: Kind
    old_writer: str
    new_writer: str
    old_epoch: int
    new_epoch: int
    noticed_s: float | None
    """From the fault until the control plane began a failover, by its events."""
    took_s: float | None
    """From then until the new writer served, by its events."""
    stall_s: float
    returned_s: float
    """From the fault, or from its undoing, until the old writer was a reader again."""

    def __str__(self) -> str:
        noticed = "      " if self.noticed_s is None else f"{self.noticed_s:5.2f}s"
        return (
            f"{self.number:3}  {self.kind:<16} {self.old_writer:>5} → {self.new_writer:<5}  "
            f"epoch {self.old_epoch:>3} → {self.new_epoch:<3}  noticed {noticed}  "
            f"stall {self.stall_s:5.2f}s  back {self.returned_s:5.2f}s"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stalls:
    """Of the rounds of some kind."""

    rounds: int
    p50_s: float
    worst_s: float

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> Stalls:
        """At least one."""
        stalls = [each.stall_s for each in rounds]
        return cls(rounds=len(stalls), p50_s=statistics.median(stalls), worst_s=max(stalls))


@dataclass(slots=True, kw_only=True)
class Found:
    """What a run gathered."""

    rounds: list[Round] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    acknowledged: int = 0
    looks: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """What clients' sessions ended with, by SQLSTATE or kind."""

    def stalls(self) -> Mapping[str, Stalls]:
        """Of each kind there was, and of the unplanned ones together."""
        groups = {"unplanned": [each for each in self.rounds if each.kind is not Kind.PLANNED]}
        for kind in Kind:
            groups[kind] = [each for each in self.rounds if each.kind is kind]
        return {name: Stalls.of(rounds) for name, rounds in groups.items() if rounds}


def judge(
    rounds: Sequence[Round],
    acks: Sequence[Ack],
    sights: Sequence[Sight],
    present: Mapping[str, set[tuple[int, int]]],
) -> list[str]:
    """What does not hold, in words. `present`: the ledger as each instance shows it."""
    found: dict[str, Sequence[object]] = {
        f"acknowledged commits missing on {name}": lost(acks, rows)
        for name, rows in present.items()
    }
    found["commits that contradict the order of others"] = out_of_order(acks)
    found["timelines on which two instances acknowledged"] = list(shared_timelines(acks).items())
    found["looks at a writer that showed less than was acknowledged"] = stale(sights, acks)
    found["rounds that did not raise the epoch"] = [
        later.number for former, later in pairwise(rounds) if later.new_epoch <= former.new_epoch
    ]
    return [f"{what}: {len(items)}, as {_few(items)}" for what, items in found.items() if items]


def _few(items: Sequence[object]) -> str:
    return "; ".join(map(str, items[:_SHOWN])) + (" ..." if len(items) > _SHOWN else "")


def summary(found: Found) -> list[str]:
    """For people."""
    lines = [
        f"{name:<16} {each.rounds:3} rounds   stall p50 {each.p50_s:.2f} s, "
        f"worst {each.worst_s:.2f} s"
        for name, each in found.stalls().items()
    ]
    lines.append(
        f"{found.acknowledged:,} commits acknowledged, {found.looks:,} looks at writers; sessions "
        f"ended with {', '.join(f'{k} ({n})' for k, n in sorted(found.failures.items())) or '-'}"
    )
    lines += [f"VIOLATED: {each}" for each in found.violations]
    lines.append("it does NOT hold" if found.violations else "it holds")
    return lines
