"""Compute nodes as real processes, on real storage nodes, under a control plane of the test's."""

# ruff: noqa: N802 - the methods are named as the calls are

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc
import psutil
import psycopg
from grpc import aio

from boreal.cluster import free_ports
from boreal.rpc import compute_pb2, control_pb2
from boreal.rpc.edge import make_server, volume_ref
from boreal.types import VolumeId
from tests.storage_node.node_process import NodeProcess

VOLUME = VolumeId("agent-test")
PASSWORD = "secret"
_T = TypeVar("_T")
Connection = psycopg.AsyncConnection[tuple[Any, ...]]


async def until(condition: Callable[[], _T], what: str, limit_s: float = 60.0) -> _T:
    """Wait for a condition; the value that made it true."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + limit_s
    while not (value := condition()):
        assert clock() < deadline, f"waited {limit_s:g} s in vain for {what}"
        await asyncio.sleep(0.005)
    return value


_MESSAGES: dict[str, tuple[Any, Any]] = {
    "StorageHeartbeat": (
        control_pb2.StorageHeartbeatRequest,
        control_pb2.StorageHeartbeatResponse,
    ),
    "ComputeHeartbeat": (
        control_pb2.ComputeHeartbeatRequest,
        control_pb2.ComputeHeartbeatResponse,
    ),
    "VolumeCreated": (control_pb2.VolumeCreatedRequest, control_pb2.VolumeCreatedResponse),
}


def add_control(control: object, server: aio.Server) -> None:
    """Serve those of the Control service's methods above that `control` has."""
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(control, name),
            request_deserializer=request.FromString,
            response_serializer=response.SerializeToString,
        )
        for name, (request, response) in _MESSAGES.items()
        if hasattr(control, name)
    }
    service = grpc.method_handlers_generic_handler("boreal.Control", handlers)
    server.add_generic_rpc_handlers((service,))


class ScriptedControl:
    """Gives each instance the order that the test set for it; remembers what they reported."""

    def __init__(self) -> None:
        self._storage: dict[str, control_pb2.StorageNode] = {}
        self._orders: dict[str, control_pb2.Order] = {}
        self._changed = asyncio.Event()
        self.reports: dict[str, control_pb2.ComputeHeartbeatRequest] = {}
        self.incarnations: dict[str, list[str]] = {}
        self.created: control_pb2.VolumeCreatedRequest | None = None

    @property
    def storage_count(self) -> int:
        return len(self._storage)

    def order(
        self, instance: str, kind: control_pb2.Order.Kind.ValueType, epoch: int, **more: Any
    ) -> None:
        """The instance's order from now on."""
        self._orders[instance] = control_pb2.Order(
            kind=kind, volume=volume_ref(VOLUME, epoch), **more
        )
        self._changed.set()
        self._changed = asyncio.Event()

    def status(self, instance: str) -> compute_pb2.ComputeStatus:
        """What it last said of itself."""
        if instance not in self.reports:
            return compute_pb2.ComputeStatus()
        return self.reports[instance].status

    async def StorageHeartbeat(self, request: Any, context: Any) -> Any:
        self._storage[request.node.name] = request.node
        return control_pb2.StorageHeartbeatResponse(members=self._storage.values())

    async def VolumeCreated(self, request: Any, context: Any) -> Any:
        self.created = request
        return control_pb2.VolumeCreatedResponse()

    async def ComputeHeartbeat(self, request: Any, context: Any) -> Any:
        name, incarnation = request.status.instance, request.status.incarnation
        self.reports[name] = request
        known = self.incarnations.setdefault(name, [])
        if incarnation not in known:
            known.append(incarnation)
            self._orders.pop(name, None)  # an order is for one incarnation
        order = self._order(name)
        with suppress(TimeoutError):
            async with asyncio.timeout(request.wait_ms / 1000):
                while (order := self._order(name)) == request.known:
                    await self._changed.wait()
        return control_pb2.ComputeHeartbeatResponse(
            order=order,
            members=self._storage.values(),
            instances=[
                control_pb2.InstanceStatus(address=report.address, alive=True, status=report.status)
                for report in self.reports.values()
            ],
        )

    def _order(self, name: str) -> control_pb2.Order:
        return self._orders.get(name, control_pb2.Order(kind=control_pb2.Order.WAIT))


class AgentProcess:
    """One `python -m compute_node`. Keeps its ports and directory over restarts."""

    def __init__(self, name: str, home: Path, control: str, *options: str) -> None:
        self.name = name
        self.data_dir = home / name
        self.port, self.postgres_port = free_ports(2)
        self._home = home
        self._control = control
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        password = self._home / "password"
        password.write_text(PASSWORD)
        with (self._home / f"{self.name}.log").open("ab") as output:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "compute_node", "--insecure", "--name", self.name),
                    *("--data-dir", str(self.data_dir), "--control", self._control),
                    *("--port", str(self.port), "--postgres-port", str(self.postgres_port)),
                    *("--password-file", str(password), *self._options),
                ],
                stdout=output,
                stderr=output,
            )

    @property
    def log(self) -> str:
        """All that it and its PostgreSQL said."""
        return (self._home / f"{self.name}.log").read_text()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def postmaster(self) -> psutil.Process:
        lines = (self.data_dir / "pgdata" / "postmaster.pid").read_text().splitlines()
        return psutil.Process(int(lines[0]))

    @property
    def lease(self) -> int:
        """Until when it holds the lease, as the shim reads it."""
        word = (self.data_dir / "run" / "pages.lease").read_bytes()[:8]
        return int.from_bytes(word, "little")

    def connect(self, **options: Any) -> Any:
        """A client's connection to this very instance; await it."""
        return psycopg.AsyncConnection.connect(
            host="127.0.0.1",
            port=self.postgres_port,
            user="boreal",
            password=PASSWORD,
            dbname="postgres",
            autocommit=True,
            connect_timeout=10,
            **options,
        )

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(how)
            process.wait(60)


class Cluster:
    """Six storage nodes, a scripted control plane, as many compute nodes as the test adds."""

    def __init__(self, home: Path, control: ScriptedControl, address: str) -> None:
        self.home = home
        self.control = control
        self._address = address
        self.nodes = [NodeProcess(f"sn-{n}", home, address) for n in range(1, 7)]
        for node in self.nodes:  # of ports that no outgoing connection is given meanwhile
            ports = free_ports(4)
            node.log_port, node.frames_port, node.pages_port, node.page_frames_port = ports
        self.agents: dict[str, AgentProcess] = {}

    def add(self, name: str, *options: str) -> AgentProcess:
        """Start an agent."""
        agent = self.agents[name] = AgentProcess(name, self.home, self._address, *options)
        agent.start()
        return agent

    def tell(self, name: str, kind: str, epoch: int, **more: Any) -> None:
        """Order an instance."""
        self.control.order(name, control_pb2.Order.Kind.Value(kind), epoch, **more)

    async def state(self, name: str, state: str, limit_s: float = 60.0) -> None:
        """Wait until it reports that it is in that state."""
        wanted = compute_pb2.ComputeState.Value(state)
        await until(
            lambda: self.control.status(name).state == wanted, f"{name} to be {state}", limit_s
        )

    async def serves(self, name: str, limit_s: float = 60.0) -> None:
        """Wait until it says that it takes clients."""
        await until(
            lambda: self.control.status(name).takes_clients, f"{name} to take clients", limit_s
        )

    async def reborn(self, name: str, lives: int, limit_s: float = 60.0) -> None:
        """Wait until it has reported so many lives."""
        await until(
            lambda: len(self.control.incarnations.get(name, [])) >= lives,
            f"life {lives} of {name}",
            limit_s,
        )

    def lives(self, name: str) -> int:
        """How many it has reported."""
        return len(self.control.incarnations[name])

    async def begin(self, writer: str, *options: str) -> AgentProcess:
        """Make the volume; the maker is its first writer, under epoch 2."""
        agent = self.add(writer, *options)
        await self.reborn(writer, 1)
        self.tell(writer, "CREATE_VOLUME", 1)
        await until(lambda: self.control.created is not None, "the volume")
        await self.reborn(writer, 2)
        self.tell(writer, "WRITE", 2, former_gone=True)
        await self.serves(writer)
        return agent

    async def join(self, reader: str, epoch: int, *options: str) -> AgentProcess:
        """Add a reader, and wait until it serves."""
        agent = self.add(reader, *options)
        await self.reborn(reader, 1)
        self.tell(reader, "READ", epoch)
        await self.serves(reader)
        return agent


@asynccontextmanager
async def cluster() -> AsyncIterator[Cluster]:
    """Run one; gone without a trace afterwards."""
    home = _new_home()
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, home)
        control = ScriptedControl()
        server = make_server()
        add_control(control, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, None)
        made = Cluster(home, control, f"127.0.0.1:{port}")
        for node in made.nodes:
            stack.callback(node.stop)
            await asyncio.to_thread(node.start)
        await until(lambda: control.storage_count == 6, "six storage nodes")
        try:
            yield made
        except BaseException:
            for agent in made.agents.values():
                print(f"--- {agent.name} ---\n{agent.log[-8000:]}")
            raise
        finally:
            for agent in made.agents.values():
                await asyncio.to_thread(agent.stop)


def _new_home() -> Path:
    home = Path(tempfile.mkdtemp(prefix="boreal-agent-", dir="/var/tmp"))
    home.chmod(0o755)  # PostgreSQL's account must get in
    return home
