"""What the framed lanes (boreal.frames) have in common at this end: a listener, its connections."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import structlog
from google.protobuf.message import DecodeError

from boreal.errors import BadUsage, BorealError, MalformedRequest
from boreal.frames import MAX_FRAME_BYTES, FrameReader
from boreal.rpc.edge import lane_server_arguments
from boreal.sockets import notice_silence

MAX_CONNECTIONS = 256

_log = structlog.get_logger(__name__)
_Request = TypeVar("_Request")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane(Generic[_Request]):
    """What is spoken on a lane, and how much of it is held for a peer."""

    name: str
    """For people: the call it carries."""
    decode: Callable[[bytes], _Request]
    """Reads one message; DecodeError if it is none."""
    limit_bytes: int = MAX_FRAME_BYTES
    """Of one request."""
    write_buffer_bytes: int = 64 * 1024
    """Of answers the peer does not take; with more than that no request of his is read."""


class FramedServer:
    """Listens for the connections of a lane and knows the open ones."""

    def __init__(self, connect: Callable[[FramedServer], FramedConnection[Any]]) -> None:
        """`connect` makes the connection of a new peer."""
        self._connect = connect
        self._server: asyncio.Server | None = None
        self.open: set[FramedConnection[Any]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen, on any port if it is 0; the port. BadUsage if it is taken."""
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: self._connect(self), host, port, **lane_server_arguments()
            )
        except OSError as error:
            raise BadUsage(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Stop listening and close every connection."""
        if self._server is not None:
            self._server.close()
            for connection in list(self.open):
                connection.close()
            await self._server.wait_closed()


class FramedConnection(asyncio.Protocol, ABC, Generic[_Request]):
    """One peer.

    Bounded: an unfinished frame by the lane's limit, answers by not reading on while the peer does
    not take them. A peer that sends what is no request is told so, and its connection is closed:
    the stream cannot be followed any further.
    """

    transport: asyncio.Transport

    def __init__(self, lane: Lane[_Request], server: FramedServer) -> None:
        self._lane = lane
        self._siblings = server.open
        self._frames = FrameReader(lane.name, lane.limit_bytes)

    @abstractmethod
    def received(self, requests: Sequence[_Request], refusal: BorealError | None) -> None:
        """These requests arrived together, in order. After them came what earns a `refusal`; the
        connection is closed once what is written here is sent. Must not raise."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A peer has come."""
        self.transport = cast("asyncio.Transport", transport)
        notice_silence(transport)
        if len(self._siblings) >= MAX_CONNECTIONS:
            _log.warning(
                "a lane connection over the limit was closed",
                lane=self._lane.name,
                limit=MAX_CONNECTIONS,
            )
            self.transport.abort()
            return
        self.transport.set_write_buffer_limits(high=self._lane.write_buffer_bytes)
        self._siblings.add(self)

    def data_received(self, data: bytes) -> None:
        """A piece of the stream. All frames that arrive together are handled together."""
        if self.transport.is_closing():
            return
        requests = []
        refusal: BorealError | None = None
        try:
            for body in self._frames.feed(data):
                requests.append(self._lane.decode(body))  # noqa: PERF401 - what came before a bad frame counts
        except DecodeError:
            refusal = MalformedRequest(f"a frame on the {self._lane.name} lane is not a request")
        except BorealError as error:
            refusal = error
        self.received(requests, refusal)
        if refusal is not None:
            self.transport.close()

    def pause_writing(self) -> None:
        """The peer does not take its answers."""
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """It took them."""
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the peer left
        """The peer is gone."""
        self._siblings.discard(self)

    def close(self) -> None:
        """Close it once its answers are sent."""
        self.transport.close()
