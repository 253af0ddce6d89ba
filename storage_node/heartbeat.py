"""The node's reports to the control plane, and what it learns back: who its peers are."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from boreal.errors import BorealError
from boreal.rpc import control_pb2, control_pb2_grpc
from boreal.rpc.edge import calling, open_channel
from boreal.types import NodeName
from storage_node.config import StorageConfig
from storage_node.volumes import Volumes

INTERVAL_SECONDS = 0.5
_TIMEOUT_SECONDS = 1.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another storage node."""

    name: NodeName
    log_address: str


class Membership:
    """The fleet as last heard of. The control plane may be down: then what it said last stands."""

    def __init__(self) -> None:
        self._peers: tuple[Peer, ...] = ()

    @property
    def peers(self) -> tuple[Peer, ...]:
        """Every other storage node."""
        return self._peers

    def learn(self, own: NodeName, members: Sequence[control_pb2.StorageNode]) -> None:
        """Take the control plane's answer."""
        self._peers = tuple(
            Peer(name=NodeName(member.name), log_address=member.addresses.log)
            for member in members
            if member.name != own and member.addresses.log
        )


class Heartbeat:
    """Reports every `INTERVAL_SECONDS` until cancelled. A control plane that is away is normal."""

    def __init__(
        self,
        config: StorageConfig,
        volumes: Volumes,
        membership: Membership,
        pages_served: Callable[[], bool],
    ) -> None:
        """`pages_served` tells whether the node has its page process."""
        self._pages_served = pages_served
        self._config = config
        self._volumes = volumes
        self._membership = membership
        self._incarnation = uuid.uuid4().hex
        self._heard = True

    async def run(self) -> None:
        """Report for ever."""
        channel = open_channel(self._config.control)
        stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(channel)
        try:
            while True:
                await self._beat(stub)
                await asyncio.sleep(INTERVAL_SECONDS)
        finally:
            await channel.close(None)

    async def _beat(self, stub: control_pb2_grpc.ControlAsyncStub) -> None:
        try:
            with calling("control", "StorageHeartbeat"):
                answer = await stub.StorageHeartbeat(self._report(), timeout=_TIMEOUT_SECONDS)
        except BorealError as error:
            self._changed(heard=False, why=error.message)
            return
        self._membership.learn(self._config.name, answer.members)
        self._changed(heard=True, why="it answered")

    def _changed(self, *, heard: bool, why: str) -> None:
        if heard != self._heard:
            _log.info("control plane", heard=heard, why=why)
        self._heard = heard

    def _report(self) -> control_pb2.StorageHeartbeatRequest:
        config = self._config
        return control_pb2.StorageHeartbeatRequest(
            node=control_pb2.StorageNode(
                name=config.name,
                zone=config.zone,
                addresses=control_pb2.StorageAddresses(
                    log=config.address(config.log_port),
                    frames=config.address(config.frames_port),
                    pages=config.address(config.pages_port),
                    page_frames=config.address(config.page_frames_port),
                ),
            ),
            incarnation=self._incarnation,
            pid=os.getpid(),
            segments=[*self._segments(), *self._broken()],
        )

    def _segments(self) -> list[control_pb2.SegmentReport]:
        no_pages = "" if self._pages_served() else "its page process is not running"
        return [
            control_pb2.SegmentReport(
                volume_id=volume,
                promised_epoch=segment.state.promised,
                scl=segment.state.scl,
                vdl=segment.state.vdl,
                indexed_lsn=segment.shared.indexed,
                failure=segment.failure or no_pages,
                start_lsn=segment.state.start,
                ack_delay_us=round(segment.ack_delay_s(self._config.pressure, 1) * 1e6),
            )
            for volume, segment in self._volumes
        ]

    def _broken(self) -> list[control_pb2.SegmentReport]:
        return [
            control_pb2.SegmentReport(volume_id=volume, failure=error.message)
            for volume, error in self._volumes.broken.items()
        ]
