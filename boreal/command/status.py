"""`boreal status`: what is gathered, and its JSON form. (status_view.py shows it to people.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from boreal.cluster import CONTROL, ENDPOINTS, HOST, ClusterConfig
from boreal.command.remote import (
    Outside,
    Place,
    Remote,
    connect,
    if_reachable,
    of_control_plane,
    state_name,
)
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
class InstancePlace:
    """An instance, wherever it is."""

    name: str
    tier: int
    host: str
    postgres_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What was found out, raw."""

    place: Place
    nodes: Mapping[str, str]
    """Every storage node's zone."""
    members: Sequence[InstancePlace]
    """Every instance."""
    processes: Mapping[str, ProcessStatus]
    """Those on this machine."""
    cluster: control_pb2.ClusterStatus | None
    """None: the control plane does not answer."""
    instances: Mapping[str, compute_pb2.ComputeStatus]
    """From the instances themselves, those that answer."""
    metrics: Mapping[str, str]
    """Where processes on this machine serve theirs, by name; see ClusterConfig.metrics_ports."""


async def gather(place: Place) -> Gathered:
    """Ask the kernel, the control plane and the instances; of a cluster elsewhere, only the control
    plane, which tells what it heard: BadUsage if that does not answer.
    """
    async with connect(place) as remote:
        if isinstance(place, Outside):
            return _from_outside(place, await of_control_plane(remote.cluster_status(), place))
        return await gather_by(place, remote)


async def gather_by(place: Place, remote: Remote) -> Gathered:
    """The same over connections that are kept. A control plane that is away is no error."""
    if isinstance(place, Outside):
        return _from_outside(place, await if_reachable(remote.cluster_status()))
    return await _from_here(place, remote)


def _from_outside(place: Outside, cluster: control_pb2.ClusterStatus | None) -> Gathered:
    known = cluster or control_pb2.ClusterStatus()
    return Gathered(
        place=place,
        nodes={each.node.name: each.node.zone for each in known.storage},
        members=[
            InstancePlace(
                name=each.status.instance,
                tier=each.status.tier,
                host=each.address.rpartition(":")[0],
                postgres_port=each.postgres_port,
            )
            for each in known.instances
        ],
        processes={},
        cluster=cluster,
        instances={each.status.instance: each.status for each in known.instances if each.alive},
        metrics={},
    )


async def _from_here(config: ClusterConfig, remote: Remote) -> Gathered:
    local = LocalProcesses(config.data_dir)
    processes = {name: local.status(name) for name in config.names}

    def answers(name: str) -> bool:
        return processes[name].state is ProcessState.RUNNING

    return Gathered(
        place=config,
        nodes={entry.name: entry.zone for entry in config.storage},
        members=[
            InstancePlace(
                name=entry.name, tier=entry.tier, host=HOST, postgres_port=entry.postgres_port
            )
            for entry in config.compute
        ],
        processes=processes,
        cluster=await if_reachable(remote.cluster_status()) if answers(CONTROL) else None,
        instances=await remote.instances(list(filter(answers, config.instance_names))),
        metrics={name: f"{HOST}:{port}" for name, port in config.metrics_ports.items()},
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
        "data_dir": None if isinstance(found.place, Outside) else str(found.place.data_dir),
        "control": {
            **_process(found, CONTROL),
            "address": found.place.control_address,
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
        "storage": [_node(found, name, vdl) for name in found.nodes],
        "compute": [_instance(found, member, vdl) for member in found.members],
    }


def _process(found: Gathered, name: str) -> Json:
    status = found.processes.get(name)
    return {
        "name": name,
        "process": status.state.value if status else None,
        "pid": status.pid if status else None,
        "metrics": found.metrics.get(name),
    }


# --- endpoints -----------------------------------------------------------------------------------


def _endpoints(found: Gathered) -> Json:
    """Where the endpoints are, and whom they lead to as far as the instances tell."""
    taking = [name for name, status in found.instances.items() if status.takes_clients]
    writers = [name for name in taking if name == _writer_at_work(found)]
    readers = [name for name in taking if found.instances[name].state == compute_pb2.READER]
    writer_at, reader_at = None, None
    if isinstance(found.place, ClusterConfig):
        writer_at = f"{HOST}:{found.place.postgres_port}"
        reader_at = f"{HOST}:{found.place.reader_port}"
    return {
        **_process(found, ENDPOINTS),
        "writer": {"address": writer_at, "instances": writers},
        "reader": {"address": reader_at, "instances": readers or writers},
    }


def _writer_at_work(found: Gathered) -> str | None:
    """Of those that say they are, the one with the newest epoch: the others were deposed."""
    writers = [each for each in found.instances.values() if _ROLES.get(each.state) == "writer"]
    newest = max(writers, key=lambda status: status.volume.epoch, default=None)
    return newest.instance if newest else None


# --- storage nodes -------------------------------------------------------------------------------


def _node(found: Gathered, name: str, vdl: int) -> Json:
    row: Json = {
        **_process(found, name),
        "pages_metrics": found.metrics.get(f"{name}/pages"),
        "zone": found.nodes[name],
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


def _instance(found: Gathered, member: InstancePlace, vdl: int) -> Json:
    reported = next(
        (
            each
            for each in (found.cluster.instances if found.cluster else ())
            if each.status.instance == member.name
        ),
        None,
    )
    status = found.instances.get(member.name)
    return {
        **_process(found, member.name),
        "tier": member.tier,
        "address": f"{member.host}:{member.postgres_port}",
        "postgres_port": member.postgres_port,
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
