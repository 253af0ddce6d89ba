"""Goal: whatever becomes of the writer, another takes over, nothing acknowledged is lost, there is
never a second one, and the old one comes back as a reader by itself.

Method: one cluster of three instances, db-3 of the first tier. Clients commit row after row through
the writer endpoint and note who acknowledged what; watchers look at each instance as long as it
holds itself for the writer (bench/ledger.py has both, and the rules they are judged by). Three
frozen storage nodes stop a failover half-way for as long as is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import psycopg
import pytest

from bench.control import Control
from bench.faults import UNPLANNED, Kind, inject
from bench.ledger import (
    SCHEMA,
    Ack,
    LedgerClient,
    Watcher,
    lost,
    out_of_order,
    shared_timelines,
    stale,
)
from boreal.processes import LocalProcesses
from boreal.rpc import compute_pb2
from tests.cluster.local import LocalCluster, local_cluster, until
from tests.cluster.roles import await_replay, settled

pytestmark = pytest.mark.timeout(240)

_BOUND_S = 60.0
_FIRST_TIER = "db-3"
_NODES = ("sn-1", "sn-3", "sn-5")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster("--readers=1") as running:
        running.boreal("add-reader", "--tier=0")
        running.query(SCHEMA)
        settled(running)
        yield running


class Observed:
    """Clients and watchers at work, and what must hold when they are done."""

    def __init__(self, cluster: LocalCluster, first_client: int) -> None:
        self._cluster = cluster
        self.clients = [
            LedgerClient(cluster.dsn, number, pause_s=0.002)
            for number in (first_client, first_client + 1)
        ]
        self.watchers = [
            Watcher(cluster.dsn_of(name), name, first_client, patience_s=20)
            for name in cluster.instances
        ]

    def progress(self, *, by: str | None = None, other_than: str | None = None) -> None:
        """Wait until every client has another commit acknowledged, by whom it is to be."""

        def meant(ack: Ack) -> bool:
            return by in {None, ack.writer} and ack.writer != other_than

        for client in self.clients:
            assert client.wait_for(meant, _BOUND_S), (
                f"no commit acknowledged by {by or 'anybody'}; {client.last_failure}"
            )

    def check(self) -> None:
        """What was acknowledged is everywhere, in one order, and no writer hid any of it."""
        acks = [ack for client in self.clients for ack in client.acks]
        assert len(acks) > 10
        await_replay(self._cluster)
        for name in self._cluster.instances:
            rows = self._cluster.query(
                "select client, number from ledger", self._cluster.dsn_of(name)
            )
            assert lost(acks, {(client, number) for client, number in rows}) == [], name
        assert out_of_order(acks) == []
        assert shared_timelines(acks) == {}
        assert stale([sight for each in self.watchers for sight in each.sights], acks) == []


@contextmanager
def observed(cluster: LocalCluster) -> Iterator[Observed]:
    """Clients and watchers until the end of the block; then, all being settled, the check."""
    ((first,),) = cluster.query("select coalesce(max(client), 0) + 1 from ledger")
    everybody = Observed(cluster, first)
    with ExitStack() as running:
        for worker in (*everybody.clients, *everybody.watchers):
            running.enter_context(worker)
        everybody.progress()
        yield everybody
        settled(cluster)
        everybody.progress()
    everybody.check()


def failovers_since(cluster: LocalCluster, count: int) -> list[str]:
    """What was told of failovers after the first `count` events."""
    kinds = [event["kind"] for event in cluster.events()[count:]]
    return [kind for kind in kinds if kind.startswith("failover")]


# --- unplanned ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", UNPLANNED)
def test_a_writer_that_fails_is_replaced(cluster: LocalCluster, kind: Kind) -> None:
    before = settled(cluster)
    with observed(cluster) as clients:
        undo = inject(kind, cluster.directory, before.writer)
        clients.progress(other_than=before.writer)
        if undo is not None:
            clients.progress()  # the cluster has gone on for a while
            undo()
        after = settled(cluster)
        assert after.writer != before.writer
        assert after.volume.epoch > before.volume.epoch


def test_the_first_tier_takes_over_and_it_is_told(cluster: LocalCluster) -> None:
    if settled(cluster).writer == _FIRST_TIER:
        cluster.boreal("failover", "--target=db-1")
    before = settled(cluster)
    assert before.writer != _FIRST_TIER
    count = len(cluster.events())
    with observed(cluster) as clients:
        cluster.boreal("kill", before.writer)
        clients.progress(other_than=before.writer)
        assert settled(cluster).writer == _FIRST_TIER
    assert failovers_since(cluster, count) == ["failover_started", "failover_completed"]
    told = [event for event in cluster.events()[count:] if event["kind"] == "failover_completed"]
    assert [event["instance"] for event in told] == [_FIRST_TIER]
    assert told[0]["took_ms"] > 0


def test_a_session_of_a_deposed_writer_ends(cluster: LocalCluster) -> None:
    before = settled(cluster)
    with observed(cluster) as clients, cluster.connect(cluster.dsn_of(before.writer)) as session:
        undo = inject(Kind.AGENT_FROZEN, cluster.directory, before.writer)
        assert undo is not None
        clients.progress(other_than=before.writer)
        with ThreadPoolExecutor() as threads:
            asked = threads.submit(session.execute, "select max(number) from ledger")
            clients.progress()
            undo()
            with pytest.raises(psycopg.OperationalError):
                asked.result(timeout=_BOUND_S)


# --- planned --------------------------------------------------------------------------------------


def test_a_writer_is_moved(cluster: LocalCluster) -> None:
    before = settled(cluster)
    target = next(name for name in cluster.instances if name != before.writer)
    count = len(cluster.events())
    with observed(cluster) as clients:
        assert target in cluster.boreal("failover", f"--target={target}")
        clients.progress(by=target)
        after = settled(cluster)
        assert (after.writer, after.volume.epoch > before.volume.epoch) == (target, True)
    assert failovers_since(cluster, count) == ["failover_started", "failover_completed"]


def test_transactions_may_end_before_a_writer_is_moved(cluster: LocalCluster) -> None:
    """One that is at work ends by itself; one that does nothing is ended."""
    settled(cluster)
    cluster.query("create table if not exists moved (n int)")
    with cluster.connect() as working, cluster.connect() as idle, ThreadPoolExecutor() as threads:
        idle.execute("begin")
        idle.execute("insert into moved values (1)")
        work = threads.submit(
            working.execute, "insert into moved select 2 from pg_sleep(0.5) returning n"
        )
        until(lambda: _sleeps(cluster), _BOUND_S, "the statement to run")
        Control(cluster.directory).fail_over()
        assert work.result(timeout=_BOUND_S).fetchall() == [(2,)]
        with pytest.raises(psycopg.OperationalError):
            idle.execute("commit")
        idle.close()
    assert cluster.query("select n from moved") == [(2,)]
    settled(cluster)


def _sleeps(cluster: LocalCluster) -> bool:
    return cluster.query("select count(*) from pg_stat_activity where wait_event = 'PgSleep'") == [
        (1,)
    ]


@pytest.mark.parametrize("target", ["db-9", "sn-1"])
def test_nobody_else_can_be_a_target(cluster: LocalCluster, target: str) -> None:
    before = settled(cluster)
    assert "db-1" in cluster.boreal("failover", f"--target={target}", check=False)
    after = settled(cluster)
    assert (after.writer, after.volume.epoch) == (before.writer, before.volume.epoch)


# --- half-way -------------------------------------------------------------------------------------


@contextmanager
def stopped_half_way(cluster: LocalCluster, writer: str) -> Iterator[str]:
    """Kill the writer while too few storage nodes answer for another; who was appointed."""
    processes = LocalProcesses(cluster.directory)
    for node in _NODES:
        processes.pause(node)
    try:
        inject(Kind.POSTGRES_KILLED, cluster.directory, writer)
        yield until(lambda: _promoting(cluster, writer), _BOUND_S, "a reader to be appointed")
    finally:
        for node in _NODES:
            processes.resume(node)


def _promoting(cluster: LocalCluster, *but: str) -> str | None:
    for name in cluster.instances:
        if name not in but and cluster.instance_status(name).state == compute_pb2.PROMOTING:
            return name
    return None


def test_the_control_plane_dies_in_mid_failover(cluster: LocalCluster) -> None:
    before = settled(cluster)
    with observed(cluster):
        with stopped_half_way(cluster, before.writer) as appointed:
            cluster.boreal("kill", "control")
            cluster.boreal("restart", "control")
        after = settled(cluster)
        assert after.writer == appointed
        assert after.volume.epoch == before.volume.epoch + 1


def test_a_failover_ends_without_the_control_plane(cluster: LocalCluster) -> None:
    before = settled(cluster)
    with observed(cluster) as clients:
        with stopped_half_way(cluster, before.writer) as appointed:
            cluster.boreal("kill", "control")
        until(
            lambda: cluster.instance_status(appointed).state == compute_pb2.WRITER,
            _BOUND_S,
            f"{appointed} to serve",
        )
        cluster.query("create table if not exists by_itself ()", cluster.dsn_of(appointed))
        cluster.boreal("restart", "control")
        clients.progress(by=appointed)


def test_nothing_is_decided_while_there_is_no_control_plane(cluster: LocalCluster) -> None:
    before = settled(cluster)
    reader = next(name for name in cluster.instances if name != before.writer)
    with observed(cluster) as clients:
        cluster.boreal("kill", "control")
        clients.progress(by=before.writer)
        cluster.query("select count(*) from ledger", cluster.reader_dsn)
        inject(Kind.POSTGRES_KILLED, cluster.directory, before.writer)
        cluster.query("select count(*) from ledger", cluster.dsn_of(reader))
        assert _promoting(cluster) is None
        cluster.boreal("restart", "control")
        clients.progress()


def test_the_appointed_one_dies_too(cluster: LocalCluster) -> None:
    before = settled(cluster)
    count = len(cluster.events())
    with observed(cluster):
        with stopped_half_way(cluster, before.writer) as appointed:
            LocalProcesses(cluster.directory).kill(appointed)
        after = settled(cluster)
        assert after.volume.epoch >= before.volume.epoch + 2
    told = failovers_since(cluster, count)
    assert told[:2] == ["failover_started", "failover_failed"]
    assert told[-2:] == ["failover_started", "failover_completed"]


def test_the_control_plane_dies_in_mid_move(cluster: LocalCluster) -> None:
    before = settled(cluster)
    target = next(name for name in cluster.instances if name != before.writer)
    with observed(cluster), ThreadPoolExecutor() as threads:
        asked = threads.submit(cluster.boreal, "failover", f"--target={target}", check=False)
        # It may be over before we look: then the control plane dies just after it.
        until(
            lambda: cluster.instance_status(before.writer).state != compute_pb2.WRITER,
            _BOUND_S,
            "the writer to yield",
        )
        cluster.boreal("kill", "control")
        cluster.boreal("restart", "control")
        asked.result(timeout=120)
        after = settled(cluster)
        assert after.volume.epoch > before.volume.epoch
