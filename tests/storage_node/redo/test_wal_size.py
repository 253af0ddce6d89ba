"""Goal: a heap and B-tree load costs Boreal no more log than stock PostgreSQL writes without
full-page images: within 2 %.

Method: the same transactions, one client, the same seed, on a stock PostgreSQL without full-page
writes, and on one with every setting of Boreal's writer that bears on the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from boreal.engine import Engine, find_engine
from boreal.types import InstanceName, parse_lsn
from compute_node.config import ComputeConfig
from compute_node.configuration import write_configuration
from tests.support.stock_postgres import StockPostgres, stock_postgres

_TRANSACTIONS = 1500
_TOLERANCE = 0.02
_OF_THE_LOG = (
    "wal_level",
    "wal_consistency_checking",
    "wal_log_hints",
    "wal_compression",
    "full_page_writes",
)


def _production_settings(directory: Path, engine: Engine) -> dict[str, str]:
    """What the configuration Boreal writes for its PostgreSQL says of the log."""
    config = ComputeConfig(
        name=InstanceName("db-1"),
        data_dir=directory,
        engine_dir=directory / "engine",
        host="127.0.0.1",
        control="127.0.0.1:1",
        port=1,
        postgres_port=2,
        master_password="",
    )
    config.pgdata.mkdir(parents=True)
    write_configuration(config, engine)
    lines = (config.pgdata / "postgresql.conf").read_text().splitlines()
    pairs = (line.partition(" = ") for line in lines)
    return {name: value.strip("'") for name, _, value in pairs if name in _OF_THE_LOG}


def _log_written(settings: Mapping[str, str]) -> int:
    """Bytes of log the load makes."""
    with stock_postgres(settings) as server:
        where = (f"--host={server.socket_directory}", "--username=postgres")
        server.engine.run("pgbench", *where, "--initialize", "--no-vacuum", "--quiet", "postgres")
        server.run("CHECKPOINT")
        before = _position(server)
        load = ("--client=1", f"--transactions={_TRANSACTIONS}", "--random-seed=7")
        server.engine.run("pgbench", *where, *load, "--no-vacuum", "postgres")
        return _position(server) - before


def _position(server: StockPostgres) -> int:
    (row,) = server.run("SELECT pg_current_wal_insert_lsn()::text")
    return parse_lsn(row[0])


def test_the_log_is_as_small_as_stocks(tmp_path: Path) -> None:
    production = _production_settings(tmp_path, find_engine(tmp_path / "engine"))
    assert production["wal_consistency_checking"] == "gin,spgist"
    stock = _log_written({"full_page_writes": "off", "wal_level": "replica"})
    ours = _log_written(production)
    print(f"{_TRANSACTIONS} transactions: {stock} bytes of log on stock, {ours} on Boreal")
    assert stock > _TRANSACTIONS * 300
    assert abs(ours - stock) <= stock * _TOLERANCE
