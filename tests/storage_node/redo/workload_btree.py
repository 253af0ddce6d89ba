"""What B-trees do: splits, posting lists, deletion of entries and of whole pages, levels gone."""

from __future__ import annotations

from collections.abc import Callable

from tests.storage_node.redo.oracle import run_script
from tests.support.stock_postgres import StockPostgres


def growing(server: StockPostgres) -> None:
    """Ascending, descending, at random; wide keys, so that a few rows make a deep tree."""
    run_script(
        server,
        """
        CREATE TABLE grow (id int, r int, w text COLLATE "C", n numeric);
        ALTER TABLE grow ALTER w SET STORAGE PLAIN;
        CREATE UNIQUE INDEX grow_id ON grow (id);
        CREATE INDEX grow_desc ON grow (id DESC) INCLUDE (r);
        CREATE INDEX grow_random ON grow (r) WITH (fillfactor = 50);
        CREATE INDEX grow_wide ON grow (w);
        CREATE INDEX grow_two ON grow (n, w DESC NULLS FIRST) WHERE id % 2 = 0;
        INSERT INTO grow SELECT i, (i * 7919) % 3001, repeat('w', 1200) || lpad(i::text, 6, '0'),
            NULLIF(i % 10, 3) FROM generate_series(1, 450) i;
        INSERT INTO grow SELECT i, (i * 7919) % 3001, repeat('w', 1200) || (i * 37 % 999), i
            FROM generate_series(451, 700) i;
        UPDATE grow SET n = n + 1 WHERE id % 9 = 0;
        DELETE FROM grow WHERE id % 2 = 0;
        VACUUM grow;
        INSERT INTO grow SELECT i, i, repeat('v', 900) || i, i FROM generate_series(1000, 1100) i;
        """,
    )


def posting_lists(server: StockPostgres) -> None:
    """Deduplication, splits of posting lists, vacuum within them, bottom-up deletion."""
    run_script(
        server,
        """
        CREATE TABLE dup (k int, n int, f text) WITH (fillfactor = 80);
        CREATE INDEX dup_k ON dup (k);
        CREATE INDEX dup_n ON dup (n) WITH (deduplicate_items = off);
        INSERT INTO dup SELECT i % 4, i % 3, repeat('f', 60) FROM generate_series(1, 1700) i;
        DELETE FROM dup WHERE ctid::text LIKE '%,1_)';
        VACUUM dup;
        INSERT INTO dup SELECT i % 4, i % 3, repeat('g', 60) FROM generate_series(1, 900) i;
        DELETE FROM dup WHERE k = 2;
        VACUUM (INDEX_CLEANUP on) dup;
        INSERT INTO dup SELECT i % 4, i % 3, 'h' FROM generate_series(1, 300) i;

        -- Versions of the same rows pile up in dup_k2 while dup_n2 gets new keys: bottom-up.
        CREATE TABLE versions (k int, n int);
        CREATE INDEX versions_k ON versions (k);
        CREATE INDEX versions_n ON versions (n);
        INSERT INTO versions SELECT i % 40, i FROM generate_series(1, 300) i;
        UPDATE versions SET n = n + 1000;
        UPDATE versions SET n = n + 1000;
        UPDATE versions SET n = n + 1000;
        UPDATE versions SET n = n + 1000;
        UPDATE versions SET n = n + 1000;
        UPDATE versions SET n = n + 1000 WHERE n % 2 = 0;
        """,
    )


def marked_dead(server: StockPostgres) -> None:
    """Scans mark entries of dead rows; the next insertion that needs room deletes them."""
    run_script(
        server,
        """
        CREATE TABLE dead (k int, t text);
        CREATE INDEX dead_k ON dead (k) WITH (deduplicate_items = off);
        CREATE INDEX dead_d ON dead (k);
        INSERT INTO dead SELECT i, 'x' FROM generate_series(1, 360) i;
        INSERT INTO dead SELECT i / 10, 'y' FROM generate_series(1, 360) i;
        DELETE FROM dead WHERE k % 3 <> 0;
        SET enable_seqscan = off; SET enable_bitmapscan = off;
        SELECT count(t) FROM dead WHERE k > 0;
        INSERT INTO dead SELECT i, 'z' FROM generate_series(1, 400) i;
        DELETE FROM dead WHERE k < 100;
        SELECT count(t) FROM dead WHERE k > 0;
        INSERT INTO dead SELECT i % 90, 'z' FROM generate_series(1, 500) i;
        """,
    )


def page_deletion(server: StockPostgres) -> None:
    """Emptied pages go, levels become a single page, the fast root comes down, pages return."""
    run_script(
        server,
        """
        CREATE TABLE shrink (id int, w text COLLATE "C");
        ALTER TABLE shrink ALTER w SET STORAGE PLAIN;
        INSERT INTO shrink SELECT i, repeat('s', 2000) || lpad(i::text, 6, '0')
            FROM generate_series(1, 400) i;
        CREATE INDEX shrink_w ON shrink (w);
        CREATE INDEX shrink_id ON shrink (id);
        DELETE FROM shrink WHERE id BETWEEN 30 AND 330;
        VACUUM shrink;
        INSERT INTO shrink SELECT i, repeat('s', 2000) || lpad(i::text, 6, '0')
            FROM generate_series(100, 140) i;
        DELETE FROM shrink WHERE id > 5;
        VACUUM shrink;
        VACUUM shrink;
        INSERT INTO shrink SELECT i, repeat('s', 2000) || lpad(i::text, 6, '0')
            FROM generate_series(1000, 1060) i;
        DELETE FROM shrink;
        VACUUM shrink;
        SELECT txid_current(); SELECT txid_current();
        VACUUM shrink;
        INSERT INTO shrink SELECT i, repeat('s', 2000) || lpad(i::text, 6, '0')
            FROM generate_series(1, 60) i;
        """,
    )


def building(server: StockPostgres) -> None:
    """Indexes built, rebuilt, built while others write; tables ordered by them."""
    run_script(
        server,
        """
        CREATE TABLE built (id int, k int, t text);
        INSERT INTO built SELECT i, i % 50, md5(i::text) FROM generate_series(1, 900) i;
        CREATE UNIQUE INDEX built_id ON built (id);
        CREATE INDEX built_t ON built (t, k) INCLUDE (id);
        CREATE INDEX CONCURRENTLY built_k ON built (k);
        UPDATE built SET k = k + 1 WHERE id % 13 = 0;
        REINDEX TABLE built;
        REINDEX TABLE CONCURRENTLY built;
        REINDEX INDEX CONCURRENTLY built_k;
        CLUSTER built USING built_t;
        INSERT INTO built SELECT i, i, 'late' FROM generate_series(2000, 2100) i;
        VACUUM FULL built;
        DROP INDEX CONCURRENTLY built_k;
        CREATE INDEX built_lower ON built (lower(t));
        INSERT INTO built SELECT i, i, 'later' FROM generate_series(3000, 3100) i;
        """,
    )


THEMES: tuple[Callable[[StockPostgres], None], ...] = (
    growing,
    posting_lists,
    marked_dead,
    page_deletion,
    building,
)
