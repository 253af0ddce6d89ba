"""Brings a dead compute process of a local cluster back. (A cloud's instance manager, in small.)

Storage nodes it leaves alone: a volume with nodes missing serves on, and people should be able to
look at one. `boreal restart` starts those.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from boreal.errors import BorealError
from boreal.processes import LocalProcesses, ProcessState
from boreal.types import InstanceName

POLL_S = 0.1

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How long to wait before the next start of a process that keeps dying.

    The first start is at once; each further one waits twice as long, up to a cap. A life longer
    than `forgiven_after_s` makes it the first again.
    """

    first_s: float = 0.25
    cap_s: float = 5.0
    forgiven_after_s: float = 30.0

    def delay_s(self, short_lives: int) -> float:
        """The wait after so many short lives in a row."""
        if short_lives == 0:
            return 0.0
        return min(self.cap_s, self.first_s * 2.0 ** min(short_lives - 1, 16))


@dataclass(slots=True)
class _Watched:
    """One process as the launcher remembers it."""

    started_at: float
    short_lives: int = 0
    died_at: float | None = None


class Launcher:
    """Watches the named processes; starts those that died, by the command they had.

    One that was stopped on purpose is left alone: `LocalProcesses` tells the two apart, and its
    locks keep the launcher out of a stop or restart that is under way.
    """

    def __init__(
        self,
        processes: LocalProcesses,
        names: tuple[InstanceName, ...],
        clock: Callable[[], float],
        backoff: Backoff | None = None,
    ) -> None:
        self._processes = processes
        self._clock = clock
        self._backoff = backoff or Backoff()
        # What died before we came to look has not died young, as far as anyone knows.
        self._watched = {name: _Watched(clock() - self._backoff.forgiven_after_s) for name in names}

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            for name, watched in self._watched.items():
                await self._look(name, watched)
            await asyncio.sleep(POLL_S)

    async def _look(self, name: InstanceName, watched: _Watched) -> None:
        if self._processes.status(name).state is not ProcessState.DEAD:
            watched.died_at = None
            return
        now = self._clock()
        if watched.died_at is None:
            watched.died_at = now
            young = now - watched.started_at < self._backoff.forgiven_after_s
            watched.short_lives = watched.short_lives + 1 if young else 0
        delay_s = self._backoff.delay_s(watched.short_lives)
        if now - watched.died_at < delay_s:
            return
        try:
            pid = await asyncio.to_thread(self._processes.revive, name)
        except BorealError as error:
            _log.error("cannot start a process again", name=name, error=error.message)
            pid = None
        # A start that failed is a very short life.
        watched.started_at, watched.died_at = self._clock(), None
        if pid is not None:
            _log.info("started again", name=name, pid=pid, after_s=delay_s)
