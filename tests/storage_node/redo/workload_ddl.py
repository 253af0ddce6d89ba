"""What commands do to whole relations and databases, and what a server's life brings."""

from __future__ import annotations

import signal
from collections.abc import Callable

from tests.storage_node.redo.oracle import run_script
from tests.support.stock_postgres import StockPostgres


def rewrites(server: StockPostgres) -> None:
    """Tables written anew: VACUUM FULL, CLUSTER, ALTER TABLE, TRUNCATE, materialized views."""
    run_script(
        server,
        """
        CREATE TABLE old (id int PRIMARY KEY, n int, t text);
        INSERT INTO old SELECT i, i % 10, repeat('o', i % 90) FROM generate_series(1, 400) i;
        DELETE FROM old WHERE id % 4 = 0;
        ALTER TABLE old ALTER n TYPE numeric USING n * 1.5;
        ALTER TABLE old ADD c timestamptz DEFAULT clock_timestamp();
        CLUSTER old USING old_pkey;
        VACUUM FULL old;
        INSERT INTO old VALUES (5000, 1, 'after');
        BEGIN; TRUNCATE old; INSERT INTO old VALUES (1, 1, 'x'); ROLLBACK;
        BEGIN; SAVEPOINT a; DROP TABLE old; ROLLBACK TO a; UPDATE old SET n = 0; COMMIT;
        TRUNCATE old;
        INSERT INTO old SELECT i, i, 'new' FROM generate_series(1, 100) i;
        BEGIN; CREATE TABLE fresh (i int); INSERT INTO fresh SELECT generate_series(1, 300);
        TRUNCATE fresh; INSERT INTO fresh VALUES (1); COMMIT;
        CREATE MATERIALIZED VIEW seen AS SELECT id, n FROM old;
        CREATE UNIQUE INDEX seen_id ON seen (id);
        REFRESH MATERIALIZED VIEW seen;
        UPDATE old SET n = -n WHERE id < 20;
        REFRESH MATERIALIZED VIEW CONCURRENTLY seen;
        CREATE TABLE made AS SELECT * FROM old;
        ALTER TABLE made SET (fillfactor = 50);
        ALTER TABLE old SET UNLOGGED;
        INSERT INTO old VALUES (7000, 1, 'unlogged');
        ALTER TABLE old SET LOGGED;
        VACUUM FULL pg_class;
        VACUUM FULL pg_database;
        REINDEX SCHEMA pg_catalog;
        """,
    )


def undone(server: StockPostgres) -> None:
    """Everything that an abort must leave no trace of."""
    run_script(
        server,
        """
        CREATE TABLE stays (id int PRIMARY KEY, t text);
        INSERT INTO stays SELECT i, 's' FROM generate_series(1, 200) i;
        BEGIN;
        CREATE TABLE goes (id serial PRIMARY KEY, t text, p point);
        CREATE INDEX ON goes USING gist (p);
        CREATE INDEX ON goes USING hash (t);
        INSERT INTO goes (t, p) SELECT 'g', point(i, i) FROM generate_series(1, 200) i;
        CREATE INDEX stays_t ON stays (t);
        ALTER TABLE stays ADD n int DEFAULT random() * 9;
        CLUSTER stays USING stays_pkey;
        DROP TABLE goes;
        ROLLBACK;
        BEGIN; DELETE FROM stays; DROP TABLE stays; ROLLBACK;
        UPDATE stays SET t = 'still here' WHERE id % 5 = 0;
        DO $$ BEGIN
          FOR i IN 1 .. 70 LOOP
            BEGIN
              INSERT INTO stays VALUES (i + 150, 'dup');
            EXCEPTION WHEN unique_violation THEN UPDATE stays SET t = 'caught' WHERE id = i + 150;
            END;
          END LOOP;
        END $$;
        VACUUM stays;
        """,
    )


def databases(server: StockPostgres) -> None:
    """CREATE DATABASE both ways, from templates in use, and what happens in them afterwards."""
    run_script(
        server,
        """
        CREATE DATABASE logged TEMPLATE template1 STRATEGY wal_log;
        CREATE DATABASE copied TEMPLATE template1 STRATEGY file_copy;
        \\connect copied
        CREATE TABLE here (id int PRIMARY KEY, t text);
        INSERT INTO here SELECT i, 'c' FROM generate_series(1, 200) i;
        VACUUM;
        \\connect logged
        CREATE TABLE here (id int PRIMARY KEY, t text);
        INSERT INTO here SELECT i, 'l' FROM generate_series(1, 200) i;
        UPDATE here SET t = 'u' WHERE id % 3 = 0;
        \\connect postgres
        CREATE DATABASE again TEMPLATE copied STRATEGY file_copy;
        CREATE DATABASE gone TEMPLATE logged STRATEGY file_copy;
        \\connect again
        DELETE FROM here WHERE id % 2 = 0;
        VACUUM here;
        INSERT INTO here VALUES (1000, 'again');
        \\connect postgres
        DROP DATABASE gone;
        DROP DATABASE copied;
        """,
    )


def restarts(server: StockPostgres) -> None:
    """Unlogged and temporary tables over a clean restart, a crash, and a recovery from it."""
    run_script(
        server,
        """
        CREATE UNLOGGED TABLE fleeting (id serial PRIMARY KEY, t text, p point, a int[]);
        CREATE INDEX ON fleeting USING gist (p);
        CREATE INDEX ON fleeting USING gin (a);
        CREATE INDEX ON fleeting USING spgist (p);
        CREATE INDEX ON fleeting USING hash (t);
        CREATE INDEX ON fleeting USING brin (id);
        INSERT INTO fleeting (t, p, a) SELECT 'f', point(i, i), ARRAY[i]
            FROM generate_series(1, 200) i;
        CREATE TEMPORARY TABLE passing (id int PRIMARY KEY, t text);
        INSERT INTO passing SELECT i, 'p' FROM generate_series(1, 300) i;
        CREATE TABLE lasting (id int PRIMARY KEY, t text);
        INSERT INTO lasting SELECT i, 'l' FROM generate_series(1, 300) i;
        """,
    )
    server.stop()
    server.start()
    run_script(
        server,
        """
        UPDATE lasting SET t = 'before the crash' WHERE id % 4 = 0;
        DELETE FROM lasting WHERE id % 7 = 0;
        CREATE INDEX lasting_t ON lasting (t);
        INSERT INTO fleeting (t) VALUES ('lost');
        SET synchronous_commit = on; INSERT INTO lasting VALUES (1000, 'kept');
        """,
    )
    server.stop(signal.SIGQUIT)
    server.start()
    run_script(
        server,
        """
        INSERT INTO lasting SELECT i, 'after' FROM generate_series(2000, 2100) i;
        UPDATE lasting SET t = t || '!' WHERE id % 9 = 0;
        VACUUM lasting;
        INSERT INTO fleeting (t) VALUES ('new');
        """,
    )


def full_page_images(server: StockPostgres) -> None:
    """The first change of a page after a checkpoint brings its image, which redo must apply."""
    _restart(server, {"full_page_writes": "on"})
    make = """
        CREATE TABLE imaged (id int PRIMARY KEY, k int, p point, t text);
        CREATE INDEX imaged_k ON imaged (k);
        CREATE INDEX imaged_p ON imaged USING gist (p);
        CREATE INDEX imaged_h ON imaged USING hash (k);
        CREATE INDEX imaged_b ON imaged USING brin (k) WITH (pages_per_range = 1);
        INSERT INTO imaged SELECT i, i % 30, point(i % 41, i % 37), 'i'
            FROM generate_series(1, 500) i;
        CHECKPOINT;
        UPDATE imaged SET t = 'u' WHERE id % 3 = 0;
        CHECKPOINT;
        """
    change = """
        INSERT INTO imaged SELECT i, i % 30, point(i % 41, i % 37), 'j'
            FROM generate_series({0}, {0} + 60) i;
        UPDATE imaged SET k = k + 1 WHERE id % 10 = 0;
        CHECKPOINT;
        """
    rounds = "".join(change.format(start) for start in range(1000, 1400, 61))
    end = "DELETE FROM imaged WHERE id % 2 = 0; CHECKPOINT; VACUUM imaged; CHECKPOINT;"
    run_script(
        server,
        make
        + rounds
        + end
        + "INSERT INTO imaged VALUES (1, 1, NULL, 'last') ON CONFLICT DO NOTHING;",
    )
    _restart(server, {})


def logged_hints(server: StockPostgres) -> None:
    """With wal_log_hints the first hint on a page after a checkpoint is a record."""
    run_script(
        server,
        """
        CREATE TABLE hinted (id int PRIMARY KEY);
        INSERT INTO hinted SELECT generate_series(1, 300);
        CHECKPOINT;
        """,
    )
    for images in ("off", "on"):
        _restart(server, {"wal_log_hints": "on", "full_page_writes": images})
        run_script(
            server,
            "SELECT count(*) FROM hinted; CHECKPOINT; DELETE FROM hinted WHERE id < 50; CHECKPOINT;"
            " SELECT count(*) FROM hinted;",
        )
    _restart(server, {})


def logical_level(server: StockPostgres) -> None:
    """What wal_level=logical adds: old rows in records, and records of the catalog's history."""
    _restart(server, {"wal_level": "logical"})
    run_script(
        server,
        """
        SELECT pg_create_logical_replication_slot('history', 'pgoutput');
        CREATE TABLE told (id int PRIMARY KEY, n int, t text)
            WITH (user_catalog_table = true, fillfactor = 50);
        INSERT INTO told SELECT i, i, repeat('t', 60) FROM generate_series(1, 200) i;
        ALTER TABLE told REPLICA IDENTITY FULL;
        UPDATE told SET n = -n WHERE id % 2 = 0;
        UPDATE told SET t = repeat('T', 200) WHERE id % 5 = 0;
        UPDATE told SET t = repeat(t, 30) WHERE id % 20 = 0;
        DELETE FROM told WHERE id % 3 = 0;
        ALTER TABLE told REPLICA IDENTITY DEFAULT;
        UPDATE told SET id = id + 1000 WHERE id % 7 = 0;
        DELETE FROM told WHERE id % 11 = 0;
        BEGIN; UPDATE told SET n = 0; ROLLBACK;
        VACUUM FULL told;
        CLUSTER told USING told_pkey;
        CREATE TABLE cleared (i int);
        INSERT INTO cleared VALUES (1);
        TRUNCATE cleared;
        SELECT pg_drop_replication_slot('history');
        """,
    )
    _restart(server, {})


def _restart(server: StockPostgres, settings: dict[str, str]) -> None:
    server.stop()
    server.start(settings)


THEMES: tuple[Callable[[StockPostgres], None], ...] = (
    rewrites,
    undone,
    databases,
    restarts,
    full_page_images,
    logged_hints,
    logical_level,
)
