"""`make lag`: how long after it was written is a commit seen on a reader?

pgbench writes rows, each with the writer's clock_timestamp(), at a steady rate of commits through
the writer endpoint. On each reader a client asks in a tight loop for the rows it has not seen, each
with the reader's clock_timestamp() (one machine, one clock). A commit's lag is the difference when
it is first seen; so it holds the commit itself, its quorum included, whose latency pgbench tells.
Lags are counted after a warm-up.

Judged is, with exit code 1, that every reader saw every commit; whether pgbench held the rate is
told.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import click

from bench.control import Control
from bench.load import Target, parse_summary, percentile
from bench.session import Session
from bench.single import DIRECTORY, RESULTS, boreal_alone, say, told_in_words, write_result
from bench.systems import Boreal
from boreal import cluster
from boreal.engine import Engine
from boreal.errors import BorealError, Internal, ProcessFailed
from boreal.waiting import wait_until

_SCHEMA = "create table beats (id bigserial primary key, at timestamptz not null)"
_WRITE = "insert into beats (at) values (clock_timestamp());\n"
_READ = """
    select id, extract(epoch from clock_timestamp()) - extract(epoch from at)
    from beats where id > $1
"""
_WINDOW = 500
"""Rows commit out of the order of their ids, but not by so many."""
_PATIENCE_S = 30.0
_HELD = 0.97


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """Of one reader, in milliseconds."""

    commits: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    worst_ms: float
    looks_per_s: float
    """How often it was asked: a lag is too large by up to so long a wait."""

    @classmethod
    def of(cls, lags_s: Iterable[float], looks_per_s: float) -> Lag:
        """Of at least one commit."""
        ordered = sorted(1000 * each for each in lags_s)
        return cls(
            commits=len(ordered),
            p50_ms=percentile(ordered, 50),
            p95_ms=percentile(ordered, 95),
            p99_ms=percentile(ordered, 99),
            worst_ms=ordered[-1],
            looks_per_s=looks_per_s,
        )

    def __str__(self) -> str:
        return (
            f"p50 {self.p50_ms:.1f} ms, p95 {self.p95_ms:.1f}, p99 {self.p99_ms:.1f}, worst "
            f"{self.worst_ms:.1f}; {self.commits:,} commits, {self.looks_per_s:,.0f} looks a second"
        )


class Follower:
    """A client that looks for new rows on one reader, in a thread, from entering until leaving."""

    def __init__(self, dsn: str, warm_up_s: float) -> None:
        self._dsn = dsn
        self._warm_up_s = warm_up_s
        self._lags_s: list[float] = []
        self._looks = 0
        self._counted_s = 0.0
        self._failure: BorealError | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)
        self.seen = 0
        """Rows, those of the warm-up too."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        self._thread.join(_PATIENCE_S)

    def check(self) -> None:
        """Raise what ended it, if something did."""
        if self._failure is not None:
            raise self._failure

    def lag(self) -> Lag:
        """What it found; ProcessFailed if that is nothing."""
        self.check()
        if not self._lags_s:
            raise ProcessFailed("the reader showed no row")
        return Lag.of(self._lags_s, self._looks / self._counted_s)

    def _run(self) -> None:
        try:
            with Session(self._dsn, patience_s=_PATIENCE_S) as session:
                self._follow(session)
        except BorealError as error:
            self._failure = error

    def _follow(self, session: Session) -> None:
        unseen = Unseen()
        began = time.monotonic()
        while not self._stopping.is_set():
            rows = [
                (int(str(row)), float(str(lag_s)))
                for row, lag_s in session.query(_READ, str(unseen.below))
            ]
            fresh = unseen.take(row for row, _ in rows)
            self.seen += len(fresh)
            counted_s = time.monotonic() - began - self._warm_up_s
            if counted_s > 0:
                self._looks += 1
                self._counted_s = counted_s
                self._lags_s += [lag_s for row, lag_s in rows if row in fresh]


class Unseen:
    """Which rows of those shown again are new. Rows appear about in the order of their ids.

    Invariant: every row up to `below` was seen, or a good many after it were: it is none then.
    """

    def __init__(self) -> None:
        self.below = 0
        self._seen: set[int] = set()

    def take(self, shown: Iterable[int]) -> set[int]:
        """The new ones among rows above `below`; they count as seen from now on."""
        fresh = set(shown) - self._seen
        self._seen |= fresh
        if len(self._seen) > _WINDOW:
            self.below = min(self._seen) - 1
        while self.below + 1 in self._seen:
            self.below += 1
            self._seen.remove(self.below)
        return fresh


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What pgbench says of itself."""

    commits: int
    tps: float
    commit_ms: float
    """Of one commit, on average."""
    late_ms: float
    """How long after its turn one began, on average: large if the rate is not held."""


def parse_written(output: str) -> Written:
    """Read the output of a pgbench that was given a rate."""
    summary = parse_summary(output)
    match = re.search(r"^rate limit schedule lag: avg ([\d.]+) ", output, re.MULTILINE)
    if match is None:
        raise Internal(f"pgbench does not tell how late it was: {output[-500:]}")
    late_ms = float(match[1])
    return Written(
        commits=summary.transactions,
        tps=summary.tps,
        commit_ms=summary.latency_mean_ms - late_ms,
        late_ms=late_ms,
    )


def write_steadily(
    engine: Engine, target: Target, directory: Path, *, rate: int, clients: int, seconds: float
) -> Written:
    """Run pgbench at `rate` commits a second."""
    script = directory / "beat.sql"
    script.write_text(_WRITE)
    done = subprocess.run(
        [
            *(
                str(engine.tool("pgbench")),
                "--no-vacuum",
                f"--file={script}",
                "--protocol=prepared",
            ),
            *(f"--rate={rate}", f"--client={clients}", "--jobs=1", f"--time={seconds:.0f}"),
        ],
        env=engine.environment(target.environment()),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds + _PATIENCE_S,
        check=False,
    )
    if done.returncode != 0:
        raise ProcessFailed(f"pgbench failed: {done.stderr.strip()[-300:]}")
    return parse_written(done.stdout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run."""

    written: Written
    lags: dict[str, Lag]
    """By reader."""
    unseen: dict[str, int]
    """Commits that a reader never showed, by reader."""


def measure(
    engine: Engine,
    boreal: Boreal,
    *,
    readers: Sequence[str],
    rate: int,
    clients: int,
    seconds: float,
    warm_up_s: float,
) -> Measured:
    """Write, and read on every reader meanwhile."""
    config = cluster.load(boreal.directory)
    with Session(boreal.target.dsn, patience_s=_PATIENCE_S) as session:
        session.query(_SCHEMA)
    for name in readers:
        _await_table(config.instance_dsn(name))
    followers = {name: Follower(config.instance_dsn(name), warm_up_s) for name in readers}
    with contextlib.ExitStack() as running:
        for follower in followers.values():
            running.enter_context(follower)
        say(f"{rate} commits a second for {seconds + warm_up_s:.0f} s")
        written = write_steadily(
            engine, boreal.target, boreal.directory, rate=rate, clients=clients,
            seconds=seconds + warm_up_s,
        )  # fmt: skip
        _await_all_seen(list(followers.values()), written.commits)
    return Measured(
        written=written,
        lags={name: follower.lag() for name, follower in followers.items()},
        unseen={name: written.commits - each.seen for name, each in followers.items()},
    )


def _await_table(dsn: str) -> None:
    def there() -> bool:
        with Session(dsn, patience_s=_PATIENCE_S) as session:
            return session.query("select to_regclass('beats') is not null") == [("t",)]

    wait_until(
        there, timeout_s=_PATIENCE_S, otherwise=lambda: ProcessFailed("a reader does not follow")
    )


def _await_all_seen(followers: Sequence[Follower], written: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while any(each.seen < written for each in followers) and time.monotonic() < deadline:
        for each in followers:
            each.check()
        time.sleep(0.05)


@click.command(context_settings={"show_default": True})
@click.option("--rate", default=1000, type=click.IntRange(1), help="Commits a second.")
@click.option("--seconds", default=30.0, type=click.FloatRange(1), help="That count.")
@click.option("--warm-up", "warm_up_s", default=5.0, type=click.FloatRange(0), help="Seconds.")
@click.option("--clients", default=16, type=click.IntRange(1, 80), help="That write.")
@click.option("--readers", default=1, type=click.IntRange(1, 15))
@click.option("--dir", "directory", default=DIRECTORY,
              type=click.Path(exists=True, file_okay=False, path_type=Path))  # fmt: skip
@click.option("--results", default=RESULTS, type=click.Path(file_okay=False, path_type=Path))
def main(
    *,
    rate: int,
    seconds: float,
    warm_up_s: float,
    clients: int,
    readers: int,
    directory: Path,
    results: Path,
) -> None:
    """Measure the readers' lag on a cluster of its own; writes a JSON file."""
    options = ["--readers", str(readers)]
    with told_in_words(), boreal_alone(directory, options) as (engine, boreal, facts):
        done = measure(
            engine, boreal, readers=_reader_names(boreal), rate=rate, clients=clients,
            seconds=seconds, warm_up_s=warm_up_s,
        )  # fmt: skip
        plan = {"rate": rate, "seconds": seconds, "clients": clients, "readers": readers}
        path = write_result(results, "lag", {**facts, "plan": plan, **asdict(done)})
    held = "" if done.written.tps >= _HELD * rate else f"; the rate of {rate} was NOT held"
    print(
        f"{done.written.tps:,.0f} commits a second of {done.written.commit_ms:.1f} ms on average, "
        f"begun {done.written.late_ms:.1f} ms late{held}"
    )
    for name, lag in done.lags.items():
        print(f"{name}: {lag}")
    missing = {name: count for name, count in done.unseen.items() if count > 0}
    for name, count in missing.items():
        print(f"VIOLATED: {count} commits never were seen on {name}")
    print(f"Written to {path}")
    sys.exit(1 if missing else 0)


def _reader_names(boreal: Boreal) -> list[str]:
    status = Control(boreal.directory).try_status()
    if status is None:
        raise ProcessFailed("the control plane does not answer")
    return [name for name in cluster.load(boreal.directory).instance_names if name != status.writer]


if __name__ == "__main__":
    main()
