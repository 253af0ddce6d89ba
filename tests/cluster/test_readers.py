"""Goal: a reader shows what was committed, one moment at a time, and changes nothing.

Method: one cluster with two readers; SQL as the master user at each instance's own port, while the
writer works. What both can be asked is asked of both: by sequential scan, by index.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import psycopg
import pytest

from tests.cluster.local import LocalCluster, RecordingClient, check_ledgers, local_cluster, until
from tests.cluster.roles import await_answer, await_replay, settled

pytestmark = pytest.mark.timeout(240)

_ACCOUNTS = 2000
_TOTAL = 100 * _ACCOUNTS
_LOAD_S = 5.0

Rows = list[tuple[Any, ...]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster("--readers=2") as running:
        running.query("create table ledger (client text, n int, primary key (client, n))")
        settled(running)
        yield running


def test_readers_see_what_is_written(cluster: LocalCluster) -> None:
    cluster.query("create table seen (id int primary key, body text)")
    cluster.query("insert into seen select n, repeat('x', 3000) from generate_series(1, 500) n")
    cluster.query("create index on seen (body)")
    cluster.query("delete from seen where id % 5 = 0")
    await_replay(cluster)
    for name in cluster.reader_names():
        dsn = cluster.dsn_of(name)
        assert cluster.query("select count(*), sum(length(body)) from seen", dsn) == [
            (400, 400 * 3000)
        ]
        assert cluster.query("select pg_is_in_recovery()", dsn) == [(True,)]
    cluster.query("truncate seen")
    cluster.query("insert into seen values (1, 'after')")
    await_replay(cluster)
    for name in cluster.reader_names():
        assert cluster.query("select * from seen", cluster.dsn_of(name)) == [(1, "after")]


def test_each_commit_reaches_a_reader(cluster: LocalCluster) -> None:
    """One after the other, without any other log behind it that could push it along."""
    cluster.query("create table steps (n int)")
    (name, _) = cluster.reader_names()
    await_replay(cluster)
    with cluster.connect() as writer, cluster.connect(cluster.dsn_of(name)) as reader:
        for number in range(1, 51):
            writer.execute("insert into steps values (%s)", (number,))
            _await_step(reader, number)


def _await_step(reader: psycopg.Connection[Any], number: int) -> None:
    def there() -> bool:
        return reader.execute("select max(n) from steps").fetchone() == (number,)

    until(there, 30, f"commit {number}")


@pytest.mark.parametrize(
    "statement",
    [
        "insert into ledger values ('reader', 1)",
        "update ledger set n = 0",
        "delete from ledger",
        "create table t (n int)",
        "create temporary table t (n int)",
        "select nextval('numbers')",
        "select * from ledger for update",
        "vacuum ledger",
    ],
)
def test_a_reader_refuses_to_write(cluster: LocalCluster, statement: str) -> None:
    cluster.query("create sequence if not exists numbers")
    await_replay(cluster)
    for dsn in (cluster.reader_dsn, *map(cluster.dsn_of, cluster.reader_names())):
        with cluster.connect(dsn) as session, pytest.raises(psycopg.Error) as refused:
            session.execute(statement.encode())
        assert refused.value.sqlstate == "25006"


# --- what drivers ask -----------------------------------------------------------------------------


def test_instances_know_who_they_are(cluster: LocalCluster) -> None:
    who = "select pg_catalog.aurora_db_instance_identifier()"
    for name in cluster.instances:
        assert cluster.query(who, cluster.dsn_of(name)) == [(name,)]
    assert cluster.query(who) == [(cluster.writer_name(),)]
    assert cluster.query(who, cluster.reader_dsn)[0][0] in cluster.reader_names()


def test_every_instance_tells_the_topology_in_any_database(cluster: LocalCluster) -> None:
    cluster.query("create database later template template0")
    cluster.query("insert into ledger values ('topology', 1)")
    await_replay(cluster)
    writer = cluster.writer_name()
    expected = [(name, name == writer) for name in cluster.instances]
    topology = """
        select server_id, session_id = 'MASTER_SESSION_ID' from aurora_replica_status()
        where now() - last_update_timestamp < interval '10 s' and durable_lsn > 0
          and coalesce(replica_lag_in_msec, 0) >= 0
        order by 1
    """
    for name in cluster.instances:
        for database in ("postgres", "later"):
            dsn = cluster.dsn_of(name).removesuffix("postgres") + database
            await_answer(cluster, topology, expected, dsn)
    lags = cluster.query(
        "select replica_lag_in_msec is null, highest_lsn_rcvd is null from aurora_replica_status()"
        f" where server_id <> '{writer}'"
    )
    assert lags == [(False, False)] * 2


# --- one moment at a time -------------------------------------------------------------------------


class Mover(threading.Thread):
    """Moves amounts between accounts, so that their sum never changes, and vacuums them."""

    def __init__(self, dsn: str, seed: int, *, vacuums: bool) -> None:
        super().__init__(name=f"mover {seed}")
        self._dsn = dsn
        self._random = random.Random(seed)
        self._vacuums = vacuums
        self._stopping = threading.Event()
        self.moves = 0
        self.failure: psycopg.Error | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        self.join(60)
        assert not self.is_alive()
        assert self.failure is None, self.failure

    def run(self) -> None:
        try:
            with psycopg.connect(self._dsn, autocommit=True) as session:
                while not self._stopping.is_set():
                    self._vacuum(session) if self._vacuums else self._move(session)
                    self.moves += 1
        except psycopg.Error as error:
            self.failure = error

    def _move(self, session: psycopg.Connection[Any]) -> None:
        giver, taker = sorted(self._random.sample(range(1, _ACCOUNTS + 1), 2))
        amount = self._random.randint(1, 50)
        with session.transaction():
            update = "update accounts set amount = amount + %s, moved = moved + 1 where id = %s"
            session.execute(update, (-amount, giver))
            session.execute(update, (amount, taker))

    def _vacuum(self, session: psycopg.Connection[Any]) -> None:
        session.execute("vacuum (index_cleanup on, truncate off) accounts")
        self._stopping.wait(0.2)


@pytest.mark.parametrize(
    "load_s", [_LOAD_S, pytest.param(180.0, marks=[pytest.mark.long, pytest.mark.timeout(400)])]
)
def test_a_snapshot_on_a_reader_stays_what_it_is(cluster: LocalCluster, load_s: float) -> None:
    """Those of many short transactions, and one on each reader that lasts all the time."""
    cluster.query("drop table if exists accounts")
    cluster.query("create table accounts (id int primary key, amount int, moved int default 0)")
    cluster.query("create index on accounts (amount)")
    cluster.query(f"insert into accounts select n, 100 from generate_series(1, {_ACCOUNTS}) n")
    await_replay(cluster)
    with contextlib.ExitStack() as stack:
        movers = [Mover(cluster.dsn, seed, vacuums=seed == 0) for seed in range(3)]
        for mover in movers:
            stack.enter_context(mover)
        sessions = [
            stack.enter_context(cluster.connect(cluster.dsn_of(name)))
            for name in cluster.reader_names()
        ]
        lasting = [
            stack.enter_context(cluster.connect(cluster.dsn_of(name)))
            for name in cluster.reader_names()
        ]
        for session in lasting:
            session.execute("begin transaction isolation level repeatable read")
        first = [session.execute(_DIGEST.encode()).fetchall() for session in lasting]
        moved: list[int] = []
        deadline = time.monotonic() + load_s
        while time.monotonic() < deadline:
            moved += map(_look_at_one_moment, sessions)
            assert [session.execute(_DIGEST.encode()).fetchall() for session in lasting] == first
    assert len(set(moved)) > 3, "the readers never saw anything move"
    assert all(mover.moves > 3 for mover in movers)
    await_replay(cluster)
    everybody = [_by_every_way(cluster, cluster.dsn_of(name)) for name in cluster.instances]
    assert everybody[1:] == everybody[:-1]


def _look_at_one_moment(session: psycopg.Connection[Any]) -> int:
    """Look several times in one transaction; the number of moves that it showed."""
    looks: list[tuple[Any, ...]] = []
    with session.transaction():
        session.execute("set transaction isolation level repeatable read")
        for path in ("seqscan", "indexscan", "seqscan"):
            others = {
                "seqscan": ("indexscan", "bitmapscan"),
                "indexscan": ("seqscan", "bitmapscan"),
            }
            for other in others[path]:
                session.execute(f"set local enable_{other} = off".encode())
            session.execute(f"set local enable_{path} = on".encode())
            looks.append(session.execute(_DIGEST.encode()).fetchall()[0])
            session.execute("select pg_sleep(0.05)")
    assert len(set(looks)) == 1, "one snapshot, several states"
    (count, total, moves, _) = looks[0]
    assert (count, total) == (_ACCOUNTS, _TOTAL)
    return int(moves)


_DIGEST = """
    select count(*), sum(amount), sum(moved), sum(hashtext(id || ':' || amount)::bigint)
    from accounts where id > 0
"""


def _by_every_way(cluster: LocalCluster, dsn: str) -> Rows:
    """What scans of the table and of both indexes say; they must say the same."""
    ways = {
        "table": ("indexscan", "bitmapscan", "indexonlyscan"),
        "key": ("seqscan", "bitmapscan"),
        "bitmap": ("seqscan", "indexscan", "indexonlyscan"),
    }
    found = []
    with cluster.connect(dsn) as session:
        for condition in ("id > 0", "amount > -1000000"):
            for others in ways.values():
                session.execute("reset all")
                for other in others:
                    session.execute(f"set enable_{other} = off".encode())
                question = _DIGEST.replace("id > 0", condition)
                found.append(session.execute(question.encode()).fetchall()[0])
    assert len(set(found)) == 1, "a table and its index disagree"
    return found


def test_storage_has_the_pages_that_everybody_sees(cluster: LocalCluster) -> None:
    assert " 0  pages differ" in cluster.boreal("verify")


# --- coming and going -----------------------------------------------------------------------------


def test_readers_hold_nobody_up(cluster: LocalCluster) -> None:
    readers = cluster.reader_names()
    with RecordingClient(cluster, "frozen readers") as client:
        client.progress(10)
        for name in readers:
            cluster.boreal("pause", name)
        client.progress(100)
        for name in readers:
            cluster.boreal("resume", name)
        client.progress(10)
    assert client.errors == []
    settled(cluster)
    await_replay(cluster)
    count = "select count(*) from ledger where client = 'frozen readers'"
    expected = cluster.query(count)
    for name in readers:
        assert cluster.query(count, cluster.dsn_of(name)) == expected


@pytest.mark.parametrize("how", ["kill", "restart"])
def test_a_reader_comes_back(cluster: LocalCluster, how: str) -> None:
    before = settled(cluster)
    name = cluster.reader_names()[0]
    with RecordingClient(cluster, f"reader {how}") as client:
        client.progress(10)
        former = cluster.instance_status(name).incarnation
        cluster.boreal(how, name)
        until(lambda: _lives_anew(cluster, name, former), 60, f"{name} to begin a new life")
        client.progress(10)
    assert client.errors == []
    after = settled(cluster)
    assert (after.writer, after.volume.epoch) == (before.writer, before.volume.epoch)
    await_replay(cluster, name)
    count = f"select count(*) from ledger where client = 'reader {how}'"
    assert cluster.query(count, cluster.dsn_of(name)) == cluster.query(count)
    check_ledgers(cluster, client)


def _lives_anew(cluster: LocalCluster, name: str, former: str) -> bool:
    row = next(row for row in cluster.status()["compute"] if row["name"] == name)
    return row["incarnation"] not in (None, former) and row["takes_clients"]


def test_a_reader_is_added_and_removed(cluster: LocalCluster) -> None:
    cluster.query(
        "create table large with (autovacuum_enabled = off)"  # it would touch every page
        " as select n, repeat('y', 1000) b from generate_series(1, 15000) n"
    )
    size = cluster.query("select pg_relation_size('large')")[0][0]
    cluster.take_bundle()  # what is younger than the last one, a new reader replays, pages and all
    before = set(cluster.instances)
    cluster.boreal("add-reader", "--tier=7")
    (name,) = set(cluster.instances) - before
    dsn = cluster.dsn_of(name)
    assert cluster.query("select b from large where ctid = '(0,1)'", dsn) == [("y" * 1000,)]
    row = next(row for row in cluster.status()["compute"] if row["name"] == name)
    assert (row["role"], row["tier"]) == ("reader", 7)
    assert stored_bytes(cluster.pgdata(name) / "base") < size // 2  # catalogs, for the most part
    assert cluster.query("select count(*) from large", dsn) == [(15_000,)]
    cluster.boreal("remove-reader", name)
    assert set(cluster.instances) == before
    with pytest.raises(psycopg.OperationalError):
        cluster.connect(dsn)
    told = [event["kind"] for event in cluster.events() if event["instance"] == name]
    assert [kind.lower() for kind in told][-1] == "instance_removed"
    settled(cluster)


def stored_bytes(directory: Path) -> int:
    """What the files below `directory` take on disk; holes take nothing."""
    return sum(file.stat().st_blocks * 512 for file in directory.rglob("*") if file.is_file())
