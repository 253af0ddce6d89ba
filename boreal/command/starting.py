"""One start of a cluster, phase by phase: what is started when, and what is waited for."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from boreal.cluster import CONTROL, ENDPOINTS, HOST, ClusterConfig
from boreal.command.remote import Remote, connect, if_reachable
from boreal.command.reporter import Reporter
from boreal.command.roster import command_line, is_instance, listed, ports_of, storage_names
from boreal.errors import ProcessFailed
from boreal.processes import LocalProcesses, ProcessState
from boreal.quorum import SIX_WAY
from boreal.rpc import compute_pb2, control_pb2

_T = TypeVar("_T")

CONTROL_BOUND_S = 30.0
STORAGE_BOUND_S = 60.0
VOLUME_BOUND_S = 180.0
SERVED_BOUND_S = 180.0
SQL_BOUND_S = 30.0
LISTENS_BOUND_S = 20.0
_POLL_S = 0.05
_AT_ONCE = max(2, os.cpu_count() or 2)
"""How many readers start at the same time: each costs CPU seconds, and clients are served."""
_TOLERATED_DEATHS = 3
"""How often what is brought back may die while it starts before that is the failure to report."""
_TOLERATED_LIVES = 6
"""The same of its PostgreSQL."""


class Start:
    """One start.

    The first instance to run is the one that wrote last: with another one first, a stop and a start
    would be a failover. The others follow once SQL is served, few at a time.
    """

    def __init__(
        self, config: ClusterConfig, processes: LocalProcesses, reporter: Reporter
    ) -> None:
        self._config = config
        self._processes = processes
        self._reporter = reporter
        self._pids: defaultdict[str, set[int]] = defaultdict(set)
        self._lives: defaultdict[str, set[str]] = defaultdict(set)

    def run(self) -> None:
        """Start what is missing and wait for SQL."""
        began = time.monotonic()
        self._resume_paused()
        alone = len(self._config.compute) == 1
        first = [name for name in self._config.names if alone or not is_instance(name)]
        started = self._start_missing(first)
        if started or not self._missing(self._config.names):
            text = f"started {listed(started)}" if started else "everything runs already"
            self._reporter.phase(text, time.monotonic() - began)
        asyncio.run(self._await_all())

    async def _await_all(self) -> None:
        async with connect(self._config) as remote:
            status = await self._phase(self._control_answers(remote), "the control plane answers")
            leader = self._lead(status.writer)
            absent = await self._phase(self._storage_alive(remote), "the storage nodes report")
            for name in absent:
                self._reporter.notice(str(self._processes.failure(name, "is down")))
            await self._phase(self._volume_ready(remote, leader), "the volume is ready")
            writer = await self._phase(
                self._writer(remote, leader), lambda found: f"{found.instance} is the writer"
            )
            served = f"SQL is served, epoch {writer.volume.epoch}"
            await self._phase(self._writes_served(writer.instance), served)
            names = self._config.instance_names
            others = [name for name in names if name != writer.instance]
            if others:
                verb = "takes" if len(others) == 1 else "take"
                text = f"{listed(others)} {verb} clients"
                await self._phase(self._all_take_clients(remote, others), text)

    async def await_one(self, name: str, pid: int, *, writes: bool = False) -> None:
        """Return once process `name`, started as `pid`, does its work.

        `writes`: and once there is a writer, for it was this instance.
        """
        async with connect(self._config) as remote:
            if name == CONTROL:
                await self._control_answers(remote)
            elif name == ENDPOINTS:
                await self._listens()
            elif name in storage_names():
                await self._node_reports(remote, name, pid)
            else:
                await self._takes_clients(remote, name)
                if writes:
                    await self._writes_served(name)

    async def start_instance(self, name: str) -> None:
        """Start a reader and return when it takes clients."""
        async with connect(self._config) as remote:
            await self._start_and_await(remote, name)

    # --- starting --------------------------------------------------------------------------------

    def _resume_paused(self) -> None:
        for name in self._config.names:
            if self._processes.status(name).state is ProcessState.PAUSED:
                self._processes.resume(name)
                self._reporter.notice(f"{name} was paused; resumed it")

    def _missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if not self._processes.status(name).alive]

    def _start_missing(self, names: Sequence[str]) -> list[str]:
        missing = self._missing(names)
        for name in missing:
            self._processes.start(name, command_line(self._config, name))
        return missing

    def _lead(self, last_writer: str) -> str:
        """The instance to look at while there is no writer; started if none runs."""
        names = self._config.instance_names
        running = [name for name in names if self._processes.status(name).alive]
        candidates = running or names
        leader = last_writer if last_writer in candidates else candidates[0]
        self._start_missing([leader])
        return leader

    async def _phase(self, waiting: Awaitable[_T], text: str | Callable[[_T], str]) -> _T:
        began = time.monotonic()
        result = await waiting
        told = text if isinstance(text, str) else text(result)
        self._reporter.phase(told, time.monotonic() - began)
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

    async def _volume_ready(self, remote: Remote, leader: str) -> bool:
        async def ready() -> bool | None:
            self._check_revived(leader)
            status = await if_reachable(remote.cluster_status())
            return True if status and status.volume_ready else None

        return await self._until(ready, "has not made the volume", leader, VOLUME_BOUND_S)

    async def _writer(self, remote: Remote, leader: str) -> compute_pb2.ComputeStatus:
        async def writes() -> compute_pb2.ComputeStatus | None:
            self._check_revived(leader)
            found = (await remote.instances(self._config.instance_names)).values()
            for status in found:
                self._check_lives(status)
            writers = [status for status in found if status.state == compute_pb2.WRITER]
            return max(writers, key=lambda status: status.volume.epoch, default=None)

        return await self._until(writes, "has not become the writer", leader, SERVED_BOUND_S)

    async def _writes_served(self, name: str) -> bool:
        """The writer endpoint leads to a writer, which `name` is thought to be."""

        def culprit() -> str:
            return ENDPOINTS if _accepts(self._config.instance(name).postgres_port) else name

        query = "select not pg_is_in_recovery()"
        return await self._answers(self._config.dsn, query, (ENDPOINTS, name), culprit)

    async def _all_take_clients(self, remote: Remote, names: Sequence[str]) -> None:
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(name: str) -> None:
            async with gate:
                await self._start_and_await(remote, name)

        # Everyone comes to an end, each within its bound; then the first failure is told.
        for outcome in await asyncio.gather(*map(one, names), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _start_and_await(self, remote: Remote, name: str) -> None:
        await asyncio.to_thread(self._start_missing, [name])
        await self._takes_clients(remote, name)

    async def _takes_clients(self, remote: Remote, name: str) -> None:
        async def takes() -> bool | None:
            self._check_revived(name)
            status = await if_reachable(remote.instance_status(name))
            if status is None:
                return None
            self._check_lives(status)
            return status.takes_clients or None

        await self._until(takes, "does not take clients", name, SERVED_BOUND_S)
        await self._answers(self._config.instance_dsn(name), "select true", (name,), name)

    async def _answers(
        self, dsn: str, query: str, involved: Sequence[str], culprit: str | Callable[[], str]
    ) -> bool:
        async def answered() -> bool | None:
            for name in involved:
                self._check_revived(name)
            return await asyncio.to_thread(_is_true, dsn, query) or None

        return await self._until(answered, "does not serve SQL", culprit, SQL_BOUND_S)

    async def _listens(self) -> bool:
        async def listening() -> bool | None:
            self._check_alive(ENDPOINTS)
            ports = ports_of(self._config, ENDPOINTS)
            return all([await asyncio.to_thread(_accepts, port) for port in ports]) or None

        return await self._until(listening, "does not listen", ENDPOINTS, LISTENS_BOUND_S)

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

    def _check_revived(self, name: str) -> None:
        """The control plane's launcher brings it back, but not without end."""
        self._check_alive(CONTROL)
        status = self._processes.status(name)
        if status.pid is not None:
            self._pids[name].add(status.pid)
        if len(self._pids[name]) > _TOLERATED_DEATHS:
            raise self._failure(name, f"ended {_TOLERATED_DEATHS} times")

    def _check_lives(self, status: compute_pb2.ComputeStatus) -> None:
        lives = self._lives[status.instance]
        lives.add(status.incarnation)
        if len(lives) > _TOLERATED_LIVES:
            raise self._failure(status.instance, "cannot keep its PostgreSQL running")

    def _failure(self, name: str, what: str) -> ProcessFailed:
        failure = self._processes.failure(name, what)
        return ProcessFailed(
            f"{failure.message}\nWhat else runs was left running. See it all with `boreal logs "
            f"{name}`; then `boreal up` tries again, and `boreal down` stops everything"
        )


def _is_true(dsn: str, query: str) -> bool:
    """Whether a client gets this answer through the front door."""
    import psycopg  # takes a tenth of a second, and is only needed once all else is well

    try:
        with psycopg.connect(dsn, connect_timeout=5, autocommit=True) as connection:
            return connection.execute(query.encode()).fetchone() == (True,)
    except psycopg.OperationalError:
        return False


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=1):
            return True
    except OSError:
        return False
