"""Goal: instances come, go and restart by the command, and each time it returns when that is done.

Method: one cluster of real processes; what the command says is believed at once, without waiting.
"""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.cluster.local import LocalCluster, RecordingClient, check_ledgers, local_cluster, until

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A cluster with one reader."""
    with local_cluster("--readers=1") as running:
        running.query("create table ledger (client text, n int, primary key (client, n))")
        yield running


def number(cluster: LocalCluster, dsn: str, statement: str) -> int:
    """One number, by a connection that nobody helps to come about."""
    with cluster.connect(dsn) as connection:
        row = connection.execute(statement.encode()).fetchone()
    assert row is not None
    return int(row[0])


def roles(cluster: LocalCluster) -> dict[str, str]:
    return {row["name"]: row["role"] for row in cluster.status()["compute"]}


def test_up_brings_up_readers_and_the_endpoints_lead_to_them(cluster: LocalCluster) -> None:
    writer = cluster.writer_name()
    (reader,) = cluster.reader_names()
    status = cluster.status()
    assert status["writer"] == writer
    assert status["endpoints"]["writer"]["instances"] == [writer]
    assert status["endpoints"]["reader"]["instances"] == [reader]
    in_recovery = "select pg_is_in_recovery()::int"
    assert number(cluster, cluster.dsn, in_recovery) == 0
    assert number(cluster, cluster.reader_dsn, in_recovery) == 1
    assert number(cluster, cluster.dsn_of(reader), in_recovery) == 1
    (row,) = [row for row in status["compute"] if row["name"] == reader]
    assert row["lag_bytes"] is not None
    assert "everything runs already" in cluster.boreal("up", "--readers=1")


def test_a_reader_is_added_and_removed(cluster: LocalCluster) -> None:
    dsn = cluster.boreal("add-reader", "--tier=3").splitlines()[-1]
    added = cluster.instances[-1]
    assert dsn == cluster.dsn_of(added)
    assert number(cluster, dsn, "select pg_is_in_recovery()::int") == 1
    assert {row["name"]: row["tier"] for row in cluster.status()["compute"]}[added] == 3
    cluster.boreal("remove-reader", added)
    assert added not in cluster.instances
    assert not (cluster.directory / added).exists()
    with pytest.raises(psycopg.OperationalError):
        cluster.connect(dsn)
    kinds = [event["kind"] for event in cluster.events() if event["instance"] == added]
    assert kinds[0] == "instance_added"
    assert kinds[-1] == "instance_removed"


def test_the_writer_is_not_removed(cluster: LocalCluster) -> None:
    output = cluster.boreal("remove-reader", cluster.writer_name(), check=False)
    assert "boreal failover" in output


def test_a_restarted_reader_takes_clients(cluster: LocalCluster) -> None:
    (reader,) = cluster.reader_names()
    cluster.boreal("restart", reader)
    assert number(cluster, cluster.dsn_of(reader), "select 1") == 1
    assert cluster.reader_names() == [reader]


def test_a_restarted_writer_is_a_reader_and_there_is_a_writer(cluster: LocalCluster) -> None:
    former = cluster.writer_name()
    with RecordingClient(cluster, "restart") as client:
        client.progress(20)
        cluster.boreal("restart", former)
        with cluster.connect() as connection:
            connection.execute("insert into ledger values ('after', 1)")
        client.progress(20)
    check_ledgers(cluster, client)
    assert cluster.writer_name() != former
    assert number(cluster, cluster.dsn_of(former), "select pg_is_in_recovery()::int") == 1


def test_down_and_up_is_no_failover(cluster: LocalCluster) -> None:
    writer, before = cluster.writer_name(), cluster.events()
    cluster.boreal("down")
    cluster.up()
    assert roles(cluster)[writer] == "writer"
    assert set(roles(cluster).values()) == {"writer", "reader"}
    after = cluster.events()[len(before) :]
    assert not [event for event in after if event["kind"].startswith("failover")], after


def test_endpoints_that_die_take_no_connection_with_them(cluster: LocalCluster) -> None:
    with cluster.connect() as connection, cluster.connect(cluster.reader_dsn) as reader:
        cluster.boreal("kill", "endpoints")
        assert connection.execute("select 1").fetchone() == (1,)
        assert reader.execute("select 1").fetchone() == (1,)
        assert cluster.query("select 2") == [(2,)]
    cluster.boreal("restart", "endpoints")
    assert number(cluster, cluster.reader_dsn, "select 3") == 3


def test_a_planned_failover_by_name(cluster: LocalCluster) -> None:
    former = cluster.writer_name()
    (target,) = cluster.reader_names()
    assert cluster.boreal("failover", "--target", target).startswith(f"{target} is the writer")
    assert number(cluster, cluster.dsn, "select pg_is_in_recovery()::int") == 0
    assert cluster.writer_name() == target
    last = [event for event in cluster.events() if event["kind"].startswith("failover")][-1]
    assert (last["kind"], last["instance"]) == ("failover_completed", target)
    assert last["took_ms"] > 0
    until(lambda: roles(cluster)[former] == "reader", 60, "the former writer to read")
