"""Real storage node processes for tests, and clients of them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc import aio

from boreal.frames import FrameReader, frame
from boreal.quorum import Lineage
from boreal.rpc import control_pb2, storage_pb2, storage_pb2_grpc
from boreal.rpc.edge import (
    calling,
    error_from_wire,
    lineage_to_wire,
    make_server,
    open_channel,
    volume_ref,
)
from boreal.types import Lsn, VolumeId
from boreal.waiting import wait_until

VOLUME = VolumeId("vol-1")
START_LIMIT_S = 30.0


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on right now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class NodeProcess:
    """One `python -m storage_node`. Keeps its ports and directory over restarts."""

    def __init__(self, name: str, home: Path, control: str, tls_dir: Path | None = None) -> None:
        self.name = name
        self.data_dir = home / name
        self.log_port, self.frames_port, self.pages_port, self.page_frames_port = free_ports(4)
        self._control = control
        self._security = ("--tls-dir", str(tls_dir)) if tls_dir else ("--insecure",)
        self._output = home / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Of its gRPC services."""
        return f"127.0.0.1:{self.log_port}"

    def command(self) -> list[str]:
        """How it is started."""
        return [
            *(sys.executable, "-m", "storage_node", "--name", self.name, "--zone", "a"),
            *("--data-dir", str(self.data_dir), "--control", self._control),
            *("--log-port", str(self.log_port), "--frames-port", str(self.frames_port)),
            *("--pages-port", str(self.pages_port)),
            *("--page-frames-port", str(self.page_frames_port), *self._security),
        ]

    def start(self) -> None:
        """Start it and wait until both lanes are open."""
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(self.command(), stdout=output, stderr=output)
        for port in (self.log_port, self.frames_port):
            wait_until(
                lambda port=port: self._process_ended() or _listens(port),  # type: ignore[misc]
                timeout_s=START_LIMIT_S,
                otherwise=lambda: AssertionError(f"{self.name} did not start: {self.output}"),
            )
        assert not self._process_ended(), self.output

    @property
    def pid(self) -> int:
        """Of its log process, which must run."""
        assert self._process is not None
        return self._process.pid

    @property
    def output(self) -> str:
        """What it logged."""
        return self._output.read_text()[-4000:]

    def stop(self, how: signal.Signals = signal.SIGKILL) -> int | None:
        """End it; its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.send_signal(how)
        return process.wait(START_LIMIT_S)

    def _process_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class FakeControl:
    """A control plane that knows who reported, and tells everyone."""

    def __init__(self) -> None:
        self.reports: dict[str, control_pb2.StorageHeartbeatRequest] = {}

    async def storage_heartbeat(
        self,
        request: control_pb2.StorageHeartbeatRequest,
        _context: aio.ServicerContext[object, object],
    ) -> control_pb2.StorageHeartbeatResponse:
        self.reports[request.node.name] = request
        return control_pb2.StorageHeartbeatResponse(
            members=[report.node for report in self.reports.values()]
        )


@asynccontextmanager
async def fake_control() -> AsyncIterator[tuple[FakeControl, str]]:
    """Serve one; yields it and its address."""
    control = FakeControl()
    server = make_server()
    method = grpc.unary_unary_rpc_method_handler(
        control.storage_heartbeat,
        request_deserializer=control_pb2.StorageHeartbeatRequest.FromString,
        response_serializer=control_pb2.StorageHeartbeatResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("boreal.Control", {"StorageHeartbeat": method}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield control, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogClient:
    """The log's calls, with errors as their own classes."""

    stub: storage_pb2_grpc.StorageLogAsyncStub
    volume: VolumeId = VOLUME

    async def create(self, epoch: int, start: int) -> None:
        request = storage_pb2.CreateVolumeRequest(
            volume=volume_ref(self.volume, epoch),
            system_identifier=42,
            start_lsn=start,
        )
        with calling("node", "CreateVolume"):
            await self.stub.CreateVolume(request, timeout=10)

    async def fence(self, epoch: int) -> storage_pb2.Position:
        request = storage_pb2.FenceRequest(volume=volume_ref(self.volume, epoch))
        with calling("node", "Fence"):
            return await self.stub.Fence(request, timeout=10)

    async def adopt(self, epoch: int, lineage: Lineage) -> storage_pb2.Position:
        request = storage_pb2.AdoptRequest(
            volume=volume_ref(self.volume, epoch), lineage=lineage_to_wire(lineage)
        )
        with calling("node", "Adopt"):
            return await self.stub.Adopt(request, timeout=10)

    async def position(self, epoch: int) -> storage_pb2.Position:
        request = storage_pb2.GetPositionRequest(volume=volume_ref(self.volume, epoch))
        with calling("node", "GetPosition"):
            return await self.stub.GetPosition(request, timeout=10)

    async def log(self, epoch: int, start: int, end: int) -> bytes:
        request = storage_pb2.GetLogRequest(
            volume=volume_ref(self.volume, epoch), start_lsn=start, end_lsn=end
        )
        with calling("node", "GetLog"):
            return b"".join([c.data async for c in self.stub.GetLog(request, timeout=10)])

    async def append(self, epoch: int, at: int, data: bytes, vdl: int = 0) -> Lsn:
        """One append over a stream of its own; the SCL it acknowledges."""
        return await self.send(self.request(epoch, at, data, vdl))

    async def send(self, request: storage_pb2.AppendRequest) -> Lsn:
        """The same of a request that is made already."""
        call = self.stub.Append(iter([request]), timeout=10)
        with calling("node", "Append"):
            return ack(await anext(aiter(call)))

    def request(self, epoch: int, at: int, data: bytes, vdl: int = 0) -> storage_pb2.AppendRequest:
        return storage_pb2.AppendRequest(
            volume=volume_ref(self.volume, epoch), start_lsn=at, data=data, vdl=vdl
        )


def ack(response: storage_pb2.AppendResponse) -> Lsn:
    """The SCL of an answer, or the error it carries."""
    if response.HasField("error"):
        raise error_from_wire(response.error)
    return Lsn(response.ack.scl)


@asynccontextmanager
async def log_client(address: str) -> AsyncIterator[LogClient]:
    """A client of one node."""
    channel = open_channel(address)
    try:
        yield LogClient(stub=storage_pb2_grpc.StorageLogStub(channel))
    finally:
        await channel.close(None)


class LaneClient:
    """The framed lane, one call at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._frames = FrameReader("Append")
        self._responses: list[storage_pb2.AppendResponse] = []

    def send(self, data: bytes) -> None:
        """Raw bytes."""
        self._writer.write(data)

    async def receive(self) -> storage_pb2.AppendResponse:
        """The next answer; EOFError once the node has closed the connection."""
        while not self._responses:
            data = await asyncio.wait_for(self._reader.read(65536), 10)
            if not data:
                raise EOFError
            self._responses += [
                storage_pb2.AppendResponse.FromString(body) for body in self._frames.feed(data)
            ]
        return self._responses.pop(0)

    async def append(self, request: storage_pb2.AppendRequest) -> Lsn:
        """One append; the SCL it acknowledges."""
        self.send(frame(request.SerializeToString()))
        return ack(await self.receive())


@asynccontextmanager
async def lane_client(port: int) -> AsyncIterator[LaneClient]:
    """A connection to a node's framed lane."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield LaneClient(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
