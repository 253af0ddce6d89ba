"""SQL that makes the engine write nearly every kind of WAL record that touches pages."""

from __future__ import annotations

from typing import LiteralString

from tests.support.stock_postgres import StockPostgres

_INDEXES: tuple[LiteralString, ...] = (
    "CREATE TABLE kinds (id int, t text, a int[], p point, b box, w tsvector)",
    "CREATE INDEX kinds_btree ON kinds (t)",
    "CREATE UNIQUE INDEX kinds_unique ON kinds (id)",
    "CREATE INDEX kinds_hash ON kinds USING hash (id)",
    "CREATE INDEX kinds_gin ON kinds USING gin (a)",
    "CREATE INDEX kinds_gin_slow ON kinds USING gin (w) WITH (fastupdate = off)",
    "CREATE INDEX kinds_gist ON kinds USING gist (b)",
    "CREATE INDEX kinds_spgist ON kinds USING spgist (p)",
    "CREATE INDEX kinds_spgist_text ON kinds USING spgist (t)",
    "CREATE INDEX kinds_brin ON kinds USING brin (id) WITH (pages_per_range = 2)",
    """INSERT INTO kinds SELECT g, repeat(md5(g::text), 1 + g % 5), ARRAY[g % 50, g % 7, g],
         point(g % 97, g % 89), box(point(g % 97, g % 89), point(g % 97 + 1, g % 89 + 2)),
         to_tsvector('simple', 'w' || g % 300 || ' x' || g % 11)
       FROM generate_series(1, 600) g""",
    "SELECT brin_summarize_new_values('kinds_brin')",
    "UPDATE kinds SET id = id + 100000, p = point(id, 1) WHERE id % 6 = 0",
    "DELETE FROM kinds WHERE id % 3 = 0",
    "VACUUM kinds",
    "SELECT brin_desummarize_range('kinds_brin', 0)",
    """INSERT INTO kinds SELECT g, 'again', ARRAY[1], point(1, 1), box(point(1, 1), point(2, 2)), ''
       FROM generate_series(200000, 200100) g""",
    "DELETE FROM kinds",
    "VACUUM kinds",
    "REINDEX TABLE kinds",
    """INSERT INTO kinds SELECT g, md5(g::text), ARRAY[g % 9], point(g % 31, g % 29),
         box(point(g % 31, g % 29), point(g % 31 + 1, g % 29 + 1)), to_tsvector('simple', 'w' || g)
       FROM generate_series(1, 200) g""",
    "DELETE FROM kinds WHERE id % 2 = 0",
    # Scans that find dead rows mark their index entries, and set hint bits, without a record.
    "SET enable_seqscan = off",
    "SELECT count(*) FROM kinds WHERE t > 'a'",
    "SELECT count(*) FROM kinds WHERE b && box(point(0, 0), point(50, 50))",
    "SELECT count(*) FROM kinds WHERE id = 8",
    # pgvector logs by the GENERIC resource manager.
    "CREATE EXTENSION vector",
    "CREATE TABLE vectors (id int, v vector(3))",
    "CREATE INDEX vectors_hnsw ON vectors USING hnsw (v vector_l2_ops)",
    "INSERT INTO vectors SELECT g, ARRAY[g % 7, g % 5, g] FROM generate_series(1, 60) g",
)

_HEAP: tuple[LiteralString, ...] = (
    "CREATE TABLE accounts (id int PRIMARY KEY, balance int, filler text) WITH (fillfactor = 90)",
    "INSERT INTO accounts SELECT g, 0, repeat('f', 80) FROM generate_series(1, 600) g",
    "VACUUM (FREEZE) accounts",
    # Each of these finds pages all-visible and all-frozen, and must clear them.
    "UPDATE accounts SET balance = 1 WHERE id = 5",
    "UPDATE accounts SET filler = repeat('g', 900) WHERE id % 100 = 7",
    "DELETE FROM accounts WHERE id % 97 = 0",
    "SELECT id FROM accounts WHERE id = 500 FOR UPDATE",
    "INSERT INTO accounts VALUES (4000, 1, 'conflict') ON CONFLICT (id) DO NOTHING",
    "INSERT INTO accounts VALUES (4000, 1, 'x') ON CONFLICT (id) DO UPDATE SET balance = 9",
    "VACUUM (FREEZE) accounts",
    "CREATE TABLE big (id serial, doc text)",
    "ALTER TABLE big ALTER doc SET STORAGE EXTERNAL",
    "INSERT INTO big (doc) SELECT repeat('0123456789', 2000) FROM generate_series(1, 20)",
    "DELETE FROM big WHERE id > 5",
    "VACUUM big",
    "CREATE SEQUENCE counter",
    "SELECT setval('counter', 100)",
    "SELECT nextval('counter') FROM generate_series(1, 70)",
    "CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY)",
    "INSERT INTO unlogged SELECT generate_series(1, 100)",
    "CREATE TABLE cut (id int) WITH (vacuum_truncate = on)",
    "INSERT INTO cut SELECT generate_series(1, 1200)",
    "VACUUM cut",
    "DELETE FROM cut WHERE id > 300",
    "VACUUM cut",
    "CLUSTER accounts USING accounts_pkey",
    "VACUUM (FREEZE) accounts",
    "DELETE FROM accounts WHERE id = 3",
    "VACUUM FULL big",
)

_COMMANDS: tuple[LiteralString, ...] = (
    "CREATE TABLE doomed (id int PRIMARY KEY, t text)",
    "BEGIN",
    "INSERT INTO doomed VALUES (1, 'a')",
    "SAVEPOINT one",
    "CREATE TABLE never (id int PRIMARY KEY)",
    "INSERT INTO never VALUES (1)",
    "ROLLBACK TO one",
    "SAVEPOINT two",
    "INSERT INTO doomed VALUES (2, 'b')",
    "RELEASE two",
    "TRUNCATE doomed",
    "INSERT INTO doomed VALUES (3, 'c')",
    "COMMIT",
    "BEGIN",
    "CREATE TABLE rolled_back (id int PRIMARY KEY, t text)",
    "INSERT INTO rolled_back VALUES (1, 'a')",
    "ROLLBACK",
    "BEGIN",
    "SAVEPOINT three",
    "DROP TABLE doomed",
    "CREATE TABLE prepared (id int PRIMARY KEY)",
    "PREPARE TRANSACTION 'commits'",
    "COMMIT PREPARED 'commits'",
    "BEGIN",
    "CREATE TABLE prepared_too (id int PRIMARY KEY)",
    "PREPARE TRANSACTION 'aborts'",
    "ROLLBACK PREPARED 'aborts'",
    "DROP TABLE prepared",
    "CREATE DATABASE logged STRATEGY wal_log",
    "CREATE DATABASE copied STRATEGY file_copy",
    "DROP DATABASE logged",
    "DROP DATABASE copied",
    "SELECT pg_switch_wal()",
)


def exercise(server: StockPostgres, database: str) -> None:
    """Run it all in a fresh database."""
    server.run(*_INDEXES, database=database)
    server.run(*_HEAP, database=database)
    server.run(*_COMMANDS, database=database)
    _copy_and_lock(server, database)


def _copy_and_lock(server: StockPostgres, database: str) -> None:
    """What takes COPY, or two sessions at once."""
    with server.connect(database) as one, server.connect(database) as other:
        one.execute("CREATE TABLE copied (id int PRIMARY KEY, n int)")
        for start in (0, 150):
            with one.cursor().copy("COPY copied FROM STDIN") as copy:
                for number in range(start, start + 150):
                    copy.write_row((number, 0))
            # Leaves the last page all-visible and half full, for the next COPY to clear.
            one.execute("VACUUM (FREEZE) copied")
        with one.transaction():
            one.execute("UPDATE copied SET n = 1 WHERE id = 10")
            other.execute("SELECT n FROM copied WHERE id = 10 FOR KEY SHARE")
