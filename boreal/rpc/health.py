"""The standard health service of gRPC (grpc.health.v1), which every server of ours has.

Two things can be asked. The process as a whole (no service named): whoever answers is alive, and a
probe that would restart it should ask no more than that, for a node that catches up or restores
does its work. And `READY`: whether it does now what it is there for.

Only Check: Watch is answered UNIMPLEMENTED, which the protocol provides for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from boreal.errors import NotNow
from boreal.rpc.edge import calling, open_channel
from boreal.rpc.identity import Identity

READY = "ready"
"""The name of the second thing, in HealthCheckRequest.service."""


class _HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # it has no types
    """Answers from what the process knows; holds no state."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        self._ready = ready

    async def Check(  # noqa: N802 - gRPC names it
        self, request: health_pb2.HealthCheckRequest, context: aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        """Whether the process, or what was asked about, serves."""
        if request.service not in {"", READY}:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"ask about {READY!r}, or about nothing in particular"
            )
        serves = request.service != READY or self._ready()
        answer = health_pb2.HealthCheckResponse
        return answer(status=answer.SERVING if serves else answer.NOT_SERVING)


def add_health(server: aio.Server, ready: Callable[[], bool] = lambda: True) -> None:
    """Let `server` answer probes; `ready` tells at any time whether the process does its work."""
    health_pb2_grpc.add_HealthServicer_to_server(_HealthService(ready), server)


async def check(
    address: str, *, ready: bool, within_s: float, identity: Identity | None = None
) -> None:
    """Ask the process at `address` (HOST:PORT). Returns if it serves; NotNow if it says that it
    does not, Unreachable or UnknownOutcome if it says nothing. `identity` as for `open_channel`.
    """
    request = health_pb2.HealthCheckRequest(service=READY if ready else "")
    async with open_channel(address, identity) as channel:
        with calling(address, "Check"):
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=within_s)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise NotNow(f"{address} is alive, but does not do its work at this moment")
