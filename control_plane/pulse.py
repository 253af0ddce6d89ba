"""Wakes whoever waits for something to change."""

from __future__ import annotations

import asyncio


class Pulse:
    """Beats at each change. Look first, then wait: with no await between, no beat is missed."""

    def __init__(self) -> None:
        self._beat = asyncio.Event()

    def beat(self) -> None:
        """Wake everyone who waits now."""
        self._beat.set()
        self._beat = asyncio.Event()

    async def wait(self) -> None:
        """Return at the next beat."""
        await self._beat.wait()
