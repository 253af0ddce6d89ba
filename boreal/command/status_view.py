"""`boreal status` for people, made from its JSON form."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from boreal.command.roster import listed
from boreal.command.status import Json

_PROCESS_STYLES = {"running": "green", "paused": "yellow", "dead": "bold red"}
_QUICK_MS, _SLOW_MS = 50.0, 1000.0
"""A reader's lag that is as good as none, and one that is worth a look."""


def to_table(report: Json) -> RenderableType:
    """The whole of it. Made for terminals of 80 columns and more."""
    upper = Group(headline(report), "", services(report))
    return Group(upper, "", instances(report), "", storage(report))


def headline(report: Json) -> Text:
    """The volume and its writer, or what is wrong."""
    volume = report["volume"]
    elsewhere = report["data_dir"] is None
    if not elsewhere and all(row["pid"] is None for row in _rows(report)):
        return Text("the cluster is down; `boreal up` starts it", "bold")
    if elsewhere and not report["control"]["answers"]:
        address = report["control"]["address"]
        return Text(f"no control plane answers at {address}", "bold red")
    if not report["control"]["answers"]:
        return Text.assemble(
            ("the control plane does not answer", "bold red"),
            ": what only it knows is missing below. Reads and writes go on without it; "
            "`boreal restart control` starts it",
        )
    ready = volume["id"] if volume["ready"] else "not created yet"
    return Text.assemble(
        ("volume ", "dim"),
        ready,
        ("   epoch ", "dim"),
        str(volume["epoch"] or "-"),
        ("   VDL ", "dim"),
        volume["vdl"] or "-",
        ("   writer ", "dim"),
        _writer(report),
    )


def _writer(report: Json) -> Text:
    name = report["writer"]
    row = next((each for each in report["compute"] if each["name"] == name), None)
    if row is None:
        return Text("none yet", "yellow")
    if row["role"] == "writer":
        return Text(name, "bold green")
    return Text(f"{name}, {row['state'] or 'silent'}", "bold yellow")


def _rows(report: Json) -> list[Json]:
    return [report["control"], report["endpoints"], *report["storage"], *report["compute"]]


def services(report: Json) -> Table:
    """The control plane, and the endpoints with whom they lead to."""
    table = _table("process", "pid", "")
    control, endpoints = report["control"], report["endpoints"]
    table.add_row("control", *_process_cells(control), _word(control["answers"], "answers"))
    table.add_row("endpoints", *_process_cells(endpoints), _leads(endpoints["writer"], "writer"))
    table.add_row("", "", "", _leads(endpoints["reader"], "readers"))
    return table


def _leads(endpoint: Json, role: str) -> Text:
    names = listed(endpoint["instances"])
    to = Text(names, "bold") if names else Text("nobody: clients wait", "yellow")
    at = f"{endpoint['address']}  " if endpoint["address"] else ""
    return Text.assemble(f"{at}{role:<8}", ("→ ", "dim"), to)


def instances(report: Json) -> Table:
    """Roles, and how far each instance is."""
    table = _table("process", "pid", "role", "tier", "state", "port", "LSN")
    for heading in ("lag", "lag ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report["compute"]:
        role = Text(row["role"] or "-", "bold green" if row["role"] == "writer" else "")
        table.add_row(
            row["name"],
            *_process_cells(row),
            role,
            str(row["tier"]),
            _instance_state(row),
            str(row["postgres_port"]),
            row["flush_lsn"] or row["replay_lsn"] or "-",
            "" if row["role"] == "writer" else size(row["lag_bytes"]),
            lag(row),
        )
    return table


def storage(report: Json) -> Table:
    """The six nodes, and how far each is behind."""
    table = _table("process", "pid", "zone", "state", "SCL")
    for heading in ("lag", "not indexed", "log kept", "ack ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    links = {
        link["node"]: link
        for row in report["compute"]
        if row["role"] == "writer"
        for link in row["links"]
    }
    for node in report["storage"]:
        link = links.get(node["name"])
        table.add_row(
            node["name"],
            *_process_cells(node),
            node["zone"],
            _node_state(node),
            node["scl"] or "-",
            size(node["lag_bytes"]),
            size(node["indexed_lag_bytes"]),
            size(node["log_kept_bytes"]),
            f"{link['ack_latency_us'] / 1000:.1f}" if link and link["ack_latency_us"] else "-",
        )
    return table


def lag(row: Json) -> Text:
    """A reader's lag in milliseconds, by its colour good or bad."""
    lag_ms = row["lag_ms"]
    if lag_ms is None:
        return Text("" if row["role"] == "writer" else "-")
    style = "green" if lag_ms <= _QUICK_MS else "yellow" if lag_ms <= _SLOW_MS else "bold red"
    return Text(f"{lag_ms:,.1f}", style)


def size(size_bytes: int | None) -> str:
    """A size in few digits."""
    if size_bytes is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 10_000:
            return f"{size_bytes} {unit}"
        size_bytes //= 1024
    return f"{size_bytes} GiB"


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("name", *headings):
        table.add_column(heading, no_wrap=True)
    return table


def _process_cells(row: Json) -> tuple[Text, str]:
    process = row["process"] or "-"
    return Text(process, _PROCESS_STYLES.get(process, "dim")), str(row["pid"] or "-")


def _instance_state(row: Json) -> Text:
    if row["state"] is None:
        return Text("-", "dim")
    if row["takes_clients"]:
        return Text("serves", "green")
    return Text(row["state"], "yellow")


def _node_state(node: Json) -> Text:
    if node["failure"]:
        return Text(node["failure"], "bold red")
    if node["process"] not in {"running", None}:  # the control plane takes a moment to notice
        return Text("-", "dim")
    if node["alive"] is False:
        return Text(f"silent for {node['silent_ms'] / 1000:.0f} s", "yellow")
    if node["ack_delay_us"]:
        return Text(f"acks +{node['ack_delay_us'] / 1000:.0f} ms", "yellow")
    return _word(node["alive"], "alive")


def _word(value: bool | None, word: str) -> Text:
    return Text(word, "green") if value else Text("-", "dim")
