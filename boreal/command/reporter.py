"""Who hears how a start or stop goes on."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Hears how a start goes on."""

    def phase(self, text: str, seconds: float) -> None:
        """A phase is over, and took so long."""

    def notice(self, text: str) -> None:
        """Something the user should know."""


class Silent:
    """A reporter for programs."""

    def phase(self, text: str, seconds: float) -> None:
        """Say nothing."""

    def notice(self, text: str) -> None:
        """Say nothing."""
