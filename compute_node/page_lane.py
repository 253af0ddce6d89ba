"""The framed lane of GetPages to one storage node (proto/storage.proto).

A caller that gives up, because its deadline passed or because another node was quicker, has the
node told so: else the node would make pages for nobody, or wait for its index for as long as the
caller had meant to wait, and the calls counted there would be other ones than those counted here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, cast

from google.protobuf.message import DecodeError

from boreal.errors import (
    BorealError,
    CorruptData,
    Internal,
    NotNow,
    OversizeRequest,
    UnknownOutcome,
    Unreachable,
)
from boreal.frames import FrameReader, frame
from boreal.rpc import storage_pb2
from boreal.rpc.edge import error_from_wire, lane_client_arguments
from boreal.sockets import notice_silence
from boreal.types import PAGE_BYTES, NodeName

CONNECT_S: Final = 1.0
"""Bound on making a connection."""
MAX_CALLS: Final = 256
"""Under way on one connection, as the node allows."""

Pages = asyncio.Future[list[bytes | None]]


class PageLane:
    """Calls of GetPages to one node, any number at once, over one connection.

    The connection is made by the first call, and by the first one after it broke. Not for several
    event loops.
    """

    def __init__(self, peer: NodeName, address: str) -> None:
        """`address` is HOST:PORT."""
        self._peer = peer
        self._address = address
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[str] | None = None
        self._closed = False

    def get_pages(self, request: storage_pb2.GetPagesRequest, within_s: float) -> Pages:
        """As many pages as are asked for, None for a block that does not exist.

        Cancelling it ends the call. It raises what the node answered; CorruptData if that is not
        what was asked for; Unreachable if nothing was sent; UnknownOutcome if no answer came in
        time or the connection broke.
        """
        connection = self._connection
        if connection is None or connection.ended or self._closed:
            return asyncio.get_running_loop().create_task(self._first(request, within_s))
        return connection.call(request, within_s)

    async def _first(
        self, request: storage_pb2.GetPagesRequest, within_s: float
    ) -> list[bytes | None]:
        """Connect, and make a call."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within_s
        connection = await self._connected(within_s)
        return await connection.call(request, deadline - loop.time())

    async def close(self, *, grace_s: float = 0.0) -> None:
        """Let the connection go; calls under way have `grace_s` to be answered."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait((self._connecting,))
        if self._connection is not None:
            await self._connection.close(grace_s)

    async def _connected(self, within_s: float) -> _Connection:
        """The connection, made by whoever comes first; Unreachable."""
        if self._closed:
            raise Unreachable(f"the connection to {self._peer} was given up")
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect())
        attempt = self._connecting
        await asyncio.wait((attempt,), timeout=min(within_s, CONNECT_S))
        why_not = attempt.result() if attempt.done() and not attempt.cancelled() else "no answer"
        if why_not or self._connection is None:
            raise Unreachable(f"{self._peer} cannot be reached for GetPages: {why_not}")
        return self._connection

    async def _connect(self) -> str:
        """Connect; why it did not work, empty if it did. Raises nothing."""
        host, _, port = self._address.rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, self._connection = await loop.create_connection(
                    lambda: _Connection(self._peer), host, int(port), **lane_client_arguments()
                )
        except TimeoutError:
            return f"no connection to {self._address} within {CONNECT_S:g} s"
        except (OSError, ValueError, OverflowError) as error:  # no such host, no such port
            return str(error)
        finally:
            self._connecting = None
        return ""


class _Call:
    """One call under way. Collects its pages."""

    __slots__ = ("_count", "_next_block", "_pages", "_peer", "pages")

    def __init__(self, peer: NodeName, request: storage_pb2.GetPagesRequest) -> None:
        self._peer = peer
        self._count = request.count
        self._next_block = request.first_block
        self._pages: list[bytes | None] = []
        self.pages: Pages = asyncio.get_running_loop().create_future()
        """Done once all have come, or none will any more."""

    def fail(self, error: BorealError) -> None:
        """No pages will come; the first reason counts."""
        if not self.pages.done():
            self.pages.set_exception(error)

    def take(self, answer: storage_pb2.PageAnswer) -> None:
        """One of its answers."""
        if self.pages.done():
            return
        if answer.WhichOneof("outcome") == "error":
            self.fail(error_from_wire(answer.error))
            return
        images = answer.images
        pages, exists = images.pages, images.exists  # once: each access copies
        count = len(exists)
        come = len(self._pages) + count
        if images.first_block != self._next_block:
            self._corrupt("out of order")
        elif len(pages) != PAGE_BYTES * count or not count:
            self._corrupt("that are not whole")
        elif come > self._count or (answer.last and come < self._count):
            self._corrupt(f"that are {come}, not {self._count}")
        else:
            self._next_block += count
            if count == 1:
                self._pages.append(pages if exists[0] else None)
            else:
                self._pages += [
                    pages[at * PAGE_BYTES : (at + 1) * PAGE_BYTES] if there else None
                    for at, there in enumerate(exists)
                ]
            if answer.last:
                self.pages.set_result(self._pages)

    def _corrupt(self, how: str) -> None:
        self.fail(CorruptData(f"{self._peer} sent pages {how}"))


class _Connection(asyncio.Protocol):
    """One connection. Bounded: MAX_CALLS, no requests to a peer that does not take them.

    Invariant: a call is in `_calls` from before its request is sent until the node's last answer to
    it came, or its caller has gone and the node was told.
    """

    _transport: asyncio.Transport

    def __init__(self, peer: NodeName) -> None:
        self._peer = peer
        self._frames = FrameReader("GetPages")
        self._calls: dict[int, _Call] = {}
        self._last_number = 0
        self._stuck = False
        self.ended = False
        """No call can be made any more."""

    def call(self, request: storage_pb2.GetPagesRequest, within_s: float) -> Pages:
        """As PageLane.get_pages."""
        loop = asyncio.get_running_loop()
        self._last_number = number = self._last_number + 1
        timer = loop.call_later(within_s, self._give_up, number)
        call = _Call(self._peer, request)
        if self.ended or self._stuck or self._transport.is_closing():
            call.fail(Unreachable(f"the connection to {self._peer} takes no requests"))
        elif len(self._calls) >= MAX_CALLS:
            call.fail(NotNow(f"{MAX_CALLS} calls to {self._peer} are under way already"))
        else:
            self._calls[number] = call
            within_ms = max(round(within_s * 1000), 1)
            self._send(storage_pb2.PageCall(call=number, get=request, within_ms=within_ms))
        call.pages.add_done_callback(lambda _pages: self._over(number, timer))
        return call.pages

    def _over(self, number: int, timer: asyncio.TimerHandle) -> None:
        """Nobody waits for that call any more: it is answered, or given up."""
        timer.cancel()
        if self._calls.pop(number, None) is not None and not self.ended:
            self._send(storage_pb2.PageCall(call=number, cancel=storage_pb2.CancelPages()))

    def _send(self, call: storage_pb2.PageCall) -> None:
        self._transport.write(frame(call.SerializeToString()))

    def _give_up(self, number: int) -> None:
        if (call := self._calls.get(number)) is not None:
            call.fail(UnknownOutcome(f"{self._peer} did not answer GetPages in time"))

    async def close(self, grace_s: float) -> None:
        """End it; calls under way may be answered for so long."""
        waiting = [call.pages for call in self._calls.values()]
        if waiting and grace_s:
            await asyncio.wait(waiting, timeout=grace_s)
        self._end(lambda: UnknownOutcome(f"the connection to {self._peer} was given up"))

    def _end(self, error: Callable[[], BorealError]) -> None:
        """Hang up; what was under way fails with an `error` each."""
        self.ended = True
        self._transport.abort()
        for call in self._calls.values():
            call.fail(error())

    # --- the transport's ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Calls can be made."""
        self._transport = cast("asyncio.Transport", transport)
        notice_silence(transport)

    def data_received(self, data: bytes) -> None:
        """Answers, whole or in part."""
        if self.ended:
            return
        try:
            for body in self._frames.feed(data):
                self._answered(storage_pb2.PageAnswer.FromString(body))
        except (DecodeError, OversizeRequest):
            self._end(lambda: CorruptData(f"{self._peer} sent what is no answer to GetPages"))

    def _answered(self, answer: storage_pb2.PageAnswer) -> None:
        number = answer.call
        if number == 0:
            refusal = error_from_wire(answer.error)
            why = f"{self._peer} does not follow: {refusal.code}: {refusal.message}"
            self._end(lambda: Internal(why))
            return
        call = self._calls.get(number)
        if call is None:
            return  # on its way when its caller gave up
        if answer.last:
            del self._calls[number]
        call.take(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        """It broke, or was ended here."""
        why = f"the connection to {self._peer} broke during GetPages" + (f": {exc}" if exc else "")
        self._end(lambda: UnknownOutcome(why))

    def pause_writing(self) -> None:
        """The node takes no requests for now: it is stopped, say."""
        self._stuck = True

    def resume_writing(self) -> None:
        """It takes them again."""
        self._stuck = False
