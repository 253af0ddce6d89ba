"""The systems compared. Each is started fresh in a directory of its own and can say where SQL is
served, which processes it consists of, how much log it has shipped, and how far storage is.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from bench.accounting import Kind, Tree, standby_kind, writer_kind
from bench.load import Target
from bench.postgres import START_S, PostgresServer
from boreal import cluster, process_tree
from boreal.cluster import free_ports
from boreal.command import status
from boreal.command.remote import command_identity, connect
from boreal.engine import Engine
from boreal.errors import BorealError, Internal, NotNow, ProcessFailed
from boreal.processes import LocalProcesses
from boreal.quorum import SIX_WAY
from boreal.rpc import control_pb2, storage_pb2, storage_pb2_grpc
from boreal.rpc.edge import calling, open_channel
from boreal.rpc.identity import Identity
from boreal.waiting import wait_until

_COMMAND_S = 180
_STANDBYS = ("s1", "s2", "s3", "s4", "s5", "s6")


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageState:
    """What Boreal's status tells of its storage nodes at one moment.

    They report every half second: a backlog is that much older than it looks.
    """

    backlog_bytes: int
    """Log that the node furthest behind holds and has not indexed."""
    ack_p50_ms: float | None
    ack_p99_ms: float | None
    """Of appends in the last seconds, by the fourth fastest of the six: what commits wait for. None
    without any."""
    ack_p99_worst_ms: float | None
    """By the slowest of the six."""
    ack_delay_ms: float
    """How long acks are held back because the index lags: back-pressure."""


class System(Protocol):
    """Something that serves SQL. `stop` undoes `start`, also one that failed half-way, and may be
    called twice.
    """

    @property
    def title(self) -> str:
        """What it is, for the reader of the report."""

    @property
    def target(self) -> Target:
        """Where SQL is served."""

    def start(self) -> None:
        """Start it, empty."""

    def stop(self) -> None:
        """End its processes."""

    def pause(self) -> None:
        """Use no CPU until `resume`: it is another system's turn."""

    def resume(self) -> None:
        """Go on, and return when everything is as it was before the pause."""

    def trees(self) -> Sequence[Tree]:
        """Its processes."""

    def shipped_bytes(self) -> int | None:
        """Log bytes sent to all copies together since some fixed moment; None if it ships none."""

    def storage_state(self) -> StorageState | None:
        """How far storage is; None if there is none."""

    def under_load(self) -> AbstractContextManager[None]:
        """What is special about it while a load runs."""


class _Stock:
    """What stock PostgreSQL needs not do for the bench: an idle one uses no CPU anyway."""

    def pause(self) -> None:
        return

    def resume(self) -> None:
        return

    def storage_state(self) -> StorageState | None:
        return None

    def under_load(self) -> AbstractContextManager[None]:
        return nullcontext()


class StockAlone(_Stock):
    """One PostgreSQL that fsyncs its own log: what a commit costs with one copy."""

    title = "stock PostgreSQL alone, fsync"

    def __init__(self, engine: Engine, directory: Path) -> None:
        directory.mkdir(mode=0o711)
        (port,) = free_ports(1)
        self._server = PostgresServer(
            engine, directory / "primary", port=port, password=_password()
        )

    @property
    def target(self) -> Target:
        return self._server.target

    def start(self) -> None:
        self._server.create()
        self._server.start()

    def stop(self) -> None:
        self._server.stop()

    def trees(self) -> Sequence[Tree]:
        return _primary_trees(self._server)

    def shipped_bytes(self) -> int | None:
        return None


class StockQuorum(_Stock):
    """PostgreSQL's own way to Boreal's promise: six fsyncing standbys, any four for a commit."""

    title = "stock PostgreSQL, ANY 4 of 6 fsyncing standbys"

    def __init__(self, engine: Engine, directory: Path) -> None:
        directory.mkdir(mode=0o711)
        names = ("primary", *_STANDBYS)
        password = _password()
        self._primary, *standbys = (
            PostgresServer(engine, directory / name, port=port, password=password)
            for name, port in zip(names, free_ports(len(names)), strict=True)
        )
        self._standbys = dict(zip(_STANDBYS, standbys, strict=True))

    @property
    def target(self) -> Target:
        return self._primary.target

    def start(self) -> None:
        """Ends only when all six stream and every commit waits for four of them."""
        self._primary.create()
        self._primary.start()
        with ThreadPoolExecutor(len(_STANDBYS)) as pool:
            list(pool.map(self._start_standby, self._standbys))
        self._wait_for_all("streaming")
        self._primary.query(
            "ALTER SYSTEM SET synchronous_standby_names = 'ANY 4 (s1, s2, s3, s4, s5, s6)'"
        )
        self._primary.query("SELECT pg_reload_conf()")
        self._wait_for_all("quorum")

    def _start_standby(self, name: str) -> None:
        self._standbys[name].copy_from(self._primary, name)
        self._standbys[name].start()

    def _wait_for_all(self, state: str) -> None:
        wait_until(
            lambda: self._count(state) == len(_STANDBYS),
            timeout_s=START_S,
            otherwise=lambda: ProcessFailed(f"only {self._count(state)} standbys are {state}"),
        )

    def _count(self, state: str) -> int:
        rows = self._primary.query("SELECT state, sync_state FROM pg_stat_replication")
        return sum(state in row for row in rows)

    def stop(self) -> None:
        for server in (self._primary, *self._standbys.values()):
            server.stop()

    def trees(self) -> Sequence[Tree]:
        standbys = [
            Tree(root_pid=server.pid, root_kind=Kind.STANDBY, child_kind=standby_kind)
            for server in self._standbys.values()
            if server.pid is not None
        ]
        return [*_primary_trees(self._primary), *standbys]

    def shipped_bytes(self) -> int | None:
        rows = self._primary.query(
            "SELECT coalesce(sum(sent_lsn - '0/0'), 0)::bigint FROM pg_stat_replication"
        )
        return int(rows[0][0])


class Boreal:
    """A local Boreal cluster, started and asked through the `boreal` command as a user would.

    With `pages_stopped` the page processes of all storage nodes are frozen while a load runs: what
    is left is the way of a commit. Next to the whole it shows what indexing and background work
    cost.
    """

    def __init__(
        self,
        directory: Path,
        *,
        pages_stopped: bool = False,
        options: Sequence[str] = (),
    ) -> None:
        """`options` are further ones for `boreal up`."""
        self._directory = directory
        self._options = options
        self._pages_stopped = pages_stopped
        self._target: Target | None = None
        self._direct_target: Target | None = None
        self._processes = LocalProcesses(directory)
        directory.mkdir(mode=0o711)

    @property
    def directory(self) -> Path:
        """Where all its data are."""
        return self._directory

    @property
    def title(self) -> str:
        if self._pages_stopped:
            return "Boreal, its six page processes STOPPED during the load: nothing is indexed"
        return "Boreal"

    @property
    def target(self) -> Target:
        if self._target is None:
            raise Internal("asked where Boreal serves SQL before it was started")
        return self._target

    def start(self) -> None:
        if self._target is not None:  # two systems may be one cluster
            return
        self.command("up", "--port", str(free_ports(1)[0]), *self._options)
        config = cluster.load(self._directory)
        self._target = Target.parse(config.dsn)
        self._direct_target = Target.parse(config.instance_dsn(self._writer()["name"]))

    @property
    def direct_target(self) -> Target:
        """The writer's own port, past the endpoint."""
        if self._direct_target is None:
            raise Internal("asked where Boreal serves SQL before it was started")
        return self._direct_target

    def stop(self) -> None:
        if self._processes.names():
            self._unfreeze()  # a compute node that stops wants its storage nodes
            self.command("down")

    def pause(self) -> None:
        # Heartbeats are some percent of a core, which the others would have to do without.
        for name in self._alive():
            self._processes.pause(name)

    def resume(self) -> None:
        self._unfreeze()
        wait_until(
            self._ships_to_all,
            timeout_s=START_S,
            otherwise=lambda: ProcessFailed("Boreal did not find together again after a pause"),
            poll_s=0.2,
        )

    def _unfreeze(self) -> None:
        for name in self._alive():
            self._processes.resume(name)

    def _alive(self) -> list[str]:
        names = self._processes.names()
        return [name for name in names if self._processes.status(name).alive]

    def _ships_to_all(self) -> bool:
        links = [link["state"] for link in self._writer()["links"]]
        return len(links) == SIX_WAY.copies and set(links) == {"streaming"}

    def pids(self) -> dict[str, int]:
        """Of the processes that are alive, by name; those below them not."""
        found = {name: self._processes.status(name).pid for name in self._processes.names()}
        return {name: pid for name, pid in found.items() if pid is not None}

    def trees(self) -> Sequence[Tree]:
        trees = []
        for name, pid in self.pids().items():
            root_kind, child_kind = _boreal_kinds(name)
            trees.append(Tree(root_pid=pid, root_kind=root_kind, child_kind=child_kind))
        return trees

    def shipped_bytes(self) -> int | None:
        shipped: int | None = self._writer()["shipped_bytes"]
        return shipped

    def storage_state(self) -> StorageState | None:
        # Not by the command: to start Python costs more than what is to be measured.
        found = status.to_json(asyncio.run(status.gather(cluster.load(self._directory))))
        return read_storage_state(found)

    def unsettled_layers(self) -> int | None:
        """Layers of the page index, at the node that has most, whose pages wait to be stored.

        None if a node, or the control plane, does not answer.
        """
        config = cluster.load(self._directory)
        found = asyncio.run(status.gather(config)).cluster
        if found is None or len(found.storage) < SIX_WAY.copies:
            return None
        try:
            return asyncio.run(_most_unsettled(found, command_identity(config)))
        except BorealError:
            return None

    def take_bundle(self) -> None:
        """Have the writer take a bundle, if the moment allows it."""
        with suppress(NotNow):
            asyncio.run(_take_bundle(cluster.load(self._directory)))

    def under_load(self) -> AbstractContextManager[None]:
        return self._stopped_pages() if self._pages_stopped else nullcontext()

    @contextmanager
    def _stopped_pages(self) -> Iterator[None]:
        processes = [
            child
            for name in self._alive()
            if name.startswith("sn-")
            for child in psutil.Process(self._processes.status(name).pid).children()
        ]
        if len(processes) != SIX_WAY.copies:
            raise ProcessFailed(f"{len(processes)} page processes run, not {SIX_WAY.copies}")
        try:
            for process in processes:
                process_tree.send(process, signal.SIGSTOP)
            yield
        finally:
            for process in processes:
                process_tree.send(process, signal.SIGCONT)

    def _writer(self) -> Any:
        """The writer's line of the status."""
        found = self._status()
        return next(row for row in found["compute"] if row["name"] == found["writer"])

    def _status(self) -> Any:
        return json.loads(self.command("status", "--json"))

    def command(self, verb: str, *arguments: str) -> str:
        """Run one `boreal` command on it; what that printed. ProcessFailed if it fails."""
        command = [str(Path(sys.executable).with_name("boreal")), verb]
        try:
            # A session of its own: Ctrl-C on the terminal is for the bench, which then stops it.
            done = subprocess.run(
                [*command, "--data-dir", str(self._directory), *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_COMMAND_S,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            raise ProcessFailed(f"boreal {verb} did not end within {_COMMAND_S} s") from error
        if done.returncode != 0:
            raise ProcessFailed(f"boreal {verb} failed: {(done.stderr or done.stdout).strip()}")
        return done.stdout


async def _take_bundle(config: cluster.ClusterConfig) -> None:
    async with connect(config) as remote:
        await remote.take_bundle()


async def _most_unsettled(found: control_pb2.ClusterStatus, identity: Identity | None) -> int:
    request = storage_pb2.GetIndexStateRequest(volume=found.volume)
    most = 0
    for report in found.storage:
        node = report.node
        async with open_channel(node.addresses.pages, identity) as channel:
            stub: storage_pb2_grpc.StoragePagesAsyncStub = storage_pb2_grpc.StoragePagesStub(
                channel
            )
            with calling(node.name, "GetIndexState"):
                state = await stub.GetIndexState(request, timeout=_COMMAND_S)
            most = max(most, state.unsettled)
    return most


def read_storage_state(found: Any) -> StorageState | None:
    """Read what `boreal status --json` prints; None if the control plane does not answer. Pure."""
    lags = [node["indexed_lag_bytes"] for node in found["storage"]]
    if None in lags:
        return None
    links = [link for compute in found["compute"] for link in compute["links"]]
    p50s, p99s = (
        sorted(link[name] / 1000 for link in links if link.get(name))
        for name in ("ack_p50_us", "ack_p99_us")
    )
    return StorageState(
        backlog_bytes=max(lags),
        ack_p50_ms=_by_the_quorum(p50s),
        ack_p99_ms=_by_the_quorum(p99s),
        ack_p99_worst_ms=p99s[-1] if p99s else None,
        ack_delay_ms=max(node.get("ack_delay_us") or 0 for node in found["storage"]) / 1000,
    )


def _by_the_quorum(ascending: Sequence[float]) -> float | None:
    return ascending[SIX_WAY.write - 1] if len(ascending) >= SIX_WAY.write else None


def _boreal_kinds(name: str) -> tuple[Kind, Callable[[str], Kind]]:
    """The kinds of a Boreal process and of those below it, by its name in the cluster."""
    if name.startswith("sn-"):
        return Kind.STORAGE_LOG, lambda _: Kind.STORAGE_PAGES
    if name.startswith("db-"):
        return Kind.AGENT, writer_kind
    kind = Kind.ENDPOINTS if name == cluster.ENDPOINTS else Kind.CONTROL
    return kind, lambda _: kind


def _primary_trees(server: PostgresServer) -> list[Tree]:
    if server.pid is None:
        return []
    return [Tree(root_pid=server.pid, root_kind=Kind.POSTGRES, child_kind=writer_kind)]


def _password() -> str:
    return secrets.token_urlsafe(16)
