"""Keeps the node's page process running and tells it when there is something to index."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import structlog

from boreal.types import NodeName

_POLL_SECONDS = 0.2
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 10.0
_HEALTHY_SECONDS = 30.0
"""One that lived so long did not fail at its start: begin with the short pause again."""
TURN_SECONDS = 0.2
"""Appends within it wake the page process once. The index may be that much behind: whoever waits
for a page asks for it there, which wakes it, too."""
_GOLDEN_RATIO = 0.618034

_log = structlog.get_logger(__name__)


class PageProcess(Protocol):
    """storage_node.page_process.PageProcess, as much of it as is used here."""

    @property
    def pid(self) -> int:
        """Its process id."""
        ...

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        ...

    def notify(self) -> None:
        """Wake it; never blocks."""
        ...

    def stop(self) -> None:
        """End it."""
        ...


def until_turn(name: NodeName, now: float) -> float:
    """Seconds until the node's page process may be woken, `now` being the machine's clock.

    All nodes get an append at the same moment. Where they share a machine they would all index it
    at the same moment too, and commits would wait for six processes at once. So each has its turn;
    the golden ratio keeps the turns of names in sequence apart, however many there are.
    """
    share = sum(name.encode()) * _GOLDEN_RATIO % 1
    return TURN_SECONDS - (now - share * TURN_SECONDS) % TURN_SECONDS


class PageSupervisor:
    """The one owner of the page process: starts it, and again when it died, ever more slowly."""

    def __init__(self, name: NodeName, start: Callable[[], PageProcess]) -> None:
        self._name = name
        self._start = start
        self._process: PageProcess | None = None
        self._notifying = False
        self.starts = 0
        """How often one was started; only ever grows."""

    @property
    def running(self) -> bool:
        """Whether there is one now."""
        return self._process is not None

    def notify(self) -> None:
        """The log grew, or volumes came or went. Cheap."""
        if not self._notifying:
            self._notifying = True
            loop = asyncio.get_running_loop()
            loop.call_later(until_turn(self._name, loop.time()), self._notify)

    def _notify(self) -> None:
        self._notifying = False
        if self._process is not None:
            self._process.notify()

    async def run(self) -> None:
        """Keep one running until cancelled; then stop it."""
        clock = asyncio.get_running_loop().time
        pause = _FIRST_PAUSE_SECONDS
        try:
            while True:
                started = clock()
                self._process = process = self._start()
                self.starts += 1
                _log.info("page process started", pid=process.pid)
                while (status := process.poll()) is None:
                    await asyncio.sleep(_POLL_SECONDS)
                if clock() - started >= _HEALTHY_SECONDS:
                    pause = _FIRST_PAUSE_SECONDS
                _log.error("page process died", status=status, restart_in_seconds=pause)
                process.stop()
                self._process = None
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        finally:
            if self._process is not None:
                self._process.stop()
