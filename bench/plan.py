"""What one run of the bench consists of. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Script(StrEnum):
    """What a client does, again and again."""

    SIMPLE_UPDATE = "simple-update"  # pgbench -N
    TPCB_LIKE = "tpcb-like"  # pgbench's default
    CONNECT = "connect"  # pgbench -S -C: one row read over a connection of its own

    @property
    def options(self) -> tuple[str, ...]:
        """What tells pgbench."""
        if self is Script.CONNECT:
            return ("--builtin=select-only", "--connect")
        return (f"--builtin={self}",)


class SystemName(StrEnum):
    """What is compared."""

    BOREAL = "boreal"
    PAGES_STOPPED = "boreal-pages-stopped"
    DIRECT = "boreal-direct"
    QUORUM = "stock-quorum"
    ALONE = "stock-alone"


BASELINE = SystemName.QUORUM
"""The peer: same promise (four of six copies durable at commit), so ratios are to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One load. Every system gets the same one."""

    script: Script
    clients: int

    def __str__(self) -> str:
        return f"{self.script}, {self.clients} client{'s' if self.clients > 1 else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Scripts x clients x systems.

    Invariant of `measurements`: the systems take turns within a cell, so what else the machine does
    hits all alike; and each cell begins with the next system, so none is always first.
    """

    scripts: tuple[Script, ...]
    clients: tuple[int, ...]
    systems: tuple[SystemName, ...]
    scale: int
    seconds: int

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every load, in the order it is run."""
        return tuple(
            Cell(script=script, clients=clients)
            for script in self.scripts
            for clients in self.clients
        )

    def measurements(self) -> Iterator[tuple[Cell, SystemName]]:
        """What is measured, in order."""
        for turn, cell in enumerate(self.cells):
            first = turn % len(self.systems)
            for system in self.systems[first:] + self.systems[:first]:
                yield cell, system

    def estimate_s(self) -> float:
        """Roughly how long it takes, with set-up; on a loaded machine it is more."""
        one_load_s = self.seconds + 3
        one_system_s = 8 + 0.4 * self.scale
        return len(self.systems) * (len(self.cells) * one_load_s + one_system_s)
