"""pgbench: fill the tables, run a load, read what it says."""

from __future__ import annotations

import re
import resource
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bench.plan import Cell
from boreal.engine import Engine
from boreal.errors import Internal, ProcessFailed

SAMPLING_RATE = 0.25
"""The part of the transactions pgbench logs. Enough for a p99, light enough not to be measured."""
_THREADS = 2
_GRACE_S = 30
"""How much longer than asked pgbench may take: a commit may be waiting for its quorum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where SQL is served. Always TCP, so that every system pays for the same client connection."""

    host: str
    port: int
    user: str
    password: str
    database: str

    @classmethod
    def parse(cls, dsn: str) -> Target:
        """Read a libpq connection string or URL."""
        parts = conninfo_to_dict(dsn)
        return cls(
            host=str(parts["host"]),
            port=int(parts["port"] or 5432),
            user=str(parts["user"]),
            password=str(parts.get("password") or ""),
            database=str(parts["dbname"]),
        )

    @property
    def dsn(self) -> str:
        """A libpq connection string."""
        return make_conninfo(
            host=self.host,
            port=self.port,
            user=self.user,
            password=self.password,
            dbname=self.database,
        )

    def environment(self) -> dict[str, str]:
        """For a libpq program: keeps the password out of the process table."""
        return {
            "PGHOST": self.host,
            "PGPORT": str(self.port),
            "PGUSER": self.user,
            "PGPASSWORD": self.password,
            "PGDATABASE": self.database,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What pgbench says at its end."""

    transactions: int
    failed: int
    tps: float
    latency_mean_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One run of pgbench."""

    summary: Summary
    p50_ms: float
    p95_ms: float
    p99_ms: float
    sampled: int
    pgbench_cpu_s: float


def parse_summary(output: str) -> Summary:
    """Read pgbench's standard output. Internal if it is not that of a finished run."""

    def figure(pattern: str) -> float:
        match = re.search(pattern, output, re.MULTILINE)
        if match is None:
            raise Internal(f"pgbench's output has no line like {pattern!r}: {output[-500:]}")
        return float(match[1])

    return Summary(
        transactions=int(figure(r"^number of transactions actually processed: (\d+)")),
        failed=int(figure(r"^number of failed transactions: (\d+)")),
        tps=figure(
            r"^tps = ([\d.]+) \((?:without initial connection time|including reconnection times)\)"
        ),
        latency_mean_ms=figure(r"^latency average = ([\d.]+) ms"),
    )


def parse_log(lines: Iterable[str]) -> list[float]:
    """Read the latencies (ms) of a transaction log: `client number time_us script epoch_s us`.

    A failed or skipped transaction has a word instead of a time, and is none.
    """
    latencies = []
    for line in lines:
        fields = line.split()
        if len(fields) >= 6 and fields[2].isdecimal():
            latencies.append(int(fields[2]) / 1000)
    return latencies


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of ascending values; NaN of nothing."""
    if not ordered:
        return float("nan")
    rank = -(-len(ordered) * percent // 100)  # ceiling
    return ordered[max(int(rank), 1) - 1]


def fill(engine: Engine, target: Target, scale: int, deadline_s: float) -> None:
    """Make pgbench's tables."""
    command = [str(engine.tool("pgbench")), "--initialize", "--quiet", f"--scale={scale}"]
    _run(command, engine.environment(target.environment()), deadline_s, lambda: None)


def run(
    engine: Engine, target: Target, cell: Cell, seconds: int, on_tick: Callable[[], None]
) -> Load:
    """Run one load, calling `on_tick` several times a second. ProcessFailed if a client failed."""
    with tempfile.TemporaryDirectory(prefix="pgbench-") as scratch:
        command = [
            str(engine.tool("pgbench")),
            "--no-vacuum",
            *cell.script.options,
            f"--client={cell.clients}",
            f"--jobs={min(cell.clients, _THREADS)}",
            f"--time={seconds}",
            "--log",
            f"--log-prefix={scratch}/log",
            f"--sampling-rate={SAMPLING_RATE}",
        ]
        cpu_before_s = _children_cpu_s()
        environment = engine.environment(target.environment())
        output = _run(command, environment, seconds + _GRACE_S, on_tick)
        cpu_s = _children_cpu_s() - cpu_before_s
        latencies: list[float] = []
        for path in Path(scratch).iterdir():
            with path.open() as lines:
                latencies += parse_log(lines)
    latencies.sort()
    return Load(
        summary=parse_summary(output),
        p50_ms=percentile(latencies, 50),
        p95_ms=percentile(latencies, 95),
        p99_ms=percentile(latencies, 99),
        sampled=len(latencies),
        pgbench_cpu_s=cpu_s,
    )


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _run(
    command: Sequence[str],
    environment: dict[str, str],
    deadline_s: float,
    on_tick: Callable[[], None],
) -> str:
    tick_s = 0.2
    with (
        tempfile.TemporaryFile("w+") as stdout,
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
        ) as process,
    ):
        try:
            for _ in range(int(deadline_s / tick_s)):
                try:
                    process.wait(timeout=tick_s)
                except subprocess.TimeoutExpired:
                    on_tick()
                else:
                    break
            else:
                raise ProcessFailed(f"pgbench did not end within {deadline_s:.0f} s")
        finally:
            process.kill()  # does nothing to a process that has ended
        stderr.seek(0)
        if process.wait() != 0:
            raise ProcessFailed(f"pgbench failed: {_first_error(stderr.read())}")
        stdout.seek(0)
        return stdout.read()


def _first_error(stderr: str) -> str:
    errors = [line for line in stderr.splitlines() if "error" in line.lower()]
    return (errors or [stderr.strip()[-300:]])[0]
