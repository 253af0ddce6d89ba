"""The agent's gRPC service (proto/compute.proto)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from grpc import aio

from boreal.rpc import compute_pb2, compute_pb2_grpc
from boreal.types import NodeName
from compute_node.agent import Agent
from compute_node.verify import verify

_Context = aio.ServicerContext[Any, Any]


class ComputeService(compute_pb2_grpc.ComputeServicer):
    """Answers from the agent's state; holds none of its own."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def GetStatus(
        self, request: compute_pb2.GetComputeStatusRequest, context: _Context
    ) -> compute_pb2.ComputeStatus:
        """What this node reports of itself."""
        return self._agent.status()

    async def Follow(
        self, request_iterator: AsyncIterator[compute_pb2.FollowerReport], context: _Context
    ) -> AsyncIterator[compute_pb2.LogPiece]:
        """Give a reader the log."""
        async for piece in self._agent.publisher.follow(request_iterator):
            yield piece

    async def TakeBundle(
        self, request: compute_pb2.TakeBundleRequest, context: _Context
    ) -> compute_pb2.TakeBundleResponse:
        """Take a bundle now."""
        writer = self._agent.writer
        put = await writer.take_bundle()
        return compute_pb2.TakeBundleResponse(
            end_lsn=writer.bundle_end, bytes_sent=put.bytes_sent, files_sent=put.files_sent
        )

    async def Verify(
        self, request: compute_pb2.VerifyRequest, context: _Context
    ) -> AsyncIterator[compute_pb2.VerifyEvent]:
        """Compare PostgreSQL's pages with storage's."""
        nodes = [NodeName(name) for name in request.nodes]
        async for event in verify(self._agent.writer, nodes):
            yield event
