"""The framed lane of Append (boreal.frames): what a commit waits for, so nothing is in its way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from boreal.errors import BorealError
from boreal.frames import frame
from boreal.rpc import storage_pb2
from boreal.rpc.edge import error_to_wire
from storage_node.append import AppendHandler
from storage_node.framed import FramedConnection, FramedServer, Lane

_LANE: Final = Lane(name="Append", decode=storage_pb2.AppendRequest.FromString)


def append_lane(handler: AppendHandler) -> FramedServer:
    """The lane's server, to be started."""
    return FramedServer(lambda server: _Connection(handler, server))


class _Connection(FramedConnection[storage_pb2.AppendRequest]):
    """One peer. All requests that arrive together are handled together, with one disk sync."""

    def __init__(self, handler: AppendHandler, server: FramedServer) -> None:
        super().__init__(_LANE, server)
        self._handler = handler
        self._held_back: list[bytes] = []
        """Answers in order, all of which `_release` sends: those to be delayed, and what followed.

        As many as a peer can send in the little while; the writer has one append under way."""

    def received(
        self, requests: Sequence[storage_pb2.AppendRequest], refusal: BorealError | None
    ) -> None:
        responses, delay_s = self._handler.handle(requests)
        if refusal is not None:
            responses.append(storage_pb2.AppendResponse(error=error_to_wire(refusal)))
        answer = b"".join([frame(r.SerializeToString()) for r in responses])
        if self._held_back or (delay_s and refusal is None):
            if not self._held_back:
                asyncio.get_running_loop().call_later(delay_s, self._release)
            self._held_back.append(answer)
        else:
            self.transport.write(answer)
        if refusal is not None:
            self._release()

    def _release(self) -> None:
        answers, self._held_back = self._held_back, []
        if answers and not self.transport.is_closing():
            self.transport.write(b"".join(answers))
