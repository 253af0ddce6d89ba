"""Goal: the bench measures real systems and leaves nothing behind. Method: run the command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest

from boreal.errors import ProcessFailed
from boreal.waiting import wait_until

pytestmark = pytest.mark.timeout(360)

BENCH = [sys.executable, "-m", "bench", "--scale=1", "--seconds=1", "--scripts=simple-update"]


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory on a real disk, as the bench demands; tmp_path may be in memory."""
    with TemporaryDirectory(dir="/var/tmp", prefix="boreal-test-") as directory:
        path = Path(directory)
        path.chmod(0o711)
        yield path


def processes_in(directory: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(directory) in word for word in process.info["cmdline"] or ())
    ]


def measure(disk: Path, results: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run the bench; what must hold for every system is checked here."""
    with subprocess.Popen(
        [*BENCH, *arguments, f"--dir={disk}", f"--results={results}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as bench:
        try:
            output, _ = bench.communicate(timeout=270)
        finally:
            bench.terminate()  # it then removes what it started; nothing if it has ended
    assert bench.returncode == 0, output
    (path,) = results.glob("*.json")
    outcomes: list[dict[str, Any]] = json.loads(path.read_text())["outcomes"]
    for outcome in outcomes:
        assert outcome["tps"] > 0
        assert 0 < outcome["p50_ms"] <= outcome["p95_ms"] <= outcome["p99_ms"]
        assert outcome["wal_bytes_per_transaction"] > 100
        assert outcome["cpu_ms_per_transaction"]["backends"] > 0
    assert processes_in(disk) == []
    assert list(disk.iterdir()) == []
    return outcomes


def copies(outcome: dict[str, Any]) -> float:
    return float(outcome["shipped_bytes_per_transaction"] / outcome["wal_bytes_per_transaction"])


def test_it_measures_a_lone_server(disk: Path, tmp_path: Path) -> None:
    (alone,) = measure(disk, tmp_path, "--clients=2", "--systems=stock-alone")
    assert alone["system"] == "stock-alone"
    assert alone["shipped_bytes_per_transaction"] is None


@pytest.mark.long
def test_it_measures_a_quorum(disk: Path, tmp_path: Path) -> None:
    (quorum,) = measure(disk, tmp_path, "--clients=2", "--systems=stock-quorum")
    assert copies(quorum) == pytest.approx(6, rel=0.05)
    assert quorum["cpu_ms_per_transaction"]["standby receive"] > 0


@pytest.mark.long
def test_it_measures_boreal_whole_and_in_part(disk: Path, tmp_path: Path) -> None:
    """Also without its page processes, and past its endpoint, which is no cluster of its own."""
    systems = "--systems=boreal,boreal-pages-stopped,boreal-direct"
    whole, stopped, direct = measure(disk, tmp_path, "--clients=2", systems)
    assert (whole["system"], stopped["system"]) == ("boreal", "boreal-pages-stopped")
    assert direct["system"] == "boreal-direct"
    for outcome in (whole, stopped, direct):
        assert outcome["drain_s"] is not None  # what was stopped was let go on
        assert copies(outcome) == pytest.approx(6, rel=0.05)
        for kind in ("walsender", "agent", "storage log"):
            assert outcome["cpu_ms_per_transaction"][kind] > 0
    assert whole["storage"]["backlog_bytes"] >= 0
    assert whole["cpu_ms_per_transaction"]["storage pages"] > 0
    assert stopped["storage"]["backlog_bytes"] > 0


def test_an_interrupted_run_leaves_nothing(disk: Path) -> None:
    with subprocess.Popen(
        [*BENCH, "--systems=stock-alone", f"--dir={disk}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as bench:
        wait_until(
            lambda: any("checkpoint_timeout=1d" in each.cmdline() for each in processes_in(disk)),
            timeout_s=60,
            otherwise=lambda: ProcessFailed("no server was started"),
        )
        bench.send_signal(signal.SIGTERM)
        _, stderr = bench.communicate(timeout=60)
    assert bench.returncode == 1
    assert "interrupted" in stderr
    assert processes_in(disk) == []
    assert list(disk.iterdir()) == []


def test_a_directory_in_memory_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [*BENCH, "--dir=/dev/shm", f"--results={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "tmpfs" in done.stderr
