"""A storage node in miniature: real sockets, the real segment rules, the log in memory.

What a shipper can see of a node, and nothing else: StorageLog.Adopt and GetPosition, and the framed
lane. It can be killed and restarted on its ports, paused, and made to pull from a peer.
"""

from __future__ import annotations

import asyncio
import random
import socket
from contextlib import suppress
from dataclasses import replace
from typing import cast

import grpc
from grpc import aio

from boreal.errors import BorealError
from boreal.frames import FrameReader, frame
from boreal.quorum import Lineage, SegmentState
from boreal.rpc import edge, storage_pb2
from boreal.types import Epoch, Lsn, NodeName
from compute_node.shipper import StorageAddress

_PORTS = iter(random.sample(range(10_000, 32_000), 22_000))
"""Not given to outgoing connections by the kernel: a port must stay free while its node is down."""


def free_port() -> int:
    for port in _PORTS:  # none is handed out twice
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


class FakeNode:
    def __init__(self, name: str, lineage: Lineage, start: Lsn) -> None:
        self.log_port, self.frames_port = free_port(), free_port()
        self.address = StorageAddress(
            name=NodeName(name),
            log=f"127.0.0.1:{self.log_port}",
            frames=f"127.0.0.1:{self.frames_port}",
        )
        self.state = SegmentState(
            promised=lineage.last.epoch, lineage=lineage, start=start, scl=start, vdl=start
        )
        self.log = bytearray()
        self.paused = False
        self.appends: list[tuple[Lsn, int, Lsn]] = []
        """(start, bytes, vdl) of each append accepted."""
        self._lanes: set[_FakeLane] = set()
        self._frames: asyncio.Server | None = None
        self._server: aio.Server | None = None

    async def start(self) -> None:
        self._server = edge.make_server()
        handlers = {
            "Adopt": grpc.unary_unary_rpc_method_handler(
                self._adopt,
                storage_pb2.AdoptRequest.FromString,
                storage_pb2.Position.SerializeToString,
            ),
            "GetPosition": grpc.unary_unary_rpc_method_handler(
                self._get_position,
                storage_pb2.GetPositionRequest.FromString,
                storage_pb2.Position.SerializeToString,
            ),
        }
        service = grpc.method_handlers_generic_handler("boreal.StorageLog", handlers)
        self._server.add_generic_rpc_handlers((service,))
        assert self._server.add_insecure_port(self.address.log) == self.log_port
        await self._server.start()
        loop = asyncio.get_running_loop()
        self._frames = await loop.create_server(
            lambda: _FakeLane(self), "127.0.0.1", self.frames_port
        )

    async def kill(self) -> None:
        """As kill -9 looks from outside: every connection is reset; what is on disk stays."""
        if self._frames is not None:
            self._frames.close()
            for lane in tuple(self._lanes):
                lane.transport.abort()
            await self._frames.wait_closed()
        if self._server is not None:
            await self._server.stop(None)
        self._frames = self._server = None

    def pause(self) -> None:
        """As SIGSTOP: connections stay, nothing is read."""
        self.paused = True
        for lane in self._lanes:
            lane.transport.pause_reading()

    def resume(self) -> None:
        self.paused = False
        for lane in self._lanes:
            lane.transport.resume_reading()

    def fence(self, epoch: int) -> None:
        self.state = self.state.fence(Epoch(epoch))

    def pull_from(self, peer: FakeNode) -> None:
        self.log += peer.log[len(self.log) :]
        self.state = replace(self.state, scl=peer.state.scl)

    # --- StorageLog ----------------------------------------------------------------------------

    async def _adopt(
        self, request: storage_pb2.AdoptRequest, context: object
    ) -> storage_pb2.Position:
        lineage = edge.lineage_from_wire(request.lineage)
        self.state = self.state.adopt(edge.epoch_of(request.volume), lineage)
        del self.log[self.state.scl - self.state.start :]
        return self._position()

    async def _get_position(
        self, request: storage_pb2.GetPositionRequest, context: object
    ) -> storage_pb2.Position:
        self.state.check_epoch(edge.epoch_of(request.volume))
        return self._position()

    def _position(self) -> storage_pb2.Position:
        return storage_pb2.Position(
            node=self.address.name,
            promised_epoch=self.state.promised,
            lineage=edge.lineage_to_wire(self.state.lineage),
            start_lsn=self.state.start,
            scl=self.state.scl,
            vdl=self.state.vdl,
        )

    # --- the lane ------------------------------------------------------------------------------

    def append(self, request: storage_pb2.AppendRequest) -> storage_pb2.AppendResponse:
        at, data = Lsn(request.start_lsn), request.data
        try:
            accepted = self.state.append(
                edge.epoch_of(request.volume), at, len(data), Lsn(request.vdl)
            )
        except BorealError as error:
            return storage_pb2.AppendResponse(error=edge.error_to_wire(error))
        self.log += data[accepted.skip :]
        self.state = accepted.state
        self.appends.append((at, len(data), Lsn(request.vdl)))
        return storage_pb2.AppendResponse(ack=storage_pb2.AppendAck(scl=self.state.scl))


class _FakeLane(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, node: FakeNode) -> None:
        self._node = node
        self._reader = FrameReader("Append")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._node._lanes.add(self)
        if self._node.paused:
            self.transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._node._lanes.discard(self)

    def data_received(self, data: bytes) -> None:
        for body in self._reader.feed(data):
            response = self._node.append(storage_pb2.AppendRequest.FromString(body))
            self.transport.write(frame(response.SerializeToString()))
