"""A stock hot standby, made by copying a stopped stock primary."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from tests.support.stock_postgres import StockPostgres

FEED_PORT = 6000  # only names the socket file


class StockStandby(StockPostgres):
    """Ready as soon as it answers queries. Its feed's socket belongs into `socket_directory`."""

    def _accepts_writes(self) -> bool:
        try:
            self.run("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def stock_standby(primary: StockPostgres) -> Iterator[StockStandby]:
    """Copy `primary`, which must be stopped; the caller starts the copy."""
    home = Path(tempfile.mkdtemp(prefix="boreal-pg-"))
    home.chmod(0o755)
    primary.engine.account.own(home)
    settings = {
        "primary_conninfo": f"host={home} port={FEED_PORT} user=postgres application_name=sb",
        "wal_retrieve_retry_interval": "100ms",
        "wal_receiver_status_interval": "1s",
        "synchronous_standby_names": "boreal",  # once it is promoted
    }
    standby = StockStandby(primary.engine, home, settings)
    try:
        shutil.copytree(primary.data, standby.data)
        (standby.data / "standby.signal").touch()
        for path in (standby.data, *standby.data.rglob("*")):
            primary.engine.account.own(path)
        yield standby
    finally:
        standby.stop()
        shutil.rmtree(home, ignore_errors=True)
