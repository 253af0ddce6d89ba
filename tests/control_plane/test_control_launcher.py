"""The launcher brings back what died, soon, and leaves alone what was stopped.

Method: a real process that is really killed; the launcher on the test's event loop.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from boreal import cluster
from boreal.files import write_atomic
from boreal.processes import LocalProcesses, ProcessState
from boreal.types import InstanceName
from control_plane.launcher import Backoff, ClusterNames, Launcher

NAME = InstanceName("db-1")
OTHER = InstanceName("db-2")
SLEEPER = (sys.executable, "-S", "-c", "import time; time.sleep(60)")
FAILING = (sys.executable, "-S", "-c", "print('one life', flush=True)")


@pytest.fixture
async def processes(tmp_path: Path) -> AsyncIterator[LocalProcesses]:
    local = LocalProcesses(tmp_path)
    launching = asyncio.create_task(Launcher(local, lambda: (OTHER, NAME), time.monotonic).run())
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


async def test_a_process_is_back_though_another_one_is_being_changed(
    processes: LocalProcesses,
) -> None:
    for name in (NAME, OTHER):
        processes.start(name, SLEEPER)
    await asyncio.sleep(0.2)  # the launcher has seen them alive
    with processes._changing(OTHER):  # as a command does while it stops it
        processes.kill(OTHER)
        processes.kill(NAME)
        async with asyncio.timeout(10):
            while not processes.status(NAME).alive:
                await asyncio.sleep(0.01)
        assert not processes.status(OTHER).alive
    async with asyncio.timeout(10):
        while not processes.status(OTHER).alive:
            await asyncio.sleep(0.01)
    processes.stop(OTHER, timeout_s=0.5)


def test_the_names_follow_the_cluster_file(tmp_path: Path) -> None:
    names = ClusterNames(tmp_path)
    assert names() == ()
    config = cluster.create(tmp_path, postgres_port=7510)
    config.save()
    assert names() == ("endpoints", "db-1")
    (first,) = config.compute
    second = replace(first, name=OTHER, agent_port=1, postgres_port=2)
    replace(config, compute=(first, second)).save()
    assert names() == ("endpoints", "db-1", "db-2")
    write_atomic(tmp_path / "cluster.json", "not a cluster")
    assert names() == ("endpoints", "db-1", "db-2")
