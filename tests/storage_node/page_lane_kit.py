"""A client of the lane of GetPages that sends what it is told to, right or wrong."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from boreal.frames import FrameReader, frame
from boreal.rpc import storage_pb2
from boreal.rpc.edge import error_from_wire
from tests.storage_node.page_volume_kit import WAIT_S


class PageLaneClient:
    """One connection. For one task, but any number of calls at once."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._frames = FrameReader("GetPages")
        self._arrived: defaultdict[int, list[storage_pb2.PageAnswer]] = defaultdict(list)
        self._calls = 0

    def send(self, data: bytes) -> None:
        """Raw bytes."""
        self._writer.write(data)

    def begin(self, request: storage_pb2.GetPagesRequest, within_s: float = WAIT_S) -> int:
        """Make a call; its number."""
        self._calls += 1
        call = storage_pb2.PageCall(call=self._calls, get=request, within_ms=round(within_s * 1000))
        self.send(frame(call.SerializeToString()))
        return self._calls

    def cancel(self, call: int) -> None:
        """Take a call back."""
        wire = storage_pb2.PageCall(call=call, cancel=storage_pb2.CancelPages())
        self.send(frame(wire.SerializeToString()))

    async def answer(self, call: int) -> storage_pb2.PageAnswer:
        """The next answer to that call; EOFError once the node has closed the connection."""
        while not self._arrived[call]:
            data = await asyncio.wait_for(self._reader.read(1 << 18), WAIT_S)
            if not data:
                raise EOFError
            for body in self._frames.feed(data):
                answer = storage_pb2.PageAnswer.FromString(body)
                self._arrived[answer.call].append(answer)
        return self._arrived[call].pop(0)

    @property
    def answered(self) -> set[int]:
        """Calls with answers that nobody asked for yet."""
        return {call for call, answers in self._arrived.items() if answers}

    async def images(self, call: int) -> list[storage_pb2.PageImages]:
        """All a call is answered with, or the error raised."""
        found = []
        while True:
            answer = await self.answer(call)
            if answer.HasField("error"):
                assert answer.last
                raise error_from_wire(answer.error)
            found.append(answer.images)
            if answer.last:
                return found


async def _connected(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                return await asyncio.open_connection("127.0.0.1", port)
            await asyncio.sleep(0.02)


@asynccontextmanager
async def page_lane_client(port: int) -> AsyncIterator[PageLaneClient]:
    """A connection to a node's lane, once it listens."""
    reader, writer = await _connected(port)
    try:
        yield PageLaneClient(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
