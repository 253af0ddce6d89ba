"""What an offline check finds and how it tells of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A thing that is not what was stored."""

    volume: str
    what: str
    """Which thing, and what is wrong with it."""
    remedy: str
    """What the owner of the node can do."""


class Watcher(Protocol):
    """Hears how a check goes on."""

    def found(self, damage: Damage) -> None:
        """Something is damaged."""

    def advanced(self, size_bytes: int) -> None:
        """So much more was read."""


class Report:
    """The findings of one volume's check, as they come."""

    def __init__(self, volume: str, watcher: Watcher) -> None:
        self.volume = volume
        self.damages: list[Damage] = []
        self.counts: Counter[str] = Counter()
        """Of what was checked, by its name for people."""
        self._watcher = watcher

    def damage(self, what: str, remedy: str) -> None:
        """Note a damage."""
        found = Damage(volume=self.volume, what=what, remedy=remedy)
        self.damages.append(found)
        self._watcher.found(found)

    def count(self, what: str, number: int = 1, *, size_bytes: int = 0) -> None:
        """Note what was checked, and how much was read for it."""
        self.counts[what] += number
        self._watcher.advanced(size_bytes)
