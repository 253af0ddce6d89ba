"""`python -m bench.cold`: how fast does a compute node read that has nothing yet?

Two figures, each on a compute node started anew, so that every page comes from storage:

*Sequential*: `select count(*)` over the whole table by a sequential scan, in MB/s of the table.
Prefetch, parallel workers and shared_buffers are as configured.

*Random*: primary-key lookups over a prepared statement, one after the other, each on a heap page
not read before. A page has received `--chain` records since its base (other rows were updated), so
storage must redo as many to make it. Before that, each lookup's way
through the index is read by a search between two neighbouring keys, which ends at the leaf without
touching the heap; what is measured then is one miss of a heap page each. That warming is itself
measured: nearly every search misses one leaf of the index, whose history is the index build's.
Times are those of the client, over TCP, all included; `warm` is the same lookup again, when nothing
is missing, for comparison.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import psycopg

from bench import load
from bench.load import Target, percentile
from bench.single import (
    DIRECTORY,
    RESULTS,
    boreal_alone,
    drain,
    say,
    settle,
    told_in_words,
    write_result,
)
from bench.systems import Boreal
from boreal.engine import Engine
from boreal.errors import ProcessFailed
from boreal.types import PAGE_BYTES

_SCALE_BYTES = 12.8 * 2**20
"""Of pgbench_accounts, for each unit of pgbench's scale."""
_UPDATED_AT_ONCE = 50
"""Pages a transaction."""
_RECORDS_AN_UPDATE = 2
"""On the page the row was on, if that is full."""
_FRESH_SHARE = 0.05
"""Of the table, at most, in the local files of a compute node that counts as fresh."""
_SEED = 1

Connection = psycopg.Connection[tuple[object, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """A sequential scan."""

    table_bytes: int
    seconds: float
    mb_per_s: float
    """Of 10^6 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Times of single statements, in milliseconds."""

    count: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Latency:
        """Of at least one time."""
        ordered = sorted(times_ms)
        return cls(
            count=len(ordered),
            p50_ms=percentile(ordered, 50),
            p95_ms=percentile(ordered, 95),
            p99_ms=percentile(ordered, 99),
            max_ms=ordered[-1],
        )

    def __str__(self) -> str:
        return (
            f"p50 {self.p50_ms:.2f} ms, p95 {self.p95_ms:.2f}, p99 {self.p99_ms:.2f}, "
            f"max {self.max_ms:.1f} ({self.count})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cold:
    """What was measured."""

    fill_s: float
    drain_s: float
    settle_s: float | None
    """From then until the pages were stored; None: they were not in time."""
    scan: Scan
    chain: int
    """Records on each page looked up since its base."""
    heap_miss: Latency
    index_miss: Latency
    warm: Latency


def measure(engine: Engine, boreal: Boreal, *, scale: int, lookups: int, chain: int) -> Cold:
    """Fill, scan, make chains, look up."""
    say(f"filling at scale {scale}")
    began = time.monotonic()
    load.fill(engine, boreal.target, scale, 300 + 60 * scale)
    fill_s = time.monotonic() - began
    say(f"filled in {fill_s:.0f} s; waiting for the index")
    drain_s = drain(boreal)
    say("waiting for the pages to be stored")
    settle_s = settle(boreal)
    scan = _scan(boreal)
    say(f"sequential: {scan.table_bytes / 1e6:.0f} MB in {scan.seconds:.1f} s: "
        f"{scan.mb_per_s:.0f} MB/s")  # fmt: skip
    aids, made = _make_chains(boreal, lookups, chain)
    drain(boreal)
    _restart(boreal)
    with _connect(boreal.target) as connection:
        index = _timed(connection, "select 1 from pgbench_accounts where aid > %s and aid < %s",
                       [(aid, aid + 1) for aid in aids])  # fmt: skip
        say(f"index misses: {index}")
        by_key = "select abalance from pgbench_accounts where aid = %s"
        heap = _timed(connection, by_key, [(aid,) for aid in aids])
        say(f"heap misses:  {heap}")
        warm = _timed(connection, by_key, [(aid,) for aid in aids])
        say(f"warm:         {warm}")
    return Cold(
        fill_s=fill_s,
        drain_s=drain_s,
        settle_s=settle_s,
        scan=scan,
        chain=made,
        heap_miss=heap,
        index_miss=index,
        warm=warm,
    )


def _connect(target: Target) -> Connection:
    return psycopg.connect(target.dsn, autocommit=True, connect_timeout=10)


def _number(connection: Connection, query: str) -> int:
    row = connection.execute(query.encode()).fetchone()
    if row is None:
        raise ProcessFailed(f"{query!r} gave no row")
    return int(str(row[0]))


def _restart(boreal: Boreal) -> None:
    """A compute node that has nothing: ProcessFailed if it kept what it should have lost."""
    boreal.command("restart", "db-1")
    with _connect(boreal.target) as connection:
        table = _number(connection, "select pg_relation_size('pgbench_accounts')")
        path = connection.execute("select pg_relation_filepath('pgbench_accounts')").fetchone()
    if path is None:
        raise ProcessFailed("pgbench_accounts has no file")
    file = boreal.directory / "db-1" / "pgdata" / str(path[0])
    here = sum(each.stat().st_blocks * 512 for each in (file, *file.parent.glob(f"{file.name}.*")))
    if here > max(_FRESH_SHARE * table, 64 * PAGE_BYTES):
        raise ProcessFailed(f"the compute node began with {here} of {table} bytes: it is not cold")


def _scan(boreal: Boreal) -> Scan:
    _restart(boreal)
    with _connect(boreal.target) as connection:
        for path in ("indexscan", "indexonlyscan", "bitmapscan"):
            connection.execute(f"set enable_{path} = off".encode())
        table_bytes = _number(connection, "select pg_relation_size('pgbench_accounts')")
        began = time.monotonic()
        _number(connection, "select count(*) from pgbench_accounts")
        seconds = time.monotonic() - began
    return Scan(table_bytes=table_bytes, seconds=seconds, mb_per_s=table_bytes / 1e6 / seconds)


def _make_chains(boreal: Boreal, lookups: int, chain: int) -> tuple[list[int], int]:
    """Put `chain` records on each of `lookups` pages; keys of rows there that were left alone, and
    how many records it was.

    pgbench fills the table in the order of its keys, as many rows to each page. A row on a full
    page is locked before it is put elsewhere (heap_update, heapam.c): an update is two records.
    """
    with _connect(boreal.target) as connection:
        connection.execute("alter table pgbench_accounts set (autovacuum_enabled = off)")
        rows = _number(connection, "select count(*) from pgbench_accounts where ctid < '(1,0)'")
        pages = _number(connection, "select max(aid) from pgbench_accounts") // rows
        blocks = random.Random(_SEED).sample(range(pages), min(lookups, pages))
        updates = chain // _RECORDS_AN_UPDATE
        say(f"updating {updates} rows on each of {len(blocks)} pages")
        for at in range(0, len(blocks), _UPDATED_AT_ONCE):
            with connection.transaction():
                for block in blocks[at : at + _UPDATED_AT_ONCE]:
                    first = block * rows + 1
                    connection.execute(
                        "update pgbench_accounts set abalance = abalance + 1"
                        " where aid between %s and %s",
                        (first, first + updates - 1),
                    )
        return [block * rows + rows for block in blocks], updates * _RECORDS_AN_UPDATE


def _timed(
    connection: Connection,
    statement: str,
    arguments: Sequence[tuple[int, ...]],
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    connection.execute("set plan_cache_mode = force_generic_plan")
    times_ms = []
    with connection.cursor() as cursor:
        for each in arguments:
            began = clock()
            cursor.execute(statement.encode(), each, prepare=True)
            cursor.fetchall()
            times_ms.append(1000 * (clock() - began))
    return Latency.of(times_ms)


@click.command(context_settings={"show_default": True})
@click.option("--mb", default=1024, type=click.IntRange(10), help="Size of the table, MiB.")
@click.option("--lookups", default=2000, type=click.IntRange(10), help="Random reads.")
@click.option("--chain", default=32, type=click.IntRange(0, 100), help="Records on each page.")
@click.option("--dir", "directory", default=DIRECTORY,
              type=click.Path(exists=True, file_okay=False, path_type=Path))  # fmt: skip
@click.option("--results", default=RESULTS, type=click.Path(file_okay=False, path_type=Path))
def main(*, mb: int, lookups: int, chain: int, directory: Path, results: Path) -> None:
    """Measure cold reads on a cluster of its own; writes a JSON file. Leaves nothing else."""
    scale = max(1, round(mb * 2**20 / _SCALE_BYTES))
    with told_in_words(), boreal_alone(directory) as (engine, boreal, facts):
        done = measure(engine, boreal, scale=scale, lookups=lookups, chain=chain)
        path = write_result(results, "cold", {**facts, "scale": scale, **asdict(done)})
    print(f"sequential scan  {done.scan.mb_per_s:.0f} MB/s")
    print(f"random heap page {done.heap_miss}, chains of {done.chain}")
    print(f"random leaf page {done.index_miss}")
    print(f"nothing missing  {done.warm}")
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
