"""What the commands share that measure one Boreal cluster by itself."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import click

from bench import machine, report
from bench.systems import Boreal
from bench.workspace import make_workspace, require_disk
from boreal.engine import Engine, find_engine
from boreal.errors import BorealError, ProcessFailed

RESULTS = Path(__file__).parent / "results"
DIRECTORY = Path("/var/tmp")
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DRAINED_BYTES = 64 * 1024
_DRAIN_S = 1800.0
_SETTLE_S = 1800.0


@contextlib.contextmanager
def boreal_alone(
    directory: Path, options: Sequence[str] = ()
) -> Iterator[tuple[Engine, Boreal, dict[str, object]]]:
    """A cluster started fresh, and the facts of the run; afterwards neither it nor its data."""
    require_disk(directory)
    facts: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe_machine(directory),
    }
    with make_workspace(directory) as workspace:
        engine = find_engine(workspace)
        facts["versions"] = machine.describe_versions(engine)
        boreal = Boreal(workspace / "boreal", options=options)
        try:
            boreal.start()
            yield engine, boreal, facts
        finally:
            for number in _INTERRUPTS:  # a second Ctrl-C must not leave servers behind
                signal.signal(number, signal.SIG_IGN)
            boreal.stop()


@contextlib.contextmanager
def told_in_words() -> Iterator[None]:
    """Errors and interrupts of a command, as people see them."""
    for number in _INTERRUPTS:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    except BorealError as error:
        raise click.ClickException(error.message) from error
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; everything is removed") from None


def say(text: str) -> None:
    """Leave a line on standard error, with the time."""
    print(f"{datetime.now(UTC):%H:%M:%S}  {text}", file=sys.stderr, flush=True)


def drain(boreal: Boreal) -> float:
    """Wait until every storage node has indexed its log; how long that took."""
    began = time.monotonic()
    while (waited_s := time.monotonic() - began) < _DRAIN_S:
        state = boreal.storage_state()
        if state is not None and state.backlog_bytes < _DRAINED_BYTES:
            return waited_s
        time.sleep(0.2)
    raise ProcessFailed(f"storage did not index its log within {_DRAIN_S:.0f} s")


def settle(boreal: Boreal) -> float | None:
    """Wait until every storage node has stored the pages a load left; how long that took.

    None if they were still at it when the wait was given up.
    """
    began = time.monotonic()
    while (waited_s := time.monotonic() - began) < _SETTLE_S:
        if boreal.unsettled_layers() == 0:
            return waited_s
        time.sleep(0.5)
    return None


def write_result(results: Path, name: str, content: Mapping[str, object]) -> Path:
    """Write the JSON file of a run; its path."""
    path = results / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    report.write_json(json.dumps(content, indent=2, allow_nan=False) + "\n", path)
    return path
