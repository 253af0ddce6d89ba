"""Start a whole local cluster, stop it, restart one process: what `up`, `down` and `restart` do.

Programs (tests, the bench) use `bring_up` and `take_down` as the command does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from boreal import cluster
from boreal.cluster import COMPUTE, CONTROL, ClusterConfig
from boreal.command.remote import Remote, connect, if_reachable
from boreal.command.roster import command_line, ports_of, storage_names
from boreal.errors import BadUsage, ProcessFailed
from boreal.processes import LocalProcesses, ProcessState
from boreal.quorum import SIX_WAY
from boreal.rpc import compute_pb2, control_pb2
from boreal.waiting import wait_until

_T = TypeVar("_T")

CONTROL_BOUND_S = 30.0
STORAGE_BOUND_S = 60.0
VOLUME_BOUND_S = 180.0
SERVED_BOUND_S = 180.0
SQL_BOUND_S = 20.0
_POLL_S = 0.05
_PORT_FREE_BOUND_S = 3.0
_TOLERATED_DEATHS = 3
"""How often a compute node may die while it starts before that is the failure to report."""
_TOLERATED_LIVES = 6
"""The same of its PostgreSQL."""


class Reporter(Protocol):
    """Hears how a start goes on."""

    def phase(self, text: str, seconds: float) -> None:
        """A phase is over, and took so long."""

    def notice(self, text: str) -> None:
        """Something the user should know."""


class Silent:
    """A reporter for programs."""

    def phase(self, text: str, seconds: float) -> None:
        """Say nothing."""

    def notice(self, text: str) -> None:
        """Say nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """What `up` was asked for."""

    data_dir: Path
    postgres_port: int | None = None
    """None: the one the cluster has, or the default for a new one."""
    retain_log_mib: int | None = None
    """None: as it is, or as storage nodes think best."""
    cache_bytes: int | None = None
    """Bound on a compute node's local pages, 0 for none. None: as it is."""


def bring_up(options: UpOptions, reporter: Reporter | None = None) -> ClusterConfig:
    """Start whatever of the cluster does not run, and return when it serves SQL. Idempotent."""
    reporter = reporter or Silent()
    cluster.prepare_directory(options.data_dir)
    processes = LocalProcesses(options.data_dir)
    with processes.one_command_at_a_time():
        config = _settle_config(options, processes, reporter)
        _Start(config, processes, reporter).run()
    return config


def take_down(data_dir: Path, reporter: Reporter | None = None) -> None:
    """Stop everything: the compute node first, with its last bundle. Idempotent."""
    reporter = reporter or Silent()
    processes = LocalProcesses(data_dir)
    if not data_dir.is_dir():
        return
    with processes.one_command_at_a_time():
        for group in ((COMPUTE,), (CONTROL,), storage_names()):
            present = [name for name in group if name in processes.names()]
            if not present:
                continue
            began = time.monotonic()
            killed = processes.stop(*present)
            reporter.phase(f"stopped {_listed(present)}", time.monotonic() - began)
            if killed:
                reporter.notice(f"{_listed(killed)} did not stop in time and had to be killed")


def restart(config: ClusterConfig, name: str, reporter: Reporter | None = None) -> int:
    """Stop process `name` if it runs, start it, and return its pid once it does its work."""
    reporter = reporter or Silent()
    began = time.monotonic()
    processes = LocalProcesses(config.data_dir)
    pid = processes.restart(name, command_line(config, name))
    asyncio.run(_Start(config, processes, reporter).await_one(name, pid))
    reporter.phase(f"{name} is at work again, pid {pid}", time.monotonic() - began)
    return pid


# --- settling the configuration ------------------------------------------------------------------


def _settle_config(
    options: UpOptions, processes: LocalProcesses, reporter: Reporter
) -> ClusterConfig:
    """The cluster's configuration, made or brought up to date, saved; its ports are usable."""
    if not (options.data_dir / "cluster.json").exists():
        port = options.postgres_port or cluster.POSTGRES_PORT
        _check_port_free(port)
        config = cluster.create(options.data_dir, postgres_port=port)
        config = replace(config, retain_log_mib=options.retain_log_mib)
        config = replace(config, cache_bytes=options.cache_bytes or 0)
        config.save()
        return config
    before = cluster.load(options.data_dir)
    config = _with_postgres_port(before, options.postgres_port, processes)
    config = replace(config, retain_log_mib=options.retain_log_mib or config.retain_log_mib)
    if options.cache_bytes is not None:
        config = replace(config, cache_bytes=options.cache_bytes)
    if not any(processes.status(name).alive for name in config.names):
        _await_ports(config, config.names)
        config, moved = cluster.with_free_ports(config)
        for old, new in moved.items():
            reporter.notice(f"internal port {old} was taken by somebody else; using {new} instead")
    if config != before:
        config.save()
    _check_ports(config, processes)
    return config


def _with_postgres_port(
    config: ClusterConfig, wanted: int | None, processes: LocalProcesses
) -> ClusterConfig:
    if wanted is None or wanted == config.postgres_port:
        return config
    if processes.status(COMPUTE).alive:
        raise BadUsage(
            f"the cluster serves on port {config.postgres_port} already; to change that to "
            f"{wanted}, stop it first with `boreal down`"
        )
    return replace(config, postgres_port=wanted)


def _check_ports(config: ClusterConfig, processes: LocalProcesses) -> None:
    """BadUsage if a process that is to be started would find a port of its taken."""
    missing = [name for name in config.names if not processes.status(name).alive]
    _await_ports(config, missing)
    if COMPUTE in missing:
        _check_port_free(config.postgres_port)
    for name in missing:
        for port in ports_of(config, name):
            # The control plane may bring the compute node back at this very moment.
            if not cluster.is_free(port) and not processes.status(name).alive:
                raise BadUsage(
                    f"port {port}, which {name} needs, is taken by another program; stop that, or "
                    "run `boreal down` and `boreal up`: with nothing running, ports are chosen anew"
                )


def _await_ports(config: ClusterConfig, names: list[str] | tuple[str, ...]) -> None:
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


def _check_port_free(port: int) -> None:
    if not cluster.is_free(port):
        (other,) = cluster.free_ports(1, avoid=[port])
        raise BadUsage(
            f"port {port}, where PostgreSQL is to listen, is taken by another program. Choose "
            f"another one: boreal up --port {other}"
        )


# --- starting ------------------------------------------------------------------------------------


class _Start:
    """One start of a cluster, phase by phase."""

    def __init__(
        self, config: ClusterConfig, processes: LocalProcesses, reporter: Reporter
    ) -> None:
        self._config = config
        self._processes = processes
        self._reporter = reporter
        self._compute_pids: set[int] = set()

    def run(self) -> None:
        """Start what is missing and wait for SQL."""
        began = time.monotonic()
        missing = self._start_missing()
        text = f"started {_listed(missing)}" if missing else "everything runs already"
        self._reporter.phase(text, time.monotonic() - began)
        asyncio.run(self._await_served())

    def _start_missing(self) -> list[str]:
        missing = []
        for name in self._config.names:
            state = self._processes.status(name).state
            if state is ProcessState.PAUSED:
                self._processes.resume(name)
                self._reporter.notice(f"{name} was paused; resumed it")
            elif state is not ProcessState.RUNNING:
                self._processes.start(name, command_line(self._config, name))
                missing.append(name)
        return missing

    async def _await_served(self) -> None:
        async with connect(self._config) as remote:
            await self._phase(self._control_answers(remote), "the control plane answers")
            absent = await self._phase(self._storage_alive(remote), "the storage nodes report")
            for name in absent:
                self._reporter.notice(str(self._processes.failure(name, "is down")))
            await self._phase(self._volume_ready(remote), "the volume is ready")
            epoch = await self._phase(self._writer(remote), f"{COMPUTE} is the writer")
            await self._phase(self._sql_served(), f"SQL is served, epoch {epoch}")

    async def await_one(self, name: str, pid: int) -> None:
        """Return once process `name`, started as `pid`, does its work."""
        async with connect(self._config) as remote:
            if name == CONTROL:
                await self._control_answers(remote)
            elif name == COMPUTE:
                await self._writer(remote)
                await self._sql_served()
            else:
                await self._node_reports(remote, name, pid)

    async def _phase(self, waiting: Awaitable[_T], text: str) -> _T:
        began = time.monotonic()
        result = await waiting
        self._reporter.phase(text, time.monotonic() - began)
        return result

    # --- what is waited for: each condition answers None for "not yet" ---------------------------

    async def _control_answers(self, remote: Remote) -> control_pb2.ClusterStatus:
        async def answered() -> control_pb2.ClusterStatus | None:
            self._check_alive(CONTROL)
            return await if_reachable(remote.cluster_status())

        return await self._until(answered, "does not answer", CONTROL, CONTROL_BOUND_S)

    async def _storage_alive(self, remote: Remote) -> list[str]:
        """Wait for all storage nodes; return those that ended, if the volume can serve without."""
        everyone = storage_names()
        silent = set(everyone)

        async def gathered() -> list[str] | None:
            self._check_alive(CONTROL)
            status = await if_reachable(remote.cluster_status())
            if status is None:
                return None
            dead = [name for name in everyone if not self._processes.status(name).alive]
            alive = {each.node.name for each in status.storage if each.alive} - set(dead)
            if dead and (not status.volume_ready or SIX_WAY.copies - len(dead) < SIX_WAY.write):
                raise self._failure(dead[0], "ended")
            silent.clear()
            silent.update(set(everyone) - alive - set(dead))
            return None if silent else dead

        what = "does not report to the control plane"
        return await self._until(gathered, what, lambda: min(silent), STORAGE_BOUND_S)

    async def _volume_ready(self, remote: Remote) -> bool:
        async def ready() -> bool | None:
            self._check_compute()
            status = await if_reachable(remote.cluster_status())
            return True if status and status.volume_ready else None

        return await self._until(ready, "has not made the volume", COMPUTE, VOLUME_BOUND_S)

    async def _writer(self, remote: Remote) -> int:
        async def writes() -> int | None:
            self._check_compute()
            status = await if_reachable(remote.compute_status())
            if status is None:
                return None
            lives.add(status.incarnation)
            if len(lives) > _TOLERATED_LIVES:
                raise self._failure(COMPUTE, "cannot keep its PostgreSQL running")
            return status.volume.epoch if status.state == compute_pb2.WRITER else None

        lives: set[str] = set()
        return await self._until(writes, "has not become the writer", COMPUTE, SERVED_BOUND_S)

    async def _sql_served(self) -> bool:
        async def served() -> bool | None:
            self._check_compute()
            return await asyncio.to_thread(_select_one, self._config.dsn) or None

        return await self._until(served, "does not serve SQL", COMPUTE, SQL_BOUND_S)

    async def _node_reports(self, remote: Remote, name: str, pid: int) -> bool:
        async def reported() -> bool | None:
            self._check_alive(name)
            status = await if_reachable(remote.cluster_status())
            storage = status.storage if status else ()
            return any(each.node.name == name and each.pid == pid for each in storage) or None

        what = "does not report to the control plane"
        return await self._until(reported, what, name, STORAGE_BOUND_S)

    # --- how waiting fails ---------------------------------------------------------------------

    async def _until(
        self,
        condition: Callable[[], Awaitable[_T | None]],
        what: str,
        culprit: str | Callable[[], str],
        bound_s: float,
    ) -> _T:
        deadline = time.monotonic() + bound_s
        while (value := await condition()) is None:
            if time.monotonic() > deadline:
                name = culprit if isinstance(culprit, str) else culprit()
                raise self._failure(name, f"{what} after {bound_s:.0f} s")
            await asyncio.sleep(_POLL_S)
        return value

    def _check_alive(self, name: str) -> None:
        if not self._processes.status(name).alive:
            raise self._failure(name, "ended")

    def _check_compute(self) -> None:
        """The control plane's launcher brings it back, but not without end."""
        self._check_alive(CONTROL)
        status = self._processes.status(COMPUTE)
        if status.pid is not None:
            self._compute_pids.add(status.pid)
        if len(self._compute_pids) > _TOLERATED_DEATHS:
            raise self._failure(COMPUTE, f"ended {_TOLERATED_DEATHS} times")

    def _failure(self, name: str, what: str) -> ProcessFailed:
        failure = self._processes.failure(name, what)
        return ProcessFailed(
            f"{failure.message}\nWhat else runs was left running. See it all with `boreal logs "
            f"{name}`; then `boreal up` tries again, and `boreal down` stops everything"
        )


def _select_one(dsn: str) -> bool:
    """Whether a client gets an answer through the front door."""
    import psycopg  # takes a tenth of a second, and is only needed once all else is well

    try:
        with psycopg.connect(dsn, connect_timeout=5, autocommit=True) as connection:
            return connection.execute("select 1").fetchone() == (1,)
    except psycopg.OperationalError:
        return False


def _listed(names: Sequence[str]) -> str:
    """`sn-1 ... sn-6` in few words."""
    storage = [name for name in names if name in storage_names()]
    if len(storage) < len(storage_names()):
        return ", ".join(names)
    others = [name for name in names if name not in storage]
    return ", ".join([*others[:1], f"{storage[0]} to {storage[-1]}", *others[1:]])
