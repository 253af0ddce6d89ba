"""Goal: what a client was told is committed stays committed, whatever dies.

Method: clients that write down every acknowledged row, on a real cluster; processes are killed with
SIGKILL in mid-write; afterwards every acknowledged row must be there, once, and no other than those
somebody sent. See local.RecordingClient.
"""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import pytest

from boreal.rpc import storage_pb2
from boreal.types import parse_lsn
from tests.cluster.local import NODES, LocalCluster, RecordingClient, check_ledgers, until

pytestmark = pytest.mark.timeout(240)


def scls(cluster: LocalCluster) -> dict[str, str]:
    return {node["name"]: node["scl"] for node in cluster.status()["storage"]}


def all_caught_up(cluster: LocalCluster) -> bool:
    nodes = cluster.status()["storage"]
    return all(node["alive"] and node["lag_bytes"] == 0 for node in nodes)


def test_a_lost_zone_goes_unnoticed_and_a_third_node_only_delays(cluster: LocalCluster) -> None:
    with cluster.pgbench("-i", "-q", "-s", "1") as initializing:
        output = initializing.communicate(timeout=120)[0]
        assert initializing.returncode == 0, output
    with (
        cluster.pgbench("-n", "-c", "4", "-T", "10") as load,
        RecordingClient(cluster, "zone") as client,
    ):
        client.progress(20)
        cluster.boreal("kill", "sn-1")
        cluster.boreal("kill", "sn-2")
        client.progress(50)
        assert client.errors == []

        cluster.boreal("kill", "sn-3")
        acknowledged = len(client.ledger.acknowledged)
        # A commit under way when the third node fell may still have had its four; no other has.
        with cluster.connect(options="-c statement_timeout=2000") as connection:
            assert connection.execute("select count(*) from pgbench_branches").fetchone() == (1,)
        assert len(client.ledger.acknowledged) <= acknowledged + 1
        cluster.boreal("restart", "sn-3")
        client.progress(20, timeout_s=10)
        assert client.errors == []
        client.stop()
        output = load.communicate(timeout=120)[0]
    assert load.returncode == 0, output
    assert re.search(r"number of failed transactions: 0 ", output), output

    cluster.boreal("restart", "sn-1")
    cluster.boreal("restart", "sn-2")
    until(lambda: all_caught_up(cluster), 60, "the nodes that were away to catch up")
    check_ledgers(cluster, client)


@pytest.mark.parametrize("nodes_down", [(), ("sn-2", "sn-5")], ids=["whole", "two-nodes-down"])
def test_the_compute_node_holds_nothing_that_matters(
    cluster: LocalCluster, nodes_down: tuple[str, ...]
) -> None:
    epoch = cluster.status()["volume"]["epoch"]
    with RecordingClient(cluster, f"compute-{len(nodes_down)}") as client:
        client.progress(100)
        for node in nodes_down:
            cluster.boreal("kill", node)
        cluster.boreal("kill", "db-1")  # the agent and its PostgreSQL
        shutil.rmtree(cluster.directory / "db-1" / "pgdata", ignore_errors=True)
        client.progress(100)
    assert client.errors, "the client never noticed; was anything killed?"
    check_ledgers(cluster, client)
    assert cluster.status()["volume"]["epoch"] > epoch
    for node in nodes_down:
        cluster.boreal("restart", node)
    until(lambda: all_caught_up(cluster), 60, "the nodes that were away to catch up")


def test_postgres_alone_dies(cluster: LocalCluster) -> None:
    with RecordingClient(cluster, "postgres") as client:
        client.progress(50)
        pid_file = cluster.directory / "db-1" / "pgdata" / "postmaster.pid"
        postmaster = int(pid_file.read_text().split()[0])
        cluster.kill_pid(postmaster, "postgres")
        client.progress(50)
    check_ledgers(cluster, client)


def test_everything_dies_at_once(cluster: LocalCluster) -> None:
    with RecordingClient(cluster, "everything") as client:
        client.progress(100)
        # The control plane first: it would start the compute node again.
        for name in ("control", *NODES, "db-1"):
            cluster.boreal("kill", name)
        client.stop()
    cluster.up()
    check_ledgers(cluster, client)
    until(lambda: all_caught_up(cluster), 60, "the nodes to agree")


def test_commits_wait_for_a_quorum_and_reads_go_on(cluster: LocalCluster) -> None:
    with (
        ThreadPoolExecutor() as threads,
        cluster.connect() as reader,
        cluster.connect() as writer,
    ):
        before = reader.execute("select count(*) from ledger").fetchone()
        for node in ("sn-4", "sn-5", "sn-6"):
            cluster.boreal("pause", node)
        commit = threads.submit(writer.execute, "insert into ledger values ('waiting', 1)")
        with pytest.raises(TimeoutError):
            commit.result(timeout=2)
        assert reader.execute("select count(*) from ledger").fetchone() == before
        cluster.boreal("resume", "sn-4")
        commit.result(timeout=10)
        for node in ("sn-5", "sn-6"):
            cluster.boreal("resume", node)
        until(lambda: all_caught_up(cluster), 30, "the paused nodes to catch up")


def test_verify_finds_nothing(cluster: LocalCluster) -> None:
    assert " 0  pages differ" in cluster.boreal("verify")


def test_a_bundle_waits_for_the_log_it_stands_on(cluster: LocalCluster) -> None:
    """Found by restarting the compute node in the middle of a large load: a bundle had been stored
    whose log no quorum had, and nothing could be restored from it."""
    before = cluster.status()
    with ThreadPoolExecutor() as threads, cluster.connect() as writer:
        for node in ("sn-1", "sn-3", "sn-5"):
            cluster.boreal("pause", node)
        commit = threads.submit(writer.execute, "insert into ledger values ('bundle', 1)")
        with pytest.raises(TimeoutError):
            commit.result(timeout=1)
        bundle = threads.submit(cluster.take_bundle)
        with pytest.raises(TimeoutError):
            bundle.result(timeout=2)
        for node in ("sn-1", "sn-3", "sn-5"):
            cluster.boreal("resume", node)
        commit.result(timeout=10)
        end = bundle.result(timeout=10)
    assert parse_lsn(before["volume"]["vdl"]) < end <= parse_lsn(cluster.status()["volume"]["vdl"])


def spoil_newest_bundle(cluster: LocalCluster) -> None:
    """Take the control file out of it, on every node: it is whole, and nothing starts from it."""
    for directory in cluster.directory.glob("sn-*/volumes/vol-*/bundles/manifests"):
        newest = max(directory.iterdir(), default=None)
        if newest is None:
            continue  # of a volume whose creation was tried again
        bundle = storage_pb2.BundleManifest.FromString(newest.read_bytes()[4:])
        files = [file for file in bundle.files if file.path != "global/pg_control"]
        assert len(files) == len(bundle.files) - 1
        del bundle.files[:]
        bundle.files.extend(files)
        body = bundle.SerializeToString(deterministic=True)
        newest.write_bytes(google_crc32c.value(body).to_bytes(4, "big") + body)


def test_a_bundle_that_nothing_starts_from_is_not_the_end(cluster: LocalCluster) -> None:
    cluster.query("create table kept (n int)")
    for number in range(3):
        cluster.query(f"insert into kept values ({number})")
        cluster.take_bundle()
    cluster.query("insert into kept values (3)")
    spoil_newest_bundle(cluster)
    cluster.boreal("kill", "db-1")
    assert cluster.query("select sum(n) from kept") == [(6,)]
