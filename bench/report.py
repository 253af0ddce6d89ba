"""The tables for people and the JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from bench.accounting import Kind
from bench.plan import BASELINE, Cell, SystemName
from bench.runner import Failure, Measurement, Outcome

_Outcome = TypeVar("_Outcome", Measurement, Outcome)

_NOISE_SHARE = 0.10
"""Where other work took more than this part of the machine, the table says so."""


def ratio(outcomes: Sequence[Outcome], measurement: Measurement) -> float | None:
    """Its tps over the baseline's in the same cell; None where the baseline has none."""
    for other in outcomes:
        if (
            isinstance(other, Measurement)
            and (other.cell, other.system) == (measurement.cell, BASELINE)
            and other.load.summary.tps
        ):
            return measurement.load.summary.tps / other.load.summary.tps
    return None


def load_table(outcomes: Sequence[Outcome], titles: Mapping[SystemName, str]) -> Table:
    """Throughput, latency and log volume."""
    table = Table(title="pgbench, side by side", title_justify="left", expand=False)
    table.add_column("load", no_wrap=True)
    table.add_column("system", no_wrap=True)
    for heading in ("tps", f"× {BASELINE}", "mean ms", "p50", "p95", "p99",
                    "ack p50", "ack p99", "backlog MiB", "drained s",
                    "WAL B/tx", "shipped B/tx", "CPU ms/tx", "other load"):  # fmt: skip
        table.add_column(heading, justify="right")
    for cell, group in _by_cell(outcomes, titles):
        for outcome in group:
            label = str(cell) if outcome is group[0] else ""
            table.add_row(label, str(outcome.system), *_load_cells(outcomes, outcome))
        table.add_section()
    return table


def cpu_table(outcomes: Sequence[Outcome], titles: Mapping[SystemName, str]) -> Table:
    """CPU by kind of process."""
    measured = [outcome for outcome in outcomes if isinstance(outcome, Measurement)]
    kinds = [kind for kind in Kind if any(kind in one.cpu_s for one in measured)]
    table = Table(
        title="CPU milliseconds per transaction, by kind of process", title_justify="left"
    )
    table.add_column("load", no_wrap=True)
    table.add_column("system", no_wrap=True)
    for heading in (*kinds, "in all", "(pgbench)"):
        table.add_column(heading, justify="right")
    for cell, group in _by_cell(measured, titles):
        for one in group:
            figures = [one.cpu_s.get(kind) for kind in kinds]
            figures += [sum(one.cpu_s.values()), one.load.pgbench_cpu_s]
            table.add_row(
                str(cell) if one is group[0] else "",
                str(one.system),
                *("" if s is None else f"{one.per_transaction(1000 * s):.3f}" for s in figures),
            )
        table.add_section()
    return table


def line(outcome: Outcome) -> str:
    """One outcome as it comes."""
    where = f"{outcome.cell!s:<26} {outcome.system:<21}"
    if isinstance(outcome, Failure):
        return f"{where} failed: {outcome.reason}"
    return f"{where} {outcome.load.summary.tps:9,.0f} tps   p95 {outcome.load.p95_ms:.2f} ms"


def notes(outcomes: Sequence[Outcome], titles: Mapping[SystemName, str]) -> list[str]:
    """What a reader must know to read the tables right."""
    lines = [f"{name}: {title}." for name, title in titles.items()]
    lines.append(
        "shipped: log bytes sent to all copies together. CPU and log are counted until the system "
        "was idle again. other load: share of the machine's CPU used by anything else meanwhile. "
        "ack: ms of an append's ack at the load's end, by the fourth fastest of the six nodes. "
        "backlog: log not indexed when the load ended, and the seconds until it was."
    )
    lines += where_time_goes(outcomes, titles)
    shares = [one.elsewhere_share for one in outcomes if isinstance(one, Measurement)]
    noisy = [share for share in shares if share > _NOISE_SHARE]
    if noisy:
        lines.append(
            f"NOISY: during {len(noisy)} of {len(shares)} loads something else used more than "
            f"{_NOISE_SHARE:.0%} of the machine, up to {max(noisy):.0%}. Ratios are doubtful."
        )
    for outcome in outcomes:
        where = f"{outcome.system}, {outcome.cell}"
        if isinstance(outcome, Failure):
            lines.append(f"FAILED {where}: {outcome.reason}")
            continue
        if outcome.storage is not None and outcome.drain_s is None:
            lines.append(f"NOT DRAINED {where}: the index did not catch up")
        if outcome.storage is not None and outcome.storage.ack_delay_ms:
            lines.append(
                f"BACK-PRESSURE {where}: acks were held back by {outcome.storage.ack_delay_ms:.0f} "
                "ms at the end, because the index lagged"
            )
        if not outcome.settled:
            lines.append(f"unsettled {where}: work put off was still going on, and is not counted")
        if outcome.load.summary.failed:
            lines.append(f"{where}: {outcome.load.summary.failed} transactions failed")
    return lines


def where_time_goes(outcomes: Sequence[Outcome], titles: Mapping[SystemName, str]) -> list[str]:
    """In words, for each load of Boreal's: what took the CPU, and what a commit waits for."""
    lines = []
    for cell, group in _by_cell([o for o in outcomes if isinstance(o, Measurement)], titles):
        whole = {one.system: one for one in group}
        for one in group:
            if one.storage is None:
                continue
            total = sum(one.cpu_s.values()) or math.nan
            shares = sorted(one.cpu_s.items(), key=lambda item: -item[1])
            text = ", ".join(f"{kind} {s / total:.0%}" for kind, s in shares if s > 0.005 * total)
            told = (
                f"{one.system}, {cell}: {one.per_transaction(1000 * total):.2f} ms of CPU for each "
                f"transaction: {text}."
            )
            if one.storage.ack_p50_ms is not None:
                told += (
                    f" Of its p50 of {one.load.p50_ms:.2f} ms the fourth storage node's ack is "
                    f"{one.storage.ack_p50_ms:.2f} ms."
                )
            lines.append(told)
        lines += _cost_of_pages(cell, whole) + _cost_of_endpoint(cell, whole)
    return lines


def _cost_of_pages(cell: Cell, whole: Mapping[SystemName, Measurement]) -> list[str]:
    """What indexing and background work cost, where both were measured."""
    full, bare = whole.get(SystemName.BOREAL), whole.get(SystemName.PAGES_STOPPED)
    if full is None or bare is None or not bare.load.summary.tps:
        return []
    lost = 1 - full.load.summary.tps / bare.load.summary.tps
    text = f"{cell}: indexing and background work cost {lost:.0%} of the transactions"
    if full.storage and bare.storage and full.storage.ack_p99_ms and bare.storage.ack_p99_ms:
        text += (
            f"; an ack's p99 is {full.storage.ack_p99_ms:.2f} ms with them and "
            f"{bare.storage.ack_p99_ms:.2f} ms without"
        )
    return [text + "."]


def _cost_of_endpoint(cell: Cell, whole: Mapping[SystemName, Measurement]) -> list[str]:
    """What the writer endpoint costs, where clients also went past it."""
    through, past = whole.get(SystemName.BOREAL), whole.get(SystemName.DIRECT)
    if through is None or past is None or not past.load.summary.tps:
        return []
    lost = 1 - through.load.summary.tps / past.load.summary.tps
    # The mean: what pgbench logs of a transaction, and so its p50, is without the connecting.
    text = (
        f"{cell}: the writer endpoint costs {lost:.1%} of the transactions; one takes "
        f"{through.load.summary.latency_mean_ms:.2f} ms through it and "
        f"{past.load.summary.latency_mean_ms:.2f} ms past it."
    )
    return [text]


def as_json(outcomes: Sequence[Outcome], facts: Mapping[str, object]) -> str:
    """Everything, for programs: `facts` about the run, and its `outcomes`."""
    records = [_record(outcomes, outcome) for outcome in outcomes]
    return json.dumps({**facts, "outcomes": records}, indent=2, allow_nan=False) + "\n"


def write_json(text: str, path: Path) -> None:
    """Write the file in one piece, its directory too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(text)
    scratch.rename(path)


def _by_cell(
    outcomes: Iterable[_Outcome], titles: Mapping[SystemName, str]
) -> list[tuple[Cell, list[_Outcome]]]:
    cells: dict[Cell, list[_Outcome]] = {}
    for outcome in outcomes:
        cells.setdefault(outcome.cell, []).append(outcome)
    order = list(titles)
    for group in cells.values():
        group.sort(key=lambda outcome: order.index(outcome.system))
    return list(cells.items())


def _load_cells(outcomes: Sequence[Outcome], outcome: Outcome) -> list[str]:
    if isinstance(outcome, Failure):
        return ["failed"]
    summary, done = outcome.load.summary, outcome.load
    times = ratio(outcomes, outcome)
    shipped = outcome.shipped_bytes
    return [
        f"{summary.tps:,.0f}",
        "" if times is None else f"{times:.2f}",
        f"{summary.latency_mean_ms:.2f}",
        f"{done.p50_ms:.2f}",
        f"{done.p95_ms:.2f}",
        f"{done.p99_ms:.2f}",
        *_storage_cells(outcome),
        f"{outcome.per_transaction(outcome.wal_bytes):,.0f}",
        "" if shipped is None else f"{outcome.per_transaction(shipped):,.0f}",
        f"{outcome.per_transaction(1000 * sum(outcome.cpu_s.values())):.2f}",
        f"{outcome.elsewhere_share:.0%}",
    ]


def _storage_cells(outcome: Measurement) -> list[str]:
    state = outcome.storage
    if state is None:
        return [""] * 4
    acks = (state.ack_p50_ms, state.ack_p99_ms)
    return [
        *("" if ms is None else f"{ms:.2f}" for ms in acks),
        f"{state.backlog_bytes / 2**20:.1f}",
        "never" if outcome.drain_s is None else f"{outcome.drain_s:.1f}",
    ]


def _record(outcomes: Sequence[Outcome], outcome: Outcome) -> dict[str, object]:
    base: dict[str, object] = {**asdict(outcome.cell), "system": outcome.system}
    if isinstance(outcome, Failure):
        return {**base, "failed": outcome.reason}
    done, shipped = outcome.load, outcome.shipped_bytes
    figures = {
        **asdict(done.summary),
        "ratio_to_baseline": ratio(outcomes, outcome),
        "p50_ms": done.p50_ms,
        "p95_ms": done.p95_ms,
        "p99_ms": done.p99_ms,
        "sampled_transactions": done.sampled,
        "wal_bytes_per_transaction": outcome.per_transaction(outcome.wal_bytes),
        "shipped_bytes_per_transaction": (
            None if shipped is None else outcome.per_transaction(shipped)
        ),
        "pgbench_cpu_ms_per_transaction": outcome.per_transaction(1000 * done.pgbench_cpu_s),
        "elsewhere_share": outcome.elsewhere_share,
        "settle_s": outcome.settle_s,
        "settled": outcome.settled,
        "drain_s": outcome.drain_s,
    }
    storage = None if outcome.storage is None else asdict(outcome.storage)
    cpu = {kind: outcome.per_transaction(1000 * s) for kind, s in outcome.cpu_s.items()}
    return {**base, **_finite(figures), "storage": storage, "cpu_ms_per_transaction": _finite(cpu)}


def _finite(figures: Mapping[Any, object]) -> dict[str, object]:
    # JSON has no NaN; a figure that does not exist is null.
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in figures.items()
    }
