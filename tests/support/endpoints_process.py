"""The endpoints' process, and the control plane's part that it listens to."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg
from grpc import aio

from boreal.cluster import HOST, free_ports
from boreal.rpc import control_pb2, control_pb2_grpc
from boreal.rpc.edge import make_server
from boreal.rpc.identity import Identity

_START_LIMIT_S = 30.0


class Routings(control_pb2_grpc.ControlServicer):
    """A Control service that tells of one routing after another."""

    def __init__(self) -> None:
        self._current = control_pb2.Routing()
        self._changed = asyncio.Event()
        self.streams = 0
        """How many were asked for."""

    def become(self, *routes: control_pb2.Route) -> None:
        self._current = control_pb2.Routing(routes=routes)
        self._changed.set()
        self._changed = asyncio.Event()

    async def WatchRouting(  # noqa: N802 - gRPC names the method
        self, _request: control_pb2.WatchRoutingRequest, _context: Any
    ) -> AsyncIterator[control_pb2.Routing]:
        self.streams += 1
        while True:
            changed = self._changed
            yield self._current
            await changed.wait()


class EndpointsProcess:
    """A running one."""

    def __init__(
        self, log: Path, control: str, *arguments: str, identity: Identity | None = None
    ) -> None:
        security = ("--tls-dir", str(identity.directory)) if identity else ("--insecure",)
        self.writer_port, self.reader_port = free_ports(2)
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "control_plane.endpoints", *security),
                    *("--control", control),
                    *("--writer-port", str(self.writer_port)),
                    *("--reader-port", str(self.reader_port)),
                    *arguments,
                ],
                stderr=output,
            )
        self.observed = psutil.Process(self._process.pid)

    def events(self) -> list[dict[str, Any]]:
        """What it has logged."""
        lines = self._log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    async def logged(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait until it has logged `event` so often; return those."""
        async with asyncio.timeout(_START_LIMIT_S):
            while len(found := [one for one in self.events() if one["event"] == event]) < count:
                if self._process.poll() is not None:
                    raise RuntimeError(f"the endpoints ended:\n{self._log.read_text()}")
                await asyncio.sleep(0.01)
        return found

    async def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it; its exit status."""
        if self._process.poll() is None:
            self._process.send_signal(how)
        return await asyncio.to_thread(self.wait)

    def wait(self) -> int:
        """Wait for its end; its exit status."""
        return self._process.wait(20)

    def connection(self, *, reader: bool = False, **options: Any) -> dict[str, Any]:
        """What psycopg needs for a connection through the writer's or the readers' endpoint."""
        port = self.reader_port if reader else self.writer_port
        return {
            "host": HOST,
            "port": port,
            "user": "postgres",
            "dbname": "postgres",
            "autocommit": True,
            "connect_timeout": 60,
            **options,
        }

    async def connect(self, **options: Any) -> psycopg.AsyncConnection[Any]:
        """A session through an endpoint."""
        return await psycopg.AsyncConnection.connect(**self.connection(**options))

    async def instance(self, **options: Any) -> str:
        """The name of the instance that a fresh session is with."""
        session = await self.connect(**options)
        async with session:
            row = await (await session.execute("SHOW cluster_name")).fetchone()
        if row is None:
            raise LookupError("cluster_name")
        return str(row[0])


@asynccontextmanager
async def control_plane(
    routings: Routings, port: int | None = None, identity: Identity | None = None
) -> AsyncIterator[tuple[str, aio.Server]]:
    """Serve `routings`; its address, and the server, which may be stopped before."""
    server = make_server()
    control_pb2_grpc.add_ControlServicer_to_server(routings, server)
    address = f"{HOST}:{port or free_ports(1)[0]}"
    if identity is None:
        server.add_insecure_port(address)
    else:
        server.add_secure_port(address, identity.server_credentials())
    await server.start()
    try:
        yield address, server
    finally:
        await server.stop(None)


@asynccontextmanager
async def endpoints(
    folder: Path,
    *routes: control_pb2.Route,
    arguments: tuple[str, ...] = (),
    identity: Identity | None = None,
) -> AsyncIterator[tuple[EndpointsProcess, Routings]]:
    """Run the endpoints' process on a control plane that tells of `routes` first.

    With an `identity` clients may have TLS; it is the control plane's, too.
    """
    routings = Routings()  # type: ignore[abstract]
    routings.become(*routes)
    async with control_plane(routings, identity=identity) as (address, _server):
        process = EndpointsProcess(folder / "endpoints.log", address, *arguments, identity=identity)
        try:
            await process.logged("endpoints serve")
            if routes:
                await process.logged("routing changes")
            yield process, routings
        finally:
            await process.end(signal.SIGKILL)
