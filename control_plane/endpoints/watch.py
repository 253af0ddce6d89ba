"""Learning from the control plane who serves. While it is away, what it said last stands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Never

import structlog

from boreal.errors import BorealError, MalformedRequest
from boreal.rpc import control_pb2, control_pb2_grpc
from boreal.rpc.edge import calling, open_channel
from boreal.types import InstanceName
from control_plane.endpoints.choice import Route

_RETRY_S = 0.1

_log = structlog.get_logger(__name__)


def routes_from_wire(routing: control_pb2.Routing) -> tuple[Route, ...]:
    """Read a routing; MalformedRequest if it is none."""
    routes = tuple(
        Route(
            instance=InstanceName(route.instance),
            writer=route.writer,
            host=route.host,
            port=route.postgres_port,
            handover=route.handover,
        )
        for route in routing.routes
    )
    if len({route.instance for route in routes}) < len(routes):
        raise MalformedRequest("a routing names no instance twice")
    if sum(route.writer for route in routes) > 1:
        raise MalformedRequest("a routing has one writer at most")
    return routes


async def watch(control: str, take_over: Callable[[tuple[Route, ...]], None]) -> Never:
    """Pass on every routing that the control plane at `control` tells of, for ever."""
    away = False
    async with open_channel(control) as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        while True:
            why = "it ended the stream"
            try:
                with calling("the control plane", "WatchRouting"):
                    async for routing in stub.WatchRouting(control_pb2.WatchRoutingRequest()):
                        take_over(routes_from_wire(routing))
                        if away:
                            _log.info("the control plane is back")
                            away = False
            except BorealError as error:
                why = error.message
            if not away:
                _log.warning("the control plane is away; its last routing stands", why=why)
                away = True
            await asyncio.sleep(_RETRY_S)
