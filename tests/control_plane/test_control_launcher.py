"""The launcher brings back what died, soon, and leaves alone what was stopped.

Method: a real process that is really killed; the launcher on the test's event loop.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from boreal.processes import LocalProcesses, ProcessState
from boreal.types import InstanceName
from control_plane.launcher import Backoff, Launcher

NAME = InstanceName("db-1")
SLEEPER = (sys.executable, "-S", "-c", "import time; time.sleep(60)")
FAILING = (sys.executable, "-S", "-c", "print('one life', flush=True)")


@pytest.fixture
async def processes(tmp_path: Path) -> AsyncIterator[LocalProcesses]:
    local = LocalProcesses(tmp_path)
    launching = asyncio.create_task(Launcher(local, (NAME,), time.monotonic).run())
    yield local
    launching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launching
    local.stop(NAME, timeout_s=0.5)


async def test_a_killed_process_is_back_within_a_moment(processes: LocalProcesses) -> None:
    first = processes.start(NAME, SLEEPER)
    await asyncio.sleep(0)
    processes.kill(NAME)
    async with asyncio.timeout(3):
        while not processes.status(NAME).alive:
            await asyncio.sleep(0.01)
    assert processes.status(NAME).pid != first


async def test_a_stopped_or_paused_process_is_left_alone(processes: LocalProcesses) -> None:
    pid = processes.start(NAME, SLEEPER)
    processes.pause(NAME)
    await asyncio.sleep(0.5)  # several looks of the launcher
    assert processes.status(NAME).pid == pid
    processes.stop(NAME)
    await asyncio.sleep(0.5)
    assert processes.status(NAME).state is ProcessState.STOPPED


async def test_one_that_keeps_dying_is_started_less_and_less(processes: LocalProcesses) -> None:
    processes.start(NAME, (*FAILING[:-1], "import time; print('one life'); time.sleep(0.2)"))
    await asyncio.sleep(2.5)
    lives = len(processes.last_lines(NAME, 100))
    assert 2 <= lives <= 5  # without backoff it would be eight or more


def test_the_backoff_doubles_up_to_its_cap() -> None:
    backoff = Backoff(first_s=1, cap_s=5)
    assert [backoff.delay_s(lives) for lives in (0, 1, 2, 3, 4, 10_000)] == [0, 1, 2, 4, 5, 5]
