"""`make soak MINUTES=30`: does a cluster under steady load keep its size, its memory and its word?

pgbench (TPC-B) runs again and again; each run begins, as pgbench does, by emptying its history
table, so the data stay as large as they are and whatever else grows, grows because something is not
given back. Every few seconds is sampled what each storage node takes on disk (allocated blocks, by
directory), what memory each process has, how far the index is behind, and what pgbench says.

Judged is what comes after the warm-up (the first third): each node's size stays within ±20 % of its
mean, and no transaction failed. Memory is told as growth per hour: of anonymous memory, since what
is mapped from files is the kernel's to take back.
"""

from __future__ import annotations

import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import click
import psutil

from bench import load
from bench.single import DIRECTORY, RESULTS, boreal_alone, say, told_in_words, write_result
from bench.systems import Boreal
from boreal.engine import Engine
from boreal.errors import BorealError

FLATNESS = 0.20
"""How far a node's size may be from its mean, as a part of it."""
KEPT = 90
"""Samples that go into the file."""
_GRACE_S = 60.0
_PROGRESS = re.compile(
    r"^progress: (?P<epoch_s>[\d.]+) s, (?P<tps>[\d.]+) tps, lat (?P<latency_ms>[\d.]+|NaN) ms"
    r"(?:.*, (?P<failed>\d+) failed)?"
)
_NODE = re.compile(r"sn-\d+")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One soak."""

    minutes: float
    run_s: int
    """Of each pgbench."""
    sample_s: float
    clients: int
    scale: int
    bundle_s: float | None = None
    """How often a bundle is asked for, besides those the compute node takes by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The cluster at one moment."""

    at_s: float
    """Since the first load began."""
    disk_bytes: Mapping[str, Mapping[str, int]]
    """By node, then by directory of its volumes: allocated blocks."""
    rss_bytes: Mapping[str, int]
    anonymous_bytes: Mapping[str, int]
    """By process; PostgreSQL's together."""
    backlog_bytes: int | None

    def node_bytes(self, node: str) -> int:
        """All that a node takes."""
        return sum(self.disk_bytes[node].values())

    def record(self) -> dict[str, object]:
        """What is worth keeping of it."""
        return {
            "at_s": round(self.at_s, 1),
            "disk_mib": {node: self.node_bytes(node) >> 20 for node in self.disk_bytes},
            "log_mib": {node: parts.get("log", 0) >> 20 for node, parts in self.disk_bytes.items()},
            "anonymous_mib": {name: size >> 20 for name, size in self.anonymous_bytes.items()},
            "backlog_bytes": self.backlog_bytes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """A line of pgbench's progress."""

    at_s: float
    tps: float
    latency_ms: float | None
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Flatness:
    """A node's size after the warm-up."""

    warm_bytes: int
    """At the end of the warm-up."""
    mean_bytes: float
    lowest: float
    highest: float
    """As parts of the mean: 0.9, 1.1."""
    holds: bool
    """Whether that is flat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the samples amount to."""

    flatness: Mapping[str, Flatness]
    """By node."""
    memory_growth_bytes_per_hour: Mapping[str, float]
    """Of anonymous memory, by process, after the warm-up."""
    memory_last_bytes: Mapping[str, int]
    backlog_most_bytes: int
    tps_mean: float
    errors: Sequence[str]

    @property
    def holds(self) -> bool:
        """Flat, and without errors."""
        return not self.errors and all(each.holds for each in self.flatness.values())


# --- judging: pure -------------------------------------------------------------------------------


def thinned(items: Sequence[_T], most: int = KEPT) -> Sequence[_T]:
    """At most `most` of them, evenly spread, the last one among them."""
    step = -(-len(items) // most) or 1
    return items[::-1][::step][::-1]


def judge(
    samples: Sequence[Sample],
    throughput: Sequence[Throughput],
    errors: Sequence[str],
    flatness: float = FLATNESS,
) -> Verdict:
    """What at least three samples say after their first third; what is flat, `flatness` says."""
    warm = samples[len(samples) // 3 :]
    nodes = sorted(warm[0].disk_bytes)
    processes = sorted(set(warm[0].anonymous_bytes) & set(warm[-1].anonymous_bytes))
    failed = sum(each.failed for each in throughput)
    return Verdict(
        flatness={
            node: _flatness([sample.node_bytes(node) for sample in warm], flatness)
            for node in nodes
        },
        memory_growth_bytes_per_hour={
            process: 3600
            * slope(
                [
                    (sample.at_s, sample.anonymous_bytes[process])
                    for sample in warm
                    if process in sample.anonymous_bytes
                ]
            )
            for process in processes
        },
        memory_last_bytes={process: warm[-1].anonymous_bytes[process] for process in processes},
        backlog_most_bytes=max(sample.backlog_bytes or 0 for sample in samples),
        tps_mean=sum(each.tps for each in throughput) / max(1, len(throughput)),
        errors=[*errors, *([f"{failed} transactions failed"] if failed else [])],
    )


def _flatness(sizes: Sequence[int], allowed: float) -> Flatness:
    mean = sum(sizes) / len(sizes)
    lowest, highest = (each / mean if mean else 1.0 for each in (min(sizes), max(sizes)))
    return Flatness(
        warm_bytes=sizes[0],
        mean_bytes=mean,
        lowest=lowest,
        highest=highest,
        holds=1 - lowest <= allowed and highest - 1 <= allowed,
    )


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The least-squares line's rise for each unit; 0 where there is no line."""
    count = len(points)
    mean_x = sum(x for x, _ in points) / max(1, count)
    mean_y = sum(y for _, y in points) / max(1, count)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def parse_progress(lines: Iterable[str], began_epoch_s: float) -> list[Throughput]:
    """Read what pgbench says with --progress and --progress-timestamp."""
    found = []
    for line in lines:
        match = _PROGRESS.match(line)
        if match:
            latency = match["latency_ms"]
            found.append(
                Throughput(
                    at_s=float(match["epoch_s"]) - began_epoch_s,
                    tps=float(match["tps"]),
                    latency_ms=None if latency == "NaN" else float(latency),
                    failed=int(match["failed"] or 0),
                )
            )
    return found


def summary(verdict: Verdict) -> list[str]:
    """For people."""
    mib = 2**20
    lines = [f"{verdict.tps_mean:,.0f} transactions a second"]
    for node, flat in verdict.flatness.items():
        lines.append(
            f"{node}: {flat.warm_bytes / mib:,.0f} MiB after the warm-up; then {flat.lowest:.0%} "
            f"to {flat.highest:.0%} of {flat.mean_bytes / mib:,.0f} MiB"
            + ("" if flat.holds else "   NOT FLAT")
        )
    for process, growth in verdict.memory_growth_bytes_per_hour.items():
        last = verdict.memory_last_bytes[process]
        lines.append(
            f"{process}: {last / mib:,.1f} MiB at the end, {growth / mib:+,.1f} MiB an hour"
        )
    lines.append(f"the index was {verdict.backlog_most_bytes / mib:,.1f} MiB behind at most")
    lines += [f"ERROR {error}" for error in verdict.errors]
    lines.append("it holds" if verdict.holds else "it does NOT hold")
    return lines


# --- sampling ------------------------------------------------------------------------------------


def disk_bytes(directory: Path) -> dict[str, dict[str, int]]:
    """What each storage node of a cluster takes: log, bundles, and each part of pages."""
    found: dict[str, dict[str, int]] = {}
    for node in sorted(path for path in directory.iterdir() if _NODE.fullmatch(path.name)):
        parts = found[node.name] = dict[str, int]()
        for file in (node / "volumes").rglob("*"):
            try:
                found_here = file.stat()
            except FileNotFoundError:
                continue  # a segment that was dropped under the walk
            if stat.S_ISREG(found_here.st_mode):
                below = file.relative_to(node / "volumes").parts[1:-1]
                part = "/".join(below[: 2 if below[:1] == ("pages",) else 1]) or "state"
                parts[part] = parts.get(part, 0) + 512 * found_here.st_blocks
    return found


def memory_bytes(roots: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """(RSS, anonymous memory) of the processes below the named roots; PostgreSQL's together."""
    rss: dict[str, int] = {}
    anonymous: dict[str, int] = {}
    for name, pid in roots.items():
        try:
            root = psutil.Process(pid)
            members = [(name, root), *((_child(name, c), c) for c in root.children(recursive=True))]
        except psutil.NoSuchProcess:
            continue
        for label, process in members:
            fields = _status(process.pid)
            rss[label] = rss.get(label, 0) + fields.get("VmRSS", 0)
            anonymous[label] = anonymous.get(label, 0) + fields.get("RssAnon", 0)
    return rss, anonymous


def _child(name: str, process: psutil.Process) -> str:
    if _NODE.fullmatch(name):
        return f"{name} pages"
    try:
        postgres = process.name().startswith("postgres")
    except psutil.NoSuchProcess:
        postgres = True
    return f"{name} postgres" if postgres else f"{name} helpers"


def _status(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status (proc(5)), in bytes; empty once it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split() for line in text.splitlines() if line.endswith(" kB"))
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in pairs}


def take_sample(boreal: Boreal, began: float) -> Sample:
    """The cluster now."""
    rss, anonymous = memory_bytes(boreal.pids())
    state = boreal.storage_state()
    return Sample(
        at_s=time.monotonic() - began,
        disk_bytes=disk_bytes(boreal.directory),
        rss_bytes=rss,
        anonymous_bytes=anonymous,
        backlog_bytes=None if state is None else state.backlog_bytes,
    )


# --- running -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Soaked:
    """What a soak gathered."""

    samples: list[Sample]
    throughput: list[Throughput]
    errors: list[str]


def soak(engine: Engine, boreal: Boreal, plan: Plan) -> Soaked:
    """Run pgbench until the time is over, however often that is, and sample meanwhile."""
    say(f"filling at scale {plan.scale}")
    load.fill(engine, boreal.target, plan.scale, 120 + 60 * plan.scale)
    found = Soaked(samples=[], throughput=[], errors=[])
    began, began_epoch_s = time.monotonic(), time.time()
    sample_due_s, bundle_due_s = 0.0, plan.bundle_s

    def sample() -> None:
        nonlocal sample_due_s, bundle_due_s
        now_s = time.monotonic() - began
        try:
            if now_s >= sample_due_s:
                sample_due_s += plan.sample_s
                found.samples.append(take_sample(boreal, began))
            if plan.bundle_s and bundle_due_s and now_s >= bundle_due_s:
                bundle_due_s += plan.bundle_s
                boreal.take_bundle()
        except BorealError as error:
            found.errors.append(f"sampling: {error.message}")

    while (left_s := 60 * plan.minutes - (time.monotonic() - began)) > 0:
        seconds = max(1, min(plan.run_s, round(left_s)))
        code, lines = _pgbench(engine, boreal, plan, seconds, sample)
        fresh = parse_progress(lines, began_epoch_s)
        found.throughput.extend(fresh)
        found.errors.extend(line for line in lines if "error" in line.lower())
        if code != 0:
            found.errors.append(f"pgbench ended with exit code {code}")
            break
        sizes = [sample.node_bytes(node) / 2**20 for sample in found.samples[-1:]
                 for node in sample.disk_bytes]  # fmt: skip
        say(
            f"{(time.monotonic() - began) / 60:.1f} min: "
            f"{sum(each.tps for each in fresh) / max(1, len(fresh)):,.0f} tps, "
            f"{min(sizes, default=0):,.0f} to {max(sizes, default=0):,.0f} MiB a node"
        )
    found.samples.append(take_sample(boreal, began))
    return found


def _pgbench(
    engine: Engine, boreal: Boreal, plan: Plan, seconds: int, on_tick: Callable[[], None]
) -> tuple[int, list[str]]:
    """One run of TPC-B, history emptied first; its exit code and what it said."""
    command = [
        str(engine.tool("pgbench")),
        "--builtin=tpcb-like",
        f"--client={plan.clients}",
        "--jobs=2",
        f"--time={seconds}",
        f"--progress={max(1, round(plan.sample_s))}",
        "--progress-timestamp",
    ]
    output = boreal.directory / "pgbench.log"
    environment = engine.environment(boreal.target.environment())
    deadline = time.monotonic() + seconds + _GRACE_S
    with (
        output.open("wb") as log,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ) as process,
    ):
        try:
            while process.poll() is None and time.monotonic() < deadline:
                on_tick()
                try:
                    process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            process.kill()  # does nothing to a process that has ended
        code = process.wait()
    return code, output.read_text().splitlines()


@click.command(context_settings={"show_default": True})
@click.option("--minutes", default=30.0, type=click.FloatRange(0.2), help="How long in all.")
@click.option("--run-seconds", default=300, type=click.IntRange(5), help="Of each pgbench.")
@click.option("--sample-seconds", default=5.0, type=click.FloatRange(0.5))
@click.option("--clients", default=8, type=click.IntRange(1, 80))
@click.option("--scale", default=20, type=click.IntRange(1, 1000))
@click.option("--retain-log-mib", type=click.IntRange(1), help="As `boreal up` takes it.")
@click.option(
    "--bundle-seconds",
    type=click.FloatRange(0.5),
    help="Take bundles this often: log is kept from the oldest of three on.",
)
@click.option(
    "--flatness",
    default=FLATNESS,
    type=click.FloatRange(0, 1),
    help="How far from its mean a node's size may be.",
)
@click.option("--dir", "directory", default=DIRECTORY,
              type=click.Path(exists=True, file_okay=False, path_type=Path))  # fmt: skip
@click.option("--results", default=RESULTS, type=click.Path(file_okay=False, path_type=Path))
def main(
    *,
    minutes: float,
    run_seconds: int,
    sample_seconds: float,
    clients: int,
    scale: int,
    retain_log_mib: int | None,
    bundle_seconds: float | None,
    flatness: float,
    directory: Path,
    results: Path,
) -> None:
    """Soak a cluster of its own; writes a JSON file. Fails unless its size is flat and no error."""
    plan = Plan(
        minutes=minutes,
        run_s=run_seconds,
        sample_s=sample_seconds,
        clients=clients,
        scale=scale,
        bundle_s=bundle_seconds,
    )
    options = [] if retain_log_mib is None else ["--retain-log-mib", str(retain_log_mib)]
    with told_in_words(), boreal_alone(directory, options) as (engine, boreal, facts):
        found = soak(engine, boreal, plan)
        verdict = judge(found.samples, found.throughput, found.errors, flatness)
        content = {
            **facts,
            "plan": asdict(plan),
            "up_options": options,
            "holds": verdict.holds,
            "verdict": asdict(verdict),
            "errors": found.errors,
            "samples": [sample.record() for sample in thinned(found.samples)],
            "throughput": [asdict(line) for line in thinned(found.throughput)],
        }
        path = write_result(results, "soak", content)
    for line in summary(verdict):
        print(line)
    print(f"Written to {path}")
    sys.exit(0 if verdict.holds else 1)


if __name__ == "__main__":
    main()
