"""Waiting until a cluster's instances have found their roles, and readers what was written."""

from __future__ import annotations

from typing import Any

from bench.control import Control, is_reader, serving_writer
from boreal.rpc import control_pb2
from tests.cluster.local import LocalCluster, until

_BOUND_S = 60.0


def settled(cluster: LocalCluster) -> control_pb2.ClusterStatus:
    """The cluster's status, once there is a writer and every other instance reads."""
    control = Control(cluster.directory)

    def status() -> control_pb2.ClusterStatus | None:
        found = control.try_status()
        if found is None or serving_writer(found) is None:
            return None
        others = [name for name in cluster.instances if name != found.writer]
        return found if all(is_reader(found, name) for name in others) else None

    return until(status, _BOUND_S, "a writer, and all others its readers")


def await_replay(cluster: LocalCluster, *names: str) -> None:
    """Return once the named instances, or all readers, show what is committed by now."""
    ((lsn,),) = cluster.query("select pg_current_wal_flush_lsn()::text")
    question = f"select not pg_is_in_recovery() or pg_last_wal_replay_lsn() >= '{lsn}'"
    for name in names or cluster.reader_names():
        await_answer(cluster, question, [(True,)], cluster.dsn_of(name))


def await_answer(
    cluster: LocalCluster, question: str, expected: list[tuple[Any, ...]], dsn: str
) -> None:
    """Ask until the answer is this."""
    what = f"{expected} to be the answer to {question!r}"
    until(lambda: cluster.query(question, dsn) == expected, _BOUND_S, what)
