"""`make failover`: what clients notice of a failover, and whether everything holds meanwhile.

A cluster of its own with readers; pgbench and a few clients that commit row after row through the
writer endpoint and note every acknowledgement (bench/ledger.py). Then the writer fails, again and
again and each time in the next way (bench/faults.py), and is afterwards moved on purpose. A frozen
writer goes on a second after the new one's first commit, so that it meets a cluster that went on
without it.

The stall is the longest wait of any of those clients for its next acknowledgement. They reconnect
at once, and give up a connection that says nothing for a second: nobody else can tell a client that
its server is frozen.

Judged is, with exit code 1: no acknowledged commit is missing on any instance; acknowledgements
obey one order, so there never were two writers; no session that still holds its server for the
writer is shown less than was acknowledged; every old writer comes back as a reader by itself.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path

import click

from bench import load
from bench.background import Pgbench
from bench.control import Control, is_reader, serving_writer
from bench.faults import MIXED, UNPLANNED, Kind, inject
from bench.ledger import SCHEMA, Ack, LedgerClient, Watcher, longest_gap_s
from bench.rounds import Found, Plan, Round, judge, summary
from bench.session import Session
from bench.single import DIRECTORY, RESULTS, boreal_alone, told_in_words, write_result
from bench.systems import Boreal
from boreal import cluster
from boreal.engine import Engine
from boreal.errors import BorealError, ProcessFailed
from boreal.rpc import control_pb2
from boreal.waiting import wait_until

_SERVED_S = 60.0
"""How long a round may take to have a new writer, and then its old one back as a reader."""
_RESUME_AFTER_S = 1.0
_LEDGER_PAUSE_S = 0.005
_WATCH_PATIENCE_S = 20.0


class Experiment:
    """The rounds of one run on a running cluster."""

    def __init__(self, engine: Engine, boreal: Boreal, plan: Plan) -> None:
        self._directory = boreal.directory
        self._control = Control(boreal.directory)
        self._plan = plan
        dsn = boreal.target.dsn
        self._clients = [
            LedgerClient(dsn, number, pause_s=_LEDGER_PAUSE_S)
            for number in range(plan.ledger_clients)
        ]
        config = cluster.load(boreal.directory)
        self._names = config.instance_names
        self._watchers = [
            Watcher(config.instance_dsn(name), name, client=0, patience_s=_WATCH_PATIENCE_S)
            for name in self._names
        ]
        self._load = Pgbench(
            engine, boreal.target, boreal.directory, plan.load_clients, plan.load_rate
        )
        self.found = Found()

    def run(self) -> None:
        """All rounds, then the checks; what was found is in `found`, also if it fails half-way."""
        with contextlib.ExitStack() as running:
            for worker in (*self._clients, *self._watchers):
                running.enter_context(worker)
            running.enter_context(self._load)
            for number, kind in enumerate(self._plan.kinds, start=1):
                this = self._round(number, kind)
                self.found.rounds.append(this)
                print(this, flush=True)
            self._settled()
        self._check()

    def _round(self, number: int, kind: Kind) -> Round:
        before = self._settled()
        self._progress("before the round", lambda ack: ack.writer == before.writer)
        time.sleep(self._plan.pause_s)
        seen = max((event.id for event in self._control.events()), default=0)
        began_s, began_unix_s = time.monotonic(), time.time()
        undo = None
        if kind is Kind.PLANNED:
            self._control.fail_over()
        else:
            undo = inject(kind, self._directory, before.writer)
        self._progress("after the fault", lambda ack: ack.writer != before.writer)
        self._load.restart()  # a pgbench that is connected to a frozen server waits for ever
        if undo is not None:
            time.sleep(_RESUME_AFTER_S)
            undo()
        undone_s = time.monotonic() if undo is not None else began_s
        after = self._await_reader(before.writer)
        events = self._control.events(seen)
        started = _first(events, control_pb2.Event.FAILOVER_STARTED)
        completed = _first(events, control_pb2.Event.FAILOVER_COMPLETED)
        return Round(
            number=number,
            kind=kind,
            old_writer=before.writer,
            new_writer=after.writer,
            old_epoch=before.volume.epoch,
            new_epoch=after.volume.epoch,
            noticed_s=started.unix_ms / 1000 - began_unix_s if started else None,
            took_s=completed.took_ms / 1000 if completed else None,
            stall_s=max(longest_gap_s(client.acks, began_s) for client in self._clients),
            returned_s=time.monotonic() - undone_s,
        )

    def _settled(self) -> control_pb2.ClusterStatus:
        """Wait until there is a writer and everybody else is a reader."""

        def settled() -> control_pb2.ClusterStatus | None:
            status = self._control.try_status()
            if status is None or serving_writer(status) is None:
                return None
            others = [name for name in self._names if name != status.writer]
            return status if all(is_reader(status, name) for name in others) else None

        return _within(settled, "no writer with every other instance as its reader")

    def _await_reader(self, name: str) -> control_pb2.ClusterStatus:
        def returned() -> control_pb2.ClusterStatus | None:
            status = self._control.try_status()
            if status is None or serving_writer(status) is None:
                return None
            return status if is_reader(status, name) else None

        return _within(returned, f"{name}, the old writer, did not come back as a reader")

    def _progress(self, when: str, condition: Callable[[Ack], bool]) -> None:
        for client in self._clients:
            if not client.wait_for(condition, _SERVED_S):
                raise ProcessFailed(
                    f"a client had no commit acknowledged for {_SERVED_S:.0f} s {when}; its last "
                    f"words: {client.last_failure}"
                )

    def _check(self) -> None:
        found = self.found
        acks = [ack for client in self._clients for ack in client.acks]
        found.acknowledged = len(acks)
        found.looks = sum(len(watcher.sights) for watcher in self._watchers)
        for client in self._clients:
            for kind, count in client.failures.items():
                found.failures[kind] = found.failures.get(kind, 0) + count
        config = cluster.load(self._directory)
        sights = [sight for watcher in self._watchers for sight in watcher.sights]
        present = {str(name): _rows(config.instance_dsn(name), len(acks)) for name in self._names}
        found.violations += judge(found.rounds, acks, sights, present)


def _rows(dsn: str, at_least: int) -> set[tuple[int, int]]:
    """The ledger as an instance shows it, once it shows so many rows or has had its time."""
    deadline = time.monotonic() + _SERVED_S
    while True:
        with Session(dsn, patience_s=_SERVED_S) as session:
            rows = session.query("select client, number from ledger")
        if len(rows) >= at_least or time.monotonic() > deadline:
            return {(int(str(client)), int(str(number))) for client, number in rows}
        time.sleep(0.2)


def _first(
    events: Sequence[control_pb2.Event], kind: control_pb2.Event.Kind.ValueType
) -> control_pb2.Event | None:
    return next((event for event in events if event.kind == kind), None)


def _within(
    condition: Callable[[], control_pb2.ClusterStatus | None], otherwise: str
) -> control_pb2.ClusterStatus:
    found = wait_until(
        condition,
        timeout_s=_SERVED_S,
        otherwise=lambda: ProcessFailed(f"{otherwise}, for {_SERVED_S:.0f} s"),
        poll_s=0.05,
    )
    if found is None:
        raise ProcessFailed(otherwise)
    return found


# --- the command ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _logs_kept(directory: Path, results: Path, found: Found) -> Iterator[None]:
    """If something does not hold or fails, keep the processes' logs: the cluster is removed."""
    try:
        yield
    except BorealError as error:
        found.violations.append(error.message)
    if found.violations:
        kept = results / f"failover-logs-{time.strftime('%Y%m%d-%H%M%S')}"
        shutil.copytree(directory / "logs", kept)
        print(f"The logs of its processes are in {kept}", flush=True)


@click.command(context_settings={"show_default": True})
@click.option("--unplanned", default=20, type=click.IntRange(0), help="Rounds.")
@click.option("--planned", default=5, type=click.IntRange(0), help="Rounds.")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice([str(kind) for kind in UNPLANNED]),
    help="Of the unplanned, in turn; all of them unless given.",
)
@click.option("--readers", default=2, type=click.IntRange(1, 15))
@click.option("--scale", default=5, type=click.IntRange(1, 1000), help="Of pgbench's tables.")
@click.option("--load-clients", default=4, type=click.IntRange(1, 80), help="Of pgbench.")
@click.option("--load-rate", default=0, type=click.IntRange(0), help="tps; 0: what it can.")
@click.option("--ledger-clients", default=2, type=click.IntRange(1, 40))
@click.option("--pause", "pause_s", default=2.0, help="Seconds of load before each round.")
@click.option("--dir", "directory", default=DIRECTORY,
              type=click.Path(exists=True, file_okay=False, path_type=Path))  # fmt: skip
@click.option("--results", default=RESULTS, type=click.Path(file_okay=False, path_type=Path))
def main(
    *,
    unplanned: int,
    planned: int,
    kinds: Sequence[str],
    readers: int,
    scale: int,
    load_clients: int,
    load_rate: int,
    ledger_clients: int,
    pause_s: float,
    directory: Path,
    results: Path,
) -> None:
    """Fail over again and again on a cluster of its own; writes a JSON file."""
    in_turn = [Kind(kind) for kind in kinds] or MIXED
    plan = Plan(
        kinds=[*islice(cycle(in_turn), unplanned), *([Kind.PLANNED] * planned)],
        readers=readers,
        scale=scale,
        load_clients=load_clients,
        load_rate=load_rate,
        ledger_clients=ledger_clients,
        pause_s=pause_s,
    )
    with (
        told_in_words(),
        boreal_alone(directory, ["--readers", str(readers)]) as (engine, boreal, facts),
    ):
        load.fill(engine, boreal.target, scale, 120 + 60 * scale)
        with Session(boreal.target.dsn, patience_s=_SERVED_S) as session:
            session.query(SCHEMA)
        experiment = Experiment(engine, boreal, plan)
        found = experiment.found
        with _logs_kept(boreal.directory, results, found):
            experiment.run()
        content = {
            **facts,
            "plan": asdict(plan),
            "holds": not found.violations,
            "stalls": {name: asdict(each) for name, each in found.stalls().items()},
            **asdict(found),
        }
        path = write_result(results, "failover", content)
    for line in summary(found):
        print(line)
    print(f"Written to {path}")
    sys.exit(1 if found.violations else 0)


if __name__ == "__main__":
    main()
