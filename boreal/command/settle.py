"""Before a start: the cluster's configuration, made or brought up to date, and its ports usable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from boreal import cluster
from boreal.cluster import ENDPOINTS, ClusterConfig
from boreal.command.reporter import Reporter
from boreal.command.roster import ports_of
from boreal.errors import BadUsage
from boreal.processes import LocalProcesses
from boreal.waiting import wait_until

_PORT_FREE_BOUND_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """What `up` was asked for. None: as it is, or for a new cluster the default."""

    data_dir: Path
    postgres_port: int | None = None
    """The writer endpoint's."""
    reader_port: int | None = None
    """The reader endpoint's; by default the one after the writer endpoint's."""
    readers: int | None = None
    """How many readers there are to be at least."""
    retain_log_mib: int | None = None
    cache_bytes: int | None = None
    """Bound on an instance's local pages, 0 for none."""
    insecure: bool | None = None
    """Whether its processes are to talk unencrypted."""


def settle_config(
    options: UpOptions, processes: LocalProcesses, reporter: Reporter
) -> ClusterConfig:
    """The configuration to start with, saved. BadUsage if a port it needs is taken."""
    exists = (options.data_dir / "cluster.json").exists()
    before = cluster.load(options.data_dir) if exists else None
    config = _with_ports(before, options, processes) if before else _new(options)
    config = cluster.with_readers(config, options.readers or 0)
    config = replace(config, retain_log_mib=options.retain_log_mib or config.retain_log_mib)
    if options.cache_bytes is not None:
        config = replace(config, cache_bytes=options.cache_bytes)
    if options.insecure is not None:
        config = replace(config, insecure=options.insecure)
    if before and before.insecure is not config.insecure:
        _check_stopped(before, processes)
    if before and not any(processes.status(name).alive for name in config.names):
        _await_ports(config, config.names)
        config, moved = cluster.with_free_ports(config)
        for old, new in moved.items():
            reporter.notice(f"internal port {old} was taken by somebody else; using {new} instead")
    if config != before:
        config.save()
    if before:
        _check_ports(config, processes)
    return config


def _new(options: UpOptions) -> ClusterConfig:
    port = options.postgres_port or cluster.POSTGRES_PORT
    _check_two(port, options.reader_port)
    _check_endpoint_free(port, "--port")
    if options.reader_port:
        _check_endpoint_free(options.reader_port, "--reader-port")
    return cluster.create(options.data_dir, postgres_port=port, reader_port=options.reader_port)


def _with_ports(
    config: ClusterConfig, options: UpOptions, processes: LocalProcesses
) -> ClusterConfig:
    """As asked, of a cluster that exists. The reader endpoint follows a writer endpoint that moves,
    unless it was asked for elsewhere.
    """
    port = options.postgres_port or config.postgres_port
    moves = port != config.postgres_port
    follows = cluster.reader_port_for(port) if moves else config.reader_port
    reader_port = options.reader_port or follows
    _check_two(port, reader_port)
    if (port, reader_port) == (config.postgres_port, config.reader_port):
        return config
    if processes.status(ENDPOINTS).alive:
        raise BadUsage(
            f"the cluster serves on ports {config.postgres_port} (writer) and {config.reader_port} "
            "(readers) already; to change that, stop it first with `boreal down`"
        )
    return replace(config, postgres_port=port, reader_port=reader_port)


def _check_stopped(config: ClusterConfig, processes: LocalProcesses) -> None:
    if any(processes.status(name).alive for name in config.names):
        now, wanted = ("without", "with") if config.insecure else ("with", "without")
        raise BadUsage(
            f"the cluster runs {now} TLS; to start it {wanted}, stop it first with `boreal down`: "
            "the two do not talk to each other"
        )


def _check_two(port: int, reader_port: int | None) -> None:
    if port == reader_port:
        raise BadUsage(f"port {port} cannot be both endpoints': choose another --reader-port")


def _check_ports(config: ClusterConfig, processes: LocalProcesses) -> None:
    """BadUsage if a process that is to be started would find a port of its taken."""
    missing = [name for name in config.names if not processes.status(name).alive]
    _await_ports(config, missing)
    for name in missing:
        for port in ports_of(config, name):
            # The control plane may bring the process back at this very moment.
            if not cluster.is_free(port) and not processes.status(name).alive:
                if port in {config.postgres_port, config.reader_port}:
                    option = "--port" if port == config.postgres_port else "--reader-port"
                    _check_endpoint_free(port, option)
                raise BadUsage(
                    f"port {port}, which {name} needs, is taken by another program; stop that, or "
                    "run `boreal down` and `boreal up`: with nothing running, ports are chosen anew"
                )


def _await_ports(config: ClusterConfig, names: Sequence[str]) -> None:
    """Give what was just killed the moment it needs to let go of its ports."""
    ports = [port for name in names for port in ports_of(config, name)]
    try:
        wait_until(
            lambda: all(map(cluster.is_free, ports)),
            timeout_s=_PORT_FREE_BOUND_S,
            otherwise=TimeoutError,
        )
    except TimeoutError:
        return  # whose port it is and what to do about it, the caller knows


def _check_endpoint_free(port: int, option: str) -> None:
    if not cluster.is_free(port):
        (other,) = cluster.free_ports(1, avoid=[port])
        raise BadUsage(
            f"port {port}, where clients are to connect, is taken by another program. Choose "
            f"another one: boreal up {option} {other}"
        )
