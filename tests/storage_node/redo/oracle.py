"""The oracle: PostgreSQL itself judges our redo, record by record and file by file.

A stock PostgreSQL runs SQL with `wal_consistency_checking`, so that its records carry the pages as
they are after the change. Every record is applied by `NativeRedo` to pages that began as the
cluster's files at the import LSN; each result is compared with the record's after-image, and at
quiet moments all pages with PostgreSQL's files. Hash records carry no images (PostgreSQL 16 writes
wrong checksums with them when sessions are concurrent), so those are compared with the files alone.

In a test:

    with oracle() as run:
        run.server.run("CREATE TABLE t (i int)", "INSERT INTO t VALUES (1)")
        assert run.check() == []

From a shell, each file a script of psql's:  python -m tests.storage_node.redo.oracle FILE.sql ...
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import LiteralString

from boreal.pages import PageKind
from boreal.types import WAL_SEGMENT_BYTES, Fork, Lsn, RelationFork, parse_lsn, record_end_before
from boreal.wal import WalDecoder
from storage_node.redo import Redo
from storage_node.redo.native import NativeRedo
from tests.storage_node.redo.judge import Difference, Judge
from tests.storage_node.redo.record_types import Coverage
from tests.storage_node.redo.relation_files import RelationFiles
from tests.storage_node.redo.replayed_pages import ReplayedPages
from tests.support.page_kinds import kind_of_relation
from tests.support.stock_postgres import StockPostgres, stock_postgres

SETTINGS: Mapping[str, str] = {
    "wal_consistency_checking": "heap,heap2,btree,gin,gist,sequence,spgist,brin,generic",
    "full_page_writes": "off",
    "wal_level": "replica",
    "wal_keep_size": "8GB",
    "max_wal_size": "8GB",
    "synchronous_commit": "off",
}
_SEGMENTS_PER_ID = 0x1_0000_0000 // WAL_SEGMENT_BYTES
_DEFAULT_TABLESPACE, _GLOBAL_TABLESPACE = 1663, 1664
_CATALOG: LiteralString = """
    SELECT pg_relation_filenode(c.oid)::int, c.relkind::text, c.relpersistence::text,
           am.amname::text, CASE WHEN c.relisshared THEN 0
               ELSE (SELECT oid FROM pg_database WHERE datname = current_database()) END::int
    FROM pg_class c LEFT JOIN pg_am am ON am.oid = c.relam
    WHERE pg_relation_filenode(c.oid) IS NOT NULL"""


class OracleRun:
    """A server under judgement. Between two calls of `check` anything may be done to `server`."""

    def __init__(self, server: StockPostgres, judge: Judge, start: Lsn) -> None:
        self.server = server
        self._judge = judge
        self._decoder = WalDecoder(start)
        self._read_to = start

    @property
    def coverage(self) -> Coverage:
        """What came by so far."""
        return self._judge.coverage

    @property
    def pages(self) -> ReplayedPages:
        """The pages as redo has them."""
        return self._judge.pages

    def check(self) -> list[Difference]:
        """Judge all that was logged since the last call; nobody may be using the server."""
        kinds = self._kinds()
        (row,) = self.server.run("CHECKPOINT", "SELECT pg_current_wal_insert_lsn()::text")
        end = record_end_before(parse_lsn(row[0]))
        for segment in self._segments(end):
            for record in self._decoder.feed(segment):
                self._judge.feed(record)
        if self._decoder.position != end:
            raise ValueError(f"the log was read to {self._decoder.position:X}, not {end:X}")
        self._judge.check_files(RelationFiles(self.server.data), kinds)
        found, self._judge.differences = self._judge.differences, []
        return found

    def _segments(self, end: Lsn) -> Iterator[bytes]:
        """The log's bytes from where the last call stopped, a segment file at a time."""
        while self._read_to < end:
            number, offset = divmod(self._read_to, WAL_SEGMENT_BYTES)
            length = min(WAL_SEGMENT_BYTES - offset, end - self._read_to)
            name = f"{number // _SEGMENTS_PER_ID:08X}{number % _SEGMENTS_PER_ID:08X}"
            # The newest timeline's: it repeats what was on the segment before it began.
            path = max(self.server.wal_directory.glob(f"????????{name}"))
            with path.open("rb") as file:
                file.seek(offset)
                yield file.read(length)
            self._read_to = Lsn(self._read_to + length)

    def _kinds(self) -> dict[RelationFork, PageKind | None]:
        """How to read each relation that is logged; None where nobody may connect to look."""
        kinds: dict[RelationFork, PageKind | None] = {}
        open_databases = set()
        names = self.server.run("SELECT oid::int, datname::text FROM pg_database")
        for oid, name in names:
            if name != "template0":
                open_databases.add(oid)
                kinds |= self._kinds_in(name)
        for fork in RelationFiles(self.server.data).forks:
            if fork.database and fork.database not in open_databases:
                kinds[fork._replace(fork=Fork.MAIN)] = None
        return kinds

    def _kinds_in(self, database: str) -> dict[RelationFork, PageKind | None]:
        kinds: dict[RelationFork, PageKind | None] = {}
        for number, relation, persistence, method, oid in self.server.run(
            _CATALOG, database=database
        ):
            tablespace = _DEFAULT_TABLESPACE if oid else _GLOBAL_TABLESPACE
            fork = RelationFork(tablespace, oid, number, Fork.MAIN)
            if persistence == "p":
                kinds[fork] = kind_of_relation(relation, method)
        return kinds


@contextmanager
def oracle(
    settings: Mapping[str, str] | None = None, redo: Redo | None = None
) -> Iterator[OracleRun]:
    """A fresh server, all of whose log from initdb on will be judged."""
    with stock_postgres({**SETTINGS, **(settings or {})}) as server:
        server.stop()
        lines = server.engine.run("pg_controldata", str(server.data)).splitlines()
        control = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
        start = parse_lsn(control["Latest checkpoint location"])
        judge = Judge(RelationFiles(server.data), redo or NativeRedo())
        server.start()
        yield OracleRun(server, judge, start)


def main(scripts: list[str]) -> int:
    """Run psql scripts one after the other, judge after each; the number that differ."""
    failed = 0
    with oracle() as run:
        for script in scripts:
            run_script(run.server, Path(script).read_text())
            found = run.check()
            failed += bool(found)
            print(f"{script}: {len(found)} differences")
            for difference in found[:50]:
                print(f"  {difference}")
        print(*run.coverage.listing(), sep="\n")
    return failed


def run_script(server: StockPostgres, script: str, database: str = "postgres") -> None:
    """Let psql run a script, stopping at its first error."""
    path = server.socket_directory / "script.sql"
    path.write_text(script)
    path.chmod(0o644)
    where = (f"--host={server.socket_directory}", "--username=postgres", f"--dbname={database}")
    options = ("--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--output=/dev/null")
    server.engine.run("psql", *where, *options, f"--file={path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
