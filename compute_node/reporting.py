"""The agent's line to the control plane: one heartbeat is always under way."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, NoReturn, Protocol

import structlog

from boreal.errors import BorealError
from boreal.rpc import control_pb2, control_pb2_grpc
from boreal.rpc.edge import calling, open_channel

_WAIT_MS = 300
"""The control plane answers after so long at the latest; the next report follows at once."""
_ANSWER_WITHIN_S = 2.0
_RETRY_S = 0.1

_log = structlog.get_logger(__name__)


class Reported(Protocol):
    """Who reports."""

    def report(self) -> control_pb2.ComputeHeartbeatRequest:
        """What there is to say now; `wait_ms` is filled in."""
        ...

    async def answered(
        self,
        request: control_pb2.ComputeHeartbeatRequest,
        answer: control_pb2.ComputeHeartbeatResponse,
    ) -> None:
        """The control plane answered `request`. A BorealError is noted, no more."""
        ...


class Reporting:
    """Keeps a heartbeat under way (control.proto): an order comes as soon as it is given.

    With the control plane away it goes on trying; nothing here depends on it.
    """

    def __init__(
        self, control: str, who: Reported, *, wait_ms: int = _WAIT_MS, retry_s: float = _RETRY_S
    ) -> None:
        self._control = control
        self._who = who
        self._wait_ms = wait_ms
        self._retry_s = retry_s
        self._news = asyncio.Event()

    def news(self) -> None:
        """There is something new to report: do not wait for the answer that is under way."""
        self._news.set()

    async def run(self) -> NoReturn:
        """Report until cancelled."""
        async with open_channel(self._control) as channel:
            stub = control_pb2_grpc.ControlStub(channel)
            while True:
                self._news.clear()
                request = self._who.report()
                request.wait_ms = self._wait_ms
                answer = await self._ask(stub, request)
                if answer is not None:
                    await self._take(request, answer)
                elif not self._news.is_set():
                    await self._pause()

    async def _ask(
        self,
        stub: control_pb2_grpc.ControlAsyncStub,
        request: control_pb2.ComputeHeartbeatRequest,
    ) -> control_pb2.ComputeHeartbeatResponse | None:
        """The answer; None if there was none, or there is news before it."""
        call = asyncio.ensure_future(self._call(stub, request))
        news = asyncio.ensure_future(self._news.wait())
        try:
            either: set[asyncio.Future[Any]] = {call, news}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return call.result() if call.done() else None
        except BorealError as error:
            # Off the data path: with the control plane down we go on as we are.
            _log.debug("control plane not reached", reason=error.message)
            return None
        finally:
            for task in (call, news):
                task.cancel()
            await asyncio.gather(call, news, return_exceptions=True)

    async def _call(
        self,
        stub: control_pb2_grpc.ControlAsyncStub,
        request: control_pb2.ComputeHeartbeatRequest,
    ) -> control_pb2.ComputeHeartbeatResponse:
        with calling("the control plane", "ComputeHeartbeat"):
            return await stub.ComputeHeartbeat(
                request, timeout=_ANSWER_WITHIN_S + self._wait_ms / 1000
            )

    async def _take(
        self,
        request: control_pb2.ComputeHeartbeatRequest,
        answer: control_pb2.ComputeHeartbeatResponse,
    ) -> None:
        try:
            await self._who.answered(request, answer)
        except BorealError as error:
            _log.warning("an answer of the control plane makes no sense", reason=error.message)
            await self._pause()

    async def _pause(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._retry_s):
                await self._news.wait()
