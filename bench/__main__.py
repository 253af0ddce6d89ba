"""The command: `python -m bench`, `make bench`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench import machine, report
from bench.choice import make_system
from bench.plan import BASELINE, Plan, Script, SystemName
from bench.runner import Failure, Outcome, Runner
from bench.systems import System
from bench.workspace import make_workspace, require_disk
from boreal.engine import Engine, find_engine
from boreal.errors import BorealError

_RESULTS = Path(__file__).parent / "results"
_DIRECTORY = Path("/var/tmp")
_FILE_COLUMNS = 220
"""The width of the tables where standard output is no terminal."""
_MAX_CLIENTS = 80
"""PostgreSQL's default is 100 connections, and Boreal's agent needs some for itself."""
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Choices(click.ParamType[tuple[Any, ...]]):
    """A comma-separated list of values of one kind, each once."""

    name = "list"

    def __init__(self, kind: Callable[[str], Any]) -> None:
        self._kind = kind

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(dict.fromkeys(self._kind(word.strip()) for word in value.split(",")))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _client_count(word: str) -> int:
    number = int(word)
    if not 1 <= number <= _MAX_CLIENTS:
        raise ValueError(f"{number} clients: must be from 1 to {_MAX_CLIENTS}")
    return number


@click.command(context_settings={"show_default": True})
@click.option("--seconds", default=20, type=click.IntRange(1, 3600), help="Length of each load.")
@click.option("--scale", default=20, type=click.IntRange(1, 1000), help="pgbench's scale factor.")
@click.option(
    "--clients", default="1,16,64", type=_Choices(_client_count), help="Numbers of clients."
)
@click.option("--scripts", default=",".join(Script), type=_Choices(Script))
@click.option("--systems", default=",".join(SystemName), type=_Choices(SystemName))
@click.option(
    "--dir",
    "directory",
    default=_DIRECTORY,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the data go while it runs: on a real disk, with room for some GB.",
)
@click.option(
    "--results",
    default=_RESULTS,
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the JSON file goes.",
)
def main(
    *,
    seconds: int,
    scale: int,
    clients: tuple[int, ...],
    scripts: tuple[Script, ...],
    systems: tuple[SystemName, ...],
    directory: Path,
    results: Path,
) -> None:
    """Compare Boreal with stock PostgreSQL, with and without a quorum, side by side.

    Prints a table and writes every figure to a JSON file. Leaves nothing else behind, also when it
    is interrupted.
    """
    plan = Plan(scripts=scripts, clients=clients, systems=systems, scale=scale, seconds=seconds)
    for number in _INTERRUPTS:
        signal.signal(number, signal.default_int_handler)
    try:
        failed = _bench(plan, directory, results)
    except BorealError as error:
        raise click.ClickException(error.message) from error
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; everything is removed") from None
    sys.exit(1 if failed else 0)


def _bench(plan: Plan, directory: Path, results: Path) -> bool:
    """Run it all, print and write the report. True if any load failed."""
    require_disk(directory)
    date = datetime.now(UTC)
    facts: dict[str, object] = {
        "date": date.isoformat(timespec="seconds"),
        "plan": asdict(plan),
        "baseline": BASELINE,
        "machine": machine.describe_machine(directory),
    }
    with make_workspace(directory) as workspace, _display() as display:
        display.say(
            f"{len(plan.cells)} loads × {len(plan.systems)} systems × {plan.seconds} s: "
            f"about {plan.estimate_s() / 60:.0f} minutes, in {workspace}"
        )
        engine = find_engine(workspace)
        facts["versions"] = machine.describe_versions(engine)
        with _started(plan, engine, workspace, display) as systems:
            outcomes = _measure(Runner(plan, systems, engine, display.show), plan, display, facts)
            titles = {name: system.title for name, system in systems.items()}
            path = results / f"{date:%Y%m%d-%H%M%S}.json"
            report.write_json(report.as_json(outcomes, facts), path)
    _print(outcomes, titles, path)
    return any(isinstance(outcome, Failure) for outcome in outcomes)


def _measure(
    runner: Runner, plan: Plan, display: _Display, facts: dict[str, object]
) -> list[Outcome]:
    facts["systems"] = {name: asdict(runner.prepare(name)) for name in plan.systems}
    outcomes = []
    for outcome in runner.measurements():
        display.say(report.line(outcome))
        outcomes.append(outcome)
    return outcomes


def _print(outcomes: list[Outcome], titles: Mapping[SystemName, str], path: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else _FILE_COLUMNS)
    console.print(report.load_table(outcomes, titles), report.cpu_table(outcomes, titles))
    for note in report.notes(outcomes, titles):
        console.print(note, highlight=False)
    console.print(f"Written to {path}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _started(
    plan: Plan, engine: Engine, workspace: Path, display: _Display
) -> Iterator[Mapping[SystemName, System]]:
    """All the systems, side by side; afterwards, whatever happened, none of their processes."""
    systems: dict[SystemName, System] = {}
    try:
        for name in plan.systems:
            display.show(f"{name}: starting", 0)
            systems[name] = make_system(name, engine, workspace / name, systems)
            systems[name].start()
        yield systems
    finally:
        display.show("stopping", 0)
        for number in _INTERRUPTS:  # a second Ctrl-C must not leave servers behind
            signal.signal(number, signal.SIG_IGN)
        with contextlib.ExitStack() as stops:  # one that cannot be stopped does not save the others
            for system in systems.values():
                stops.callback(system.stop)


class _Display:
    """What goes on, on standard error: a bar while it does, a line for what is done."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=1)

    def show(self, text: str, part: float) -> None:
        """Tell what is being done and which part of it is done, 0 to 1."""
        self._progress.update(self._task, description=text, completed=part)

    def say(self, text: str) -> None:
        """Leave a line."""
        self._progress.console.print(text, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _display() -> Iterator[_Display]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Display(progress)


if __name__ == "__main__":
    main()
