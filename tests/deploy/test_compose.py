"""Goal: a cluster in containers keeps what it acknowledged, whatever is killed or cut off.

Method: `make compose-up` builds the image and starts the cluster; clients that write down every
acknowledged commit go on through the writer endpoint all the while (bench.ledger); containers are
killed by `docker kill`, partitioned by `docker network disconnect`, and looked at by `boreal
--control`, from outside. At the end every acknowledged commit must be there, and the order of the
acknowledgements must be that of the log. Afterwards nothing is left.

The tests go on where the one before left the cluster: whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import psycopg
import pytest

from bench.ledger import SCHEMA, LedgerClient, lost, out_of_order, shared_timelines
from tests.cluster.local import BOREAL, until
from tests.deploy.composed import ComposedCluster, composed_cluster
from tests.deploy.docker_engine import docker, engine, need_base_image, run

pytestmark = [pytest.mark.containers, pytest.mark.timeout(300)]

NODES = tuple(f"sn-{number}" for number in range(1, 7))
INSTANCES = ("db-1", "db-2", "db-3")
_CLIENTS = 2
_PATIENCE_S = 8.0
_AWAY_S = 60.0


@dataclass(frozen=True)
class Running:
    """The cluster, and who writes to it all the while."""

    cluster: ComposedCluster
    clients: tuple[LedgerClient, ...]

    def progress(self) -> None:
        """Every client gets a commit acknowledged that it had not asked for before."""
        for client in self.clients:
            count = len(client.acks)
            until(lambda: len(client.acks) > count + 1, _AWAY_S, "a commit")  # noqa: B023


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with ExitStack() as stack:
        stack.enter_context(engine())
        need_base_image()
        cluster = stack.enter_context(composed_cluster())
        cluster.query(SCHEMA)
        clients = tuple(
            LedgerClient(cluster.dsn, number, patience_s=_PATIENCE_S, pause_s=0.01)
            for number in range(_CLIENTS)
        )
        for client in clients:
            stack.enter_context(client)
        yield Running(cluster, clients)


def whole(cluster: ComposedCluster) -> None:
    """Wait until all nodes have all of the log, and there are a writer and two readers.

    One that was cut off says for a moment still that it is the writer.
    """

    def is_whole() -> bool:
        found = cluster.status()
        near = all(row["alive"] and row["lag_bytes"] < 65536 for row in found["storage"])
        serving = [row for row in found["compute"] if row["alive"] and row["takes_clients"]]
        return near and sorted(row["role"] for row in serving) == ["reader", "reader", "writer"]

    until(is_whole, 120, "all nodes to catch up and all instances to serve")


def test_containers_register_by_themselves(running: Running) -> None:
    found = running.cluster.status()
    assert found["data_dir"] is None
    assert {(row["name"], row["zone"]) for row in found["storage"]} == set(
        zip(NODES, "aabbcc", strict=True)
    )
    assert {row["name"] for row in found["compute"]} == set(INSTANCES)
    assert f"writer {running.cluster.writer()}" in running.cluster.boreal("status")
    kinds = {line.split()[2] for line in running.cluster.boreal("events").splitlines()}
    assert "volume" in kinds


def test_what_is_to_last_is_on_volumes_and_nothing_else(running: Running) -> None:
    def mounts(name: str) -> dict[str, str]:
        return {
            mount["Destination"]: mount["Type"] for mount in running.cluster.inspect(name)["Mounts"]
        }

    for name in (*NODES, "control"):
        assert mounts(name)["/var/lib/boreal/data"] == "volume"
    for name in INSTANCES:
        assert "/var/lib/boreal/data" not in mounts(name)


def test_nothing_runs_as_root(running: Running) -> None:
    for name in ("control", "endpoints", NODES[0], INSTANCES[0]):
        _, *rows = docker("top", running.cluster.prefix + name, "-o", "pid,uid").splitlines()
        assert {row.split()[1] for row in rows} == {"10001"}


def test_clients_may_insist_on_tls(running: Running) -> None:
    authority = running.cluster.secrets / "tls" / "ca.crt"
    for dsn in (running.cluster.dsn, running.cluster.reader_dsn):
        with psycopg.connect(dsn, sslmode="verify-full", sslrootcert=str(authority)) as session:
            assert session.pgconn.ssl_in_use
            assert session.execute("select 1").fetchone() == (1,)


def test_a_stranger_is_refused(running: Running) -> None:
    """On a port that is open to this machine, without a certificate."""
    done = run(
        [BOREAL, "--insecure", "--control", running.cluster.control, "status"],
        timeout_s=60,
        check=False,
    )
    assert "no control plane answers" in done


def test_connections_are_handed_over(running: Running) -> None:
    """PostgreSQL knows the client's address, not the endpoints'."""
    ((address, port),) = running.cluster.query(
        "select host(inet_client_addr()), inet_server_port() from pg_stat_activity limit 1"
    )
    endpoints = running.cluster.inspect("endpoints")["NetworkSettings"]["Networks"].values()
    assert address in {network["Gateway"] for network in endpoints}
    assert port == 5432


def test_a_storage_zone_dies_unnoticed(running: Running) -> None:
    cluster = running.cluster
    with cluster.pgbench("-i", "-q", "-s", "1") as initializing:
        output = initializing.communicate(timeout=120)[0]
    assert initializing.returncode == 0, output
    failures = [sum(client.failures.values()) for client in running.clients]
    with cluster.pgbench("-n", "-c", "4", "-T", "12") as load:
        running.progress()
        cluster.kill("sn-3", "sn-4")
        running.progress()
        until(lambda: not cluster.node("sn-3")["alive"], 30, "it to be noticed")
        running.progress()
        output = load.communicate(timeout=120)[0]
    assert load.returncode == 0, output
    assert "number of failed transactions: 0 " in output
    assert [sum(client.failures.values()) for client in running.clients] == failures
    cluster.start("sn-3", "sn-4")
    whole(cluster)


def test_the_writer_dies_and_a_reader_takes_over(running: Running) -> None:
    cluster = running.cluster
    former = cluster.writer()
    cluster.kill(former)
    running.progress()
    assert cluster.writer() != former
    cluster.start(former)
    whole(cluster)
    assert cluster.instance(former)["role"] == "reader"


def test_an_instance_that_crashes_comes_back(running: Running) -> None:
    """It is restarted by Docker, as bare processes are by the control plane."""
    cluster = running.cluster
    crashed = next(name for name in INSTANCES if name != cluster.writer())
    docker("exec", cluster.prefix + crashed, "sh", "-c", "kill -9 -1", check=False)
    until(lambda: cluster.inspect(crashed)["RestartCount"] == 1, 60, "Docker to restart it")
    whole(cluster)


def test_all_goes_on_without_the_control_plane(running: Running) -> None:
    cluster = running.cluster
    writer = cluster.writer()
    cluster.kill("control")
    running.progress()
    assert cluster.query("select 1") == [(1,)]
    assert cluster.query("select pg_is_in_recovery()", cluster.reader_dsn) == [(True,)]
    cluster.start("control")
    cluster.boreal("wait", "--readers=2")
    assert cluster.writer() == writer
    whole(cluster)


def test_a_storage_node_that_is_cut_off_catches_up(running: Running) -> None:
    cluster = running.cluster
    cluster.disconnect("sn-1", "a")
    until(lambda: not cluster.node("sn-1")["alive"], 30, "it to be noticed")
    behind = cluster.node("sn-1")["scl"]
    running.progress()
    assert cluster.node("sn-1")["scl"] == behind
    assert cluster.inspect("sn-1")["State"]["Running"]
    cluster.connect_again("sn-1", "a")
    whole(cluster)
    links = cluster.instance(cluster.writer())["links"]
    assert {link["state"] for link in links if link["node"] == "sn-1"} == {"streaming"}


def test_a_writer_that_is_cut_off_is_replaced_and_comes_back_as_a_reader(running: Running) -> None:
    """The endpoints still reach it, by the directory they share: nobody may be served by it."""
    cluster = running.cluster
    former = cluster.writer()
    with psycopg.connect(cluster.dsn, autocommit=True) as session:
        assert session.execute("select aurora_db_instance_identifier()").fetchone() == (former,)
        cluster.disconnect(former, "a", "b", "c")
        running.progress()
        assert cluster.writer() != former
        with pytest.raises(psycopg.OperationalError):
            session.execute("select 1")
    cluster.connect_again(former, "a", "b", "c")
    whole(cluster)
    assert cluster.instance(former)["role"] == "reader"


def test_the_role_is_moved_from_outside(running: Running) -> None:
    cluster = running.cluster
    target = next(name for name in INSTANCES if name != cluster.writer())
    assert target in cluster.boreal("failover", f"--target={target}", timeout_s=120)
    running.progress()
    assert cluster.writer() == target


def test_every_acknowledged_commit_is_there(running: Running) -> None:
    for client in running.clients:
        client.stop()
    acks = [ack for client in running.clients for ack in client.acks]
    rows = running.cluster.query("select client, number from ledger")
    present = {(int(client), int(number)) for client, number in rows}
    assert len(acks) > 100
    assert lost(acks, present) == []
    assert out_of_order(acks) == []
    assert shared_timelines(acks) == {}
    sent = {(ack.client, ack.number) for ack in acks}
    unknown = {
        (at, number) for at, client in enumerate(running.clients) for number in client.unknown
    }
    assert present <= sent | unknown
    print(f"{len(acks)} commits acknowledged, all there; {len(unknown)} of unknown outcome")
