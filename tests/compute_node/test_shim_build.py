"""The page shim's build, and the programs it finds itself in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from boreal.errors import BadUsage, ProcessFailed
from boreal.waiting import wait_until
from compute_node import shim
from tests.compute_node.shimmed import Original


def run_with(library: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={"LD_PRELOAD": str(library), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def test_other_programs_are_left_alone(library: Path, tmp_path: Path) -> None:
    variables = {shim.SOCKET_VARIABLE: "/nowhere", shim.PARENT_VARIABLE: "1"}
    file = tmp_path / "file"
    file.write_text("content")
    assert run_with(library, "cat", str(file), **variables).stdout == "content"


def test_without_its_variable_it_does_nothing(library: Path, original: Original) -> None:
    done = run_with(library, str(original.engine.tool("postgres")), "--version")
    assert done.returncode == 0
    assert "16." in done.stdout


@pytest.mark.parametrize(
    "variables",
    [
        {shim.SOCKET_VARIABLE: "/" + "x" * 108},
        {shim.SOCKET_VARIABLE: "/s", shim.PARENT_VARIABLE: "1"},
        {shim.HANDOVER_VARIABLE: "/" + "x" * 108},
        {shim.SOCKET_VARIABLE: "/s", shim.HANDOVER_VARIABLE: "/h"},
    ],
    ids=["socket path", "parent", "handover path", "no lease"],
)
def test_an_engine_it_cannot_serve_does_not_start(
    library: Path, original: Original, variables: dict[str, str]
) -> None:
    done = run_with(library, str(original.engine.tool("postgres")), "--version", **variables)
    assert done.returncode == 2
    assert "boreal shim:" in done.stderr


def test_the_engine_reads_files_only_by_calls_that_are_wrapped(original: Original) -> None:
    """An upgrade of the engine that reads or cuts files in other ways must not go unnoticed."""
    binary = original.engine.tool("postgres").read_bytes()
    others = ("open64", "openat", "pread64", "preadv", "preadv64", "readv", "truncate64",
              "ftruncate64", "unlinkat", "copy_file_range", "sendfile", "fallocate")  # fmt: skip
    assert [name for name in others if f"\0{name}\0".encode() in binary] == []


_STARTER = """
import os, subprocess, sys, time
from compute_node import shim
from pathlib import Path
library, socket, user, *command = sys.argv[1:]
how = {"user": int(user), "group": int(user)} if os.geteuid() == 0 else {}
environment = shim.environment(Path(library), Path(socket))
child = subprocess.Popen(command, cwd="/", stderr=subprocess.DEVNULL, env=environment, **how)
print(child.pid, flush=True)
time.sleep(60)
"""


def test_postgres_ends_with_its_agent(original: Original, library: Path) -> None:
    """The starter is killed; what it started must go."""
    data = original.home / "orphan"
    subprocess.run(["cp", "-a", original.data, data], check=True)
    # Started by a process of its own, which then waits to be killed.
    starter = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _STARTER,
            *(str(library), str(data / "pages"), str(original.engine.account.uid)),
            *(str(original.engine.tool("postgres")), "-D", str(data)),
            *("--listen_addresses=", f"--unix_socket_directories={data}"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert starter.stdout is not None
    with starter, starter.stdout:
        postmaster = psutil.Process(int(starter.stdout.readline()))
        wait_until(
            (data / "postmaster.pid").exists,
            timeout_s=20,
            otherwise=lambda: AssertionError("PostgreSQL did not start"),
        )
        starter.kill()
    wait_until(
        lambda: not postmaster.is_running() or postmaster.status() == psutil.STATUS_ZOMBIE,
        timeout_s=20,
        otherwise=lambda: AssertionError("PostgreSQL outlived its agent"),
    )


# --- the build -----------------------------------------------------------------------------------


def test_the_build_is_cached_and_readable_by_all(tmp_path: Path) -> None:
    library = shim.build(tmp_path / "built")
    made = library.stat()
    assert made.st_mode & 0o777 == 0o755
    assert shim.build(tmp_path / "built") == library
    assert library.stat().st_ino == made.st_ino
    assert [path.name for path in (tmp_path / "built").iterdir()] == [library.name]


def test_a_missing_compiler_is_told_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(BadUsage, match="ziglang"):
        shim.build(tmp_path / "built")


def test_a_failing_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cc").write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProcessFailed, match="no such luck"):
        shim.build(tmp_path / "built")
    assert list((tmp_path / "built").iterdir()) == []
