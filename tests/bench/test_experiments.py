"""Goal: the experiments with readers run, judge and clean up. Method: each command, very short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


def experiment(tmp_path: Path, name: str, *arguments: str) -> tuple[Any, str]:
    """Run one; its result file and what it printed."""
    with TemporaryDirectory(dir="/var/tmp", prefix="boreal-test-") as disk:
        Path(disk).chmod(0o711)
        done = subprocess.run(
            [
                *(sys.executable, "-m", f"bench.{name}", *arguments),
                *(f"--dir={disk}", f"--results={tmp_path}"),
            ],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert list(Path(disk).iterdir()) == []
    (path,) = tmp_path.glob(f"{name}-*.json")
    return json.loads(path.read_text()), done.stdout


def test_failovers(tmp_path: Path) -> None:
    found, printed = experiment(
        tmp_path, "failover", "--unplanned=1", "--planned=1", "--pause=0.5", "--scale=1"
    )
    assert "it holds" in printed
    assert [each["kind"] for each in found["rounds"]] == ["postgres-killed", "planned"]
    assert set(found["stalls"]) == {"unplanned", "postgres-killed", "planned"}
    assert found["acknowledged"] > 20
    assert found["looks"] > 0


def test_lag(tmp_path: Path) -> None:
    found, printed = experiment(
        tmp_path, "lag", "--rate=100", "--seconds=3", "--warm-up=1", "--clients=4"
    )
    assert "VIOLATED" not in printed
    (lag,) = found["lags"].values()
    assert lag["commits"] > 100
    assert 0 < lag["p50_ms"] <= lag["p99_ms"]


def test_readers(tmp_path: Path) -> None:
    found, _ = experiment(tmp_path, "readers", "--mb=10", "--readers=1")
    (added,) = found["added"]
    assert (added["name"], added["answered_s"] > 0) == ("db-2", True)
    assert added["local_bytes"] > 0
    assert found["database_bytes"] > 0
