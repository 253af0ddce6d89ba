"""Goal: what redo makes of PostgreSQL's records is what PostgreSQL has, for every kind of record.

Method: one stock PostgreSQL runs theme after theme (`workload_*`), and SQL at random by seed; after
each, `oracle` judges all it logged and all its files. BOREAL_REDO_SEEDS=3,4,5 gives other seeds,
each with more statements (`make oracle SEEDS=3,4,5`).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from boreal.wal import BlockRef, Rmgr, WalRecord
from storage_node.redo.native import NativeRedo
from tests.storage_node.redo import (
    workload_btree,
    workload_ddl,
    workload_heap,
    workload_index,
    workload_random,
)
from tests.storage_node.redo.oracle import OracleRun, oracle
from tests.support.stock_postgres import StockPostgres

_THEMES = (
    *workload_heap.THEMES,
    *workload_btree.THEMES,
    *workload_index.THEMES,
    *workload_ddl.THEMES,
    *workload_random.THEMES,
)
_LONG = "BOREAL_REDO_SEEDS" in os.environ
_SEEDS = [int(seed) for seed in os.environ.get("BOREAL_REDO_SEEDS", "1,2").split(",")]
_LONG_STEPS = 2000
_done: set[str] = set()


@pytest.mark.parametrize("theme", _THEMES, ids=lambda theme: theme.__name__)
def test_pages_are_postgresqls(judged: OracleRun, theme: Callable[[StockPostgres], None]) -> None:
    theme(judged.server)
    assert judged.check() == []
    _done.add(theme.__name__)


@pytest.mark.parametrize("seed", _SEEDS)
@pytest.mark.timeout(1800 if _LONG else 300)
def test_pages_are_postgresqls_after_sql_at_random(judged: OracleRun, seed: int) -> None:
    workload_random.at_random(judged.server, seed, _LONG_STEPS if _LONG else workload_random.STEPS)
    assert judged.check() == []


def test_every_record_type_was_met(judged: OracleRun) -> None:
    left_out = [theme.__name__ for theme in _THEMES if theme.__name__ not in _done]
    if left_out:
        pytest.skip(f"these themes were not run, or failed: {left_out}")
    assert judged.coverage.missing() == []
    assert judged.coverage.missing_variants() == []


class _Faulty(NativeRedo):
    """Redo that is wrong now and then, in ways that do little harm."""

    def apply(self, page: bytearray, record: WalRecord, block: BlockRef) -> None:
        super().apply(page, record, block)
        if record.rmgr is Rmgr.HEAP and record.info == 0x10:
            page[10] |= 0x04  # after a DELETE: PD_ALL_VISIBLE
        elif record.rmgr is Rmgr.BTREE and record.info == 0x00:
            page[8180] ^= 1  # the level
        elif record.rmgr is Rmgr.HASH and record.info == 0x20 and block.id == 0:
            page[4] ^= 1  # a wrong LSN


def test_the_oracle_sees_faults() -> None:
    with oracle(redo=_Faulty()) as run:
        run.server.run(
            "CREATE TABLE t (i int)",
            "CREATE INDEX t_i ON t (i)",
            "CREATE INDEX t_h ON t USING hash (i)",
            "INSERT INTO t VALUES (1), (2)",
            "DELETE FROM t WHERE i = 1",
        )
        (row,) = run.server.run("SELECT pg_relation_filenode('t')::int,"
            "pg_relation_filenode('t_i')::int, pg_relation_filenode('t_h')::int")  # fmt: skip
        found = {difference.page.relation.relation for difference in run.check()}
        assert found >= set(row)
        assert run.check() == [], "each fault is told once"
