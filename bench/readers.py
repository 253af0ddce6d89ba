"""`make readers`: how soon does a new reader answer, and what does it keep of the database?

On a filled database whose pages are stored one reader after the other is added by `boreal
add-reader`. Timed is, from the start of that command, the first answer at the new instance's own
port: a row by its key. Right afterwards is counted what the reader has on disk. At the end every
instance is asked once more, and the memory of all of them is told.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import psutil

from bench import load
from bench.session import Session
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
from boreal import cluster, process_tree
from boreal.engine import Engine
from boreal.errors import EngineError, ProcessFailed, UnknownOutcome, Unreachable
from boreal.waiting import wait_until

_SCALE_BYTES = 15.0 * 2**20
"""Of pgbench's tables and indexes, for each unit of its scale."""
_QUESTION = "select aid from pgbench_accounts where aid = $1"
_BOUND_S = 60.0
_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """A reader that was added."""

    name: str
    answered_s: float
    """From the start of the command to the first answer."""
    local_bytes: int
    """Its data directory on disk then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run."""

    settle_s: float | None
    """From when the database was filled until its pages were stored; None: they were not in time.

    While they are being stored it takes two to three times as long to add a reader."""
    database_bytes: int
    added: Sequence[Added]
    memory_bytes: dict[str, int]
    """Of each instance: agent and PostgreSQL, what only they have (USS)."""


def measure(engine: Engine, boreal: Boreal, *, scale: int, readers: int) -> Measured:
    """Fill, then add so many readers."""
    say(f"filling at scale {scale}")
    load.fill(engine, boreal.target, scale, 300 + 60 * scale)
    drain(boreal)
    say("waiting for the pages to be stored")
    settle_s = settle(boreal)
    with Session(boreal.target.dsn, patience_s=_BOUND_S) as session:
        ((size,),) = session.query("select pg_database_size(current_database())")
    added = []
    for _ in range(readers):
        added.append(_add(boreal))
        say(f"{added[-1].name} answered after {added[-1].answered_s:.2f} s")
    config = cluster.load(boreal.directory)
    for name in config.instance_names:
        if not _answers(config.instance_dsn(name), 2):
            raise ProcessFailed(f"{name} does not answer")
    return Measured(
        settle_s=settle_s,
        database_bytes=int(str(size)),
        added=added,
        memory_bytes={name: _memory_bytes(boreal.pids()[name]) for name in config.instance_names},
    )


def _add(boreal: Boreal) -> Added:
    before = set(cluster.load(boreal.directory).instance_names)
    began = time.monotonic()
    boreal.command("add-reader")
    config = cluster.load(boreal.directory)
    (name,) = set(config.instance_names) - before
    wait_until(
        lambda: _answers(config.instance_dsn(name), 1),
        timeout_s=_BOUND_S,
        otherwise=lambda: ProcessFailed(f"{name} does not answer"),
    )
    return Added(
        name=name,
        answered_s=time.monotonic() - began,
        local_bytes=_stored_bytes(boreal.directory / name / "pgdata"),
    )


def _answers(dsn: str, key: int) -> bool:
    try:
        with Session(dsn, patience_s=_PATIENCE_S) as session:
            return session.query(_QUESTION, str(key)) == [(str(key),)]
    except (Unreachable, UnknownOutcome, EngineError):
        return False


def _stored_bytes(directory: Path) -> int:
    found = 0
    for file in directory.rglob("*"):
        try:
            found += 512 * file.lstat().st_blocks
        except FileNotFoundError:
            continue  # one of PostgreSQL's that came and went
    return found


def _memory_bytes(agent_pid: int) -> int:
    found = 0
    for process in process_tree.tree(psutil.Process(agent_pid)):
        try:
            found += process.memory_full_info().uss
        except psutil.NoSuchProcess:
            continue
    return found


@click.command(context_settings={"show_default": True})
@click.option("--mb", default=2048, type=click.IntRange(10), help="Size of the database, MiB.")
@click.option("--readers", default=15, type=click.IntRange(1, 15), help="How many are added.")
@click.option("--dir", "directory", default=DIRECTORY,
              type=click.Path(exists=True, file_okay=False, path_type=Path))  # fmt: skip
@click.option("--results", default=RESULTS, type=click.Path(file_okay=False, path_type=Path))
def main(*, mb: int, readers: int, directory: Path, results: Path) -> None:
    """Add readers to a database in a cluster of its own; writes a JSON file."""
    scale = max(1, round(mb * 2**20 / _SCALE_BYTES))
    with told_in_words(), boreal_alone(directory) as (engine, boreal, facts):
        done = measure(engine, boreal, scale=scale, readers=readers)
        path = write_result(results, "readers", {**facts, "scale": scale, **asdict(done)})
    print(f"a database of {done.database_bytes / 2**20:,.0f} MiB")
    for each in done.added:
        print(
            f"{each.name:<6} answered after {each.answered_s:.2f} s, with "
            f"{each.local_bytes / 2**20:.1f} MiB ({each.local_bytes / done.database_bytes:.1%})"
        )
    used = sorted(done.memory_bytes.values())
    print(f"memory of an instance: {used[0] / 2**20:,.0f} to {used[-1] / 2**20:,.0f} MiB")
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
