"""The storage end of the lane of GetPages, over any GetPages of a test's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import cast

from boreal.errors import BorealError
from boreal.frames import FrameReader, frame
from boreal.rpc import storage_pb2
from boreal.rpc.edge import error_to_wire

GetPages = Callable[[storage_pb2.GetPagesRequest], AsyncIterator[storage_pb2.PageImages]]


class FakeLane:
    """Serves `get_pages`. Keeps what a test wants to see, or to break."""

    def __init__(self, get_pages: GetPages) -> None:
        self._get_pages = get_pages
        self._server: asyncio.Server | None = None
        self.port = 0
        self.peers: list[Peer] = []
        """Every connection there ever was."""

    async def start(self, port: int = 0) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Peer(self._get_pages, self.peers), "127.0.0.1", port
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """As a kill looks from outside."""
        if self._server is not None:
            self._server.close()
            for peer in self.peers:
                peer.transport.abort()
                peer.end_calls()
            await self._server.wait_closed()


class Peer(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, get_pages: GetPages, peers: list[Peer]) -> None:
        self._get_pages = get_pages
        self._frames = FrameReader("GetPages")
        self.tasks: dict[int, asyncio.Task[None]] = {}
        """Of the calls that are not answered yet."""
        self.cancelled: list[int] = []
        """Calls that the peer took back."""
        peers.append(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.end_calls()

    def end_calls(self) -> None:
        for task in self.tasks.values():
            task.cancel()

    def data_received(self, data: bytes) -> None:
        for body in self._frames.feed(data):
            call = storage_pb2.PageCall.FromString(body)
            number = call.call
            if call.WhichOneof("what") == "cancel":
                self.cancelled.append(number)
                if number in self.tasks:
                    self.tasks[number].cancel()
                continue
            task = asyncio.get_running_loop().create_task(self._serve(call))
            self.tasks[number] = task
            task.add_done_callback(lambda _task, number=number: self.tasks.pop(number))  # type: ignore[misc]

    async def _serve(self, call: storage_pb2.PageCall) -> None:
        left = call.get.count
        try:
            async for images in self._get_pages(call.get):
                left -= len(images.exists)
                self.send(storage_pb2.PageAnswer(call=call.call, images=images, last=left <= 0))
        except BorealError as error:
            wire = error_to_wire(error)
            self.send(storage_pb2.PageAnswer(call=call.call, error=wire, last=True))

    def send(self, answer: storage_pb2.PageAnswer) -> None:
        self.transport.write(frame(answer.SerializeToString()))
