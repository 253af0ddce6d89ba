"""Goal: what a user meets first holds: start, stop, what a compute node keeps, who may do what.

Method: one cluster of real processes, the `boreal` command, and SQL as the master user.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import psutil
import psycopg
import pytest

from boreal import cluster as clusters
from boreal.errors import NotNow
from boreal.types import PAGE_BYTES
from tests.cluster.local import LocalCluster, RecordingClient, check_ledgers

pytestmark = pytest.mark.timeout(240)


def stored_bytes(directory: Path) -> int:
    """What the files below `directory` take on disk; holes take nothing."""
    return sum(file.stat().st_blocks * 512 for file in directory.rglob("*") if file.is_file())


def relation_bytes(cluster: LocalCluster) -> int:
    return stored_bytes(cluster.directory / "db-1" / "pgdata" / "base")


def test_up_is_idempotent_and_status_is_for_programs_too(cluster: LocalCluster) -> None:
    assert "everything runs already" in cluster.boreal("up", f"--port={cluster.port}")
    status = cluster.status()
    assert (status["writer"], status["volume"]["ready"]) == ("db-1", True)
    assert sorted({node["zone"] for node in status["storage"]}) == ["a", "b", "c"]


def test_a_taken_port_is_a_clear_error(cluster: LocalCluster) -> None:
    other = LocalCluster(cluster.directory / "other")
    output = other.boreal("up", f"--port={cluster.port}", check=False)
    assert f"port {cluster.port}" in output
    assert "--port" in output


def test_a_compute_node_starts_without_the_data(cluster: LocalCluster) -> None:
    """A start brings the same few bytes however large the database is."""
    cluster.boreal("restart", "db-1")
    empty = relation_bytes(cluster)
    with cluster.connect() as connection:
        connection.execute("create table big (id int, filler text)")
        with (
            connection.cursor() as cursor,
            cursor.copy("copy big from stdin") as copy,
        ):
            for number in range(60_000):
                copy.write_row((number, "x" * 1000))
    size = cluster.query("select pg_relation_size('big')")[0][0]
    assert size > 60_000_000
    assert relation_bytes(cluster) > size // 2
    cluster.boreal("restart", "db-1")
    assert relation_bytes(cluster) < empty + 64 * PAGE_BYTES
    # PostgreSQL extends a table in bulk and logs no page that is still empty.
    assert 0 <= size - cluster.query("select pg_relation_size('big')")[0][0] <= 64 * PAGE_BYTES
    assert cluster.query("select count(*), sum(id) from big where id % 1000 = 7") == [
        (60, sum(range(7, 60_000, 1000)))
    ]


def test_schema_work_survives_a_new_compute_node(cluster: LocalCluster) -> None:
    for statement in (
        "create table heap (id int primary key, body text, tags int[])",
        """insert into heap select i, repeat(md5(i::text), 100), array[i, i % 7]
           from generate_series(1, 500) i""",
        "create index on heap using gin (tags)",
        "create index on heap using brin (id)",
        "create unlogged table fleeting (id int primary key)",
        "insert into fleeting select generate_series(1, 100)",
        "create sequence numbers",
        "select nextval('numbers')",
        "create table cut as select generate_series(1, 3000) as id",
        "truncate cut",
        "insert into cut values (1)",
        "create table parted (k int, v int) partition by hash (k)",
        "create table parted_0 partition of parted for values with (modulus 2, remainder 0)",
        "create table parted_1 partition of parted for values with (modulus 2, remainder 1)",
        "insert into parted select i, i from generate_series(1, 300) i",
        "create database copied_by_log template template1 strategy wal_log",
        "create database copied_by_file template template1 strategy file_copy",
        "create database dropped",
        "drop database dropped",
        "vacuum full heap",
        "delete from heap where id > 400",
        "vacuum heap",
    ):
        cluster.query(statement)
    facts = (
        "select count(*), sum(length(body)), sum(id) from heap",
        "select count(*) from heap where tags @> array[3]",
        "select sum(id) from cut",
        "select count(*), sum(v) from parted",
        "select datname from pg_database order by 1",
    )
    before = [cluster.query(fact) for fact in facts]
    cluster.boreal("kill", "db-1")
    assert [cluster.query(fact) for fact in facts] == before
    assert cluster.query("select count(*) from fleeting") == [(0,)]
    assert 2 <= cluster.query("select nextval('numbers')")[0][0] <= 1 + 33
    assert " 0  pages differ" in cluster.boreal("verify")


def test_many_subtransactions_at_bundle_time(cluster: LocalCluster) -> None:
    """Found in review: a standby cannot be read while a snapshot with lost subtransactions is all
    it knows, and after a crash that is all it will ever know."""
    cluster.query("create table nested (id int)")
    with cluster.connect() as connection, connection.transaction():
        for number in range(100):
            with connection.transaction():
                connection.execute("insert into nested values (%s)", (number,))
        with pytest.raises(NotNow):
            cluster.take_bundle()
        cluster.boreal("kill", "db-1")
        with pytest.raises(psycopg.OperationalError):
            connection.execute("select 1")
        cluster.query("select 1")
        connection.close()
    assert cluster.query("select count(*) from nested") == [(0,)]


def test_the_master_user_is_no_superuser(cluster: LocalCluster) -> None:
    with cluster.connect() as connection:
        row = connection.execute("select rolsuper from pg_roles where rolname = current_user")
        assert row.fetchone() == (False,)
        for forbidden in (
            "alter system set fsync = off",
            "create tablespace elsewhere location '/tmp'",
            "set wal_consistency_checking = ''",
            "set role boreal_admin",
            "alter role boreal superuser",
            "copy (select 1) to program 'true'",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(forbidden.encode())


def test_the_internal_role_has_no_door(cluster: LocalCluster) -> None:
    dsn = cluster.dsn.replace("://boreal:", "://boreal_admin:")
    with pytest.raises(psycopg.OperationalError, match=r"reject|authentication"):
        psycopg.connect(dsn, connect_timeout=5)


def test_postgres_runs_unprivileged_and_secrets_are_closed(cluster: LocalCluster) -> None:
    pid_file = cluster.directory / "db-1" / "pgdata" / "postmaster.pid"
    postmaster = psutil.Process(int(pid_file.read_text().split()[0]))
    assert postmaster.uids().effective != 0
    for name in ("cluster.json", "master-password"):
        assert (cluster.directory / name).stat().st_mode & 0o077 == 0


def test_a_storage_nodes_log_is_postgres_wal(cluster: LocalCluster) -> None:
    volume = cluster.directory / "sn-1" / "volumes" / cluster.status()["volume"]["id"]
    newest = max((volume / "log").glob("0*[0-9A-F]"), key=lambda path: path.name[8:])
    done = subprocess.run(
        [str(cluster.engine.tool("pg_waldump")), "--limit=5", str(newest)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "rmgr:" in done.stdout, done.stderr


def test_down_leaves_nothing_and_up_goes_on(cluster: LocalCluster) -> None:
    with RecordingClient(cluster, "down") as client:
        client.progress(30)
    before = {process.pid for process in _processes_of(cluster)}
    assert len(before) >= len(clusters.ZONES) + 2
    cluster.boreal("down")
    assert _processes_of(cluster) == []
    cluster.boreal("down")
    cluster.up()
    check_ledgers(cluster, client)


def _processes_of(cluster: LocalCluster) -> list[psutil.Process]:
    mine = []
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or []
        if any(str(cluster.directory) in argument for argument in arguments):
            mine.append(process)
    return mine


def test_status_without_a_control_plane(cluster: LocalCluster) -> None:
    cluster.boreal("kill", "control")
    assert cluster.query("select 1") == [(1,)]
    printed = json.loads(cluster.boreal("status", "--json"))
    assert printed["control"]["answers"] is False
    cluster.boreal("restart", "control")
    assert cluster.status()["writer"] == "db-1"
