"""The volume of the shim's tests: a stock cluster of many kinds of relation, stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, LiteralString

from tests.compute_node.shimmed import Original
from tests.support.stock_postgres import stock_postgres

_CONTENT: tuple[LiteralString, ...] = (
    """CREATE TABLE items (id int PRIMARY KEY, name text, tags int[], spot point, area box)
         WITH (fillfactor = 80)""",
    """INSERT INTO items SELECT g, md5(g::text), ARRAY[g % 50, g % 7], point(g % 97, g % 89),
         box(point(g % 97, g % 89), point(g % 97 + 1, g % 89 + 2))
       FROM generate_series(1, 6000) g""",
    "CREATE INDEX items_name ON items (name)",
    "CREATE INDEX items_hash ON items USING hash (name)",
    "CREATE INDEX items_tags ON items USING gin (tags)",
    "CREATE INDEX items_area ON items USING gist (area)",
    "CREATE INDEX items_spot ON items USING spgist (spot)",
    "CREATE INDEX items_brin ON items USING brin (id) WITH (pages_per_range = 2)",
    "UPDATE items SET name = name || 'x' WHERE id % 10 = 0",
    "DELETE FROM items WHERE id % 11 = 0",
    "VACUUM (FREEZE) items",
    "CREATE TABLE documents (id int, body text)",
    "ALTER TABLE documents ALTER body SET STORAGE EXTERNAL",
    "INSERT INTO documents SELECT g, repeat(md5(g::text), 300) FROM generate_series(1, 40) g",
    "CREATE TABLE shrinking (id int, filler text)",
    "INSERT INTO shrinking SELECT g, repeat('s', 400) FROM generate_series(1, 1000) g",
    "CREATE TABLE emptied (id int)",
    "INSERT INTO emptied SELECT generate_series(1, 3000)",
    "CREATE TABLE dropped (id int)",
    "INSERT INTO dropped SELECT generate_series(1, 3000)",
    "CREATE TABLE untouched (id int, filler text)",
    "INSERT INTO untouched SELECT g, repeat('u', 400) FROM generate_series(1, 1000) g",
    "VACUUM (FREEZE) untouched",  # so that reading it sets no hint bits
    "CREATE UNLOGGED TABLE scratch (id int PRIMARY KEY, n serial)",
    "INSERT INTO scratch SELECT generate_series(1, 500)",
    "CREATE SEQUENCE counter",
    "SELECT setval('counter', 77)",
    "CREATE DATABASE template_of_ours",
)
QUERIES: tuple[LiteralString, ...] = (
    "SELECT count(*), sum(hashtext(i::text)) FROM items i",
    "SELECT id FROM items WHERE name = md5('4711')",
    "SELECT count(*) FROM items WHERE name BETWEEN 'a' AND 'b'",
    "SELECT count(*), sum(id) FROM items WHERE tags @> ARRAY[5]",
    "SELECT count(*), sum(id) FROM items WHERE area && box(point(10, 10), point(20, 20))",
    "SELECT count(*), sum(id) FROM items WHERE spot <@ box(point(10, 10), point(20, 20))",
    "SELECT count(*), sum(id) FROM items WHERE id BETWEEN 100 AND 900",
    "SELECT count(id) FROM items WHERE id > 0",
    "SELECT id, md5(body) FROM documents ORDER BY id",
    "SELECT count(*), sum(id) FROM shrinking",
    "SELECT count(*), sum(id) FROM emptied",
    "SELECT last_value FROM counter",
    "SELECT count(*), sum(hashtext(a::text)) FROM pg_attribute a WHERE attrelid < 16384",
)
PLANS: tuple[LiteralString, ...] = (
    "SET enable_indexscan = off; SET enable_bitmapscan = off; SET enable_indexonlyscan = off",
    "SET enable_seqscan = off",
    "SET enable_seqscan = off; SET enable_bitmapscan = off",
)


@contextmanager
def stopped_original() -> Iterator[tuple[Original, list[Any]]]:
    """The original, stopped, and what it answered to each query, by each plan."""
    with stock_postgres() as server:
        server.run(*_CONTENT)
        server.run("CREATE TABLE there (id int PRIMARY KEY)", database="template_of_ours")
        server.run(
            "INSERT INTO there SELECT generate_series(1, 2000)",
            "CREATE UNLOGGED TABLE bare (id int)",
            database="template_of_ours",
        )
        answers = [server.run(plan, query) for plan in PLANS for query in QUERIES]
        server.stop()
        yield Original(engine=server.engine, home=server.data.parent, data=server.data), answers
