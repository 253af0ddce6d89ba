"""Goal: cold reads are measured on a compute node that is cold. Method: the command, very small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from bench.cold import Latency


def test_latencies() -> None:
    found = Latency.of([float(n) for n in range(100, 0, -1)])
    assert (found.count, found.p50_ms, found.p99_ms, found.max_ms) == (100, 50, 99, 100)


@pytest.mark.long
@pytest.mark.timeout(240)
def test_it_measures(tmp_path: Path) -> None:
    with TemporaryDirectory(dir="/var/tmp", prefix="boreal-test-") as disk:
        Path(disk).chmod(0o711)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "bench.cold", "--mb=10", "--lookups=20", "--chain=6"),
                *(f"--dir={disk}", f"--results={tmp_path}"),
            ],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert list(Path(disk).iterdir()) == []
    (path,) = tmp_path.glob("cold-*.json")
    found = json.loads(path.read_text())
    assert found["chain"] == 6
    assert found["scan"]["table_bytes"] > 10_000_000
    assert found["scan"]["mb_per_s"] > 0
    assert found["heap_miss"]["count"] == 20
    assert found["warm"]["p50_ms"] <= found["heap_miss"]["p50_ms"]
