"""What the page tests compare with: a stock PostgreSQL's WAL, and its files at several LSNs.

PostgreSQL runs as Boreal's writer does: after-images for GIN and SP-GiST alone, no full-page
writes, so that storage must build every page from the records and from what was imported.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import LiteralString

from boreal.pages.masks import PageKind
from boreal.types import (
    PAGE_BYTES,
    BlockNumber,
    Fork,
    Lsn,
    PageKey,
    RelationFork,
    parse_lsn,
    wal_segment_start,
)
from compute_node.configuration import AFTER_IMAGES
from tests.support.page_kinds import kind_of_relation
from tests.support.stock_postgres import StockPostgres, stock_postgres

SETTINGS = {
    "wal_consistency_checking": AFTER_IMAGES,
    "full_page_writes": "off",
    "wal_level": "replica",
    "wal_keep_size": "2GB",
}
_DEFAULT_TABLESPACE, _GLOBAL_TABLESPACE = 1663, 1664
_SUFFIXES = {"": Fork.MAIN, "fsm": Fork.FSM, "vm": Fork.VM, "init": Fork.INIT}

Files = dict[RelationFork, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """What a catalog says of a relation file."""

    name: str
    kind: PageKind
    unlogged: bool


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Snapshot:
    """PostgreSQL's files right after a checkpoint, and nothing happening."""

    lsn: Lsn
    files: Files
    catalog: dict[tuple[int, int, int], Relation]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RecordedRun:
    """A whole life of a cluster, from initdb on."""

    import_lsn: Lsn
    imported: Files
    wal_start: Lsn
    wal: bytes
    system_identifier: int
    snapshots: tuple[Snapshot, ...]
    """Ascending. After the last one come GIN records without after-images."""

    @property
    def end(self) -> Lsn:
        """The end of the WAL."""
        return Lsn(self.wal_start + len(self.wal))


def read_relation_files(data: Path) -> Files:
    """Every relation fork's bytes in a data directory."""
    files: Files = {}
    databases = [(_GLOBAL_TABLESPACE, 0, data / "global")]
    databases += [
        (_DEFAULT_TABLESPACE, int(path.name), path)
        for path in (data / "base").iterdir()
        if path.name.isdigit()
    ]
    for tablespace, database, directory in databases:
        for path in directory.iterdir():
            number, _, suffix = path.name.partition("_")
            if number.isdigit() and suffix in _SUFFIXES:
                fork = RelationFork(tablespace, database, int(number), _SUFFIXES[suffix])
                files[fork] = path.read_bytes()
    return files


def _control(server: StockPostgres) -> dict[str, str]:
    lines = server.engine.run("pg_controldata", str(server.data)).splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


_CATALOG: LiteralString = """
    SELECT c.oid::regclass::text, pg_relation_filenode(c.oid)::int, c.relkind::text,
           c.relpersistence::text, am.amname::text,
           CASE WHEN c.relisshared THEN 0
                ELSE (SELECT oid FROM pg_database WHERE datname = current_database()) END::int
    FROM pg_class c LEFT JOIN pg_am am ON am.oid = c.relam
    WHERE pg_relation_filenode(c.oid) IS NOT NULL"""


def _catalog(server: StockPostgres) -> dict[tuple[int, int, int], Relation]:
    found: dict[tuple[int, int, int], Relation] = {}
    names = server.run("SELECT datname::text FROM pg_database WHERE datallowconn")
    for (database_name,) in names:
        for name, number, kind, persistence, method, database in server.run(
            _CATALOG, database=database_name
        ):
            page_kind = kind_of_relation(kind, method)
            tablespace = _DEFAULT_TABLESPACE if database else _GLOBAL_TABLESPACE
            found[tablespace, database, number] = Relation(
                name=f"{database_name}.{name}", kind=page_kind, unlogged=persistence == "u"
            )
    return found


def take_snapshot(server: StockPostgres) -> Snapshot:
    """Files and catalogs as of now. Nobody else may be using the server."""
    catalog = _catalog(server)
    (row,) = server.run("CHECKPOINT", "SELECT pg_current_wal_insert_lsn()::text")
    return Snapshot(lsn=parse_lsn(row[0]), files=read_relation_files(server.data), catalog=catalog)


@contextmanager
def imported_server() -> Iterator[tuple[StockPostgres, Lsn, Files, int]]:
    """A running server, with what its files were at an LSN before anything was done to it."""
    with stock_postgres(SETTINGS) as server:
        server.stop()
        control = _control(server)
        imported = read_relation_files(server.data)
        import_lsn = parse_lsn(control["Latest checkpoint location"])
        server.start()
        yield server, import_lsn, imported, int(control["Database system identifier"])


def record_run() -> RecordedRun:
    """Run the workload."""
    with imported_server() as (server, import_lsn, imported, system_identifier):
        snapshots = []
        for stage in _STAGES:
            for database, script in stage:
                server.run(*_statements(script), database=database)
            snapshots.append(take_snapshot(server))
        server.run(*_statements(_BREACH))
        (row,) = server.run("SELECT pg_current_wal_flush_lsn()::text")
        end = parse_lsn(row[0])
        server.stop(signal.SIGQUIT)
        first, wal = server.wal()
    start = wal_segment_start(import_lsn)
    return RecordedRun(
        import_lsn=import_lsn,
        imported=imported,
        wal_start=start,
        wal=wal[start - first : end - first],
        system_identifier=system_identifier,
        snapshots=tuple(snapshots),
    )


def _statements(script: LiteralString) -> list[LiteralString]:
    return script.strip().replace("\n    ", " ").split("\n")


def page_keys(fork: RelationFork, content: bytes) -> Iterator[tuple[PageKey, bytes]]:
    """The pages of a fork's file."""
    for at in range(0, len(content), PAGE_BYTES):
        yield PageKey(fork, BlockNumber(at // PAGE_BYTES)), content[at : at + PAGE_BYTES]


# By stage. A line is a statement, or a transaction; indented lines continue it.
_MAKE: LiteralString = """
CREATE TABLE plain (id bigserial PRIMARY KEY, n int, t text, p point, r int4range, a int[], v
    tsvector)
INSERT INTO plain (n, t, p, r, a, v) SELECT i, repeat(md5(i::text), 2), point(i % 97, i % 89),
    int4range(i, i + 9), ARRAY[i % 50, i % 31], to_tsvector('simple', 'w' || i % 200 || ' x' || i)
    FROM generate_series(1, 500) i
CREATE INDEX plain_n ON plain (n)
CREATE INDEX plain_gin ON plain USING gin (a)
CREATE INDEX plain_fts ON plain USING gin (v) WITH (fastupdate = on)
CREATE INDEX plain_gist ON plain USING gist (p)
CREATE INDEX plain_range ON plain USING gist (r)
CREATE INDEX plain_sp ON plain USING spgist (p)
CREATE INDEX plain_spt ON plain USING spgist (t)
CREATE INDEX plain_brin ON plain USING brin (n) WITH (pages_per_range = 2, autosummarize = off)
CREATE TABLE dup (k int)
CREATE INDEX dup_k ON dup (k)
INSERT INTO dup SELECT i % 5 FROM generate_series(1, 900) i
CREATE TABLE wide (id int PRIMARY KEY, body text)
ALTER TABLE wide ALTER body SET STORAGE EXTERNAL
INSERT INTO wide SELECT i, repeat(md5(i::text), 200) FROM generate_series(1, 30) i
CREATE UNLOGGED TABLE fleeting (id serial PRIMARY KEY, t text)
INSERT INTO fleeting (t) SELECT 'x' FROM generate_series(1, 100)
CREATE TABLE doomed (id int)
INSERT INTO doomed SELECT generate_series(1, 700)
CREATE SEQUENCE counted
SELECT setval('counted', 1000)
VACUUM
"""
_CHANGE: LiteralString = """
INSERT INTO plain (n, t, p, r, a, v) SELECT i, md5(i::text), point(i % 53, i % 59), int4range(i,
    i + 5), ARRAY[i % 40], to_tsvector('simple', 'y' || i % 300) FROM generate_series(501, 700) i
UPDATE plain SET n = -n, t = t || 'u' WHERE id % 7 = 0
UPDATE plain SET t = upper(t) WHERE id % 11 = 0
DELETE FROM plain WHERE id % 3 = 0
BEGIN; SELECT count(*) FROM (SELECT * FROM plain WHERE id % 13 = 0 FOR UPDATE) s; COMMIT
BEGIN; UPDATE plain SET n = 0 WHERE id < 40; ROLLBACK
BEGIN; CREATE TABLE never (i int); INSERT INTO never VALUES (1); ROLLBACK
VACUUM plain
INSERT INTO dup SELECT i % 5 FROM generate_series(1, 400) i
DELETE FROM dup WHERE k = 3
VACUUM (INDEX_CLEANUP on) dup
UPDATE wide SET body = repeat(md5(id::text || 'v'), 150) WHERE id % 2 = 0
INSERT INTO wide VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET body = 'short'
DROP TABLE doomed
CREATE TABLE cut (id int, f text)
INSERT INTO cut SELECT i, repeat('c', 200) FROM generate_series(1, 600) i
CREATE INDEX cut_id ON cut (id)
VACUUM cut
DELETE FROM cut WHERE id > 100
VACUUM cut
INSERT INTO cut SELECT i, repeat('d', 100) FROM generate_series(101, 150) i
CREATE TABLE emptied (id int PRIMARY KEY)
INSERT INTO emptied SELECT generate_series(1, 500)
TRUNCATE emptied
INSERT INTO emptied VALUES (7)
BEGIN; CREATE TABLE fresh (i int); INSERT INTO fresh SELECT generate_series(1, 300); TRUNCATE
    fresh; INSERT INTO fresh VALUES (1); COMMIT
BEGIN; CREATE TABLE prepared (i int PRIMARY KEY); INSERT INTO prepared VALUES (1); DROP TABLE
    emptied; PREPARE TRANSACTION 'two'
COMMIT PREPARED 'two'
REINDEX TABLE plain
CREATE EXTENSION vector
CREATE TABLE item (id int, e vector(3))
CREATE INDEX item_hnsw ON item USING hnsw (e vector_l2_ops)
INSERT INTO item SELECT i, ARRAY[i % 7, i % 11, i % 13]::vector FROM generate_series(1, 60) i
VACUUM (FREEZE) wide
CREATE TABLE dots (p point)
CREATE INDEX dots_p ON dots USING gist (p)
INSERT INTO dots SELECT point(i, i) FROM generate_series(1, 600) i
"""
_DATABASES: LiteralString = """
CREATE DATABASE copied TEMPLATE template1 STRATEGY file_copy
CREATE DATABASE logged TEMPLATE template1 STRATEGY wal_log
CREATE DATABASE gone TEMPLATE template1 STRATEGY file_copy
"""
_IN_DATABASE: LiteralString = """
CREATE TABLE local (id int PRIMARY KEY, t text)
INSERT INTO local SELECT i, 'row' FROM generate_series(1, 300) i
VACUUM FULL pg_class
DROP TABLE IF EXISTS stray
"""
_FINISH: LiteralString = """
DROP DATABASE gone
CREATE DATABASE second TEMPLATE copied STRATEGY file_copy
CLUSTER plain USING plain_n
VACUUM FULL dup
DELETE FROM plain WHERE id % 2 = 0
INSERT INTO plain (n, t) SELECT i, 'late' FROM generate_series(1, 100) i
VACUUM plain
ALTER TABLE cut SET UNLOGGED
ALTER TABLE fleeting SET LOGGED
CREATE INDEX dup_hash ON dup USING hash (k)
SET wal_compression = 'pglz'
CREATE INDEX dup_packed ON dup (k)
RESET wal_compression
INSERT INTO dup SELECT generate_series(1, 50)
"""
_BREACH: LiteralString = """
SET wal_consistency_checking = ''
INSERT INTO plain (a) VALUES (ARRAY[1])
"""
"""Records that lack what the agreement between writer and storage asks for."""
_STAGES: tuple[tuple[tuple[str, LiteralString], ...], ...] = (
    (("postgres", _MAKE),),
    (("postgres", _CHANGE),),
    (("postgres", _DATABASES), ("copied", _IN_DATABASE), ("logged", _IN_DATABASE)),
    (("postgres", _FINISH),),
)
