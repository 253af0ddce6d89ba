"""LocalProcesses starts, finds and signals exactly its own processes.

Method: real processes with real children; their life and death is looked up in the kernel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from boreal.errors import BadUsage, ProcessFailed
from boreal.process_tree import exists
from boreal.processes import LocalProcesses, ProcessState
from boreal.waiting import wait_until

PYTHON = (sys.executable, "-S", "-c")
SLEEPER = (*PYTHON, "import time; print('ready', flush=True); time.sleep(60)")
STUBBORN = (
    *PYTHON,
    """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('ready', flush=True)
time.sleep(60)
""",
)
# A process, its child and its grandchild, each in a session of its own.
FAMILY = (
    *PYTHON,
    """
import subprocess, sys, time
generations = int(sys.argv[1])
if generations:
    subprocess.Popen([*sys.orig_argv[:-1], str(generations - 1)], start_new_session=True)
time.sleep(60)
""",
    "2",
)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[LocalProcesses]:
    local = LocalProcesses(tmp_path)
    yield local
    local.stop(*local.names(), timeout_s=0.5)


def await_ready(processes: LocalProcesses, name: str) -> None:
    wait_until(
        lambda: "ready" in processes.last_lines(name),
        timeout_s=10,
        otherwise=lambda: AssertionError(f"{name} is not ready"),
    )


def await_family(pid: int) -> list[psutil.Process]:
    """The process, its child and its grandchild."""
    root = psutil.Process(pid)
    wait_until(
        lambda: len(root.children(recursive=True)) == 2,
        timeout_s=10,
        otherwise=lambda: AssertionError("the family is not complete"),
    )
    return [root, *root.children(recursive=True)]


def test_start_is_detached_and_idempotent(processes: LocalProcesses, tmp_path: Path) -> None:
    pid = processes.start("a", SLEEPER)
    await_ready(processes, "a")
    started = psutil.Process(pid)
    assert os.getsid(pid) == pid
    assert os.getpid() not in [parent.pid for parent in started.parents()]
    assert started.cwd() == str(tmp_path)
    assert Path(f"/proc/{pid}/fd/0").readlink() == Path("/dev/null")
    assert processes.start("a", SLEEPER) == pid
    assert processes.status("a").state is ProcessState.RUNNING


def test_stop_is_clean_and_idempotent(processes: LocalProcesses) -> None:
    pid = processes.start("a", SLEEPER)
    assert processes.stop("a", "never-started") == []
    assert not psutil.pid_exists(pid) or not exists(psutil.Process(pid))
    assert processes.status("a").state is ProcessState.STOPPED
    assert processes.stop("a") == []
    assert processes.names() == []


def test_stop_takes_the_children_along(processes: LocalProcesses) -> None:
    family = await_family(processes.start("a", FAMILY))
    # The grandchild is in a session of its own and gets no signal from anyone else.
    processes.stop("a", timeout_s=0.3)
    assert not any(map(exists, family))


def test_stop_kills_what_does_not_listen(processes: LocalProcesses) -> None:
    processes.start("a", STUBBORN)
    await_ready(processes, "a")
    assert processes.stop("a", timeout_s=0.2) == ["a"]
    assert processes.status("a").state is ProcessState.STOPPED


def test_kill_leaves_nothing_of_the_tree(processes: LocalProcesses) -> None:
    family = await_family(processes.start("a", FAMILY))
    processes.kill("a")
    assert not any(map(exists, family))
    assert processes.status("a").state is ProcessState.DEAD
    with pytest.raises(BadUsage, match="boreal restart a"):
        processes.kill("a")


def test_pause_and_resume_reach_the_whole_tree(processes: LocalProcesses) -> None:
    family = await_family(processes.start("a", FAMILY))
    assert processes.pause("a") == 3
    assert {each.status() for each in family} == {psutil.STATUS_STOPPED}
    assert processes.status("a").state is ProcessState.PAUSED
    assert processes.resume("a") == 3
    assert processes.status("a").state is ProcessState.RUNNING
    processes.pause("a")
    processes.stop("a")
    assert not any(map(exists, family))


def test_a_recycled_pid_is_not_ours(processes: LocalProcesses, tmp_path: Path) -> None:
    with subprocess.Popen(SLEEPER, stdout=subprocess.DEVNULL) as stranger:
        try:
            processes.start("a", SLEEPER)
            path = tmp_path / "run" / "a.json"
            record = json.loads(path.read_text())
            processes.kill("a")
            # As if the kernel had given our pid to somebody else since.
            path.write_text(json.dumps(record | {"pid": stranger.pid}))
            assert processes.status("a").state is ProcessState.DEAD
            with pytest.raises(BadUsage):
                processes.kill("a")
            processes.stop("a")
            assert stranger.poll() is None
        finally:
            stranger.kill()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}'])
def test_a_broken_record_heals(processes: LocalProcesses, tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.json").write_text(content)
    assert processes.status("a").state is ProcessState.STOPPED
    processes.stop("a")
    processes.start("a", SLEEPER)
    assert processes.status("a").alive


def test_revive_starts_only_what_died(processes: LocalProcesses) -> None:
    assert processes.revive("a") is None
    first = processes.start("a", SLEEPER)
    assert processes.revive("a") is None
    processes.kill("a")
    second = processes.revive("a")
    assert second not in {None, first}
    assert psutil.Process(second).cmdline() == list(SLEEPER)
    processes.stop("a")
    assert processes.revive("a") is None


def test_restart_replaces(processes: LocalProcesses) -> None:
    first = processes.start("a", SLEEPER)
    second = processes.restart("a", SLEEPER)
    assert second != first
    assert processes.status("a").pid == second


def test_what_cannot_start_says_why(processes: LocalProcesses) -> None:
    processes.log_path("a").parent.mkdir()
    processes.log_path("a").write_text("an older line\n")
    with suppress(ProcessFailed):  # or it dies only after we looked
        processes.start("a", ("/no/such/program",))
    wait_until(
        lambda: not processes.status("a").alive,
        timeout_s=5,
        otherwise=lambda: AssertionError("still alive"),
    )
    failure = processes.failure("a", "ended")
    assert "a ended" in failure.message
    assert "No such file" in failure.message
    assert str(processes.log_path("a")) in failure.message


def test_last_lines_are_the_last(processes: LocalProcesses) -> None:
    assert processes.last_lines("a") == []
    processes.log_path("a").parent.mkdir()
    processes.log_path("a").write_bytes(b"".join(b"%d\xff\n" % n for n in range(100)))
    assert [line[:2] for line in processes.last_lines("a", 3)] == ["97", "98", "99"]


def test_one_command_at_a_time(processes: LocalProcesses, tmp_path: Path) -> None:
    with (
        processes.one_command_at_a_time(),
        pytest.raises(BadUsage, match=f"pid {os.getpid()}"),
        LocalProcesses(tmp_path).one_command_at_a_time(),
    ):
        pytest.fail("two commands at once")
    with LocalProcesses(tmp_path).one_command_at_a_time():
        pass


def test_concurrent_starts_start_one(processes: LocalProcesses, tmp_path: Path) -> None:
    pids: list[int] = []
    threads = [
        threading.Thread(target=lambda: pids.append(LocalProcesses(tmp_path).start("a", SLEEPER)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pids) == 4
    assert len(set(pids)) == 1
