"""Goal: a soak is judged right: what is flat, what grows, what failed.

Method: samples made by hand, pgbench's own words, files and processes of this machine. (A soak of a
real cluster is tests/cluster/test_soak.py.)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from bench.soak import (
    Sample,
    Throughput,
    disk_bytes,
    judge,
    memory_bytes,
    parse_progress,
    slope,
    summary,
    thinned,
)

MIB = 2**20


def samples(sizes_mib: Sequence[float], memory_mib: Sequence[float] | None = None) -> list[Sample]:
    """One every ten seconds; sn-1 has these sizes, sn-2 never changes."""
    return [
        Sample(
            at_s=10.0 * n,
            disk_bytes={
                "sn-1": {"log": int(size * MIB / 2), "pages/index": int(size * MIB / 2)},
                "sn-2": {"log": 100 * MIB},
            },
            rss_bytes={"sn-1": 50 * MIB},
            anonymous_bytes={"sn-1": int((memory_mib or [20] * len(sizes_mib))[n] * MIB)},
            backlog_bytes=n * 1000,
        )
        for n, size in enumerate(sizes_mib)
    ]


def test_what_grows_in_the_warm_up_only_is_flat() -> None:
    verdict = judge(samples([10, 50, 100, 100, 110, 95, 100, 105, 98]), [], [])
    assert verdict.holds
    assert verdict.flatness["sn-1"].warm_bytes == 100 * MIB
    assert verdict.flatness["sn-1"].highest == pytest.approx(110 / 101.33, rel=0.01)
    assert verdict.flatness["sn-2"].lowest == 1.0
    assert verdict.backlog_most_bytes == 8000


@pytest.mark.parametrize("sizes", [[100, 100, 100, 110, 130, 150, 170, 190, 210],
                                   [100, 100, 100, 100, 100, 100, 100, 100, 60]])  # fmt: skip
def test_what_grows_or_falls_is_not_flat(sizes: list[float]) -> None:
    verdict = judge(samples(sizes), [], [])
    assert not verdict.holds
    assert judge(samples(sizes), [], [], 0.5).holds
    text = "\n".join(summary(verdict))
    assert text.count("NOT FLAT") == 1
    assert "does NOT hold" in text


def test_errors_and_failed_transactions_do_not_hold() -> None:
    flat = samples([100] * 6)
    line = Throughput(at_s=1, tps=500, latency_ms=2, failed=0)
    assert judge(flat, [line], []).holds
    assert judge(flat, [line], []).tps_mean == 500
    assert not judge(flat, [line], ["pgbench: error: lost"]).holds
    failed = Throughput(at_s=1, tps=500, latency_ms=2, failed=3)
    assert judge(flat, [failed], []).errors == ["3 transactions failed"]


def test_memory_growth_is_per_hour_after_the_warm_up() -> None:
    growing = samples([100] * 9, [5, 15, 20, 20, 21, 22, 23, 24, 25])
    verdict = judge(growing, [], [])
    assert verdict.memory_growth_bytes_per_hour["sn-1"] == pytest.approx(360 * MIB, rel=0.01)
    assert verdict.memory_last_bytes == {"sn-1": 25 * MIB}
    assert "+360.0 MiB an hour" in "\n".join(summary(verdict))


def test_slope() -> None:
    assert slope([(0, 1), (1, 3), (2, 5)]) == pytest.approx(2)
    assert slope([(1, 7)]) == slope([]) == 0


def test_pgbenchs_progress() -> None:
    lines = [
        "pgbench (16.14)",
        "starting vacuum...end.",
        "progress: 1763856005.5 s, 1234.5 tps, lat 6.480 ms stddev 1.900, 0 failed",
        "progress: 1763856010.5 s, 0.0 tps, lat NaN ms stddev NaN, 2 failed",
        "tps = 617.2 (without initial connection time)",
    ]
    assert parse_progress(lines, 1763856000.0) == [
        Throughput(at_s=5.5, tps=1234.5, latency_ms=6.48, failed=0),
        Throughput(at_s=10.5, tps=0.0, latency_ms=None, failed=2),
    ]


def test_blocks_on_disk_are_counted_by_part(tmp_path: Path) -> None:
    volume = tmp_path / "sn-1" / "volumes" / "vol-1"
    for path in ("state", "log/1", "log/2", "pages/imports/data.mdb", "bundles/contents/x"):
        file = volume / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 8192)
    with (volume / "log" / "sparse").open("wb") as file_with_a_hole:
        file_with_a_hole.truncate(1 << 30)
    (tmp_path / "db-1").mkdir()
    found = disk_bytes(tmp_path)
    assert found == {"sn-1": {"state": 8192, "log": 16384, "pages/imports": 8192, "bundles": 8192}}


def test_memory_of_a_process() -> None:
    rss, anonymous = memory_bytes({"control": os.getpid(), "gone": 2**22 - 1})
    assert 5 * MIB < anonymous["control"] <= rss["control"]
    assert "gone" not in rss


@pytest.mark.parametrize("count", [0, 1, 89, 90, 91, 362, 1000])
def test_what_is_kept_ends_with_the_last(count: int) -> None:
    kept = thinned(range(count), 90)
    assert len(kept) <= 90
    assert list(kept[-1:]) == list(range(count))[-1:]
    assert len({second - first for first, second in pairwise(kept)}) <= 1
