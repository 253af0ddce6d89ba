"""What tables do: every record of HEAP, HEAP2 and SEQ, by one session and by two."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import LiteralString

import psycopg

from boreal.waiting import wait_until
from tests.storage_node.redo.oracle import run_script
from tests.support.stock_postgres import StockPostgres

WAIT_S = 30.0


def hot_updates_and_pruning(server: StockPostgres) -> None:
    """Chains within a page, redirects, dead line pointers, reuse; rows of many shapes."""
    run_script(
        server,
        """
        CREATE TABLE hot (id int PRIMARY KEY, n int, t text) WITH (fillfactor = 60);
        INSERT INTO hot SELECT i, 0, repeat('h', i % 70) FROM generate_series(1, 400) i;
        UPDATE hot SET n = n + 1 WHERE id % 2 = 0;
        UPDATE hot SET n = n + 1 WHERE id % 4 = 0;
        UPDATE hot SET n = n + 1, t = t || '+' WHERE id % 8 = 0;
        SELECT sum(n) FROM hot;
        UPDATE hot SET n = n + 1 WHERE id % 3 = 0;
        SELECT sum(n) FROM hot;
        DELETE FROM hot WHERE id % 5 = 0;
        BEGIN; UPDATE hot SET n = -1 WHERE id < 60; DELETE FROM hot WHERE id > 350; ROLLBACK;
        SELECT sum(n) FROM hot;
        VACUUM hot;
        INSERT INTO hot SELECT i, 1, repeat('r', i % 40) FROM generate_series(1000, 1200) i;
        UPDATE hot SET id = id + 5000 WHERE id % 7 = 0;
        UPDATE hot SET t = repeat('long', 300) WHERE id % 40 = 1;
        DELETE FROM hot WHERE id > 1100;
        VACUUM (FREEZE) hot;
        DELETE FROM hot;
        VACUUM (TRUNCATE off) hot;
        INSERT INTO hot VALUES (1, 1, 'again');

        CREATE TABLE shapes (a int, b text, c numeric, d bool, e timestamptz, f text, g int8,
            h bytea, i int, j int);
        INSERT INTO shapes (a, b) SELECT i, 'b' || i FROM generate_series(1, 150) i;
        INSERT INTO shapes SELECT i, NULL, i * 1.5, true, '2020-01-01', 'f', i, '\\x00ff', i, NULL
            FROM generate_series(1, 150) i;
        UPDATE shapes SET j = a;
        UPDATE shapes SET b = 'x' || coalesce(b, ''), f = NULL WHERE a % 2 = 0;
        ALTER TABLE shapes DROP c, ADD k int DEFAULT 7;
        UPDATE shapes SET d = NOT d WHERE a % 3 = 0;
        UPDATE shapes SET h = '\\xaa' || h WHERE a % 5 = 0;
        INSERT INTO shapes DEFAULT VALUES;
        """,
    )


def freezing(server: StockPostgres) -> None:
    """Freeze plans of all sorts, and whatever clears what they set."""
    run_script(
        server,
        """
        CREATE TABLE frozen (id int PRIMARY KEY, n int);
        INSERT INTO frozen SELECT i, 0 FROM generate_series(1, 900) i;
        BEGIN; SELECT count(*) FROM (SELECT 1 FROM frozen WHERE id % 9 = 0 FOR UPDATE) s; COMMIT;
        BEGIN; DELETE FROM frozen WHERE id % 10 = 0; ROLLBACK;
        UPDATE frozen SET n = 1 WHERE id % 11 = 0;
        VACUUM (FREEZE) frozen;
        SELECT id FROM frozen WHERE id = 5 FOR UPDATE;
        VACUUM (FREEZE) frozen;
        UPDATE frozen SET n = 2 WHERE id = 6;
        DELETE FROM frozen WHERE id = 400;
        INSERT INTO frozen VALUES (5000, 1);
        UPDATE frozen SET n = 3 WHERE id IN (200, 800);
        VACUUM (FREEZE) frozen;
        VACUUM (FREEZE, DISABLE_PAGE_SKIPPING) frozen;
        BEGIN;
        CREATE TABLE copied_frozen (id int, t text);
        COPY copied_frozen FROM PROGRAM 'seq -f "%g	frozen" 1 900' WITH (FREEZE);
        COMMIT;
        COPY copied_frozen FROM PROGRAM 'seq -f "%g	late" 1 200';
        DELETE FROM copied_frozen WHERE id = 1;
        VACUUM copied_frozen;
        """,
    )


def copying_and_toast(server: StockPostgres) -> None:
    """Multi-inserts onto new pages and onto pages half full; values out of line."""
    run_script(
        server,
        """
        CREATE TABLE copied (id int PRIMARY KEY, t text, u text);
        COPY (SELECT i, 'text of ' || i, NULL FROM generate_series(1, 700) i)
            TO PROGRAM 'cat > one.txt';
        COPY (SELECT i, NULL, repeat('u', i % 90) FROM generate_series(701, 1200) i)
            TO PROGRAM 'cat > two.txt';
        COPY copied FROM PROGRAM 'cat one.txt';
        VACUUM (FREEZE) copied;
        BEGIN; COPY copied FROM PROGRAM 'cat two.txt'; ROLLBACK;
        COPY copied FROM PROGRAM 'cat two.txt';

        CREATE TABLE wide (id int PRIMARY KEY, body text, packed text, inside text);
        ALTER TABLE wide ALTER body SET STORAGE EXTERNAL, ALTER inside SET STORAGE PLAIN;
        INSERT INTO wide SELECT i, repeat(md5(i::text), 150), repeat('c', 20000), repeat('i', 900)
            FROM generate_series(1, 40) i;
        UPDATE wide SET body = repeat(md5(body), 90) WHERE id % 3 = 0;
        UPDATE wide SET inside = 'small' WHERE id % 5 = 0;
        DELETE FROM wide WHERE id % 4 = 0;
        VACUUM wide;
        INSERT INTO wide VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET body = 'short';
        INSERT INTO wide VALUES (1, 'x') ON CONFLICT DO NOTHING;
        INSERT INTO wide VALUES (400, repeat('y', 5000)) ON CONFLICT DO NOTHING;
        SELECT lo_from_bytea(4242, decode(repeat(md5('lo'), 400), 'hex'));
        SELECT lo_put(4242, 3000, decode(repeat('abcd', 800), 'hex'));
        SELECT lo_unlink(4242);
        VACUUM pg_largeobject;
        """,
    )


def transactions(server: StockPostgres) -> None:
    """Subtransactions, two-phase commit, cursors, rows that move between partitions."""
    run_script(
        server,
        """
        CREATE TABLE acts (id int PRIMARY KEY, n int);
        BEGIN;
        INSERT INTO acts SELECT i, 0 FROM generate_series(1, 100) i;
        SAVEPOINT a; UPDATE acts SET n = 1 WHERE id < 50;
        SAVEPOINT b; DELETE FROM acts WHERE id < 20; ROLLBACK TO b;
        SAVEPOINT c; SELECT count(*) FROM (SELECT 1 FROM acts FOR SHARE) s; RELEASE c;
        UPDATE acts SET n = 2 WHERE id < 30; RELEASE a;
        SAVEPOINT d; CREATE TABLE never (i int); INSERT INTO never VALUES (1); ROLLBACK TO d;
        COMMIT;
        BEGIN; SELECT count(*) FROM (SELECT 1 FROM acts FOR KEY SHARE) s;
        SAVEPOINT e; UPDATE acts SET n = 3 WHERE id < 10; ROLLBACK TO e;
        DELETE FROM acts WHERE id = 7; COMMIT;
        BEGIN; UPDATE acts SET n = 5 WHERE id = 50; SELECT 1 FROM acts WHERE id = 51 FOR UPDATE;
        CREATE TABLE prepared (i int PRIMARY KEY); INSERT INTO prepared VALUES (1);
        PREPARE TRANSACTION 'kept';
        BEGIN; DELETE FROM acts WHERE id = 60; CREATE TABLE lost (i int);
        PREPARE TRANSACTION 'given up';
        COMMIT PREPARED 'kept';
        ROLLBACK PREPARED 'given up';
        BEGIN; DROP TABLE prepared; PREPARE TRANSACTION 'drop'; COMMIT PREPARED 'drop';

        CREATE TABLE parts (k int, t text) PARTITION BY RANGE (k);
        CREATE TABLE parts_low PARTITION OF parts FOR VALUES FROM (0) TO (100);
        CREATE TABLE parts_high PARTITION OF parts FOR VALUES FROM (100) TO (10000);
        CREATE INDEX ON parts (k);
        INSERT INTO parts SELECT i, 'p' FROM generate_series(1, 300) i;
        UPDATE parts SET k = k + 200 WHERE k < 40;
        UPDATE parts SET k = 1 WHERE k = 250;
        DELETE FROM parts WHERE k % 3 = 0;
        ALTER TABLE parts DETACH PARTITION parts_low;
        TRUNCATE parts;
        DROP TABLE parts_low;
        """,
    )


def sequences(server: StockPostgres) -> None:
    """Every way a sequence's page is written."""
    run_script(
        server,
        """
        CREATE SEQUENCE plain; CREATE SEQUENCE cached CACHE 50 INCREMENT 3;
        SELECT nextval('plain') FROM generate_series(1, 70);
        SELECT nextval('cached') FROM generate_series(1, 120);
        SELECT setval('plain', 1000), setval('cached', 9, false);
        ALTER SEQUENCE plain RESTART WITH 5 INCREMENT 2;
        SELECT nextval('plain');
        CREATE TABLE owned (id bigserial, g int GENERATED ALWAYS AS IDENTITY, x int);
        INSERT INTO owned (x) SELECT i FROM generate_series(1, 90) i;
        TRUNCATE owned RESTART IDENTITY;
        INSERT INTO owned (x) VALUES (1);
        BEGIN; CREATE SEQUENCE rolled; SELECT nextval('rolled'); ROLLBACK;
        BEGIN; ALTER SEQUENCE cached RESTART; SELECT nextval('cached'); ROLLBACK;
        CREATE UNLOGGED SEQUENCE unlogged_sequence; SELECT nextval('unlogged_sequence');
        DROP SEQUENCE plain;
        """,
    )


def truncation_and_extension(server: StockPostgres) -> None:
    """VACUUM cuts off a table's empty end; new rows extend it again."""
    run_script(
        server,
        """
        CREATE TABLE cut (id int PRIMARY KEY, f text);
        INSERT INTO cut SELECT i, repeat('c', 300) FROM generate_series(1, 900) i;
        VACUUM cut;
        DELETE FROM cut WHERE id > 150;
        VACUUM cut;
        INSERT INTO cut SELECT i, repeat('d', 100) FROM generate_series(151, 500) i;
        VACUUM (FREEZE) cut;
        DELETE FROM cut;
        VACUUM cut;
        INSERT INTO cut SELECT i, repeat('e', 500) FROM generate_series(1, 80) i;
        VACUUM cut;
        """,
    )


def second_segment(server: StockPostgres) -> None:
    """A table whose pages lie in its second file, beyond 1 GiB.

    Its first gigabyte is a hole: pages that PostgreSQL added but never used look the same.
    """
    run_script(server, "CREATE TABLE giant (id int PRIMARY KEY, t text); CHECKPOINT;")
    (row,) = server.run("SELECT pg_relation_filepath('giant')")
    with (server.data / row[0]).open("r+b") as file:
        file.truncate((1 << 30) - 8192)
    run_script(
        server,
        """
        INSERT INTO giant SELECT i, repeat('g', 400) FROM generate_series(1, 120) i;
        SET enable_seqscan = off; SET enable_bitmapscan = off;
        UPDATE giant SET t = repeat('G', 700) WHERE id BETWEEN 20 AND 90;
        DELETE FROM giant WHERE id > 110;
        SELECT 1 FROM giant WHERE id = 1 FOR SHARE;
        """,
    )
    (row,) = server.run("SELECT pg_relation_size('giant') > 1 << 30")
    assert row == (True,)


def locks_of_two_sessions(server: StockPostgres) -> None:
    """Row locks that several hold: multixacts, locks on updated rows, speculative insertion."""
    server.run(
        "CREATE TABLE locked (id int PRIMARY KEY, n int, t text)",
        "INSERT INTO locked SELECT i, 0, repeat('l', 20) FROM generate_series(1, 300) i",
        "VACUUM (FREEZE) locked",
    )
    with server.connect() as one, server.connect() as other, server.connect() as third:
        _share_rows(one, other, third)
        _lock_updated_rows(one, other)
    server.run("SELECT count(*) FROM locked", "VACUUM (FREEZE) locked")


def _share_rows(
    one: psycopg.Connection, other: psycopg.Connection, third: psycopg.Connection
) -> None:
    lock: tuple[LiteralString, ...] = ("FOR KEY SHARE", "FOR SHARE", "FOR NO KEY UPDATE")
    for number, strength in enumerate(lock):
        with one.transaction(), third.transaction():
            one.execute("SELECT 1 FROM locked WHERE id BETWEEN 1 AND 40 FOR KEY SHARE")
            third.execute("SELECT 1 FROM locked WHERE id BETWEEN 20 AND 60 FOR KEY SHARE")
            with other.transaction():
                other.execute("SELECT 1 FROM locked WHERE id < 50 " + strength)
                if number < 2:
                    one.execute("SELECT 1 FROM locked WHERE id < 10 FOR SHARE") if number else None
                else:
                    other.execute("UPDATE locked SET n = n + 1 WHERE id < 30")
            other.execute("UPDATE locked SET n = n + 1 WHERE id BETWEEN 10 AND 15")
    with one.transaction():
        one.execute("SELECT 1 FROM locked WHERE id BETWEEN 100 AND 140 FOR KEY SHARE")
        with other.transaction():
            other.execute("UPDATE locked SET t = repeat('m', 200) WHERE id BETWEEN 90 AND 130")
        other.execute("SELECT count(*) FROM locked")
    one.execute("DELETE FROM locked WHERE id BETWEEN 120 AND 125")


def _lock_updated_rows(one: psycopg.Connection, other: psycopg.Connection) -> None:
    """A lock on a row under update goes to its newer versions, too."""
    with one.transaction():
        one.execute("UPDATE locked SET n = 1 WHERE id BETWEEN 200 AND 220")
        one.execute("UPDATE locked SET n = 2 WHERE id BETWEEN 200 AND 210")
        with other.transaction():
            other.execute("SELECT 1 FROM locked WHERE id BETWEEN 200 AND 230 FOR KEY SHARE")
    other.execute("VACUUM (FREEZE) locked")
    with one.transaction(), other.transaction():
        other.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        other.execute("SELECT count(*) FROM locked")
        with one.transaction():
            one.execute("UPDATE locked SET n = 3 WHERE id BETWEEN 240 AND 250")


def speculative_insertion(server: StockPostgres) -> None:
    """Two sessions insert one key ON CONFLICT at once: one takes its row back.

    As PostgreSQL's isolation test insert-conflict-specconflict: an index expression waits for
    advisory locks, a further one at each call, so that the second session is between its heap's
    insertion and its index's while the first completes.
    """
    server.run(
        "CREATE TABLE spec (key text, data text)",
        """CREATE FUNCTION waits(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$
           DECLARE gate int := current_setting('spec.gate', true);
           BEGIN
             IF gate IS NOT NULL THEN
               PERFORM set_config('spec.gate', (gate + 1)::text, false);
               PERFORM pg_advisory_xact_lock_shared(gate);
             END IF;
             RETURN $1;
           END $$""",
        "CREATE UNIQUE INDEX spec_key ON spec (waits(key))",
    )
    insert: LiteralString = (
        "INSERT INTO spec VALUES ('k', 'd') ON CONFLICT (waits(key)) DO UPDATE SET data = 'x'"
    )
    with server.connect() as gates, server.connect() as one, server.connect() as other:
        for gate in (10, 11, 20, 21):
            gates.execute("SELECT pg_advisory_lock(%s)", (gate,))
        one.execute("SET spec.gate = '10'")
        other.execute("SET spec.gate = '20'")
        first, second = (_begin(session, insert) for session in (one, other))
        _wait_at_gates(gates, 10, 20)  # before they look for a conflict
        gates.execute("SELECT pg_advisory_unlock(10), pg_advisory_unlock(20)")
        _wait_at_gates(gates, 11, 21)  # the rows are on their page
        gates.execute("SELECT pg_advisory_unlock(11)")
        _join(first)
        gates.execute("SELECT pg_advisory_unlock(21)")
        _join(second)
    server.run("SELECT count(*) FROM spec", "VACUUM spec")


def _begin(session: psycopg.Connection, statement: LiteralString) -> threading.Thread:
    thread = threading.Thread(target=session.execute, args=(statement,), daemon=True)
    thread.start()
    return thread


def _join(thread: threading.Thread) -> None:
    thread.join(WAIT_S)
    assert not thread.is_alive()


def _wait_at_gates(control: psycopg.Connection, *gates: int) -> None:
    def waiting() -> bool:
        rows = control.execute(
            "SELECT objid::int FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        )
        return sorted(row[0] for row in rows) == list(gates)

    wait_until(
        waiting,
        timeout_s=WAIT_S,
        otherwise=lambda: RuntimeError(f"the sessions do not wait at {gates}"),
    )


THEMES: tuple[Callable[[StockPostgres], None], ...] = (
    hot_updates_and_pruning,
    freezing,
    copying_and_toast,
    transactions,
    sequences,
    truncation_and_extension,
    second_segment,
    locks_of_two_sessions,
    speculative_insertion,
)
