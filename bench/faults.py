"""What is done to a writer to make it fail, and how it is undone."""

from __future__ import annotations

import signal
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

import psutil

from boreal import process_tree
from boreal.errors import ProcessFailed
from boreal.processes import LocalProcesses


class Kind(StrEnum):
    """How a writer ends."""

    POSTGRES_KILLED = "postgres-killed"  # kill -9 of the postmaster
    AGENT_KILLED = "agent-killed"  # kill -9 of the agent alone
    FROZEN = "frozen"  # SIGSTOP of both, and of every session
    AGENT_FROZEN = "agent-frozen"  # SIGSTOP of the agent alone: PostgreSQL goes on, cut off
    PLANNED = "planned"


UNPLANNED = tuple(kind for kind in Kind if kind is not Kind.PLANNED)
MIXED = (
    *(Kind.POSTGRES_KILLED, Kind.AGENT_KILLED, Kind.FROZEN),
    *(Kind.POSTGRES_KILLED, Kind.AGENT_KILLED, Kind.AGENT_FROZEN),
)
"""A third of each: PostgreSQL is gone, the agent is, something does not answer."""


def inject(kind: Kind, directory: Path, name: str) -> Callable[[], None] | None:
    """Make instance `name` fail in an unplanned way; how to undo that, where it can be undone."""
    processes = LocalProcesses(directory)
    match kind:
        case Kind.POSTGRES_KILLED:
            process_tree.send(postmaster(directory, name), signal.SIGKILL)
            return None
        case Kind.AGENT_KILLED:
            process_tree.send(agent(directory, name), signal.SIGKILL)
            return None
        case Kind.FROZEN:
            processes.pause(name)
            return lambda: _resume(processes, name)
        case Kind.AGENT_FROZEN:
            process_tree.send(agent(directory, name), signal.SIGSTOP)
            return lambda: _resume(processes, name)
        case Kind.PLANNED:
            raise ValueError("a planned failover is asked for, not injected")


def agent(directory: Path, name: str) -> psutil.Process:
    """The agent's process. ProcessFailed if it does not run."""
    pid = LocalProcesses(directory).status(name).pid
    if pid is None:
        raise ProcessFailed(f"{name} does not run")
    return psutil.Process(pid)


def postmaster(directory: Path, name: str) -> psutil.Process:
    """The instance's PostgreSQL. ProcessFailed if it does not run."""
    pgdata = directory / name / "pgdata"
    try:
        process = psutil.Process(int((pgdata / "postmaster.pid").read_text().split()[0]))
        if process.name() == "postgres" and str(pgdata) in process.cmdline():
            return process
    except (FileNotFoundError, IndexError, psutil.NoSuchProcess) as error:
        raise ProcessFailed(f"{name}'s PostgreSQL does not run") from error
    raise ProcessFailed(f"{name}'s PostgreSQL does not run")


def _resume(processes: LocalProcesses, name: str) -> None:
    if processes.status(name).alive:
        processes.resume(name)
