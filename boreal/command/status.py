"""`boreal status`: what is gathered, and its JSON form. (status_view.py shows it to people.)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from boreal.cluster import CONTROL, ENDPOINTS, HOST, ClusterConfig, InstanceEntry
from boreal.command.remote import Remote, connect, if_reachable, state_name
from boreal.processes import LocalProcesses, ProcessState, ProcessStatus
from boreal.rpc import compute_pb2, control_pb2
from boreal.types import format_lsn

Json = dict[str, Any]

_ROLES = {
    compute_pb2.WRITER: "writer",
    compute_pb2.YIELDING: "writer",
    compute_pb2.READER: "reader",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What was found out, raw."""

    config: ClusterConfig
    processes: Mapping[str, ProcessStatus]
    cluster: control_pb2.ClusterStatus | None
    """None: the control plane does not answer."""
    instances: Mapping[str, compute_pb2.ComputeStatus]
    """From the instances themselves, those that answer."""


async def gather(config: ClusterConfig) -> Gathered:
    """Ask the kernel, the control plane and the instances."""
    async with connect(config) as remote:
        return await gather_by(config, remote)


async def gather_by(config: ClusterConfig, remote: Remote) -> Gathered:
    """The same over connections that are kept."""
    local = LocalProcesses(config.data_dir)
    processes = {name: local.status(name) for name in config.names}

    def answers(name: str) -> bool:
        return processes[name].state is ProcessState.RUNNING

    return Gathered(
        config=config,
        processes=processes,
        cluster=await if_reachable(remote.cluster_status()) if answers(CONTROL) else None,
        instances=await remote.instances(list(filter(answers, config.instance_names))),
    )


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
        "control": {
            **_process(found.processes[CONTROL]),
            **_metrics(found.config.control_metrics_port),
            "answers": known,
        },
        "endpoints": _endpoints(found),
        "volume": {
            "id": _volume_id(found) or None,
            "ready": status.volume_ready if known else None,
            "epoch": _epoch(found),
            "vdl": _lsn(vdl),
        },
        "writer": status.writer or _writer_at_work(found),
        "storage": [_node(found, entry.name, vdl) for entry in found.config.storage],
        "compute": [_instance(found, entry, vdl) for entry in found.config.compute],
    }


def _process(status: ProcessStatus) -> Json:
    return {"name": status.name, "process": status.state.value, "pid": status.pid}


def _metrics(port: int) -> Json:
    return {"metrics": f"{HOST}:{port}"}


# --- endpoints -----------------------------------------------------------------------------------


def _endpoints(found: Gathered) -> Json:
    """Where the endpoints are, and whom they lead to as far as the instances tell."""
    taking = [name for name, status in found.instances.items() if status.takes_clients]
    writers = [name for name in taking if name == _writer_at_work(found)]
    readers = [name for name in taking if found.instances[name].state == compute_pb2.READER]
    return {
        **_process(found.processes[ENDPOINTS]),
        **_metrics(found.config.endpoints_metrics_port),
        "writer": {"address": f"{HOST}:{found.config.postgres_port}", "instances": writers},
        "reader": {
            "address": f"{HOST}:{found.config.reader_port}",
            "instances": readers or writers,
        },
    }


def _writer_at_work(found: Gathered) -> str | None:
    """Of those that say they are, the one with the newest epoch: the others were deposed."""
    writers = [each for each in found.instances.values() if _ROLES.get(each.state) == "writer"]
    newest = max(writers, key=lambda status: status.volume.epoch, default=None)
    return newest.instance if newest else None


# --- storage nodes -------------------------------------------------------------------------------


def _node(found: Gathered, name: str, vdl: int) -> Json:
    entry = next(entry for entry in found.config.storage if entry.name == name)
    row: Json = {
        **_process(found.processes[name]),
        **_metrics(entry.metrics_port),
        "pages_metrics": f"{HOST}:{entry.pages_metrics_port}",
        "zone": entry.zone,
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


# --- instances -----------------------------------------------------------------------------------

_UNKNOWN_INSTANCE: Json = {
    "role": None,
    "state": None,
    "takes_clients": None,
    "epoch": None,
    "incarnation": None,
    "vdl": None,
    "flush_lsn": None,
    "received_lsn": None,
    "replay_lsn": None,
    "lag_bytes": None,
    "lag_ms": None,
    "bundle_end_lsn": None,
    "timeline": None,
    "postgres_pid": None,
    "shipped_bytes": None,
    "links": [],
}


def _instance(found: Gathered, entry: InstanceEntry, vdl: int) -> Json:
    reported = next(
        (
            each
            for each in (found.cluster.instances if found.cluster else ())
            if each.status.instance == entry.name
        ),
        None,
    )
    status = found.instances.get(entry.name)
    return {
        **_process(found.processes[entry.name]),
        **_metrics(entry.metrics_port),
        "tier": entry.tier,
        "address": f"{HOST}:{entry.postgres_port}",
        "postgres_port": entry.postgres_port,
        "alive": reported.alive if reported else None,
        "silent_ms": reported.silent_ms if reported else None,
        **(_instance_status(status, vdl) if status else _UNKNOWN_INSTANCE),
    }


def _instance_status(status: compute_pb2.ComputeStatus, vdl: int) -> Json:
    reads = status.state == compute_pb2.READER and status.replay_lsn
    return {
        "role": _ROLES.get(status.state),
        "state": state_name(status),
        "takes_clients": status.takes_clients,
        "epoch": status.volume.epoch,
        "incarnation": status.incarnation,
        "vdl": _lsn(status.vdl),
        "flush_lsn": _lsn(status.flush_lsn),
        "received_lsn": _lsn(status.received_lsn),
        "replay_lsn": _lsn(status.replay_lsn),
        "lag_bytes": max(0, vdl - status.replay_lsn) if reads else None,
        "lag_ms": status.replay_lag_us / 1000 if reads else None,
        "bundle_end_lsn": _lsn(status.bundle_end_lsn),
        "timeline": status.timeline,
        "postgres_pid": status.postgres_pid or None,
        "shipped_bytes": status.shipped_bytes,
        "links": [
            {
                "node": link.node,
                "state": link.state,
                "scl": _lsn(link.scl),
                "ack_latency_us": link.ack_latency_us,
                "ack_p50_us": link.ack_p50_us,
                "ack_p99_us": link.ack_p99_us,
            }
            for link in status.links
        ],
    }


# --- the volume ----------------------------------------------------------------------------------


def _volume_id(found: Gathered) -> str:
    for status in (found.cluster, *found.instances.values()):
        if status is not None and status.volume.volume_id:
            return status.volume.volume_id
    return ""


def _epoch(found: Gathered) -> int | None:
    epochs = [status.volume.epoch for status in found.instances.values()]
    if found.cluster is not None:
        epochs.append(found.cluster.volume.epoch)
    return max(epochs, default=None)


def _vdl(found: Gathered) -> int:
    """The highest anybody knows: the writer's, else what it had told the storage nodes."""
    told = [
        segment.vdl
        for node in (found.cluster.storage if found.cluster else ())
        for segment in node.segments
        if segment.volume_id == _volume_id(found)
    ]
    return max([0, *told, *(status.vdl for status in found.instances.values())])


def _lsn(lsn: int) -> str | None:
    return format_lsn(lsn) if lsn else None
