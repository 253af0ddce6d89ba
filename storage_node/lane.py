"""The framed lane of Append (boreal.frames): what a commit waits for, so nothing is in its way."""

from __future__ import annotations

import asyncio
from typing import cast

import structlog
from google.protobuf.message import DecodeError

from boreal.errors import BorealError, MalformedRequest
from boreal.frames import FrameReader, frame
from boreal.rpc import storage_pb2
from boreal.rpc.edge import error_to_wire
from storage_node.append import AppendHandler

MAX_CONNECTIONS = 256
_WRITE_BUFFER_BYTES = 64 * 1024

_log = structlog.get_logger(__name__)


class LaneServer:
    """Listens for the lane's connections and knows the open ones."""

    def __init__(self, handler: AppendHandler) -> None:
        self._handler = handler
        self._open: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen; OSError if the port is taken."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self._handler, self._open), host, port
        )

    async def stop(self) -> None:
        """Stop listening and close every connection."""
        if self._server is not None:
            self._server.close()
            for connection in list(self._open):
                connection.close()
            await self._server.wait_closed()


class _Connection(asyncio.Protocol):
    """One peer. All frames that arrive together are handled together, with one disk sync.

    Bounded: an unfinished frame by the frame limit, answers by not reading on while the peer does
    not take them.
    """

    _transport: asyncio.Transport

    def __init__(self, handler: AppendHandler, siblings: set[_Connection]) -> None:
        self._handler = handler
        self._siblings = siblings
        self._frames = FrameReader()
        self._held_back: list[bytes] = []
        """Answers in order, all of which `_release` sends: those to be delayed, and what followed.

        As many as a peer can send in the little while; the writer has one append under way."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if len(self._siblings) >= MAX_CONNECTIONS:
            _log.warning("a lane connection over the limit was closed", limit=MAX_CONNECTIONS)
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        self._siblings.add(self)

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        requests = []
        refusal: BorealError | None = None
        try:
            for body in self._frames.feed(data):
                requests.append(storage_pb2.AppendRequest.FromString(body))  # noqa: PERF401 - what came before a bad frame counts
        except DecodeError:
            refusal = MalformedRequest("a frame on the Append lane is not an AppendRequest")
        except BorealError as error:
            refusal = error
        responses, delay_s = self._handler.handle(requests)
        if refusal is not None:
            responses.append(storage_pb2.AppendResponse(error=error_to_wire(refusal)))
        answer = b"".join([frame(r.SerializeToString()) for r in responses])
        if self._held_back or (delay_s and refusal is None):
            if not self._held_back:
                asyncio.get_running_loop().call_later(delay_s, self._release)
            self._held_back.append(answer)
        else:
            self._transport.write(answer)
        if refusal is not None:
            # The stream cannot be followed any further.
            self._release()
            self._transport.close()

    def _release(self) -> None:
        answers, self._held_back = self._held_back, []
        if answers and not self._transport.is_closing():
            self._transport.write(b"".join(answers))

    def pause_writing(self) -> None:
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the peer left
        self._siblings.discard(self)

    def close(self) -> None:
        """Close it once its answers are sent."""
        self._transport.close()
