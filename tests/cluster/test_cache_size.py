"""Goal: with `--cache-size` the compute node's disk stays near the bound, and no query can tell.

Method: the same statements run on a cluster with a cache much smaller than its data and on a stock
PostgreSQL, beside a load that keeps changing and reading other tables; what both answer must be the
same, and in the end every page of every storage node that of the writer.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any, LiteralString

import pytest

from tests.cluster.local import LocalCluster, local_cluster, until
from tests.support.stock_postgres import stock_postgres

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

MB = 1024 * 1024
BOUND = 32 * MB

_SET_UP: tuple[LiteralString, ...] = (
    "CREATE TABLE wide (id int PRIMARY KEY, n int, tags int[], filler text)",
    """INSERT INTO wide SELECT g, 0, ARRAY[g % 50, g % 7], repeat(md5(g::text), 20)
         FROM generate_series(1, 40000) g""",
    "CREATE INDEX wide_md5 ON wide (md5(filler))",
    "CREATE INDEX wide_tags ON wide USING gin (tags)",
    "CREATE TABLE growing (id int, filler text)",
    "CREATE UNLOGGED TABLE scratch (id int, filler text)",
    "INSERT INTO scratch SELECT g, repeat('s', 500) FROM generate_series(1, 4000) g",
    "CREATE SEQUENCE counter",
)
_ROUND: tuple[LiteralString, ...] = (
    "UPDATE wide SET n = n + 1 WHERE id % 17 = 3",
    "DELETE FROM wide WHERE id % 101 = 5 AND n > 0",
    "INSERT INTO growing SELECT g, repeat(md5(g::text), 20) FROM generate_series(1, 5000) g",
    "UPDATE wide SET filler = repeat(md5(n::text || id), 20) WHERE id % 31 = 7",
    # One transaction that reads back what it wrote itself: its command ids are not in the WAL.
    """BEGIN; INSERT INTO growing SELECT -g, repeat('x', 700) FROM generate_series(1, 4000) g;
         UPDATE growing SET id = id - 1 WHERE id < -2000; DELETE FROM growing WHERE id = -3001;
         COMMIT""",
    "VACUUM wide",
    "DELETE FROM growing WHERE id > 100",
    "VACUUM growing",
    "REINDEX INDEX wide_md5",
    "SELECT nextval('counter') FROM generate_series(1, 5)",
)
_ANSWERS: tuple[LiteralString, ...] = (
    "SELECT count(*), sum(n), sum(hashtext(w::text)) FROM wide w",
    "SELECT count(*), sum(hashtext(g::text)) FROM growing g",
    "SELECT count(*), sum(id) FROM wide WHERE tags @> ARRAY[11]",
    "SELECT count(*), max(id) FROM wide WHERE md5(filler) < '4'",
    "SELECT count(*) FROM scratch",
    "SELECT last_value FROM counter",
)

_LASTING = _ANSWERS[:4]
"""What a failover does not change: not unlogged tables, nor sequences' last values."""


def answers(run: Callable[[LiteralString], list[tuple[Any, ...]]]) -> list[list[tuple[Any, ...]]]:
    return [run(query) for query in _ANSWERS]


def local_bytes(cluster: LocalCluster) -> int:
    files = (cluster.directory / "db-1" / "pgdata" / "base").rglob("*")
    return sum(path.stat().st_blocks * 512 for path in files if path.is_file())


def scan_on(cluster: LocalCluster, finished: threading.Event, sums: set[Any]) -> None:
    with cluster.connect() as connection:
        while not finished.is_set():
            cursor = connection.execute("SELECT sum(hashtext(p::text)) FROM pgbench_branches p")
            cursor.fetchone()
            cursor = connection.execute(
                "SELECT (SELECT sum(abalance) FROM pgbench_accounts)"
                " - (SELECT sum(bbalance) FROM pgbench_branches)"
            )
            sums.add(cursor.fetchone())


def test_a_small_cache_changes_no_answer() -> None:
    sums: set[Any] = set()
    with local_cluster(f"--cache-size={BOUND // MB}MB") as cluster, stock_postgres() as stock:
        with cluster.pgbench("-i", "-q", "-s", "2") as initializing:
            output = initializing.communicate(timeout=180)[0]
            assert initializing.returncode == 0, output
        with cluster.connect() as session:

            def run(statement: LiteralString) -> list[tuple[Any, ...]]:
                cursor = session.execute(statement)
                return cursor.fetchall() if cursor.description else []

            for statement in _SET_UP:
                assert run(statement) == stock.run(statement)
            finished = threading.Event()
            scanning = threading.Thread(target=scan_on, args=(cluster, finished, sums))
            with cluster.pgbench("-n", "-c", "2", "-T", "15") as load:
                scanning.start()
                try:
                    for statement in _ROUND:
                        run(statement)
                        stock.run(statement)
                    assert answers(run) == answers(stock.run)
                finally:
                    finished.set()
                    scanning.join()
                output = load.communicate(timeout=120)[0]
            assert load.returncode == 0, output
            assert re.search(r"number of failed transactions: 0 ", output), output
            assert sums == {(0,)}

            until(lambda: local_bytes(cluster) < 1.5 * BOUND, 60, "the cache to shrink")
            assert answers(run) == answers(stock.run)
        cluster.boreal("verify", timeout_s=300)
        # What was evicted under one writer is the next one's to read.
        cluster.boreal("kill", "db-1")
        for query in _LASTING:
            assert cluster.query(query) == stock.run(query)
