"""One measurement after the other, and the waiting between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import LiteralString

from bench import accounting, load
from bench.accounting import Kind, Usages
from bench.load import Load
from bench.plan import Cell, Plan, SystemName
from bench.postgres import query
from bench.systems import StorageState, System
from boreal.engine import Engine
from boreal.errors import BorealError
from boreal.types import parse_lsn

_IDLE_CORES = 0.25
"""A system that uses less of a core than this has done its work: heartbeats are not nothing."""
_SETTLE_S = 30.0
_SETTLE_STEP_S = 0.5
_DRAIN_S = 120.0
_DRAIN_STEP_S = 0.1
_DRAINED_BYTES = 64 * 1024
"""What an idle system writes by itself, and the beginning of a record, is no backlog."""
_WARM_UP_S = 2
_SETTINGS: LiteralString = (
    "SELECT name, current_setting(name) FROM pg_settings WHERE name IN ("
    "'server_version', 'shared_buffers', 'fsync', 'synchronous_commit', 'full_page_writes', "
    "'wal_level', 'wal_compression', 'wal_consistency_checking', 'wal_buffers', 'max_wal_size', "
    "'checkpoint_timeout', 'autovacuum', 'max_connections', 'synchronous_standby_names')"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One load on one system. CPU and log are counted until the system was idle again, so work put
    off (replay on standbys, page ingest) is charged to the load that caused it.
    """

    cell: Cell
    system: SystemName
    load: Load
    wal_bytes: int
    shipped_bytes: int | None
    cpu_s: Mapping[Kind, float]
    elsewhere_share: float
    """Of the machine's CPU, used by anything else during the load: other programs, the kernel's own
    threads, other guests on the host. What makes figures of a shared machine doubtful."""
    settle_s: float
    settled: bool
    """False if the system still worked when the wait for it to be idle was given up."""
    storage: StorageState | None
    """Right after the load; None where there is none."""
    drain_s: float | None
    """From the end of the load until every storage node had indexed its log; None if it never came
    to that."""

    def per_transaction(self, total: float) -> float:
        """`total` over the transactions of the load; NaN if there were none."""
        transactions = self.load.summary.transactions
        return total / transactions if transactions else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A load that did not come to its end."""

    cell: Cell
    system: SystemName
    reason: str


Outcome = Measurement | Failure
Report = Callable[[str, float], None]
"""Told what is being done and which part of it is done, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A system with tables in it."""

    fill_s: float
    settings: Mapping[str, str]


class Runner:
    """Drives systems that have been started through a plan: one works, the others are paused."""

    def __init__(
        self, plan: Plan, systems: Mapping[SystemName, System], engine: Engine, report: Report
    ) -> None:
        self._plan = plan
        self._systems = systems
        self._engine = engine
        self._report = report

    def prepare(self, name: SystemName) -> Prepared:
        """Make the tables, warm up, and leave the system paused."""
        system = self._systems[name]
        system.resume()  # it may be another one's cluster, which was left paused
        self._report(f"{name}: filling at scale {self._plan.scale}", 0)
        began = time.monotonic()
        load.fill(self._engine, system.target, self._plan.scale, 60 + 30 * self._plan.scale)
        took_s = time.monotonic() - began
        self._report(f"{name}: warming up", 0)
        warm_up_s = min(_WARM_UP_S, self._plan.seconds)
        load.run(self._engine, system.target, self._plan.cells[0], warm_up_s, lambda: None)
        self._settle(system)
        settings = dict(query(system.target, _SETTINGS))
        system.pause()
        return Prepared(fill_s=took_s, settings=settings)

    def measurements(self) -> Iterator[Outcome]:
        """Run the plan, on prepared systems. A load that fails is an outcome; the others go on."""
        for cell, name in self._plan.measurements():
            system = self._systems[name]
            try:
                system.resume()
                yield self._measure(cell, name)
            except BorealError as error:
                yield Failure(cell=cell, system=name, reason=error.message)
            finally:
                system.pause()

    def _measure(self, cell: Cell, name: SystemName) -> Measurement:
        system = self._systems[name]
        _tidy(system)
        self._settle(system)
        wal_before, shipped_before = _log_position(system), system.shipped_bytes()
        before, busy_before_s = _usages(system), accounting.machine_busy_s()
        began = time.monotonic()
        with system.under_load():
            done = self._load(cell, name)
            elapsed_s = time.monotonic() - began
            busy_s = accounting.machine_busy_s() - busy_before_s
            ours_s = sum(accounting.spent(before, _usages(system)).values()) + done.pgbench_cpu_s
            storage = system.storage_state()
        self._report(f"{name}: {cell}: waiting until it is idle", 1)
        drain_s = self._drain(system)
        settle_s, settled = self._settle(system)
        shipped_after = system.shipped_bytes()
        return Measurement(
            cell=cell,
            system=name,
            load=done,
            wal_bytes=_log_position(system) - wal_before,
            shipped_bytes=_difference(shipped_after, shipped_before),
            cpu_s=accounting.spent(before, _usages(system)),
            elsewhere_share=max(0.0, busy_s - ours_s) / (elapsed_s * accounting.cores()),
            settle_s=settle_s,
            settled=settled,
            storage=storage,
            drain_s=drain_s,
        )

    def _load(self, cell: Cell, name: SystemName) -> Load:
        began = time.monotonic()

        def tick() -> None:
            done = (time.monotonic() - began) / self._plan.seconds
            self._report(f"{name}: {cell}", min(done, 1.0))

        tick()
        return load.run(self._engine, self._systems[name].target, cell, self._plan.seconds, tick)

    def _drain(self, system: System) -> float | None:
        """Wait until storage has indexed its log; how long that took."""
        began = time.monotonic()
        while (waited_s := time.monotonic() - began) < _DRAIN_S:
            state = system.storage_state()
            if state is None:
                return None
            if state.backlog_bytes < _DRAINED_BYTES:
                return waited_s
            time.sleep(_DRAIN_STEP_S)
        return None

    def _settle(self, system: System) -> tuple[float, bool]:
        """Wait until the system idles; how long that took, and whether it came to it."""
        began = time.monotonic()
        before = _usages(system)
        while (waited_s := time.monotonic() - began) < _SETTLE_S:
            time.sleep(_SETTLE_STEP_S)
            after = _usages(system)
            if sum(accounting.spent(before, after).values()) < _IDLE_CORES * _SETTLE_STEP_S:
                return waited_s, True
            before = after
        return waited_s, False


def _tidy(system: System) -> None:
    # What pgbench does itself before a load, done here so that it is not counted as part of it.
    query(system.target, "VACUUM pgbench_branches")
    query(system.target, "VACUUM pgbench_tellers")
    query(system.target, "TRUNCATE pgbench_history")


def _usages(system: System) -> Usages:
    return accounting.attribute(accounting.process_table(), system.trees())


def _log_position(system: System) -> int:
    return parse_lsn(str(query(system.target, "SELECT pg_current_wal_lsn()::text")[0][0]))


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before
