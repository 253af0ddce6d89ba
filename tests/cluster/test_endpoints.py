"""Goal: two addresses that never change lead to whoever has the role, and cost nothing on the way.

Method: one cluster with two readers; clients that know only the endpoints' ports, while instances
and the endpoints' own process come and go.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from bench.faults import Kind, inject, postmaster
from boreal import process_tree
from boreal.processes import LocalProcesses
from tests.cluster.local import LocalCluster, RecordingClient, check_ledgers, local_cluster, until
from tests.cluster.roles import await_answer, settled

pytestmark = pytest.mark.timeout(240)

_WHO = "select aurora_db_instance_identifier()"
_BOUND_S = 60.0
_HELD_CLIENTS = 8


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster("--readers=2") as running:
        running.query("create table ledger (client text, n int, primary key (client, n))")
        settled(running)
        yield running


def who(dsn: str, connect_timeout_s: int = 10) -> str:
    """The instance that a new connection leads to. Fails where the connection does."""
    with psycopg.connect(dsn, autocommit=True, connect_timeout=connect_timeout_s) as session:
        row = session.execute(_WHO).fetchone()
    assert row is not None
    return str(row[0])


def test_each_leads_to_its_role(cluster: LocalCluster) -> None:
    writer = settled(cluster).writer
    assert {who(cluster.dsn) for _ in range(6)} == {writer}
    assert sorted(who(cluster.reader_dsn) for _ in range(6)) == sorted(3 * cluster.reader_names())


def test_the_command_knows_them(cluster: LocalCluster) -> None:
    assert cluster.boreal("dsn").strip() == cluster.dsn
    assert cluster.boreal("dsn", "--reader").strip() == cluster.reader_dsn
    endpoints = cluster.status()["endpoints"]
    assert endpoints["writer"]["instances"] == [cluster.writer_name()]
    assert sorted(endpoints["reader"]["instances"]) == sorted(cluster.reader_names())


def test_nobody_is_in_between(cluster: LocalCluster) -> None:
    """PostgreSQL has the client's own connection, and goes on with it when the endpoints die."""
    question = "select host(client_addr), client_port from pg_stat_activity where pid = %s"
    for dsn in (cluster.dsn, cluster.reader_dsn):
        with cluster.connect(dsn) as session:
            with socket.socket(fileno=socket.dup(session.fileno())) as client:
                expected = client.getsockname()
            pid = session.info.backend_pid
            assert session.execute(question, (pid,)).fetchone() == expected
    with cluster.connect() as session:
        former = LocalProcesses(cluster.directory).kill("endpoints")
        assert session.execute("select 1").fetchone() == (1,)
        until(lambda: _answers(cluster), _BOUND_S, "the endpoints to come back")
        assert LocalProcesses(cluster.directory).status("endpoints").pid != former
        assert session.execute("select 1").fetchone() == (1,)
    assert who(cluster.dsn) == cluster.writer_name()


def _answers(cluster: LocalCluster) -> bool:
    try:
        return bool(who(cluster.dsn) and who(cluster.reader_dsn))
    except psycopg.OperationalError:
        return False


def test_they_ask_for_the_password(cluster: LocalCluster) -> None:
    for dsn in (cluster.dsn, cluster.reader_dsn):
        password = cluster.config.master_password
        for wrong in (dsn.replace(password, "guess"), dsn.replace("//boreal:", "//boreal_admin:")):
            with pytest.raises(psycopg.OperationalError, match=r"reject|authentication"):
                psycopg.connect(wrong, connect_timeout=10)


@pytest.mark.parametrize("role", ["writer", "reader"])
def test_a_statement_is_cancelled_through_them(cluster: LocalCluster, role: str) -> None:
    dsn = cluster.dsn if role == "writer" else cluster.reader_dsn
    with cluster.connect(dsn) as session, ThreadPoolExecutor() as threads:
        ((name,),) = session.execute(_WHO).fetchall()
        asked = threads.submit(session.execute, "select pg_sleep(600)")
        sleeping = (
            "select count(*) from pg_stat_activity where wait_event = 'PgSleep'"
            f" and pid = {session.info.backend_pid}"
        )
        await_answer(cluster, sleeping, [(1,)], cluster.dsn_of(name))
        session.cancel()
        with pytest.raises(psycopg.errors.QueryCanceled):
            asked.result(timeout=_BOUND_S)


def test_connections_wait_for_the_next_writer(cluster: LocalCluster) -> None:
    before = settled(cluster)
    tree = process_tree.tree(postmaster(cluster.directory, before.writer))
    with ThreadPoolExecutor(_HELD_CLIENTS) as threads:
        inject(Kind.POSTGRES_KILLED, cluster.directory, before.writer)
        until(lambda: not process_tree.exists(tree[0]), _BOUND_S, "the writer to be gone")
        held = [threads.submit(who, cluster.dsn, 60) for _ in range(_HELD_CLIENTS)]
        answers = {each.result(timeout=_BOUND_S) for each in held}
    after = settled(cluster)
    assert answers == {after.writer}
    assert after.writer != before.writer


def test_readers_are_left_out_while_they_are_away(cluster: LocalCluster) -> None:
    """With one frozen the other serves; with both, the writer."""
    writer = settled(cluster).writer
    one, other = cluster.reader_names()
    processes = LocalProcesses(cluster.directory)
    with RecordingClient(cluster, "frozen") as client:
        for frozen, led_to in ((one, other), (other, writer)):
            processes.pause(frozen)
            await_readers(cluster, led_to)
        client.progress(10)
        for name in (one, other):
            processes.resume(name)
        await_readers(cluster, one, other)
        client.progress(10)
    assert client.errors == []
    check_ledgers(cluster, client)


def await_readers(cluster: LocalCluster, *names: str) -> None:
    """Wait until the reader endpoint leads to these instances and no other."""

    def leads() -> bool:
        try:
            return {who(cluster.reader_dsn, 2) for _ in range(4)} == set(names)
        except psycopg.OperationalError:
            return False  # a frozen instance that was not yet found to be so

    until(leads, _BOUND_S, f"the reader endpoint to lead to {names}")


def test_they_lead_on_without_a_control_plane(cluster: LocalCluster) -> None:
    before = settled(cluster)
    cluster.boreal("kill", "control")
    assert {who(cluster.dsn) for _ in range(2)} == {before.writer}
    assert {who(cluster.reader_dsn) for _ in range(4)} == set(cluster.reader_names())
    cluster.boreal("restart", "control")
    settled(cluster)


def test_a_move_is_followed(cluster: LocalCluster) -> None:
    before = settled(cluster)
    target = cluster.reader_names()[0]
    with RecordingClient(cluster, "move") as client:
        client.progress(10)
        cluster.boreal("failover", f"--target={target}")
        assert who(cluster.dsn) == target
        client.progress(10)
    check_ledgers(cluster, client)
    settled(cluster)
    await_readers(cluster, *cluster.reader_names())
    assert before.writer in cluster.reader_names()
