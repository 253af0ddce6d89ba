"""The Control service: messages in, messages out; the coordinator does the thinking."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import structlog
from grpc import aio

from boreal.errors import BorealError, Failed, MalformedRequest, Refused, UnknownOutcome
from boreal.rpc import compute_pb2, control_pb2, control_pb2_grpc
from boreal.rpc.edge import volume_ref
from boreal.types import Epoch, InstanceName, VolumeId
from control_plane import wire
from control_plane.coordinator import Coordinator
from control_plane.events import Event, EventKind
from control_plane.pulse import Pulse
from control_plane.state import InstanceMember, StorageMember
from control_plane.view import CREATION_EPOCH

TICK_S = 0.05
_TICK_AGAIN_S = 1.0
"""After a tick that failed: a full disk stays full for a while."""
_LONGEST_POLL_S = 1.0
"""Well below the silence after which an instance counts as lost."""
_FAILOVER_S = 60.0
_LAST_WORDS_S = 3.0
"""How long a stopped instance's silence may take to show."""
_ENDS = {EventKind.FAILOVER_COMPLETED, EventKind.FAILOVER_FAILED}

_Context = aio.ServicerContext[Any, Any]

_log = structlog.get_logger(__name__)


class ControlService(control_pb2_grpc.ControlServicer):
    """Control of control.proto. Keeps each member's last report, only to show it.

    `pulse` is to beat whenever the coordinator's outlook changed.
    """

    def __init__(self, coordinator: Coordinator, pulse: Pulse) -> None:
        self._coordinator = coordinator
        self._pulse = pulse
        self._storage: dict[str, control_pb2.StorageHeartbeatRequest] = {}
        self._compute: dict[str, control_pb2.ComputeHeartbeatRequest] = {}

    async def keep_watch(self) -> None:
        """Let the coordinator notice what time alone changes, until cancelled."""
        while True:
            pause_s = TICK_S
            try:
                self._coordinator.tick()
            except BorealError as error:
                _log.error("the control plane cannot decide", error=error.message)
                pause_s = _TICK_AGAIN_S
            await asyncio.sleep(pause_s)

    # --- members ---------------------------------------------------------------------------------

    async def StorageHeartbeat(
        self, request: control_pb2.StorageHeartbeatRequest, _context: _Context
    ) -> control_pb2.StorageHeartbeatResponse:
        """A storage node reports."""
        promised = tuple(
            (VolumeId(segment.volume_id), Epoch(segment.promised_epoch))
            for segment in request.segments
        )
        self._coordinator.storage_reported(wire.storage_member(request.node), promised)
        self._storage[request.node.name] = request
        return control_pb2.StorageHeartbeatResponse(members=self._members())

    async def ComputeHeartbeat(
        self, request: control_pb2.ComputeHeartbeatRequest, _context: _Context
    ) -> control_pb2.ComputeHeartbeatResponse:
        """A compute node reports, and waits for news."""
        member, report = wire.instance(request)
        call = self._coordinator.instance_reported(member, report)
        self._compute[member.name] = request
        try:
            order = await self._news(member.name, request)
        except asyncio.CancelledError:
            # Its process ended, or it calls again in this moment.
            self._coordinator.instance_cut(member.name, call)
            raise
        return control_pb2.ComputeHeartbeatResponse(
            order=order, members=self._members(), instances=self._instances()
        )

    async def _news(
        self, name: InstanceName, request: control_pb2.ComputeHeartbeatRequest
    ) -> control_pb2.Order:
        """The instance's order: as soon as it is another than the known one, or in the end."""
        known = request.known if request.HasField("known") else None
        incarnation = request.status.incarnation
        with suppress(TimeoutError):
            async with asyncio.timeout(min(request.wait_ms / 1000, _LONGEST_POLL_S)):
                while request.wait_ms and self._order(name, incarnation) == known:
                    await self._pulse.wait()
        return self._order(name, incarnation)

    def _order(self, name: InstanceName, incarnation: str) -> control_pb2.Order:
        last = self._compute.get(name)
        if last is None or last.status.incarnation != incarnation:
            raise Refused(f"{name} was removed, or reported another incarnation meanwhile")
        return wire.order(self._coordinator.order(name))

    async def VolumeCreated(
        self, request: control_pb2.VolumeCreatedRequest, _context: _Context
    ) -> control_pb2.VolumeCreatedResponse:
        """The volume is ready."""
        if not request.volume.volume_id or not request.system_identifier:
            raise MalformedRequest("VolumeCreated names the volume and its system identifier")
        self._coordinator.volume_created(
            VolumeId(request.volume.volume_id),
            request.system_identifier,
            InstanceName(request.instance),
        )
        return control_pb2.VolumeCreatedResponse()

    # --- endpoints -------------------------------------------------------------------------------

    async def WatchRouting(
        self, _request: control_pb2.WatchRoutingRequest, _context: _Context
    ) -> AsyncIterator[control_pb2.Routing]:
        """Who serves clients, now and after each change.

        A control plane that has just started says nothing until every instance had the time to
        report, for what it has not heard of may well serve.
        """
        told = None
        while True:
            outlook = self._coordinator.outlook
            if outlook.informed and outlook.routes != told:
                told = outlook.routes
                yield control_pb2.Routing(routes=[wire.route(each) for each in told])
            else:
                await self._pulse.wait()

    # --- people ----------------------------------------------------------------------------------

    async def GetStatus(
        self, _request: control_pb2.GetClusterStatusRequest, _context: _Context
    ) -> control_pb2.ClusterStatus:
        """Everything known, as of now."""
        return self.status()

    def status(self) -> control_pb2.ClusterStatus:
        """The same, for the process itself."""
        durable = self._coordinator.state.current
        volume = durable.volume or (durable.creation.volume if durable.creation else VolumeId(""))
        epoch = durable.writer.epoch if durable.writer else CREATION_EPOCH if volume else 0
        return control_pb2.ClusterStatus(
            volume=volume_ref(volume, epoch),
            volume_ready=durable.volume is not None,
            writer=durable.writer.instance if durable.writer else "",
            storage=[self._storage_status(member) for member in durable.storage.values()],
            instances=self._instances(),
            pid=os.getpid(),
        )

    async def Failover(
        self, request: control_pb2.FailoverRequest, _context: _Context
    ) -> control_pb2.FailoverResponse:
        """Make another instance the writer; answer once it serves."""
        target = InstanceName(request.target) if request.target else None
        started = self._coordinator.begin_failover(target)
        try:
            async with asyncio.timeout(_FAILOVER_S):
                end = await self._end_of_failover(started)
        except TimeoutError:
            raise UnknownOutcome(
                f"the failover to {started.instance} is still under way after {_FAILOVER_S:.0f} s; "
                "`boreal events` will tell how it ends"
            ) from None
        if end.kind is EventKind.FAILOVER_FAILED:
            raise Failed(f"the failover to {started.instance} failed: {end.message}")
        return control_pb2.FailoverResponse(
            writer=end.instance, epoch=end.epoch or 0, took_ms=end.took_ms
        )

    async def _end_of_failover(self, started: Event) -> Event:
        """The event that ended it: there is one failover at a time."""
        while True:
            for event in self._coordinator.state.events_after(started.id):
                if event.kind in _ENDS:
                    return event
            await self._pulse.wait()

    async def RemoveInstance(
        self, request: control_pb2.RemoveInstanceRequest, _context: _Context
    ) -> control_pb2.RemoveInstanceResponse:
        """Forget an instance. One that was stopped just now may take a moment to look like it."""
        name = InstanceName(request.instance)
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                while self._falls_silent(name):
                    await self._pulse.wait()
        self._coordinator.remove_instance(name)
        self._compute.pop(name, None)
        return control_pb2.RemoveInstanceResponse()

    def _falls_silent(self, name: InstanceName) -> bool:
        silence = self._coordinator.instance_silence(name)
        ending = self._coordinator.stopping(name) or silence.cut_ms is not None
        return ending and not silence.lost

    async def ListEvents(
        self, request: control_pb2.ListEventsRequest, _context: _Context
    ) -> control_pb2.ListEventsResponse:
        """What happened."""
        told = self._coordinator.state.events_after(request.after)
        return control_pb2.ListEventsResponse(events=[wire.event(each) for each in told])

    # --- inside ----------------------------------------------------------------------------------

    def _members(self) -> list[control_pb2.StorageNode]:
        members = self._coordinator.state.current.storage.values()
        return [wire.storage_node(member) for member in members]

    def _instances(self) -> list[control_pb2.InstanceStatus]:
        members = self._coordinator.state.current.instances.values()
        return [self._instance_status(member) for member in members]

    def _storage_status(self, member: StorageMember) -> control_pb2.StorageNodeStatus:
        silence = self._coordinator.node_silence(member.name)
        last = self._storage.get(member.name, control_pb2.StorageHeartbeatRequest())
        return control_pb2.StorageNodeStatus(
            node=wire.storage_node(member),
            alive=silence.alive,
            silent_ms=silence.ms,
            pid=last.pid,
            segments=last.segments,
        )

    def _instance_status(self, member: InstanceMember) -> control_pb2.InstanceStatus:
        silence = self._coordinator.instance_silence(member.name)
        last = self._compute.get(member.name)
        return control_pb2.InstanceStatus(
            address=member.address,
            postgres_port=member.postgres_port,
            alive=silence.alive,
            silent_ms=silence.ms,
            pid=last.pid if last else 0,
            status=last.status if last else compute_pb2.ComputeStatus(instance=member.name),
        )
