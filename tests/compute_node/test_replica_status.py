"""Goal: drivers learn the topology by SQL, anybody in any database, and nothing else that way.

Method: the rows from statuses made by hand; the functions in a PostgreSQL that create_volume
prepared, run without anything else of Boreal, with the file that the agent's code writes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from boreal.engine import find_engine
from boreal.rpc import common_pb2, compute_pb2, control_pb2
from boreal.types import InstanceName
from compute_node.config import ADMIN, MASTER, ComputeConfig
from compute_node.create_volume import make_cluster
from compute_node.replica_status import FILE, ReplicaStatusFile, replica_status
from tests.support.stock_postgres import StockPostgres

NOW = datetime(2026, 11, 23, 3, 30, tzinfo=UTC)
NAME = "db-2"
INCARNATIONS = {name: f"{n:032x}" for n, name in enumerate(("db-1", "db-2", "db-3"), start=1)}


def status(
    name: str, state: compute_pb2.ComputeState.ValueType, *, epoch: int = 5, **fields: Any
) -> compute_pb2.ComputeStatus:
    return compute_pb2.ComputeStatus(
        instance=name,
        incarnation=INCARNATIONS[name],
        state=state,
        volume=common_pb2.VolumeRef(volume_id="vol", epoch=epoch),
        **fields,
    )


def told(
    of: compute_pb2.ComputeStatus, *, alive: bool = True, silent_ms: int = 100
) -> control_pb2.InstanceStatus:
    return control_pb2.InstanceStatus(status=of, alive=alive, silent_ms=silent_ms)


WRITER = status(
    "db-1",
    compute_pb2.WRITER,
    vdl=9000,
    followers=[
        compute_pb2.FollowerStatus(instance="db-2", floor_lsn=7000, oldest_xmin=(3 << 32) + 750),
        compute_pb2.FollowerStatus(instance="db-3", floor_lsn=6000),
    ],
)
READER = status("db-2", compute_pb2.READER, replay_lsn=8000, received_lsn=8500, replay_lag_us=2500)
OTHER = status("db-3", compute_pb2.READER, replay_lsn=7900, received_lsn=8500)


# --- the rows -------------------------------------------------------------------------------------


def test_each_instance_has_its_row() -> None:
    found = replica_status([told(OTHER, silent_ms=250), told(WRITER), told(READER)], READER, NOW)
    writer, reader, other = found
    assert [row["server_id"] for row in found] == ["db-1", "db-2", "db-3"]
    assert (writer["session_id"], writer["durable_lsn"]) == ("MASTER_SESSION_ID", 9000)
    assert writer["replica_lag_in_msec"] is writer["current_read_lsn"] is None
    assert reader["session_id"] == "00000000-0000-0000-0000-000000000002"
    assert (reader["durable_lsn"], reader["current_read_lsn"]) == (8000, 8000)
    assert (reader["highest_lsn_rcvd"], reader["oldest_read_view_lsn"]) == (8500, 7000)
    assert (reader["cur_replay_latency_in_usec"], reader["replica_lag_in_msec"]) == (2500, 2.5)
    assert (reader["feedback_epoch"], reader["feedback_xmin"]) == (3, 750)
    assert (other["feedback_epoch"], other["feedback_xmin"]) == (None, None)
    assert reader["last_update_timestamp"] == "2026-11-23T03:30:00+00:00"
    assert other["last_update_timestamp"] == "2026-11-23T03:29:59.750000+00:00"


def test_what_the_control_plane_told_grows_old() -> None:
    writer, _ = replica_status([told(WRITER), told(READER)], READER, NOW, age_s=60)
    assert writer["last_update_timestamp"] == "2026-11-23T03:28:59.900000+00:00"


def test_the_writer_of_the_highest_epoch_is_the_writer() -> None:
    deposed, promoted = WRITER, status("db-2", compute_pb2.WRITER, epoch=6, vdl=9100)
    found = replica_status([told(deposed), told(READER), told(OTHER)], promoted, NOW)
    assert [row["session_id"] == "MASTER_SESSION_ID" for row in found] == [False, True, False]


def test_a_dead_writer_is_none() -> None:
    found = replica_status([told(WRITER, alive=False), told(READER)], READER, NOW)
    assert [row["is_current"] for row in found] == [False, True]
    assert "MASTER_SESSION_ID" not in {row["session_id"] for row in found}


def test_an_instance_nobody_has_told_of_knows_itself() -> None:
    (row,) = replica_status([], READER, NOW)
    assert row["server_id"] == "db-2"


# --- in PostgreSQL --------------------------------------------------------------------------------


class PreparedPostgres(StockPostgres):
    """A cluster as create_volume leaves it, open to its unix socket."""

    def create(self) -> None:
        config = ComputeConfig(
            name=InstanceName(NAME),
            data_dir=self.socket_directory,
            engine_dir=self.socket_directory / "engine",
            host="",
            control="",
            port=0,
            postgres_port=0,
            master_password="secret",
        )
        make_cluster(config, self.engine).path.rename(self.data)
        (self.data / "pg_hba.conf").write_text("local all all trust\n")

    def connect(
        self, database: str = "postgres", user: str = ADMIN
    ) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(
            host=str(self.socket_directory),
            port=5432,
            user=user,
            dbname=database,
            autocommit=True,
            connect_timeout=10,
        )


@pytest.fixture(scope="module")
def postgres() -> Iterator[PreparedPostgres]:
    home = Path(tempfile.mkdtemp(prefix="boreal-pg-"))
    try:
        home.chmod(0o755)
        engine = find_engine(home / "engine")
        engine.account.own(home)
        server = PreparedPostgres(engine, home, {"cluster_name": NAME})
        try:
            server.create()
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def told_rows(postgres: PreparedPostgres) -> Iterator[Path]:
    instances = [told(WRITER), told(READER), told(OTHER)]
    ReplicaStatusFile(postgres.data, postgres.engine).write(instances, READER)
    yield postgres.data / FILE
    (postgres.data / FILE).unlink(missing_ok=True)


TOPOLOGY = """
    select server_id, session_id = 'MASTER_SESSION_ID', cpu, coalesce(replica_lag_in_msec, 0),
           server_id = aurora_db_instance_identifier()
    from aurora_replica_status()
    where extract(epoch from now() - last_update_timestamp) <= 300
    order by 1
"""
"""What drivers ask."""
EXPECTED = [
    ("db-1", True, None, 0.0, False),
    ("db-2", False, None, 2.5, True),
    ("db-3", False, None, 0.0, False),
]


def test_the_master_user_in_any_database(postgres: PreparedPostgres, told_rows: Path) -> None:
    with postgres.connect(user=MASTER) as session:
        assert session.execute(TOPOLOGY).fetchall() == EXPECTED
        session.execute("create database plain")
        session.execute("create database bare template template0 encoding 'LATIN1' locale 'C'")
    for database in ("plain", "bare", "template1"):
        with postgres.connect(database, user=MASTER) as session:
            assert session.execute(TOPOLOGY).fetchall() == EXPECTED
            session.execute("set datestyle = 'SQL, DMY'; set timezone = 'Asia/Kathmandu'")
            assert session.execute(TOPOLOGY).fetchall() == EXPECTED


def test_any_role_may_ask(postgres: PreparedPostgres, told_rows: Path) -> None:
    with postgres.connect(user=MASTER) as session:
        session.execute("create role somebody login")
    with postgres.connect(user="somebody") as session:
        assert session.execute(TOPOLOGY).fetchall() == EXPECTED


def test_without_a_file_there_are_no_rows(postgres: PreparedPostgres, told_rows: Path) -> None:
    told_rows.unlink()
    with postgres.connect(user=MASTER) as session:
        assert session.execute("select * from aurora_replica_status()").fetchall() == []
        row = session.execute("select pg_catalog.aurora_db_instance_identifier()").fetchone()
        assert row == (NAME,)


def test_reading_follows_the_file(postgres: PreparedPostgres, told_rows: Path) -> None:
    with postgres.connect(user=MASTER) as session:
        ReplicaStatusFile(postgres.data, postgres.engine).write([], READER)
        count = session.execute("select count(*) from aurora_replica_status()").fetchone()
        assert count == (1,)
        row = session.execute("select * from aurora_replica_status()").fetchone()
        assert row is not None
        assert row[:5] == (NAME, "00000000-0000-0000-0000-000000000002", 8000, 8500, 8000)


def test_no_schema_of_a_caller_changes_what_it_means(
    postgres: PreparedPostgres, told_rows: Path
) -> None:
    with postgres.connect(user=MASTER) as session:
        session.execute("create schema trap")
        for name, arguments in (("pg_read_file", "text, boolean"), ("current_setting", "text")):
            session.execute(
                f"create function trap.{name}({arguments}) returns text language sql"
                " as $$ select '[]' $$".encode()
            )
        session.execute(
            "create function trap.json_to_recordset(json) returns setof record language sql"
            " as $$ select 'trapped' $$"
        )
        session.execute("set search_path = trap, pg_catalog")
        rows = session.execute(
            "select server_id, aurora_db_instance_identifier() from aurora_replica_status()"
        )
        assert rows.fetchall() == [("db-1", NAME), ("db-2", NAME), ("db-3", NAME)]


@pytest.mark.parametrize(
    "statement",
    [
        "select pg_read_file('boreal/replica_status.json')",
        "select pg_read_file('pg_hba.conf', true)",
        "drop function pg_catalog.aurora_replica_status()",
        "drop function pg_catalog.aurora_db_instance_identifier()",
        "alter function pg_catalog.aurora_replica_status() owner to boreal",
        "alter function pg_catalog.aurora_replica_status() set search_path = public",
        "create function pg_catalog.aurora_status() returns int language sql return 1",
    ],
)
def test_the_master_user_can_neither_change_them_nor_read_files(
    postgres: PreparedPostgres, statement: str
) -> None:
    with (
        postgres.connect(user=MASTER) as session,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        session.execute(statement.encode())


def test_the_name_can_be_a_columns_default(postgres: PreparedPostgres) -> None:
    with postgres.connect(user=MASTER) as session:
        session.execute(
            "create table acks (n int, by text default aurora_db_instance_identifier())"
        )
        row = session.execute("insert into acks values (1) returning by").fetchone()
        assert row == (NAME,)


def test_a_dump_of_the_users_databases_has_none_of_it(postgres: PreparedPostgres) -> None:
    dumped = postgres.engine.run(
        "pg_dump", f"--host={postgres.socket_directory}", "--port=5432", f"--username={ADMIN}",
        "--schema-only", "template1",
    )  # fmt: skip
    assert "aurora" not in dumped
