"""Goal: nothing outlives a run. Method: real processes in a real directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.workspace import filesystem, make_workspace, require_disk
from boreal.errors import BadUsage


def test_what_still_works_in_it_is_ended_and_it_is_removed(tmp_path: Path) -> None:
    with make_workspace(tmp_path) as workspace:
        sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
        inside = subprocess.Popen(sleep, cwd=workspace)
        outside = subprocess.Popen(sleep, cwd=tmp_path)
    try:
        inside.wait(timeout=0)  # already gone
        assert outside.poll() is None
        assert not workspace.exists()
    finally:
        outside.kill()
        outside.wait()


def test_it_is_removed_after_a_failure_too(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), make_workspace(tmp_path) as workspace:
        (workspace / "no such directory" / "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_memory_is_refused_and_disk_is_not() -> None:
    assert filesystem(Path("/proc/self")) == "proc"
    require_disk(Path("/var/tmp"))
    with pytest.raises(BadUsage, match="tmpfs"):
        require_disk(Path("/dev/shm"))
