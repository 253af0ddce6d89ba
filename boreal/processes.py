"""The processes of one local cluster: start them detached, find them again, signal them safely.

Every process has a name (`sn-1`, `db-1`, `control`) and two files in the cluster's directory:
`run/NAME.json`, which says what was started, and `logs/NAME.log`, its standard output and error.

A process is known by its pid *and* its birth (the kernel's boot id and the start time in clock
ticks since boot), so a stale file heals by itself and a recycled pid is never signalled. Wall time
would not do: it shifts when the clock is set.

A process is *wanted* from its start until somebody begins to stop it. Wanted but not alive means
that it died; `revive` starts it again. The record of a stopped process goes once it is gone, not
before, so that a stop that was interrupted can be repeated.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path

import psutil

from boreal import process_tree
from boreal.cluster import ENVIRONMENT_PREFIX
from boreal.errors import BadUsage, ProcessFailed
from boreal.files import write_atomic
from boreal.waiting import wait_until

STOP_TIMEOUT_S = 30.0
"""How long a clean stop may take: a compute node takes its last bundle in it."""

_ORPHANS_TIMEOUT_S = 2.0
"""How long the children may outlive a process that stopped."""
_LOCK_TIMEOUT_S = STOP_TIMEOUT_S + 5.0
_DETACH = Path(__file__).with_name("detach.py")


class ProcessState(Enum):
    """What became of a process."""

    RUNNING = "running"
    PAUSED = "paused"
    DEAD = "dead"
    """It was started, nobody stopped it, and it is gone."""
    STOPPED = "stopped"
    """Never started, or stopped on purpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStatus:
    """A process at one moment."""

    name: str
    state: ProcessState
    pid: int | None = None
    """None unless it is alive."""

    @property
    def alive(self) -> bool:
        """Whether it exists (a paused process does)."""
        return self.pid is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """The content of run/NAME.json."""

    pid: int
    birth: str
    command: tuple[str, ...]
    wanted: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str) -> _Record | None:
        """None for what is not a record of ours: a torn or foreign file heals like a stale one."""
        try:
            raw = json.loads(text)
            return cls(
                pid=int(raw["pid"]),
                birth=raw["birth"],
                command=tuple(raw["command"]),
                wanted=raw["wanted"],
            )
        except (ValueError, KeyError, TypeError):
            return None


class LocalProcesses:
    """The processes of the cluster in `directory`.

    Changes of one process are serialized by a lock file, between commands and the control plane's
    launcher alike; a lock is waited for with a bound.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._run = directory / "run"
        self._logs = directory / "logs"

    def log_path(self, name: str) -> Path:
        """Where the process writes."""
        return self._logs / f"{name}.log"

    def names(self) -> list[str]:
        """Every process that was started and not stopped, alive or not."""
        return sorted(path.stem for path in self._run.glob("*.json"))

    def status(self, name: str) -> ProcessStatus:
        """Look at the process."""
        record = self._record(name)
        process = _find(record)
        if process is None:
            wanted = record is not None and record.wanted
            return ProcessStatus(
                name=name, state=ProcessState.DEAD if wanted else ProcessState.STOPPED
            )
        paused = process_tree.kernel_state(process.pid) == "T"
        state = ProcessState.PAUSED if paused else ProcessState.RUNNING
        return ProcessStatus(name=name, state=state, pid=process.pid)

    def start(self, name: str, command: Sequence[str]) -> int:
        """Start `command` detached under `name` and return its pid; that of a live one if any."""
        with self._changing(name):
            process = _find(self._record(name))
            return process.pid if process else self._launch(name, command)

    def revive(self, name: str) -> int | None:
        """Start again what died, by the same command; None if it is alive or not wanted."""
        with self._changing(name):
            record = self._record(name)
            if record is None or not record.wanted or _find(record):
                return None
            return self._launch(name, record.command)

    def restart(self, name: str, command: Sequence[str]) -> int:
        """Stop the process if it lives and start `command` in its place; return the pid."""
        with self._changing(name):
            self._terminate([name], STOP_TIMEOUT_S)
            return self._launch(name, command)

    def stop(self, *names: str, timeout_s: float = STOP_TIMEOUT_S) -> list[str]:
        """Stop cleanly, all at once: SIGTERM, a bounded wait, SIGKILL for what remains.

        Afterwards neither they nor their children exist. Returns the names that had to be killed.
        Stopping what does not run is no error.
        """
        with ExitStack() as locks:
            for name in sorted(names):
                locks.enter_context(self._changing(name))
            return self._terminate(names, timeout_s)

    def kill(self, name: str) -> int:
        """Kill -9 the process, then its children: nothing of it survives. Returns its pid."""
        tree = process_tree.freeze(self._living(name))
        process_tree.kill_all(tree)
        return tree[0].pid

    def pause(self, name: str) -> int:
        """SIGSTOP the process and its children; return how many that was."""
        return len(process_tree.freeze(self._living(name)))

    def resume(self, name: str) -> int:
        """SIGCONT the process and its children; return how many that was."""
        tree = process_tree.tree(self._living(name))
        for process in reversed(tree):
            process_tree.send(process, signal.SIGCONT)
        return len(tree)

    def last_lines(self, name: str, count: int = 12) -> list[str]:
        """The end of the process's log, for an error message."""
        try:
            with self.log_path(name).open(errors="replace") as log:
                return [line.rstrip("\n") for line in deque(log, maxlen=count)]
        except FileNotFoundError:
            return []

    def failure(self, name: str, what: str) -> ProcessFailed:
        """The error that tells what happened to `name`, with the last it said."""
        lines = self.last_lines(name)
        said = "\n".join(f"    {line}" for line in lines) or "    (its log is empty)"
        return ProcessFailed(f"{name} {what}. The last lines of {self.log_path(name)}:\n{said}")

    @contextmanager
    def one_command_at_a_time(self) -> Iterator[None]:
        """Hold the cluster's lock, so that no two `up` or `down` mix; BadUsage if it is held."""
        self._run.mkdir(parents=True, exist_ok=True)
        with (self._run / "command.lock").open("a+") as file:
            if not _try_lock(file.fileno()):
                file.seek(0)
                raise BadUsage(
                    f"another boreal command (pid {file.read().strip() or 'unknown'}) is starting "
                    f"or stopping the cluster in {self._directory}; wait for it and try again"
                )
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    # --- inside ------------------------------------------------------------------------------

    @contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        """Hold the lock of one process."""
        self._run.mkdir(parents=True, exist_ok=True)
        with (self._run / f"{name}.lock").open("a") as file:
            wait_until(
                lambda: _try_lock(file.fileno()),
                timeout_s=_LOCK_TIMEOUT_S,
                otherwise=lambda: BadUsage(f"another boreal command is still working on {name}"),
            )
            yield

    def _record(self, name: str) -> _Record | None:
        try:
            return _Record.from_json((self._run / f"{name}.json").read_text())
        except FileNotFoundError:
            return None

    def _living(self, name: str) -> psutil.Process:
        process = _find(self._record(name))
        if process is None:
            raise BadUsage(f"{name} is not running; start it with `boreal restart {name}`")
        return process

    def _launch(self, name: str, command: Sequence[str]) -> int:
        self._logs.mkdir(parents=True, exist_ok=True)
        # The command line has it all; what the caller's environment says is of another cluster.
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(f"{ENVIRONMENT_PREFIX}_")
        }
        answer = subprocess.run(
            [sys.executable, "-I", "-S", str(_DETACH), str(self.log_path(name)), *command],
            cwd=self._directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=30,
        )
        if answer.returncode != 0:
            raise ProcessFailed(f"cannot start {name}: {answer.stderr.decode().strip()}")
        pid = int(answer.stdout)
        birth = process_tree.birth(pid)
        if birth is None:
            raise self.failure(name, "ended as soon as it was started")
        self._save(name, _Record(pid=pid, birth=birth, command=tuple(command), wanted=True))
        return pid

    def _save(self, name: str, record: _Record) -> None:
        write_atomic(self._run / f"{name}.json", record.to_json())

    def _terminate(self, names: Iterable[str], timeout_s: float) -> list[str]:
        trees: dict[str, list[psutil.Process]] = {}
        for name in names:
            record = self._record(name)
            if record is None:
                continue
            self._save(name, replace(record, wanted=False))
            process = _find(record)
            # The children are noted first: once their parent is gone, nobody can name them.
            trees[name] = process_tree.tree(process) if process else []
            if process:
                process_tree.send(process, signal.SIGTERM)
            for member in trees[name]:  # a paused process hears SIGTERM when it goes on
                process_tree.send(member, signal.SIGCONT)
        everyone = [process for tree in trees.values() for process in tree]
        _await_end([tree[0] for tree in trees.values() if tree], timeout_s)
        _await_end(everyone, min(timeout_s, _ORPHANS_TIMEOUT_S))
        killed = [name for name, tree in trees.items() if any(map(process_tree.exists, tree))]
        for process in filter(process_tree.exists, everyone):
            process_tree.kill_all(process_tree.freeze(process))
        for name in trees:
            (self._run / f"{name}.json").unlink(missing_ok=True)
        return killed


def _await_end(processes: Sequence[psutil.Process], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(map(process_tree.exists, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _find(record: _Record | None) -> psutil.Process | None:
    if record is None or process_tree.birth(record.pid) != record.birth:
        return None
    try:
        return psutil.Process(record.pid)
    except psutil.NoSuchProcess:
        return None
