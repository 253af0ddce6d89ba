"""`boreal status --watch` shows the last minute. Method: reports made by hand, at moments given."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from rich.console import Console

from boreal import cluster
from boreal.command.status import gather, to_json
from boreal.command.watch import History, page, sparkline
from boreal.rpc import control_pb2
from boreal.types import format_lsn


def test_a_sparkline_is_as_high_as_its_values() -> None:
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert sparkline([None, 5.0]) == "·█"
    assert sparkline([0, 0]) == "▁▁"
    assert sparkline([]) == ""


def report(vdl: int, **lags: float | None) -> dict[str, Any]:
    return {
        "volume": {"vdl": format_lsn(vdl)},
        "compute": [
            {"name": name, "lag_ms": lag, "role": "writer" if lag is None else "reader"}
            for name, lag in lags.items()
        ],
    }


def test_the_history_keeps_a_minute() -> None:
    history = History()
    for second in range(100):
        history.add(report(second * 1000, one=None, two=float(second)), 2.0 * second)
    assert history.log_bytes_per_s == 500
    assert history.log == "█" * 60
    assert len(history.lag("two")) == 60
    assert history.lag("two")[-1] == "█"
    assert set(history.lag("one")) == {"·"}


def test_one_that_left_is_forgotten() -> None:
    history = History()
    history.add(report(1, one=None, two=1.0), 1)
    history.add(report(1, one=None), 2)
    assert history.lag("two") == ""
    assert history.lag("one") == "··"
    assert history.log_bytes_per_s == 0


def test_a_log_that_nobody_knows_is_no_growth() -> None:
    history = History()
    history.add({"volume": {"vdl": None}, "compute": []}, 1)
    history.add(report(5000), 2)
    assert history.log_bytes_per_s == 0


def test_a_page_has_it_all(config: cluster.ClusterConfig) -> None:
    found = to_json(asyncio.run(gather(config)))
    history = History()
    failed = control_pb2.Event(id=1, kind=control_pb2.Event.FAILOVER_FAILED, instance="db-1")
    history.events.append(failed)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(page(found, history))
    text = capture.get()
    for word in (str(config.data_dir), "cluster is down", "db-1", "sn-6", "failover failed"):
        assert word in text


async def test_watching_goes_on_until_it_is_stopped(config: cluster.ClusterConfig) -> None:
    watcher = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "boreal.command.main", "status", "--watch"),
        f"--data-dir={config.data_dir}",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert watcher.stdout is not None
        async with asyncio.timeout(20):
            await watcher.stdout.readuntil(b"sn-6")
            cluster.with_instance(config).save()
            await watcher.stdout.readuntil(b"db-2")
    finally:
        watcher.terminate()
        await watcher.communicate()
