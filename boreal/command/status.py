"""`boreal status`: what is gathered, its JSON form, its table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from boreal.cluster import COMPUTE, CONTROL, ClusterConfig
from boreal.command.remote import connect, if_reachable
from boreal.processes import LocalProcesses, ProcessStatus
from boreal.rpc import compute_pb2, control_pb2
from boreal.types import format_lsn

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What was found out, raw."""

    config: ClusterConfig
    processes: dict[str, ProcessStatus]
    cluster: control_pb2.ClusterStatus | None
    """None: the control plane does not answer."""
    compute: compute_pb2.ComputeStatus | None
    """From the compute node itself; None: it does not answer."""


async def gather(config: ClusterConfig) -> Gathered:
    """Ask the kernel, the control plane and the compute node."""
    local = LocalProcesses(config.data_dir)
    processes = {name: local.status(name) for name in config.names}
    async with connect(config) as remote:
        return Gathered(
            config=config,
            processes=processes,
            cluster=await if_reachable(remote.cluster_status())
            if _answers(processes[CONTROL])
            else None,
            compute=await if_reachable(remote.compute_status())
            if _answers(processes[COMPUTE])
            else None,
        )


def _answers(status: ProcessStatus) -> bool:
    return status.state.value == "running"


# --- as JSON -------------------------------------------------------------------------------------


def to_json(found: Gathered) -> Json:
    """The stable form for programs.

    LSNs are PostgreSQL's text form, sizes are bytes, times are milliseconds; what is not known (the
    control plane may be down) is null.
    """
    status = found.cluster or control_pb2.ClusterStatus()
    known = found.cluster is not None
    vdl = _vdl(found)
    return {
        "data_dir": str(found.config.data_dir),
        "control": {**_process(found.processes[CONTROL]), "answers": known},
        "volume": {
            "id": _volume_id(found) or None,
            "ready": status.volume_ready if known else None,
            "epoch": _epoch(found),
            "vdl": _lsn(vdl),
        },
        "writer": status.writer or (COMPUTE if _is_writer(found.compute) else None),
        "storage": [_node(found, entry.name, vdl) for entry in found.config.storage],
        "compute": [_instance(found)],
    }


def _process(status: ProcessStatus) -> Json:
    return {"name": status.name, "process": status.state.value, "pid": status.pid}


def _node(found: Gathered, name: str, vdl: int) -> Json:
    zone = next(entry.zone for entry in found.config.storage if entry.name == name)
    row: Json = {
        **_process(found.processes[name]),
        "zone": zone,
        "alive": None,
        "silent_ms": None,
        "promised_epoch": None,
        "scl": None,
        "lag_bytes": None,
        "indexed_lsn": None,
        "indexed_lag_bytes": None,
        "log_start": None,
        "log_kept_bytes": None,
        "ack_delay_us": None,
        "failure": None,
    }
    nodes = found.cluster.storage if found.cluster else ()
    node = next((each for each in nodes if each.node.name == name), None)
    if node is None:
        return row
    row |= {"alive": node.alive, "silent_ms": node.silent_ms}
    segment = next((each for each in node.segments if each.volume_id == _volume_id(found)), None)
    if segment is None:
        return row
    return row | {
        "promised_epoch": segment.promised_epoch,
        "scl": _lsn(segment.scl),
        "lag_bytes": max(0, vdl - segment.scl),
        "indexed_lsn": _lsn(segment.indexed_lsn),
        "indexed_lag_bytes": max(0, segment.scl - segment.indexed_lsn),
        "log_start": _lsn(segment.start_lsn),
        "log_kept_bytes": max(0, segment.scl - segment.start_lsn),
        "ack_delay_us": segment.ack_delay_us,
        "failure": segment.failure or None,
    }


def _instance(found: Gathered) -> Json:
    instances = found.cluster.instances if found.cluster else ()
    reported = next((each for each in instances if each.status.instance == COMPUTE), None)
    status = found.compute
    return {
        **_process(found.processes[COMPUTE]),
        "role": _role(status),
        "alive": reported.alive if reported else None,
        "silent_ms": reported.silent_ms if reported else None,
        "state": compute_pb2.ComputeState.Name(status.state).lower() if status else None,
        "epoch": status.volume.epoch if status else None,
        "incarnation": status.incarnation if status else None,
        "vdl": _lsn(status.vdl) if status else None,
        "flush_lsn": _lsn(status.flush_lsn) if status else None,
        "replay_lsn": _lsn(status.replay_lsn) if status else None,
        "bundle_end_lsn": _lsn(status.bundle_end_lsn) if status else None,
        "timeline": status.timeline if status else None,
        "postgres_pid": (status.postgres_pid or None) if status else None,
        "postgres_port": found.config.postgres_port,
        "shipped_bytes": status.shipped_bytes if status else None,
        "links": [
            {
                "node": link.node,
                "state": link.state,
                "scl": _lsn(link.scl),
                "ack_latency_us": link.ack_latency_us,
                "ack_p50_us": link.ack_p50_us,
                "ack_p99_us": link.ack_p99_us,
            }
            for link in (status.links if status else ())
        ],
    }


def _is_writer(status: compute_pb2.ComputeStatus | None) -> bool:
    return status is not None and status.state == compute_pb2.WRITER


def _role(status: compute_pb2.ComputeStatus | None) -> str | None:
    if status is None:
        return None
    return {compute_pb2.WRITER: "writer", compute_pb2.READER: "reader"}.get(status.state)


def _volume_id(found: Gathered) -> str:
    for status in (found.cluster, found.compute):
        if status is not None and status.volume.volume_id:
            return status.volume.volume_id
    return ""


def _epoch(found: Gathered) -> int | None:
    epochs = [each.volume.epoch for each in (found.cluster, found.compute) if each is not None]
    return max(epochs, default=None)


def _vdl(found: Gathered) -> int:
    """The highest anybody knows: the writer's, else what it had told the storage nodes."""
    told = [
        segment.vdl
        for node in (found.cluster.storage if found.cluster else ())
        for segment in node.segments
        if segment.volume_id == _volume_id(found)
    ]
    return max([found.compute.vdl if found.compute else 0, *told])


def _lsn(lsn: int) -> str | None:
    return format_lsn(lsn) if lsn else None


# --- as a table ----------------------------------------------------------------------------------


def to_table(found: Gathered) -> RenderableType:
    """For people."""
    report = to_json(found)
    return Group(_headline(report), _members(report))


def _headline(report: Json) -> Text:
    volume = report["volume"]
    if all(row["pid"] is None for row in _rows(report)):
        return Text("the cluster is down; `boreal up` starts it", "bold")
    if not report["control"]["answers"]:
        return Text.assemble(
            ("the control plane does not answer", "bold red"),
            ": what only it knows is missing below. Reads and writes go on without it; "
            "`boreal restart control` starts it",
        )
    ready = volume["id"] if volume["ready"] else "not created yet"
    return Text(
        f"volume {ready}   epoch {volume['epoch'] or '-'}   VDL {volume['vdl'] or '-'}   "
        f"writer {report['writer'] or '-'}"
    )


def _rows(report: Json) -> list[Json]:
    return [report["control"], *report["storage"], *report["compute"]]


def _members(report: Json) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "zone", "process", "pid", "state", "SCL / LSN"):
        table.add_column(heading, no_wrap=True)
    for heading in ("lag", "not indexed", "log kept"):
        table.add_column(heading, justify="right", no_wrap=True)
    control = report["control"]
    table.add_row("control", "", *_process_cells(control), _word(control["answers"], "answers"))
    for node in report["storage"]:
        table.add_row(
            node["name"],
            node["zone"],
            *_process_cells(node),
            _node_state(node),
            node["scl"] or "-",
            _bytes(node["lag_bytes"]),
            _bytes(node["indexed_lag_bytes"]),
            _bytes(node["log_kept_bytes"]),
        )
    for instance in report["compute"]:
        lsn = instance["flush_lsn"] or instance["replay_lsn"] or "-"
        table.add_row(
            instance["name"], "", *_process_cells(instance), instance["state"] or "-", lsn
        )
    return table


def _process_cells(row: Json) -> tuple[Text, str]:
    style = {"running": "green", "paused": "yellow", "dead": "bold red"}.get(row["process"], "dim")
    return Text(row["process"], style), str(row["pid"] or "-")


def _node_state(node: Json) -> Text:
    if node["failure"]:
        return Text(node["failure"], "bold red")
    if node["process"] != "running":  # the control plane takes a moment to notice
        return Text("-", "dim")
    if node["alive"] is False:
        return Text(f"silent for {node['silent_ms'] / 1000:.0f} s", "yellow")
    if node["ack_delay_us"]:
        return Text(f"acks +{node['ack_delay_us'] / 1000:.0f} ms", "yellow")
    return _word(node["alive"], "alive")


def _word(value: bool | None, word: str) -> Text:
    return Text(word, "green") if value else Text("-", "dim")


def _bytes(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 10_000:
            return f"{size_bytes} {unit}"
        size_bytes //= 1024
    return f"{size_bytes} GiB"
