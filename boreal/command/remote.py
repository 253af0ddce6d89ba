"""What the command asks of the running services, each call with a deadline."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from boreal.cluster import COMPUTE, CONTROL, ClusterConfig
from boreal.errors import UnknownOutcome, Unreachable
from boreal.rpc import (
    common_pb2,
    compute_pb2,
    compute_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
)
from boreal.rpc.edge import calling, open_channel

_T = TypeVar("_T")
_DEADLINE_S = 2.0
_VERIFY_DEADLINE_S = 6 * 3600.0


class Remote:
    """The cluster's control plane and compute agent, by their services."""

    def __init__(
        self, control: control_pb2_grpc.ControlAsyncStub, compute: compute_pb2_grpc.ComputeAsyncStub
    ) -> None:
        self._control = control
        self._compute = compute

    async def cluster_status(self) -> control_pb2.ClusterStatus:
        """What the control plane knows."""
        with calling(CONTROL, "GetStatus"):
            return await self._control.GetStatus(
                control_pb2.GetClusterStatusRequest(), timeout=_DEADLINE_S
            )

    async def compute_status(self) -> compute_pb2.ComputeStatus:
        """What the compute node says of itself."""
        with calling(COMPUTE, "GetStatus"):
            return await self._compute.GetStatus(
                compute_pb2.GetComputeStatusRequest(), timeout=_DEADLINE_S
            )

    async def verify(
        self, volume: common_pb2.VolumeRef, nodes: Sequence[str]
    ) -> AsyncIterator[compute_pb2.VerifyEvent]:
        """Compare PostgreSQL's pages with those of the named storage nodes (none named: all)."""
        request = compute_pb2.VerifyRequest(volume=volume, nodes=nodes)
        with calling(COMPUTE, "Verify"):
            async for event in self._compute.Verify(request, timeout=_VERIFY_DEADLINE_S):
                yield event


@asynccontextmanager
async def connect(config: ClusterConfig) -> AsyncIterator[Remote]:
    """Channels to both services; nothing is sent yet."""
    async with (
        open_channel(config.control_address) as control,
        open_channel(config.agent_address) as compute,
    ):
        yield Remote(control_pb2_grpc.ControlStub(control), compute_pb2_grpc.ComputeStub(compute))


async def if_reachable(call: Awaitable[_T]) -> _T | None:
    """The answer, or None if nobody is there (yet)."""
    try:
        return await call
    except (Unreachable, UnknownOutcome):
        return None
