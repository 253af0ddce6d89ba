"""A process with all below it, as the Linux kernel tells of them."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import psutil

from boreal.errors import ProcessFailed
from boreal.waiting import wait_until

_SIGNAL_TIMEOUT_S = 5.0
_MAX_FREEZE_ROUNDS = 50
_ENDED = frozenset("ZX")
_CANNOT_FORK = frozenset("ZXTtD")


@cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat (proc(5)) from the third on; empty without such a process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()  # the second, the name, may hold anything


def birth(pid: int) -> str | None:
    """What tells this process from any other that ever had its pid; None if it is dead."""
    fields = _stat(pid)
    if not fields or fields[0] in _ENDED:
        return None
    return f"{_boot_id()}:{fields[19]}"  # field 22, starttime


def kernel_state(pid: int) -> str:
    """R, S, D, T (stopped), Z, X; X also when there is no such process."""
    return (_stat(pid) or ["X"])[0]


def exists(process: psutil.Process) -> bool:
    """Whether this very process is there and more than a zombie."""
    return process.is_running() and kernel_state(process.pid) not in _ENDED


def tree(root: psutil.Process) -> list[psutil.Process]:
    """The process and all below it, parents first."""
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return [root]


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal; psutil checks that the pid was not recycled. A dead process is fine."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def freeze(root: psutil.Process) -> list[psutil.Process]:
    """Stop a whole tree and return it, parents first.

    A tree that runs can grow between looking and signalling; one in which every process is stopped
    cannot. So: stop what is there, look again, until nothing new is found.
    """
    frozen: list[psutil.Process] = []
    for _ in range(_MAX_FREEZE_ROUNDS):
        fresh = [process for process in tree(root) if process not in frozen]
        if not fresh:
            return frozen
        for process in fresh:
            send(process, signal.SIGSTOP)
        frozen += fresh
        _await_stop(fresh)
    raise ProcessFailed(f"process {root.pid} starts children faster than they can be stopped")


def _await_stop(processes: Sequence[psutil.Process]) -> None:
    wait_until(
        lambda: all(kernel_state(process.pid) in _CANNOT_FORK for process in processes),
        timeout_s=_SIGNAL_TIMEOUT_S,
        otherwise=lambda: ProcessFailed(f"process {processes[0].pid} does not stop"),
        poll_s=0.001,
    )


def kill_all(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL in the given order, and see them gone."""
    for process in processes:
        send(process, signal.SIGKILL)
    wait_until(
        lambda: not any(map(exists, processes)),
        timeout_s=_SIGNAL_TIMEOUT_S,
        otherwise=lambda: ProcessFailed("a killed process does not go away; is its disk hanging?"),
        poll_s=0.005,
    )
