"""What the tests of the command share: the verbs, and services that answer as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from grpc import aio

from boreal.cluster import ClusterConfig
from boreal.command.main import main
from boreal.errors import BorealError
from boreal.rpc import (
    common_pb2,
    compute_pb2,
    compute_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
)
from boreal.rpc.edge import make_server

VOLUME = common_pb2.VolumeRef(volume_id="vol-1", epoch=4)
_Context = aio.ServicerContext[Any, Any]


def boreal(directory: Path, *arguments: str) -> Result:
    """Run a verb on the cluster in `directory`."""
    verb, *others = arguments
    return CliRunner().invoke(main, [verb, f"--data-dir={directory}", *others])


async def boreal_meanwhile(directory: Path, *arguments: str) -> Result:
    """The same beside services that run in this very loop."""
    return await asyncio.to_thread(boreal, directory, *arguments)


class Agent(compute_pb2_grpc.ComputeServicer):
    """An instance's agent."""

    def __init__(self, name: str) -> None:
        self.status = compute_pb2.ComputeStatus(
            instance=name,
            incarnation=f"{name}/1",
            state=compute_pb2.READER,
            volume=VOLUME,
            takes_clients=True,
        )
        self.events: Sequence[compute_pb2.VerifyEvent] = ()
        self.asked: list[compute_pb2.VerifyRequest] = []
        self.bundles = 0

    async def GetStatus(  # noqa: N802
        self, request: compute_pb2.GetComputeStatusRequest, context: _Context
    ) -> compute_pb2.ComputeStatus:
        return self.status

    def Follow(  # noqa: N802
        self, request_iterator: AsyncIterator[compute_pb2.FollowerReport], context: _Context
    ) -> AsyncIterator[compute_pb2.LogPiece]:
        raise NotImplementedError

    async def TakeBundle(  # noqa: N802
        self, request: compute_pb2.TakeBundleRequest, context: _Context
    ) -> compute_pb2.TakeBundleResponse:
        self.bundles += 1
        return compute_pb2.TakeBundleResponse(end_lsn=77)

    async def Verify(  # noqa: N802
        self, request: compute_pb2.VerifyRequest, context: _Context
    ) -> AsyncIterator[compute_pb2.VerifyEvent]:
        self.asked.append(request)
        for event in self.events:
            yield event


@dataclass
class Asked:
    """What a control plane was asked to do."""

    failovers: list[str] = field(default_factory=list)
    removals: list[str] = field(default_factory=list)


class Control(control_pb2_grpc.ControlServicer):
    """A control plane."""

    def __init__(self) -> None:
        self.status = control_pb2.ClusterStatus(volume=VOLUME, volume_ready=True)
        self.events: list[control_pb2.Event] = []
        self.asked = Asked()
        self.refusals: list[BorealError] = []
        """What the next calls that change something fail with."""

    async def GetStatus(  # noqa: N802
        self, request: control_pb2.GetClusterStatusRequest, context: _Context
    ) -> control_pb2.ClusterStatus:
        return self.status

    async def Failover(  # noqa: N802
        self, request: control_pb2.FailoverRequest, context: _Context
    ) -> control_pb2.FailoverResponse:
        self.asked.failovers.append(request.target)
        self._refuse()
        writer = request.target or "db-2"
        return control_pb2.FailoverResponse(writer=writer, epoch=5, took_ms=640)

    async def RemoveInstance(  # noqa: N802
        self, request: control_pb2.RemoveInstanceRequest, context: _Context
    ) -> control_pb2.RemoveInstanceResponse:
        self.asked.removals.append(request.instance)
        self._refuse()
        return control_pb2.RemoveInstanceResponse()

    async def ListEvents(  # noqa: N802
        self, request: control_pb2.ListEventsRequest, context: _Context
    ) -> control_pb2.ListEventsResponse:
        later = [event for event in self.events if event.id > request.after]
        return control_pb2.ListEventsResponse(events=later)

    def _refuse(self) -> None:
        if self.refusals:
            raise self.refusals.pop(0)

    # --- not asked by the command ----------------------------------------------------------------

    async def StorageHeartbeat(  # noqa: N802
        self, request: control_pb2.StorageHeartbeatRequest, context: _Context
    ) -> control_pb2.StorageHeartbeatResponse:
        raise NotImplementedError

    async def ComputeHeartbeat(  # noqa: N802
        self, request: control_pb2.ComputeHeartbeatRequest, context: _Context
    ) -> control_pb2.ComputeHeartbeatResponse:
        raise NotImplementedError

    async def VolumeCreated(  # noqa: N802
        self, request: control_pb2.VolumeCreatedRequest, context: _Context
    ) -> control_pb2.VolumeCreatedResponse:
        raise NotImplementedError

    def WatchRouting(  # noqa: N802
        self, request: control_pb2.WatchRoutingRequest, context: _Context
    ) -> AsyncIterator[control_pb2.Routing]:
        raise NotImplementedError


@asynccontextmanager
async def serving(config: ClusterConfig, *services: Agent | Control) -> AsyncIterator[None]:
    """Serve where the cluster's configuration has them."""
    servers = []
    for service in services:
        server = make_server()
        if isinstance(service, Agent):
            compute_pb2_grpc.add_ComputeServicer_to_server(service, server)
            server.add_insecure_port(config.instance(service.status.instance).agent_address)
        else:
            control_pb2_grpc.add_ControlServicer_to_server(service, server)
            server.add_insecure_port(config.control_address)
        await server.start()
        servers.append(server)
    try:
        yield
    finally:
        for server in servers:
            await server.stop(None)
