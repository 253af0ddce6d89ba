"""A whole cluster of real processes, driven as a person drives it: by the `boreal` command."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil
import psycopg

from boreal import cluster
from boreal.command.remote import connect
from boreal.engine import Engine, find_engine
from boreal.errors import NotWriter
from boreal.rpc import compute_pb2

BOREAL = str(Path(sys.executable).with_name("boreal"))
_T = TypeVar("_T")
NODES = tuple(f"sn-{n}" for n in range(1, 7))


class LocalCluster:
    """One cluster in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = cluster.free_ports(1)[0]

    def boreal(self, *arguments: str, timeout_s: float = 120, check: bool = True) -> str:
        """Run one `boreal` command on this cluster; return what it printed."""
        verb, *rest = arguments
        done = subprocess.run(
            [BOREAL, verb, f"--data-dir={self.directory}", *rest],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"boreal {' '.join(arguments)} failed:\n{done.stdout}")
        return done.stdout

    def up(self, *options: str) -> None:
        """Start it, or what is missing of it."""
        self.boreal("up", f"--port={self.port}", *options, timeout_s=240)

    def status(self) -> dict[str, Any]:
        """`boreal status --json`."""
        parsed: dict[str, Any] = json.loads(self.boreal("status", "--json"))
        return parsed

    @property
    def config(self) -> cluster.ClusterConfig:
        """Names, ports, connection strings."""
        return cluster.load(self.directory)

    @property
    def dsn(self) -> str:
        """The master user's connection string, at the writer endpoint."""
        return self.config.dsn

    @property
    def reader_dsn(self) -> str:
        """The same at the reader endpoint."""
        return self.config.reader_dsn

    def dsn_of(self, instance: str) -> str:
        """The same at one instance, whatever its role."""
        return self.config.instance_dsn(instance)

    def connect(
        self, dsn: str | None = None, **options: Any
    ) -> psycopg.Connection[tuple[Any, ...]]:
        """An autocommit connection of the master user; without a `dsn`, to the writer endpoint."""
        return psycopg.connect(dsn or self.dsn, autocommit=True, connect_timeout=5, **options)

    def query(self, statement: str, dsn: str | None = None) -> list[tuple[Any, ...]]:
        """Run one statement on a connection of its own, waiting for somebody who answers."""
        what = f"the cluster to answer {statement!r}"
        return until(lambda: self._attempt(statement, dsn), 60, what)

    def _attempt(self, statement: str, dsn: str | None) -> list[tuple[Any, ...]] | None:
        try:
            with self.connect(dsn) as connection:
                cursor = connection.execute(statement.encode())
                return cursor.fetchall() if cursor.description else []
        except psycopg.OperationalError:
            return None

    # --- instances -------------------------------------------------------------------------------

    @property
    def instances(self) -> tuple[str, ...]:
        """Every instance's name."""
        return self.config.instance_names

    def writer_name(self) -> str:
        """The writer at work, waited for if there is none."""
        return until(lambda: self._writer() or None, 60, "a writer").instance

    def reader_names(self) -> list[str]:
        """The instances that are not the writer at work."""
        writer = self.writer_name()
        return [name for name in self.instances if name != writer]

    def _writer(self) -> compute_pb2.ComputeStatus | None:
        async def ask() -> compute_pb2.ComputeStatus:
            async with connect(self.config) as remote:
                return await remote.writer()

        try:
            return asyncio.run(ask())
        except NotWriter:
            return None

    def instance_status(self, name: str) -> compute_pb2.ComputeStatus:
        """What an instance says of itself."""

        async def ask() -> compute_pb2.ComputeStatus:
            async with connect(self.config) as remote:
                return await remote.instance_status(name)

        return asyncio.run(ask())

    def agent_address(self) -> str:
        """Of the present writer's agent."""
        return self.config.instance(self.writer_name()).agent_address

    def pgdata(self, instance: str = "db-1") -> Path:
        """An instance's PostgreSQL data directory."""
        return self.directory / instance / "pgdata"

    def postmaster(self, instance: str = "db-1") -> int:
        """The pid of an instance's PostgreSQL."""
        return int((self.pgdata(instance) / "postmaster.pid").read_text().split()[0])

    def events(self) -> list[dict[str, Any]]:
        """`boreal events --json`."""
        return [json.loads(line) for line in self.boreal("events", "--json").splitlines()]

    @property
    def engine(self) -> Engine:
        """The PostgreSQL it runs."""
        return find_engine(self.config.engine_dir)

    def pid(self, name: str) -> int:
        """The pid of a process of the cluster."""
        record = json.loads((self.directory / "run" / f"{name}.json").read_text())
        return int(record["pid"])

    def take_bundle(self) -> int:
        """Have the writer take a bundle; return the LSN it is consistent at."""

        async def ask() -> int:
            async with connect(self.config) as remote:
                return (await remote.take_bundle()).end_lsn

        return asyncio.run(ask())

    def kill_pid(self, pid: int, name: str) -> None:
        """SIGKILL one process of the cluster, after a look that it is the one meant."""
        process = psutil.Process(pid)
        assert process.name() == name
        assert any(str(self.directory) in part for part in process.cmdline())
        process.kill()

    def pgbench(self, *arguments: str, dsn: str | None = None) -> subprocess.Popen[str]:
        """Start pgbench; without a `dsn`, at the writer endpoint."""
        return subprocess.Popen(
            [str(self.engine.tool("pgbench")), *arguments, dsn or self.dsn],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@contextmanager
def local_cluster(*options: str) -> Iterator[LocalCluster]:
    """A running cluster, gone without a trace afterwards. `options` are those of `boreal up`."""
    directory = Path(tempfile.mkdtemp(prefix="boreal-test-", dir="/var/tmp"))
    directory.chmod(0o755)  # PostgreSQL's account must get in
    running = LocalCluster(directory)
    try:
        running.up(*options)
        yield running
    finally:
        try:
            running.boreal("down", timeout_s=180)
        finally:
            shutil.rmtree(directory)


def until(condition: Callable[[], _T | None], timeout_s: float, what: str) -> _T:
    """Poll `condition` until it gives something; AssertionError naming `what` after a while."""
    deadline = time.monotonic() + timeout_s
    while (value := condition()) is None or value is False:
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(0.05)
    return value


@dataclass
class Ledger:
    """What one client was told: a row is acknowledged, or its outcome is unknown."""

    acknowledged: set[int] = field(default_factory=set)
    unknown: set[int] = field(default_factory=set)


class RecordingClient:
    """Commits one row after the other and writes down which were acknowledged.

    Reconnects for ever. A commit that ends in an error has an unknown outcome: both are right.
    """

    def __init__(self, cluster: LocalCluster, name: str) -> None:
        self._dsn = cluster.dsn
        self.name = name
        self.ledger = Ledger()
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"client {name}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End after the commit under way."""
        self._stop.set()
        self._thread.join(timeout=60)
        assert not self._thread.is_alive(), "a commit still waits"

    def progress(self, rows: int, timeout_s: float = 60) -> None:
        """Wait until so many more rows were acknowledged."""
        goal = len(self.ledger.acknowledged) + rows
        until(lambda: len(self.ledger.acknowledged) >= goal, timeout_s, f"{rows} more commits")

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set():
            try:
                with psycopg.connect(self._dsn, autocommit=True, connect_timeout=5) as connection:
                    while not self._stop.is_set():
                        number += 1
                        self.ledger.unknown.add(number)
                        connection.execute(
                            "insert into ledger values (%s, %s)", (self.name, number)
                        )
                        self.ledger.unknown.discard(number)
                        self.ledger.acknowledged.add(number)
            except psycopg.Error as error:
                self.errors.append(str(error))
                self._stop.wait(0.05)


def check_ledgers(cluster: LocalCluster, *clients: RecordingClient) -> None:
    """Every acknowledged row is there once, and none that no client ever sent."""
    for client in clients:
        name = client.name
        rows = cluster.query(f"select n from ledger where client = '{name}'")
        found = [int(row[0]) for row in rows]
        assert len(found) == len(set(found)), "a row came twice"
        lost = client.ledger.acknowledged - set(found)
        assert not lost, f"{len(lost)} acknowledged rows are lost, the first {min(lost)}"
        stray = set(found) - client.ledger.acknowledged - client.ledger.unknown
        assert not stray, f"rows nobody sent: {sorted(stray)[:5]}"
