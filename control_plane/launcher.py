"""Brings dead processes of a local cluster back: compute nodes and endpoints.

(A cloud's instance manager, in small.)

Storage nodes it leaves alone: a volume with nodes missing serves on, and people should be able to
look at one. `boreal restart` starts those.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import SubprocessError

import structlog

from boreal import cluster
from boreal.errors import BorealError
from boreal.processes import LocalProcesses, ProcessState

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


class ClusterNames:
    """The processes to be watched: what cluster.json says, read again whenever it has changed."""

    def __init__(self, cluster_dir: Path) -> None:
        self._cluster_dir = cluster_dir
        self._read: tuple[int, int] | None = None
        self._names: tuple[str, ...] = ()

    def __call__(self) -> tuple[str, ...]:
        """The names as of now; the last ones known if the file cannot be read."""
        try:
            found = (self._cluster_dir / "cluster.json").stat()
        except OSError:
            return self._names
        version = (found.st_ino, found.st_mtime_ns)  # it is replaced, never written into
        if version != self._read:
            self._read = version
            try:
                config = cluster.load(self._cluster_dir)
            except BorealError as error:
                _log.error("cannot read which processes there are", error=error.message)
            else:
                self._names = (cluster.ENDPOINTS, *config.instance_names)
                _log.info("watching processes", names=self._names)
        return self._names


@dataclass(slots=True)
class _Watched:
    """One process as the launcher remembers it."""

    started_at: float
    short_lives: int = 0
    died_at: float | None = None
    starting: bool = False


class Launcher:
    """Watches the named processes; starts those that died, by the command they had.

    One that was stopped on purpose is left alone: `LocalProcesses` tells the two apart, and its
    locks keep the launcher out of a stop or restart that is under way. Nobody waits for another's
    lock.
    """

    def __init__(
        self,
        processes: LocalProcesses,
        names: Callable[[], tuple[str, ...]],
        clock: Callable[[], float],
        backoff: Backoff | None = None,
    ) -> None:
        self._processes = processes
        self._names = names
        self._clock = clock
        self._backoff = backoff or Backoff()
        self._watched: dict[str, _Watched] = {}
        self.starts: Counter[str] = Counter()
        """How often each process was started again; only ever grows."""

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as starts:
            while True:
                for name in self._names():
                    if self._is_due(name):
                        starts.create_task(self._start(name), name=f"start {name}")
                await asyncio.sleep(POLL_S)

    def _is_due(self, name: str) -> bool:
        """Look at the process: whether it is dead and it is time to start it."""
        now = self._clock()
        # What died before we came to look has not died young, as far as anyone knows.
        watched = self._watched.setdefault(name, _Watched(now - self._backoff.forgiven_after_s))
        if watched.starting:
            return False
        if self._processes.status(name).state is not ProcessState.DEAD:
            watched.died_at = None
            return False
        if watched.died_at is None:
            watched.died_at = now
            young = now - watched.started_at < self._backoff.forgiven_after_s
            watched.short_lives = watched.short_lives + 1 if young else 0
        return now - watched.died_at >= self._backoff.delay_s(watched.short_lives)

    async def _start(self, name: str) -> None:
        watched = self._watched[name]
        watched.starting = True
        try:
            pid = await asyncio.to_thread(self._processes.revive, name)
        except (BorealError, OSError, SubprocessError) as error:
            _log.error("cannot start a process again", name=name, error=str(error))
            pid = None
        # A start that failed is a very short life.
        watched.started_at, watched.died_at, watched.starting = self._clock(), None, False
        if pid is not None:
            self.starts[name] += 1
            _log.info("started again", name=name, pid=pid, short_lives=watched.short_lives)
