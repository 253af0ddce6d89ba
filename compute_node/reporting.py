"""The agent's line to the control plane: a heartbeat is always under way."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import NoReturn, Protocol

import structlog

from boreal.errors import BorealError
from boreal.rpc import control_pb2, control_pb2_grpc
from boreal.rpc.edge import calling, open_channel

_EVERY_S = 0.3
_WAIT_MS = 600
"""Longer than it takes to the next report: so there is always one that waits for its answer."""
_MOST_UNDER_WAY = 4
_ANSWER_WITHIN_S = 2.0

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

    They overlap. With one at a time there would be moments with none, and an agent that was killed
    in such a moment would only be noticed by its silence. With the control plane away it goes on
    trying; nothing here depends on it.
    """

    def __init__(
        self, control: str, who: Reported, *, every_s: float = _EVERY_S, wait_ms: int = _WAIT_MS
    ) -> None:
        self._control = control
        self._who = who
        self._every_s = every_s
        self._wait_ms = wait_ms
        self._news = asyncio.Event()
        self._under_way: deque[asyncio.Task[None]] = deque()
        """Oldest first."""

    def news(self) -> None:
        """There is something new to report: do so at once."""
        self._news.set()

    async def run(self) -> NoReturn:
        """Report until cancelled."""
        async with open_channel(self._control) as channel, asyncio.TaskGroup() as group:
            stub = control_pb2_grpc.ControlStub(channel)
            while True:
                self._news.clear()
                task = group.create_task(self._report(stub), name="heartbeat")
                self._under_way.append(task)
                task.add_done_callback(self._ended)
                if len(self._under_way) > _MOST_UNDER_WAY:
                    self._under_way.popleft().cancel()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._every_s):
                        await self._news.wait()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task in self._under_way:
            self._under_way.remove(task)

    async def _report(self, stub: control_pb2_grpc.ControlAsyncStub) -> None:
        request = self._who.report()
        request.wait_ms = self._wait_ms
        try:
            with calling("the control plane", "ComputeHeartbeat"):
                answer = await stub.ComputeHeartbeat(
                    request, timeout=_ANSWER_WITHIN_S + self._wait_ms / 1000
                )
        except BorealError as error:
            # Off the data path: with the control plane down we go on as we are.
            _log.debug("control plane not reached", reason=error.message)
            return
        try:
            await self._who.answered(request, answer)
        except BorealError as error:
            _log.warning("an answer of the control plane makes no sense", reason=error.message)
        else:
            if len(self._under_way) == 1:  # a new order answers all that wait for one
                self._news.set()
