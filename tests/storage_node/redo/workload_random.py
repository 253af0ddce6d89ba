"""SQL at random, by seed: what nobody thought of. Several sessions, interleaved and at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack, suppress

import psycopg

from tests.storage_node.redo.oracle import run_script
from tests.support.stock_postgres import StockPostgres

SESSIONS = 3
STEPS = 220

_TABLES = ("narrow", "wide", "many")
_MAKE = """
    CREATE SCHEMA {0};
    SET search_path = {0};
    CREATE SEQUENCE ids;
    CREATE TABLE narrow (id int PRIMARY KEY, n int, t text, p point, a int[])
        WITH (fillfactor = 70);
    CREATE TABLE wide (id int PRIMARY KEY, n int, t text, p point, a int[]);
    ALTER TABLE wide ALTER t SET STORAGE EXTERNAL;
    CREATE TABLE many (id int, n int, t text, p point, a int[]);
    CREATE INDEX many_id ON many (id);
    CREATE INDEX many_n ON many (n);
    CREATE INDEX many_t ON many USING hash (t);
    CREATE INDEX many_p ON many USING gist (p);
    CREATE INDEX wide_n ON wide USING brin (n) WITH (pages_per_range = 1);
    CREATE INDEX narrow_a ON narrow USING gin (a);
    """
_INDEXES = (
    "btree (n)",
    "btree (t, id)",
    "btree (n DESC) INCLUDE (id)",
    "hash (n)",
    "gist (p)",
    "spgist (p)",
    "spgist (t)",
    "gin (a)",
    "brin (id) WITH (pages_per_range = 1)",
    "brin (n int4_bloom_ops) WITH (pages_per_range = 2)",
)
_LOCKS = ("UPDATE", "NO KEY UPDATE", "SHARE", "KEY SHARE")


class _Writer:
    """Makes statements up. Every choice comes from the seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._made = 0

    def choose(self, count: int) -> int:
        """A number below `count`."""
        return self._random.randrange(count)

    def statement(self) -> tuple[str, bool]:
        """A statement, and whether it must stand outside of a transaction."""
        kinds = (
            (30, self._insert, False),
            (24, self._update, False),
            (12, self._delete, False),
            (8, self._lock, False),
            (6, self._scan, False),
            (5, self._upsert, False),
            (8, self._savepoint, False),
            (3, self._index, False),
            (2, self._table, False),
            (6, self._vacuum, True),
            (2, self._rebuild, True),
        )
        _, make, alone = self._random.choices(kinds, [kind[0] for kind in kinds])[0]
        return make(), alone

    def _name(self) -> str:
        return self._random.choice(_TABLES)

    def _range(self) -> str:
        start = self._random.randrange(400)
        return f"BETWEEN {start} AND {start + self._random.choice((0, 3, 20, 120))}"

    def _text(self) -> str:
        letter = self._random.choice("abcxyz")
        length = self._random.choice((0, 3, 40, 200, 1500, 7000))
        spread = self._random.choice((3, 90))
        return f"repeat('{letter}', {length} - {length} * (i % 3) / 4) || i % {spread}"

    def _insert(self) -> str:
        rows = self._random.choice((1, 5, 30, 90))
        spread = self._random.choice((3, 17, 1000))
        return (
            f"INSERT INTO {self._name()} SELECT nextval('ids') % 400, i % {spread}, "
            f"{self._text()}, point(i % {spread}, i % 29), ARRAY[i % {spread}, i % 5] "
            f"FROM generate_series(1, {rows}) i ON CONFLICT DO NOTHING"
        )

    def _upsert(self) -> str:
        table = self._random.choice(("narrow", "wide"))
        return (
            f"INSERT INTO {table} (id, n) SELECT i, i FROM generate_series(1, 400) i "
            f"WHERE i {self._range()} ON CONFLICT (id) DO UPDATE SET n = {table}.n + 1"
        )

    def _update(self) -> str:
        change = self._random.choice(
            ("n = n + 1", "t = t || 'u'", "t = left(t, 5)", "p = point(n, id)", "a = a || n",
             "n = -n, t = repeat('v', 100)", "id = id + 400", "n = NULL", "t = repeat(t, 3)")
        )  # fmt: skip
        return f"UPDATE {self._name()} SET {change} WHERE id {self._range()}"

    def _delete(self) -> str:
        return f"DELETE FROM {self._name()} WHERE id {self._range()}"

    def _lock(self) -> str:
        name, lock = self._name(), self._random.choice(_LOCKS)
        return f"SELECT count(*) FROM (SELECT 1 FROM {name} WHERE id {self._range()} FOR {lock}) s"

    def _scan(self) -> str:
        column = self._random.choice(("id > 0", "n > -9999", "t = 'a'", "p <@ box '0,0,500,500'"))
        return f"SELECT count(a) FROM {self._name()} WHERE {column}"

    def _savepoint(self) -> str:
        return self._random.choice(("SAVEPOINT s", "ROLLBACK TO s", "RELEASE s", "SAVEPOINT r"))

    def _index(self) -> str:
        self._made += 1
        if self._random.randrange(4) == 0:
            return f"DROP INDEX IF EXISTS made_{self._random.randrange(self._made)}"
        index = self._random.choice(_INDEXES)
        return f"CREATE INDEX made_{self._made} ON {self._name()} USING {index}"

    def _table(self) -> str:
        self._made += 1
        return self._random.choice(
            (
                f"CREATE TABLE made_table_{self._made} AS SELECT * FROM {self._name()}",
                f"DROP TABLE IF EXISTS made_table_{self._random.randrange(self._made)}",
                f"TRUNCATE {self._name()}",
                f"ALTER TABLE {self._name()} ADD made_{self._made} int DEFAULT 7",
                f"ALTER TABLE {self._name()} ALTER n TYPE bigint",
            )
        )

    def _vacuum(self) -> str:
        options = self._random.choice(
            ("", "(FREEZE)", "(INDEX_CLEANUP on)", "(TRUNCATE off)", "(DISABLE_PAGE_SKIPPING)")
        )
        return f"VACUUM {options} {self._name()}"

    def _rebuild(self) -> str:
        return self._random.choice(
            (
                f"VACUUM FULL {self._name()}",
                f"REINDEX TABLE {self._name()}",
                f"REINDEX TABLE CONCURRENTLY {self._name()}",
                "CLUSTER narrow USING narrow_pkey",
                "CHECKPOINT",
            )
        )


def at_random(server: StockPostgres, seed: int, steps: int = STEPS) -> None:
    """Sessions take turns; whoever would have to wait for another gives up at once."""
    writer = _Writer(seed)
    schema = f"random_{seed}"
    run_script(server, _MAKE.format(schema))
    with ExitStack() as stack:
        sessions = [stack.enter_context(server.connect()) for _ in range(SESSIONS)]
        for session in sessions:
            session.execute(
                f"SET search_path = {schema}, public; SET lock_timeout = 10; "
                f"SET enable_bitmapscan = off; SET enable_seqscan = off"
            )
        for _ in range(steps):
            _take_turn(sessions[writer.choose(SESSIONS)], writer)
        for session in sessions:
            session.execute("COMMIT" if writer.choose(2) else "ROLLBACK")


def _take_turn(session: psycopg.Connection, writer: _Writer) -> None:
    idle = session.info.transaction_status is psycopg.pq.TransactionStatus.IDLE
    statement, alone = writer.statement()
    if idle and not alone and writer.choose(2):
        session.execute("BEGIN")
    elif not idle and (alone or writer.choose(4) == 0):
        session.execute("COMMIT" if writer.choose(3) else "ROLLBACK")
    with suppress(psycopg.Error):  # many a statement does not fit its moment
        session.execute(statement)
    if session.info.transaction_status is psycopg.pq.TransactionStatus.INERROR:
        with suppress(psycopg.Error):
            session.execute("ROLLBACK TO s")
        if session.info.transaction_status is psycopg.pq.TransactionStatus.INERROR:
            session.execute("ROLLBACK")


def many_clients(server: StockPostgres) -> None:
    """Sessions that really run at once, over indexes of every kind, while VACUUM goes round."""
    run_script(
        server,
        """
        CREATE TABLE busy (id int PRIMARY KEY, n int, t text, p point, a int[])
            WITH (fillfactor = 80);
        CREATE INDEX ON busy (n);
        CREATE INDEX ON busy USING hash (n);
        CREATE INDEX ON busy USING gist (p);
        CREATE INDEX ON busy USING gin (a);
        CREATE INDEX ON busy USING spgist (p);
        CREATE INDEX ON busy USING brin (n) WITH (pages_per_range = 1);
        CREATE SEQUENCE busy_ids;
        """,
    )
    script = server.socket_directory / "busy.sql"
    script.write_text(
        """
        \\set id random(1, 200)
        \\set n random(1, 30)
        INSERT INTO busy SELECT nextval('busy_ids'), :n, repeat('b', :n), point(:id, i),
            ARRAY[i, :n] FROM generate_series(1, 4) i ON CONFLICT DO NOTHING;
        BEGIN;
        SELECT 1 FROM busy WHERE id BETWEEN :id AND :id + 2 FOR KEY SHARE;
        UPDATE busy SET t = t || 'u' WHERE id = :id + :n;
        COMMIT;
        UPDATE busy SET n = n + 1 WHERE id = :id;
        DELETE FROM busy WHERE id = :id + 7;
        INSERT INTO busy (id, n) VALUES (:id, :n) ON CONFLICT (id) DO UPDATE SET n = busy.n + 1;
        """
    )
    vacuum = server.socket_directory / "vacuum.sql"
    vacuum.write_text("VACUUM busy; \\sleep 30 ms\n")
    for path in (script, vacuum):
        path.chmod(0o644)
    where = (f"--host={server.socket_directory}", "--username=postgres", "--no-vacuum")
    load = ("--client=6", "--jobs=1", "--transactions=30", "--max-tries=20", "--random-seed=1")
    scripts = (f"--file={script}@20", f"--file={vacuum}@1")
    impatient = {"PGOPTIONS": "-c deadlock_timeout=10ms"}
    server.engine.run("pgbench", *where, *load, *scripts, "postgres", env=impatient)


THEMES: tuple[Callable[[StockPostgres], None], ...] = (many_clients,)
