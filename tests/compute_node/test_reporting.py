"""Goal: an order takes no longer than a message to arrive, news none to be told, and a control
plane that is away or makes no sense is tried again.

Method: the agent's side over real gRPC, against a control plane that answers when told to.
"""

# ruff: noqa: N802 - the methods are named as the calls are

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from boreal.cluster import free_ports
from boreal.errors import MalformedRequest, NotNow
from boreal.rpc import control_pb2
from boreal.rpc.edge import make_server
from compute_node.reporting import Reporting
from tests.compute_node.agent_kit import add_control, until


class Control:
    """Holds every call until `answers` has something for it."""

    def __init__(self) -> None:
        self.calls: list[control_pb2.ComputeHeartbeatRequest] = []
        self.cut = 0
        self.answers: asyncio.Queue[str | Exception] = asyncio.Queue()

    async def ComputeHeartbeat(self, request: Any, context: Any) -> Any:
        self.calls.append(request)
        try:
            answer = await self.answers.get()
        except asyncio.CancelledError:
            self.cut += 1
            raise
        if isinstance(answer, Exception):
            raise answer
        return control_pb2.ComputeHeartbeatResponse(order=control_pb2.Order(reason=answer))


class Node:
    """Reports how many answers it got."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def report(self) -> control_pb2.ComputeHeartbeatRequest:
        return control_pb2.ComputeHeartbeatRequest(pid=len(self.heard))

    async def answered(
        self,
        request: control_pb2.ComputeHeartbeatRequest,
        answer: control_pb2.ComputeHeartbeatResponse,
    ) -> None:
        self.heard.append(answer.order.reason)
        if answer.order.reason == "nonsense":
            raise MalformedRequest("it makes no sense")


@asynccontextmanager
async def serving(control: Control, port: int) -> AsyncIterator[None]:
    server = make_server()
    add_control(control, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


@asynccontextmanager
async def reporting(port: int, *, every_s: float) -> AsyncIterator[tuple[Node, Reporting]]:
    node = Node()
    line = Reporting(f"127.0.0.1:{port}", node, every_s=every_s, wait_ms=20_000)
    task = asyncio.create_task(line.run())
    try:
        yield node, line
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_answer_that_leaves_none_under_way_is_followed_by_another_call() -> None:
    control, (port,) = Control(), free_ports(1)
    async with serving(control, port), reporting(port, every_s=60) as (node, _):
        for number in range(3):
            await until(lambda n=number: len(control.calls) == n + 1, "a call")  # type: ignore[misc]
            control.answers.put_nowait(str(number))
        await until(lambda: node.heard == ["0", "1", "2"], "three answers")
        await until(lambda: len(control.calls) == 4, "the next call")
        assert [call.wait_ms for call in control.calls] == [20_000] * 4
        assert control.cut == 0


async def test_calls_overlap_and_are_bounded() -> None:
    control, (port,) = Control(), free_ports(1)
    async with serving(control, port), reporting(port, every_s=0.01) as (node, _):
        await until(lambda: control.cut >= 3, "the oldest calls to be given up")
        assert len(control.calls) - control.cut <= 6
        control.answers.put_nowait("heard")
        await until(lambda: node.heard == ["heard"], "the answer to one of them")


async def test_news_do_not_wait_and_what_waits_goes_on_waiting() -> None:
    control, (port,) = Control(), free_ports(1)
    async with serving(control, port), reporting(port, every_s=60) as (node, line):
        await until(lambda: len(control.calls) == 1, "a call")
        line.news()
        await until(lambda: len(control.calls) == 2, "the call that tells the news")
        assert control.cut == 0
        control.answers.put_nowait("first")
        control.answers.put_nowait("second")
        await until(lambda: node.heard == ["first", "second"], "both answers")


async def test_failures_and_nonsense_are_followed_by_another_try() -> None:
    control, (port,) = Control(), free_ports(1)
    for answer in (NotNow("busy"), "nonsense", "good"):
        control.answers.put_nowait(answer)
    async with serving(control, port), reporting(port, every_s=0.05) as (node, _):
        await until(lambda: node.heard == ["nonsense", "good"], "both answers")


async def test_a_control_plane_that_was_away_is_found_again() -> None:
    control, (port,) = Control(), free_ports(1)
    async with reporting(port, every_s=0.05) as (node, _):
        await asyncio.sleep(0.2)  # a few attempts that reach nobody
        async with serving(control, port):
            control.answers.put_nowait("there")
            await until(lambda: node.heard == ["there"], "the answer")
