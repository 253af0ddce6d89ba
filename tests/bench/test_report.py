"""Goal: the report says what was measured, failures too. Method: outcomes made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from bench import report
from bench.accounting import Kind
from bench.load import Load, Summary
from bench.plan import Cell, Script, SystemName
from bench.runner import Failure, Measurement, Outcome
from bench.systems import StorageState

CELL = Cell(script=Script.SIMPLE_UPDATE, clients=16)
TITLES = {
    SystemName.BOREAL: "ours",
    SystemName.PAGES_STOPPED: "ours, a mode",
    SystemName.DIRECT: "ours, past the endpoint",
    SystemName.QUORUM: "the peer",
}


def measurement(
    system: SystemName,
    tps: float,
    *,
    transactions: int = 1000,
    elsewhere_share: float = 0,
    ack_p99_ms: float = 3.5,
    ack_delay_ms: float = 0,
    drain_s: float | None = 1.5,
) -> Measurement:
    storage = StorageState(
        backlog_bytes=5 << 20,
        ack_p50_ms=1.25,
        ack_p99_ms=ack_p99_ms,
        ack_p99_worst_ms=9.0,
        ack_delay_ms=ack_delay_ms,
    )
    boreal = system in (SystemName.BOREAL, SystemName.PAGES_STOPPED, SystemName.DIRECT)
    return Measurement(
        cell=CELL,
        system=system,
        load=Load(
            summary=Summary(transactions=transactions, failed=0, tps=tps, latency_mean_ms=5),
            p50_ms=4,
            p95_ms=9,
            p99_ms=float("nan") if transactions == 0 else 12,
            sampled=transactions // 4,
            pgbench_cpu_s=0.1,
        ),
        wal_bytes=300_000,
        shipped_bytes=1_800_000 if system is not SystemName.ALONE else None,
        cpu_s={Kind.BACKENDS: 0.5, Kind.WALSENDER: 0.25},
        elsewhere_share=elsewhere_share,
        settle_s=0.1,
        settled=True,
        storage=storage if boreal else None,
        drain_s=drain_s if boreal else None,
    )


def outcomes() -> list[Outcome]:
    return [measurement(SystemName.QUORUM, 1000), measurement(SystemName.BOREAL, 1500)]


def rendered(items: list[Outcome]) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(report.load_table(items, TITLES), report.cpu_table(items, TITLES))
    return capture.get()


def test_ratio_is_to_the_peer_in_the_same_cell() -> None:
    peer, boreal = outcomes()
    assert isinstance(peer, Measurement)
    assert isinstance(boreal, Measurement)
    assert report.ratio(outcomes(), boreal) == pytest.approx(1.5)
    assert report.ratio([boreal], boreal) is None


def test_tables_show_ratios_bytes_and_cpu() -> None:
    text = rendered(outcomes())
    for figure in ("1,500", "1.50", "300", "1,800", "0.500", "0.250", "0.750", "3.50", "5.0"):
        assert figure in text
    assert text.rindex("boreal") < text.rindex("stock-quorum")  # in the order of titles


def test_a_failure_is_shown_and_the_rest_too() -> None:
    failure = Failure(cell=CELL, system=SystemName.BOREAL, reason="a client aborted")
    items: list[Outcome] = [measurement(SystemName.QUORUM, 1000), failure]
    assert "failed" in rendered(items)
    assert any("a client aborted" in note for note in report.notes(items, TITLES))
    assert "a client aborted" in report.line(failure)


def test_notes_tell_modes_and_noise() -> None:
    noisy = measurement(SystemName.QUORUM, 1000, elsewhere_share=0.4)
    text = "\n".join(report.notes([noisy], TITLES))
    assert "ours, a mode" in text
    assert "40%" in text


def test_it_says_where_the_time_goes() -> None:
    items = [
        measurement(SystemName.BOREAL, 900),
        measurement(SystemName.PAGES_STOPPED, 1000, ack_p99_ms=3.25),
        measurement(SystemName.QUORUM, 800),
    ]
    first, _, cost = report.where_time_goes(items, TITLES)
    assert "0.75 ms of CPU for each transaction: backends 67%, walsender 33%" in first
    assert "p50 of 4.00 ms the fourth storage node's ack is 1.25 ms" in first
    assert "cost 10% of the transactions" in cost
    assert "3.50 ms with them and 3.25 ms without" in cost
    assert len(report.where_time_goes(items[:1], TITLES)) == 1
    assert report.where_time_goes(items[2:], TITLES) == []


def test_it_says_what_the_endpoint_costs() -> None:
    items = [measurement(SystemName.BOREAL, 990), measurement(SystemName.DIRECT, 1000)]
    *_, cost = report.where_time_goes(items, TITLES)
    assert "the writer endpoint costs 1.0% of the transactions" in cost
    assert "5.00 ms through it and 5.00 ms past it" in cost


def test_notes_tell_of_an_index_that_lags() -> None:
    items = [measurement(SystemName.BOREAL, 900, ack_delay_ms=7, drain_s=None)]
    text = "\n".join(report.notes(items, TITLES))
    assert "BACK-PRESSURE" in text
    assert "NOT DRAINED" in text


def test_json_holds_facts_and_figures(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    report.write_json(report.as_json(outcomes(), {"machine": {"cores": 2}}), path)
    read = json.loads(path.read_text())
    assert read["machine"] == {"cores": 2}
    peer, boreal = read["outcomes"]
    assert (peer["system"], peer["clients"]) == ("stock-quorum", 16)
    assert boreal["ratio_to_baseline"] == pytest.approx(1.5)
    assert boreal["wal_bytes_per_transaction"] == 300
    assert boreal["storage"]["backlog_bytes"] == 5 << 20
    assert (boreal["drain_s"], peer["storage"]) == (1.5, None)
    assert boreal["cpu_ms_per_transaction"] == {"backends": 0.5, "walsender": 0.25}
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_json_of_a_load_without_a_transaction_is_still_json() -> None:
    (record,) = json.loads(report.as_json([measurement(SystemName.QUORUM, 0, transactions=0)], {}))[
        "outcomes"
    ]
    assert record["p99_ms"] is None
    assert record["wal_bytes_per_transaction"] is None
