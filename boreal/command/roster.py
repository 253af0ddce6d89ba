"""Which processes a local cluster is made of: their command lines, their ports."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from boreal.cluster import (
    CONTROL,
    ENDPOINTS,
    HOST,
    ZONES,
    ClusterConfig,
    InstanceEntry,
    StorageEntry,
)
from boreal.errors import BadUsage


def storage_names() -> tuple[str, ...]:
    """The storage nodes."""
    return tuple(ZONES)


def is_instance(name: str) -> bool:
    """Whether a process of that name is an instance, one that `cluster.json` forgot included."""
    return name not in (CONTROL, ENDPOINTS, *ZONES)


def check_name(config: ClusterConfig, name: str) -> str:
    """Return `name`; BadUsage, with the names there are, if no process has it."""
    if name not in config.names:
        raise BadUsage(f"there is no {name} here; the processes are {', '.join(config.names)}")
    return name


def listed(names: Sequence[str]) -> str:
    """Names in few words: `control, sn-1 to sn-6, db-1`."""
    runs: list[list[str]] = []
    for name in names:
        if runs and _follows(runs[-1][-1], name):
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)


def _follows(former: str, name: str) -> bool:
    (kind, _, number), (other_kind, _, other) = former.rpartition("-"), name.rpartition("-")
    if not kind or kind != other_kind or not (number.isdecimal() and other.isdecimal()):
        return False
    return int(other) == int(number) + 1


def command_line(config: ClusterConfig, name: str) -> tuple[str, ...]:
    """How to start process `name`."""
    # -P: what happens to lie in the working directory must not be imported.
    python = (sys.executable, "-P", "-m")
    identity = "--insecure" if config.insecure else f"--tls-dir={config.tls_dir / name}"
    if name == CONTROL:
        return (*python, "control_plane", identity, *_control_options(config))
    if name == ENDPOINTS:
        return (*python, "control_plane.endpoints", identity, *_endpoints_options(config))
    if name in storage_names():
        return (*python, "storage_node", identity, *_storage_options(config, _node(config, name)))
    return (*python, "compute_node", identity, *_compute_options(config, config.instance(name)))


def ports_of(config: ClusterConfig, name: str) -> tuple[int, ...]:
    """What process `name` listens on."""
    if name == CONTROL:
        return (config.control_port, config.control_metrics_port)
    if name == ENDPOINTS:
        return (config.postgres_port, config.reader_port, config.endpoints_metrics_port)
    if name in storage_names():
        return _node(config, name).ports
    return config.instance(name).ports


def _node(config: ClusterConfig, name: str) -> StorageEntry:
    return next(entry for entry in config.storage if entry.name == name)


def _control_options(config: ClusterConfig) -> tuple[str, ...]:
    return (
        f"--data-dir={config.data_dir / CONTROL}",
        f"--host={HOST}",
        f"--port={config.control_port}",
        f"--metrics-port={config.control_metrics_port}",
        f"--launch={config.data_dir}",
    )


def _endpoints_options(config: ClusterConfig) -> tuple[str, ...]:
    return (
        f"--control={config.control_address}",
        f"--host={HOST}",
        f"--writer-port={config.postgres_port}",
        f"--reader-port={config.reader_port}",
        f"--metrics-port={config.endpoints_metrics_port}",
    )


def _storage_options(config: ClusterConfig, entry: StorageEntry) -> tuple[str, ...]:
    return (
        f"--name={entry.name}",
        f"--zone={entry.zone}",
        f"--data-dir={config.data_dir / entry.name}",
        f"--control={config.control_address}",
        f"--host={HOST}",
        f"--log-port={entry.log_port}",
        f"--frames-port={entry.frames_port}",
        f"--pages-port={entry.pages_port}",
        f"--page-frames-port={entry.page_frames_port}",
        f"--metrics-port={entry.metrics_port}",
        f"--pages-metrics-port={entry.pages_metrics_port}",
        *((f"--retain-log-mib={config.retain_log_mib}",) if config.retain_log_mib else ()),
    )


def _compute_options(config: ClusterConfig, entry: InstanceEntry) -> tuple[str, ...]:
    return (
        f"--name={entry.name}",
        f"--data-dir={config.data_dir / entry.name}",
        f"--engine-dir={config.engine_dir}",
        f"--control={config.control_address}",
        f"--host={HOST}",
        f"--port={entry.agent_port}",
        f"--postgres-port={entry.postgres_port}",
        f"--metrics-port={entry.metrics_port}",
        f"--tier={entry.tier}",
        f"--password-file={config.password_file}",
        *((f"--cache-size={config.cache_bytes}",) if config.cache_bytes else ()),
    )
