"""`boreal status --watch`: the same, every second, with the last minute of each instance."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import NoReturn

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from boreal.command import status, status_view
from boreal.command.events import to_line
from boreal.command.remote import Place, Remote, connect, if_reachable
from boreal.command.status import Json
from boreal.rpc import control_pb2
from boreal.types import parse_lsn

_EVERY_S = 1.0
_SHOWN = 60
"""Samples in a sparkline."""
_EVENTS = 6
_BARS = "▁▂▃▄▅▆▇█"


class History:
    """The last minute: how fast the log grows, how far each reader is behind; the last events.

    Bounded: a sample a second for each instance there is, of the last minute; a handful of events.
    """

    def __init__(self) -> None:
        self._lags: defaultdict[str, deque[float | None]] = defaultdict(_samples)
        self._rates = _samples()
        self._last: tuple[float, int] | None = None
        self.events: deque[control_pb2.Event] = deque(maxlen=_EVENTS)

    def add(self, report: Json, now_s: float) -> None:
        """Take in a report of the moment `now_s` (monotonic)."""
        vdl = report["volume"]["vdl"]
        if vdl is not None:
            position = parse_lsn(vdl)
            if self._last and now_s > self._last[0]:
                grown = max(0, position - self._last[1])
                self._rates.append(grown / (now_s - self._last[0]))
            self._last = (now_s, position)
        for row in report["compute"]:
            self._lags[row["name"]].append(row["lag_ms"])
        for name in self._lags.keys() - {row["name"] for row in report["compute"]}:
            del self._lags[name]

    @property
    def log_bytes_per_s(self) -> float:
        """How fast the log grew between the last two reports."""
        return self._rates[-1] or 0.0 if self._rates else 0.0

    @property
    def log(self) -> str:
        """The log's growth as a sparkline."""
        return sparkline(self._rates)

    def lag(self, name: str) -> str:
        """A reader's lag as a sparkline."""
        return sparkline(self._lags.get(name, ()))


def _samples() -> deque[float | None]:
    return deque(maxlen=_SHOWN)


def sparkline(samples: Iterable[float | None]) -> str:
    """Bars as high as the values, the highest the full height; a dot for what is not known."""
    values = list(samples)
    highest = max((value for value in values if value is not None), default=0.0)
    scale = (len(_BARS) - 1) / highest if highest else 0.0
    return "".join("·" if value is None else _BARS[round(value * scale)] for value in values)


async def watch(load: Callable[[], Place], console: Console) -> None:
    """Show it until cancelled: on a terminal in place, else one page below the other."""
    if not console.is_terminal:
        await _repeat(load, console.print)
    # A screen of its own: what is on the terminal is there again afterwards.
    with Live(console=console, screen=True, auto_refresh=False) as live:
        await _repeat(load, lambda shown: live.update(shown, refresh=True))


async def _repeat(load: Callable[[], Place], show: Callable[[RenderableType], None]) -> NoReturn:
    history = History()
    while True:
        place = load()
        async with connect(place) as remote:
            while load() == place:  # else instances came or went
                show(await _look(place, remote, history))
                await asyncio.sleep(_EVERY_S)


async def _look(place: Place, remote: Remote, history: History) -> RenderableType:
    found = await status.gather_by(place, remote)
    report = status.to_json(found)
    history.add(report, time.monotonic())
    if found.cluster:
        after = history.events[-1].id if history.events else 0
        history.events.extend(await if_reachable(remote.events(after)) or ())
    return page(report, history)


def page(report: Json, history: History) -> RenderableType:
    """One screen."""
    now = datetime.now(UTC).astimezone()
    top = Text.assemble(
        ("boreal  ", "bold"),
        report["data_dir"] or report["control"]["address"],
        (f"   {now:%H:%M:%S}", "dim"),
        "\n",
    )
    lines = [to_line(event) for event in history.events]
    happened = Group(Text("\nevents", "dim"), *lines) if lines else ""
    return Group(top, status_view.to_table(report), happened, "", last_minute(report, history))


def last_minute(report: Json, history: History) -> Table:
    """How fast the log grew, and how far each reader was behind."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("name", "", "the last minute"):
        table.add_column(heading, no_wrap=True)
    rate = f"log {history.log_bytes_per_s / 2**20:8,.2f} MiB/s"
    table.add_row(report["writer"] or "-", rate, Text(history.log, "cyan"))
    for row in report["compute"]:
        if row["role"] == "reader":
            told = Text.assemble("lag ", f"{row['lag_ms'] or 0:8,.1f} ms")
            table.add_row(row["name"], told, Text(history.lag(row["name"]), "magenta"))
    return table
