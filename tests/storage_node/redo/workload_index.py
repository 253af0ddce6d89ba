"""What the other access methods do: hash, GiST, GIN, SP-GiST, BRIN, and pgvector's GENERIC."""

from __future__ import annotations

from collections.abc import Callable

from tests.storage_node.redo.oracle import run_script
from tests.support.stock_postgres import StockPostgres

_IN_BULK = "SET wal_consistency_checking = 'gin,spgist';"
"""For rows that only prepare: their pages are compared with the files, not record by record."""
_IN_DETAIL = """SET wal_consistency_checking =
    'heap,heap2,btree,gin,gist,sequence,spgist,brin,generic';"""
_WITH_HASH = "SET wal_consistency_checking = 'all';"
"""Sound as long as this session is the only one."""


def hash_indexes(server: StockPostgres) -> None:
    """Splits, overflow pages, squeezing them away, entries marked dead."""
    run_script(
        server,
        _WITH_HASH
        + """
        CREATE TABLE hashed (k int, t text);
        CREATE INDEX hashed_k ON hashed USING hash (k);
        CREATE INDEX hashed_t ON hashed USING hash (t) WITH (fillfactor = 30);
        INSERT INTO hashed SELECT i, 'x' || i FROM generate_series(1, 900) i;
        """
        + _IN_BULK
        + """
        INSERT INTO hashed SELECT 7, 'same' FROM generate_series(1, 1100) i;
        INSERT INTO hashed SELECT i % 3, 'some' || i % 5 FROM generate_series(1, 1200) i;
        """
        + _WITH_HASH
        + """
        INSERT INTO hashed SELECT i, 'y' || i FROM generate_series(1000, 1300) i;
        DELETE FROM hashed WHERE k = 7 AND ctid::text LIKE '%1)';
        VACUUM hashed;
        DELETE FROM hashed WHERE k < 8;
        VACUUM hashed;
        INSERT INTO hashed SELECT 7, 'again' FROM generate_series(1, 500) i;
        DELETE FROM hashed WHERE k = 7;
        SET enable_seqscan = off; SET enable_bitmapscan = off;
        SELECT count(t) FROM hashed WHERE k = 7;
        INSERT INTO hashed SELECT 7, 'third' FROM generate_series(1, 600) i;
        VACUUM hashed;
        REINDEX TABLE hashed;
        INSERT INTO hashed SELECT i, 'z' FROM generate_series(1, 200) i;
        """,
    )


def hash_indexes_by_files(server: StockPostgres) -> None:
    """The same without images, as it is in production."""
    run_script(
        server,
        _IN_BULK
        + """
        CREATE TABLE plain_hashed (k int);
        CREATE INDEX plain_hashed_k ON plain_hashed USING hash (k) WITH (fillfactor = 10);
        INSERT INTO plain_hashed SELECT i % 300 FROM generate_series(1, 4000) i;
        INSERT INTO plain_hashed SELECT 5 FROM generate_series(1, 1500) i;
        DELETE FROM plain_hashed WHERE k % 2 = 1;
        VACUUM plain_hashed;
        INSERT INTO plain_hashed SELECT i % 500 FROM generate_series(1, 900) i;
        """,
    )


def gist_indexes(server: StockPostgres) -> None:
    """Splits at every level, into two pages and more, dead entries, deleted and reused pages."""
    run_script(
        server,
        """
        CREATE TABLE spots (id int, p point, r int4range, v tsvector);
        CREATE INDEX spots_p ON spots USING gist (p);
        CREATE INDEX spots_r ON spots USING gist (r) WITH (fillfactor = 60);
        CREATE INDEX spots_v ON spots USING gist (v tsvector_ops (siglen = 1500));
        INSERT INTO spots SELECT i, point(i * 7919 % 997, i % 97), int4range(i, i + i % 30),
            to_tsvector('simple', 'w' || i % 70 || ' x' || i) FROM generate_series(1, 700) i;
        INSERT INTO spots SELECT i, point(3, 3), 'empty', '' FROM generate_series(1, 150) i;
        DELETE FROM spots WHERE p <@ box(point(200, 0), point(999, 100));
        VACUUM spots;
        INSERT INTO spots SELECT i, point(i % 31, i % 29), int4range(i, i + 2), 'z'
            FROM generate_series(1, 300) i;
        DELETE FROM spots WHERE id % 3 = 0;
        SET enable_seqscan = off; SET enable_bitmapscan = off;
        SELECT count(id) FROM spots WHERE p <@ box(point(-1, -1), point(999, 999));
        INSERT INTO spots SELECT i, point(i % 53, i % 59), int4range(i, i + 2), 'q'
            FROM generate_series(1, 500) i;
        DELETE FROM spots;
        VACUUM spots;
        SELECT txid_current(); SELECT txid_current();
        VACUUM spots;
        INSERT INTO spots SELECT i, point(i * 31 % 101, i), int4range(i, i + 2),
            to_tsvector('simple', 'r' || i)
            FROM generate_series(1, 400) i;
        CREATE INDEX spots_buffered ON spots USING gist (p) WITH (buffering = on);
        INSERT INTO spots SELECT i, point(i, -i), NULL, NULL FROM generate_series(1, 200) i;
        CREATE TABLE booked (r int4range, EXCLUDE USING gist (r WITH &&));
        INSERT INTO booked SELECT int4range(i * 10, i * 10 + 9) FROM generate_series(1, 300) i;
        """,
    )


def gin_indexes(server: StockPostgres) -> None:
    """The pending list, posting trees that split, and vacuum of each kind of page."""
    run_script(
        server,
        _IN_BULK
        + """
        CREATE TABLE tagged (id int, a int[]);
        COPY (SELECT i, ARRAY[1, 2 + i % 60] FROM generate_series(1, 22000) i)
            TO PROGRAM 'cat > tags.txt';
        COPY tagged FROM PROGRAM 'cat tags.txt';
        CREATE INDEX tagged_a ON tagged USING gin (a) WITH (fastupdate = off);
        INSERT INTO tagged SELECT i, ARRAY[1, i] FROM generate_series(1, 1200) i;
        CREATE INDEX tagged_later ON tagged USING gin (a)
            WITH (fastupdate = on, gin_pending_list_limit = 64);
        INSERT INTO tagged SELECT i, ARRAY[1, 2, i] FROM generate_series(1, 500) i;
        INSERT INTO tagged SELECT i, '{-1}' FROM generate_series(1, 3000) i;
        SELECT gin_clean_pending_list('tagged_later');
        DELETE FROM tagged WHERE id BETWEEN 2000 AND 21000;
        VACUUM tagged;
        DELETE FROM tagged WHERE id % 2 = 0;
        VACUUM tagged;
        INSERT INTO tagged SELECT i, ARRAY[i, 70000 - i] FROM generate_series(30000, 30400) i;
        """
        + _IN_DETAIL
        + """
        CREATE TABLE searched (v tsvector);
        CREATE INDEX searched_v ON searched USING gin (v);
        INSERT INTO searched SELECT to_tsvector('simple', md5(i::text) || ' w' || i % 9)
            FROM generate_series(1, 250) i;
        VACUUM searched;
        """,
    )


def spgist_indexes(server: StockPostgres) -> None:
    """Trees of text and of points: new nodes, split prefixes, moved leaves, redirects."""
    run_script(
        server,
        """
        CREATE TABLE radix (id int, t text, p point);
        CREATE INDEX radix_t ON radix USING spgist (t);
        CREATE INDEX radix_p ON radix USING spgist (p);
        CREATE INDEX radix_k ON radix USING spgist (p kd_point_ops);
        INSERT INTO radix SELECT i, repeat('prefix', i % 9) || md5(i::text),
            point(i * 7919 % 499, i % 101) FROM generate_series(1, 700) i;
        INSERT INTO radix SELECT i, 'prefixprefiy' || repeat(chr(97 + i % 26), i % 30),
            point(i % 13, i % 11) FROM generate_series(1, 350) i;
        INSERT INTO radix SELECT i, 'same', point(1, 1) FROM generate_series(1, 250) i;
        DELETE FROM radix WHERE id % 3 = 0;
        VACUUM radix;
        INSERT INTO radix SELECT i, 'z' || i, point(-i, i) FROM generate_series(1, 200) i;
        DELETE FROM radix;
        VACUUM radix;
        INSERT INTO radix SELECT i, 'few' || i, point(i, i) FROM generate_series(1, 20) i;
        CREATE TABLE small (t text);
        CREATE INDEX small_t ON small USING spgist (t);
        INSERT INTO small SELECT 'r' || i FROM generate_series(1, 12) i;
        DELETE FROM small WHERE t < 'r2';
        VACUUM small;
        """,
    )


def brin_indexes(server: StockPostgres) -> None:
    """Summaries made, grown in place and away, removed; more ranges than one map page holds."""
    run_script(
        server,
        """
        CREATE TABLE ranged (id int, t text);
        CREATE INDEX ranged_id ON ranged USING brin (id) WITH (pages_per_range = 1);
        CREATE INDEX ranged_t ON ranged USING brin (t)
            WITH (pages_per_range = 2, autosummarize = on);
        CREATE INDEX ranged_bloom ON ranged USING brin (id int4_bloom_ops)
            WITH (pages_per_range = 4);
        CREATE INDEX ranged_multi ON ranged USING brin (id int4_minmax_multi_ops)
            WITH (pages_per_range = 4);
        INSERT INTO ranged SELECT i, md5(i::text) FROM generate_series(1, 900) i;
        SELECT brin_summarize_new_values('ranged_id'), brin_summarize_new_values('ranged_t'),
            brin_summarize_new_values('ranged_bloom'), brin_summarize_new_values('ranged_multi');
        UPDATE ranged SET t = repeat('~', 30 + id % 50) WHERE id % 7 = 0;
        UPDATE ranged SET id = -id WHERE id % 5 = 0;
        UPDATE ranged SET t = repeat('!', 900) WHERE id % 50 = 1;
        VACUUM ranged;
        SELECT brin_desummarize_range('ranged_id', 3), brin_desummarize_range('ranged_t', 2);
        INSERT INTO ranged SELECT i, 'more' FROM generate_series(2000, 2200) i;
        SELECT brin_summarize_range('ranged_id', 3);
        """
        + _IN_BULK
        + """
        CREATE TABLE tall (id int, t text) WITH (fillfactor = 10);
        ALTER TABLE tall ALTER t SET STORAGE PLAIN;
        INSERT INTO tall SELECT i, repeat('t', 700) FROM generate_series(1, 1500) i;
        """
        + _IN_DETAIL
        + """
        CREATE INDEX tall_id ON tall USING brin (id, t) WITH (pages_per_range = 1);
        INSERT INTO tall SELECT i, 'u' FROM generate_series(1, 300) i;
        SELECT brin_summarize_new_values('tall_id');
        """,
    )


def generic_records(server: StockPostgres) -> None:
    """pgvector's two access methods."""
    run_script(
        server,
        """
        CREATE EXTENSION IF NOT EXISTS vector;
        CREATE TABLE vectors (id int, v vector(4));
        INSERT INTO vectors SELECT i, ARRAY[i % 7, i % 5, i % 11, i]::vector
            FROM generate_series(1, 120) i;
        CREATE INDEX vectors_hnsw ON vectors USING hnsw (v vector_l2_ops);
        CREATE INDEX vectors_ivf ON vectors USING ivfflat (v vector_l2_ops) WITH (lists = 5);
        INSERT INTO vectors SELECT i, ARRAY[i % 3, i % 13, i % 17, 1]::vector
            FROM generate_series(1, 90) i;
        DELETE FROM vectors WHERE id % 3 = 0;
        VACUUM vectors;
        INSERT INTO vectors SELECT i, ARRAY[1, 2, 3, i]::vector FROM generate_series(1, 40) i;
        """,
    )


THEMES: tuple[Callable[[StockPostgres], None], ...] = (
    hash_indexes,
    hash_indexes_by_files,
    gist_indexes,
    gin_indexes,
    spgist_indexes,
    brin_indexes,
    generic_records,
)
