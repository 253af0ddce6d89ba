"""Goal: metrics are served beside an event loop, without harm to it, and only while it is well.

Method: the real server on a real port; scrapes come from a thread, as Prometheus' do.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from boreal import metrics
from boreal.cluster import HOST, free_ports
from boreal.errors import BadUsage
from boreal.histogram import Durations, Sizes
from boreal.metrics import counter, gauge, gauges, histograms, served

ABOUT = {"component": "test", "name": "one"}


def scrape(port: int) -> dict[str, Metric]:
    request = urllib.request.Request(
        f"http://{HOST}:{port}/metrics",
        headers={"Accept": "application/openmetrics-text; version=1.0.0"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        text = answer.read().decode()
    families = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    return {family.name: family for family in families}


@pytest.fixture
def port() -> int:
    return free_ports(1)[0]


async def test_a_scrape_reads_on_the_loop_and_aside_of_it(port: int) -> None:
    threads: dict[str, int] = {}

    def collect() -> Iterator[Metric]:
        threads["loop"] = threading.get_ident()
        yield gauge("boreal_depth_bytes", "How deep it is.", 7)
        yield counter("boreal_dives_total", "How often somebody went.", 3)

    def aside() -> Iterator[Metric]:
        threads["aside"] = threading.get_ident()
        yield gauges(
            "boreal_fish", "How many there are.", ("kind",), [(("cod",), 2), (("eel",), 0)]
        )

    async with served(HOST, port, collect, about=ABOUT, aside=aside):
        found = await asyncio.to_thread(scrape, port)
    assert threads["loop"] == threading.get_ident() != threads["aside"]
    assert (found["boreal_depth_bytes"].unit, found["boreal_depth_bytes"].type) == (
        "bytes",
        "gauge",
    )
    assert found["boreal_dives"].samples[0].name == "boreal_dives_total"
    assert [s.labels["kind"] for s in found["boreal_fish"].samples] == ["cod", "eel"]
    assert found["boreal_process"].samples[0].labels.keys() == {"component", "name", "version"}
    assert found["process_cpu_seconds"].samples


async def test_histograms_are_cumulative(port: int) -> None:
    sizes, durations = Sizes(1, 3), Durations(first=10, last=12)
    for size in (0, 1, 2, 100):
        sizes.observe(size)
    durations.observe(0.0015)

    def collect() -> Iterator[Metric]:
        yield histograms("boreal_a_bytes", "Sizes.", ("of",), [(("x",), sizes)])
        yield histograms("boreal_b_seconds", "Times.", (), [((), durations)])

    async with served(HOST, port, collect, about=ABOUT):
        found = await asyncio.to_thread(scrape, port)
    values = {s.labels.get("le", s.name[15:]): s.value for s in found["boreal_a_bytes"].samples}
    assert values == {"1.0": 2, "3.0": 3, "7.0": 3, "+Inf": 4, "count": 4, "sum": 103}
    values = {s.labels.get("le", s.name[17:]): s.value for s in found["boreal_b_seconds"].samples}
    assert values["0.001024"] == 0
    assert values["0.002048"] == values["+Inf"] == values["count"] == 1
    assert values["sum"] == 0.0015


async def test_a_loop_that_hangs_fails_the_scrape(
    port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "_LOOP_WITHIN_S", 0.05)
    answer: list[int] = []

    def ask() -> None:
        try:
            scrape(port)
        except urllib.error.HTTPError as error:
            answer.append(error.code)
            error.close()

    async with served(HOST, port, list, about=ABOUT):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(10)  # and the loop does not turn meanwhile
        assert answer == [500]
        assert "boreal_process" in await asyncio.to_thread(scrape, port)
    assert "TimeoutError" in capfd.readouterr().err


async def test_what_cannot_be_collected_fails_the_scrape_alone(
    port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    def collect() -> Iterator[Metric]:
        raise LookupError("no such gauge")

    async with served(HOST, port, collect, about=ABOUT):
        with pytest.raises(urllib.error.HTTPError, match="500") as refused:
            await asyncio.to_thread(scrape, port)
        refused.value.close()
    assert "no such gauge" in capfd.readouterr().err


async def test_a_client_that_says_nothing_keeps_others_waiting_only_so_long(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics._Handler, "timeout", 0.05)
    async with served(HOST, port, list, about=ABOUT):
        with socket.create_connection((HOST, port)):
            assert "boreal_process" in await asyncio.to_thread(scrape, port)


async def test_the_port_is_free_again_afterwards_and_without_one_there_is_none(port: int) -> None:
    for _ in range(2):
        async with served(HOST, port, list, about=ABOUT):
            await asyncio.to_thread(scrape, port)
    before = threading.active_count()
    async with served(HOST, None, list, about=ABOUT):
        assert threading.active_count() == before


async def test_a_taken_port_is_a_clear_error(port: int) -> None:
    refused = pytest.raises(BadUsage, match=f"{HOST}:{port}.*--metrics-port")
    with socket.create_server((HOST, port)), refused:
        async with served(HOST, port, list, about=ABOUT):
            pass
