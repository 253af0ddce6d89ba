"""What the command asks of the running services, each call with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from grpc import aio

from boreal.cluster import CONTROL, ClusterConfig
from boreal.errors import BadUsage, NotWriter, UnknownOutcome, Unreachable
from boreal.rpc import compute_pb2, compute_pb2_grpc, control_pb2, control_pb2_grpc
from boreal.rpc.edge import calling, open_channel
from boreal.rpc.identity import Identity

_T = TypeVar("_T")
_DEADLINE_S = 2.0
_FAILOVER_DEADLINE_S = 90.0
_BUNDLE_DEADLINE_S = 60.0
_VERIFY_DEADLINE_S = 6 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """A cluster of which only the control plane's address is known: it runs elsewhere."""

    control_address: str
    """HOST:PORT."""
    agent_addresses: Mapping[str, str] = field(default_factory=dict)
    """None: only the control plane is asked."""
    identity: Identity | None = None
    """Who the command is to it; None: it talks unencrypted."""


Place = ClusterConfig | Outside
"""Where a cluster is."""


class Remote:
    """The cluster's control plane and the agents of its instances, by their services.

    Channels to agents are opened when first needed; they end with `stack`.
    """

    def __init__(self, place: Place, identity: Identity | None, stack: AsyncExitStack) -> None:
        self._control_address = place.control_address
        self._agent_addresses = place.agent_addresses
        self._identity = identity
        self._stack = stack
        self._agents: dict[str, compute_pb2_grpc.ComputeAsyncStub] = {}
        self._control_stub: control_pb2_grpc.ControlAsyncStub | None = None

    # --- the control plane -----------------------------------------------------------------------

    async def cluster_status(self) -> control_pb2.ClusterStatus:
        """What the control plane knows."""
        with calling(CONTROL, "GetStatus"):
            request = control_pb2.GetClusterStatusRequest()
            return await self._control().GetStatus(request, timeout=_DEADLINE_S)

    async def failover(self, target: str) -> control_pb2.FailoverResponse:
        """Make `target` the writer (empty: whoever is next); returns once it serves."""
        request = control_pb2.FailoverRequest(target=target)
        with calling(CONTROL, "Failover"):
            return await self._control().Failover(request, timeout=_FAILOVER_DEADLINE_S)

    async def remove_instance(self, name: str) -> None:
        """Have an instance that was stopped for good forgotten."""
        request = control_pb2.RemoveInstanceRequest(instance=name)
        with calling(CONTROL, "RemoveInstance"):
            await self._control().RemoveInstance(request, timeout=_DEADLINE_S)

    async def events(self, after: int = 0) -> Sequence[control_pb2.Event]:
        """What happened after the event of that id, oldest first."""
        request = control_pb2.ListEventsRequest(after=after)
        with calling(CONTROL, "ListEvents"):
            return (await self._control().ListEvents(request, timeout=_DEADLINE_S)).events

    # --- instances -------------------------------------------------------------------------------

    async def instance_status(self, name: str) -> compute_pb2.ComputeStatus:
        """What an instance says of itself."""
        stub = self._agent(name)
        with calling(name, "GetStatus"):
            return await stub.GetStatus(compute_pb2.GetComputeStatusRequest(), timeout=_DEADLINE_S)

    async def instances(self, names: Sequence[str]) -> dict[str, compute_pb2.ComputeStatus]:
        """The same of each that answers."""
        answers = await asyncio.gather(*(if_reachable(self.instance_status(n)) for n in names))
        pairs = zip(names, answers, strict=True)
        return {name: status for name, status in pairs if status is not None}

    async def writer(self) -> compute_pb2.ComputeStatus:
        """What the instance that is the writer at work says of itself; NotWriter if none is.

        The instances are asked, not the control plane: it need not be up. One that was deposed and
        has not noticed has an older epoch.
        """
        found = await self.instances(list(self._agent_addresses))
        writers = [each for each in found.values() if each.state == compute_pb2.WRITER]
        if writers:
            return max(writers, key=lambda status: status.volume.epoch)
        states = ", ".join(f"{name} is {state_name(each)}" for name, each in found.items())
        raise NotWriter(f"no instance is the writer: {states or 'none of them answers'}")

    async def take_bundle(self) -> compute_pb2.TakeBundleResponse:
        """Have the writer take a bundle; returns once that is durable."""
        writer = await self.writer()
        stub = self._agent(writer.instance)
        request = compute_pb2.TakeBundleRequest(volume=writer.volume)
        with calling(writer.instance, "TakeBundle"):
            return await stub.TakeBundle(request, timeout=_BUNDLE_DEADLINE_S)

    async def verify(
        self, writer: compute_pb2.ComputeStatus, nodes: Sequence[str]
    ) -> AsyncIterator[compute_pb2.VerifyEvent]:
        """Compare the writer's pages with those of the named storage nodes (none named: all)."""
        stub = self._agent(writer.instance)
        request = compute_pb2.VerifyRequest(volume=writer.volume, nodes=nodes)
        with calling(writer.instance, "Verify"):
            async for event in stub.Verify(request, timeout=_VERIFY_DEADLINE_S):
                yield event

    # --- inside ----------------------------------------------------------------------------------

    def _channel(self, address: str) -> aio.Channel:
        channel = open_channel(address, self._identity)
        self._stack.push_async_exit(channel)
        return channel

    def _control(self) -> control_pb2_grpc.ControlAsyncStub:
        if self._control_stub is None:
            channel = self._channel(self._control_address)
            self._control_stub = control_pb2_grpc.ControlStub(channel)
        return self._control_stub

    def _agent(self, name: str) -> compute_pb2_grpc.ComputeAsyncStub:
        if name not in self._agents:
            channel = self._channel(self._agent_addresses[name])
            self._agents[name] = compute_pb2_grpc.ComputeStub(channel)
        return self._agents[name]


@asynccontextmanager
async def connect(place: Place) -> AsyncIterator[Remote]:
    """The cluster's services; nothing is sent yet. BadUsage if it has no certificates."""
    async with AsyncExitStack() as stack:
        yield Remote(place, command_identity(place), stack)


def command_identity(place: Place) -> Identity | None:
    """Who the command is to the cluster's processes; None: they talk unencrypted.

    BadUsage if it has no certificates.
    """
    if isinstance(place, Outside):
        return place.identity
    if place.insecure:
        return None
    if not place.command_tls_dir.is_dir():
        raise BadUsage(
            f"the cluster in {place.data_dir} has no certificates yet: it was never started, or "
            "by a version of Boreal without TLS. `boreal down` and `boreal up` start it with TLS"
        )
    return Identity.load(place.command_tls_dir)


async def if_reachable(call: Awaitable[_T]) -> _T | None:
    """The answer, or None if nobody is there (yet)."""
    try:
        return await call
    except (Unreachable, UnknownOutcome):
        return None


async def of_control_plane(call: Awaitable[_T], place: Place) -> _T:
    """The answer; BadUsage that says what to do if the control plane is not there."""
    try:
        return await call
    except Unreachable as error:
        if isinstance(place, Outside):
            raise BadUsage(
                f"no control plane answers at {place.control_address}; is it the right address, "
                f"and does it run? {error.message}"
            ) from None
        raise BadUsage(
            "the control plane does not answer; `boreal status` shows whether the cluster is up, "
            f"and `boreal restart {CONTROL}` starts the control plane alone"
        ) from None


def state_name(status: compute_pb2.ComputeStatus) -> str:
    """An instance's state in a word."""
    return compute_pb2.ComputeState.Name(status.state).lower()
