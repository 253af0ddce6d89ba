"""Which processes a local cluster is made of: their command lines, their ports."""

from __future__ import annotations

import sys

from boreal.cluster import COMPUTE, CONTROL, HOST, ZONES, ClusterConfig, StorageEntry
from boreal.errors import BadUsage


def storage_names() -> tuple[str, ...]:
    """The storage nodes."""
    return tuple(ZONES)


def check_name(config: ClusterConfig, name: str) -> str:
    """Return `name`; BadUsage, with the names there are, if no process has it."""
    if name not in config.names:
        raise BadUsage(f"there is no {name} here; the processes are {', '.join(config.names)}")
    return name


def command_line(config: ClusterConfig, name: str) -> tuple[str, ...]:
    """How to start process `name`."""
    # -P: what happens to lie in the working directory must not be imported.
    python = (sys.executable, "-P", "-m")
    if name == CONTROL:
        return (*python, "control_plane", *_control_options(config))
    if name == COMPUTE:
        return (*python, "compute_node", *_compute_options(config))
    return (*python, "storage_node", *_storage_options(config, _entry(config, name)))


def ports_of(config: ClusterConfig, name: str) -> tuple[int, ...]:
    """What process `name` listens on."""
    if name == CONTROL:
        return (config.control_port,)
    if name == COMPUTE:
        return (config.agent_port, config.postgres_port)
    entry = _entry(config, name)
    return (entry.log_port, entry.frames_port, entry.pages_port)


def _entry(config: ClusterConfig, name: str) -> StorageEntry:
    check_name(config, name)
    return next(entry for entry in config.storage if entry.name == name)


def _control_options(config: ClusterConfig) -> tuple[str, ...]:
    return (
        f"--data-dir={config.data_dir / CONTROL}",
        f"--host={HOST}",
        f"--port={config.control_port}",
        f"--launch={config.data_dir}",
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
        *((f"--retain-log-mib={config.retain_log_mib}",) if config.retain_log_mib else ()),
    )


def _compute_options(config: ClusterConfig) -> tuple[str, ...]:
    return (
        f"--name={COMPUTE}",
        f"--data-dir={config.data_dir / COMPUTE}",
        f"--control={config.control_address}",
        f"--host={HOST}",
        f"--port={config.agent_port}",
        f"--postgres-port={config.postgres_port}",
        f"--password-file={config.password_file}",
        *((f"--cache-size={config.cache_bytes}",) if config.cache_bytes else ()),
    )
