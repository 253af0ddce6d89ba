"""Goal: pgbench is read right. Method: output of pgbench 16.14, and small logs."""

from __future__ import annotations

import math

import pytest

from bench.load import Target, parse_log, parse_summary, percentile
from boreal.errors import Internal

FINISHED = """\
pgbench (16.14)
transaction type: <builtin: simple update>
scaling factor: 1
query mode: simple
number of clients: 4
number of threads: 2
maximum number of tries: 1
duration: 2 s
number of transactions actually processed: 9396
number of failed transactions: 3 (0.032%)
latency average = 0.851 ms
initial connection time = 4.461 ms
tps = 4700.361932 (without initial connection time)
"""

ABORTED = """\
pgbench (16.14)
duration: 2 s
number of transactions actually processed: 0
number of failed transactions: 0 (NaN%)
"""


def test_summary() -> None:
    summary = parse_summary(FINISHED)
    assert summary.transactions == 9396
    assert summary.failed == 3
    assert summary.tps == pytest.approx(4700.361932)
    assert summary.latency_mean_ms == pytest.approx(0.851)


def test_summary_with_a_connection_for_each_transaction() -> None:
    tps = "tps = 812.5 (including reconnection times)"
    lines = [line for line in FINISHED.splitlines() if not line.startswith("tps")]
    assert parse_summary("\n".join([*lines, tps])).tps == pytest.approx(812.5)


def test_a_run_that_did_not_finish_has_no_summary() -> None:
    with pytest.raises(Internal, match="tps"):
        parse_summary(ABORTED)


def test_log_in_milliseconds() -> None:
    lines = ["0 6 1049 0 1795381945 707075", "3 1 2686 0 1795381945 703064"]
    assert parse_log(lines) == [1.049, 2.686]


def test_log_lines_that_are_no_finished_transaction() -> None:
    lines = ["0 6 failed 0 1795381945 707075", "0 7 skipped 0 1795381945 707075", "", "0 8 10"]
    assert parse_log(lines) == []


@pytest.mark.parametrize(("percent", "expected"), [(50, 50), (95, 95), (99, 99), (100, 100)])
def test_percentile_is_the_nearest_rank(percent: float, expected: float) -> None:
    assert percentile([float(value) for value in range(1, 101)], percent) == expected


def test_percentile_of_few_and_of_none() -> None:
    assert percentile([7.0], 99) == 7.0
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0
    assert math.isnan(percentile([], 50))


def test_a_target_survives_its_own_dsn() -> None:
    target = Target(host="127.0.0.1", port=54320, user="boreal", password="a/b@c:d", database="x y")
    assert Target.parse(target.dsn) == target
    assert Target.parse("postgresql://boreal:a%2Fb%40c%3Ad@127.0.0.1:54320/x%20y") == target
    assert target.environment()["PGPASSWORD"] == "a/b@c:d"
