"""Goal: storage keeps the log that somebody may still need, and no more, whoever dies meanwhile.

Method: a cluster told to keep little, log written by the megabyte, bundles taken, and `boreal
status` read for where each node's log begins.
"""

from __future__ import annotations

import pytest

from boreal.types import WAL_SEGMENT_BYTES, parse_lsn
from tests.cluster.local import (
    NODES,
    LocalCluster,
    RecordingClient,
    check_ledgers,
    local_cluster,
    until,
)


def write_log(cluster: LocalCluster, size_mib: int) -> None:
    """Log that changes no page, and a commit behind it."""
    with cluster.connect() as connection:
        for _ in range(size_mib):
            connection.execute(
                "select pg_logical_emit_message(false, 'fill', repeat('x', 1048576))"
            )
        connection.execute("insert into filled values (1)")


def go_on(cluster: LocalCluster, bundles: int) -> None:
    """So many bundles, a WAL segment's worth of log before each."""
    for _ in range(bundles):
        write_log(cluster, 16)
        cluster.take_bundle()


def starts(cluster: LocalCluster) -> dict[str, int]:
    """Where the log of each node that reported begins."""
    nodes = cluster.status()["storage"]
    return {node["name"]: parse_lsn(node["log_start"]) for node in nodes if node["log_start"]}


def moved_past(cluster: LocalCluster, lsn: int) -> dict[str, int]:
    def moved() -> dict[str, int] | None:
        now = starts(cluster)
        return now if len(now) == len(NODES) and min(now.values()) > lsn else None

    return until(moved, 60, "every node to drop log")


def scl(cluster: LocalCluster, name: str) -> int:
    (node,) = [node for node in cluster.status()["storage"] if node["name"] == name]
    return parse_lsn(node["scl"])


@pytest.mark.long
@pytest.mark.timeout(300)
def test_log_is_dropped_once_nobody_needs_it_and_not_before() -> None:
    with local_cluster("--retain-log-mib=16") as cluster:
        cluster.query("create table ledger (client text, n int)")
        cluster.query("create table filled (n int)")
        with RecordingClient(cluster, "one") as client:
            began = max(starts(cluster).values())
            go_on(cluster, 6)
            dropped = moved_past(cluster, began)

            # A compute node of its own, made from what is left; and a storage node that was killed.
            cluster.boreal("kill", "db-1")
            cluster.boreal("kill", "sn-2")
            cluster.boreal("restart", "sn-2")
            client.progress(20)
            assert all(start >= dropped[name] for name, start in starts(cluster).items())

            # One that is away holds the log on all others, and finds there what it lacks.
            cluster.boreal("kill", "sn-4")
            held = scl(cluster, "sn-4")
            go_on(cluster, 6)
            client.progress(20)
            assert max(starts(cluster).values()) <= held
            kept = [node["log_kept_bytes"] for node in cluster.status()["storage"]]
            assert max(kept) >= 6 * WAL_SEGMENT_BYTES
            cluster.boreal("restart", "sn-4")
            until(lambda: scl(cluster, "sn-4") > held + 6 * WAL_SEGMENT_BYTES, 60, "sn-4 to return")
            go_on(cluster, 4)
            moved_past(cluster, held)

            cluster.boreal("kill", "db-1")
            client.progress(20)
        check_ledgers(cluster, client)
        for node in cluster.status()["storage"]:
            assert node["failure"] is None
