"""Goal: the lag of every commit counts once. Method: ids by hand; a follower of stock PostgreSQL.

(The whole command: test_experiments.py.)
"""

from __future__ import annotations

import random

import pytest

from bench.lag import Follower, Lag, Unseen, Written, parse_written
from boreal.errors import Unreachable
from boreal.waiting import wait_until
from tests.support.stock_postgres import stock_postgres


def test_every_row_is_new_once_whatever_the_order() -> None:
    ids = list(range(1, 3001))
    pace = random.Random(1)
    shown = sorted(ids, key=lambda row: row + pace.uniform(0, 20))
    unseen = Unseen()
    new: list[int] = []
    for at in range(0, len(shown), 7):
        visible = [row for row in shown[: at + 7] if row > unseen.below]
        assert len(visible) < 40
        new += unseen.take(visible)
    assert sorted(new) == ids
    assert unseen.below == 3000


def test_ids_that_were_never_used_do_not_stop_it() -> None:
    unseen = Unseen()
    assert unseen.take([1, 2]) == {1, 2}
    assert unseen.take(range(40, 600)) == set(range(40, 600))
    assert unseen.below == 599


def test_lag_of_commits() -> None:
    lag = Lag.of([n / 1000 for n in range(1, 101)], 500)
    assert (lag.commits, lag.p50_ms, lag.p99_ms, lag.worst_ms) == (100, 50, 99, 100)


def test_what_pgbench_says_at_a_rate() -> None:
    written = parse_written(
        "number of transactions actually processed: 3000\n"
        "number of failed transactions: 0 (0.000%)\n"
        "latency average = 7.250 ms\n"
        "rate limit schedule lag: avg 3.250 (max 61.600) ms\n"
        "tps = 998.5 (without initial connection time)\n"
    )
    assert written == Written(commits=3000, tps=998.5, commit_ms=4.0, late_ms=3.25)


def test_a_follower_sees_what_is_written() -> None:
    with stock_postgres() as postgres:
        postgres.run("create table beats (id bigserial primary key, at timestamptz not null)")
        dsn = f"host={postgres.socket_directory} port=5432 user=postgres dbname=postgres"
        with Follower(dsn, warm_up_s=0) as follower:
            for _ in range(20):
                postgres.run(
                    "insert into beats (at) select clock_timestamp() from (values (1), (2)) v"
                )
            wait_until(
                lambda: follower.seen == 40,
                timeout_s=30,
                otherwise=lambda: AssertionError(f"{follower.seen} of 40 seen"),
            )
        lag = follower.lag()
        assert lag.commits == 40
        assert 0 < lag.p50_ms <= lag.worst_ms
    with Follower("host=127.0.0.1 port=1 user=nobody", warm_up_s=0) as nobody:
        pass
    with pytest.raises(Unreachable):
        nobody.lag()
