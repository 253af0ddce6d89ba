"""The agent: reports to the control plane, and carries out its orders, one life after another."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from subprocess import SubprocessError

import psycopg
import structlog

from boreal.engine import Engine
from boreal.errors import BorealError, Internal, NotWriter
from boreal.rpc import common_pb2, compute_pb2, control_pb2, control_pb2_grpc
from boreal.rpc.edge import calling, open_channel, volume_ref
from boreal.types import Epoch, VolumeId
from compute_node.bundle_choice import BundleChoice
from compute_node.config import ComputeConfig
from compute_node.create_volume import create_volume
from compute_node.fleet import Fleet
from compute_node.instance import Instance
from compute_node.life import Life, LifeState

_log = structlog.get_logger(__name__)

_HEARTBEAT_S = 0.3
_CONTROL_TIMEOUT_S = 2.0
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 2.0

Order = control_pb2.Order


class Agent:
    """One compute node.

    `run` goes on until `request_stop`. It holds at most one Instance; when that ends, for whatever
    reason but a request to stop, it begins the next life from storage.
    """

    def __init__(self, config: ComputeConfig, engine: Engine, shim: Path) -> None:
        self._config = config
        self._engine = engine
        self._shim = shim
        self._life = Life()
        self._instance: Instance | None = None
        self._bundles = BundleChoice()
        self._order = Order(kind=Order.WAIT, reason="no word from the control plane yet")
        self._ordered = asyncio.Condition()
        self._members: Sequence[control_pb2.StorageNode] = ()
        self._stopping = asyncio.Event()
        self._report_now = asyncio.Event()

    @property
    def writer(self) -> Instance:
        """The instance, if it is the writer; NotWriter if not."""
        if self._instance is None or self._life.state is not LifeState.WRITER:
            raise NotWriter(f"{self._config.name} is {self._life.state.value}, not the writer")
        return self._instance

    @property
    def members(self) -> Sequence[control_pb2.StorageNode]:
        """The storage fleet, as last told."""
        return self._members

    def request_stop(self) -> None:
        """End cleanly."""
        self._stopping.set()
        if self._instance:
            self._instance.request_stop()

    async def run(self) -> None:
        """Serve until asked to stop."""
        async with asyncio.TaskGroup() as group:
            heartbeat = group.create_task(self._keep_reporting(), name="heartbeat")
            lives = group.create_task(self._keep_living(), name="lives")
            await self._stopping.wait()
            if self._life.state not in {LifeState.READER, LifeState.WRITER}:
                lives.cancel()  # what is under way may wait for storage nodes without end
            await asyncio.wait({lives})
            heartbeat.cancel()

    # --- reporting -------------------------------------------------------------------------------

    async def _keep_reporting(self) -> None:
        channel = open_channel(self._config.control)
        stub = control_pb2_grpc.ControlStub(channel)
        try:
            while True:
                try:
                    await self._report(stub)
                except BorealError as error:
                    # Off the data path: with the control plane down we go on as we are.
                    _log.debug("control plane not reached", reason=error.message)
                self._report_now.clear()
                try:
                    async with asyncio.timeout(_HEARTBEAT_S):
                        await self._report_now.wait()
                except TimeoutError:
                    continue
        finally:
            await channel.close(None)

    async def _report(self, stub: control_pb2_grpc.ControlAsyncStub) -> None:
        identity = self._life.identity
        request = control_pb2.ComputeHeartbeatRequest(
            address=f"{self._config.host}:{self._config.port}",
            postgres_port=self._config.postgres_port,
            pid=os.getpid(),
            status=self.status(),
        )
        with calling("the control plane", "ComputeHeartbeat"):
            answer = await stub.ComputeHeartbeat(request, timeout=_CONTROL_TIMEOUT_S)
        self._members = answer.members
        if self._instance:
            await self._instance.set_members(answer.members)
        async with self._ordered:
            if identity == self._life.identity:  # else the order is for a life that has ended
                self._order = answer.order
                self._ordered.notify_all()

    def status(self) -> compute_pb2.ComputeStatus:
        """What this node reports of itself."""
        instance = self._instance
        shipper = instance.shipper if instance else None
        return compute_pb2.ComputeStatus(
            instance=self._config.name,
            incarnation=self._life.identity,
            state=compute_pb2.ComputeState.Value(self._life.state.name),
            volume=(
                volume_ref(instance.fleet.volume, instance.fleet.epoch)
                if instance
                else self._order.volume
            ),
            vdl=instance.vdl if instance else 0,
            flush_lsn=shipper.end if shipper else 0,
            replay_lsn=0,
            timeline=instance.timeline if instance else 0,
            bundle_end_lsn=instance.bundle_end if instance else 0,
            postgres_pid=instance.postgres.pid if instance else 0,
            shipped_bytes=shipper.shipped_bytes if shipper else 0,
            links=[
                compute_pb2.LinkStatus(
                    node=link.node,
                    state=link.state.value,
                    scl=link.scl,
                    ack_latency_us=link.ack_latency_us,
                    ack_p50_us=link.ack_p50_us,
                    ack_p99_us=link.ack_p99_us,
                )
                for link in (shipper.links if shipper else ())
            ],
        )

    # --- living ----------------------------------------------------------------------------------

    async def _keep_living(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while not self._stopping.is_set():
            try:
                await self._live()
                backoff_s = _FIRST_BACKOFF_S
            except (BorealError, OSError, SubprocessError, psycopg.Error) as error:
                _log.error("this life ended", reason=str(error), kind=type(error).__name__)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
            async with self._ordered:
                self._life = Life()
                self._order = Order(kind=Order.WAIT, reason="a new life: no word yet")
            self._report_now.set()

    async def _live(self) -> None:
        order = await self._order_other_than(Order.WAIT, Order.KIND_UNSPECIFIED)
        if order.kind == Order.CREATE_VOLUME:
            await self._create(order.volume)
        else:
            await self._serve(order.volume)

    async def _create(self, ref: common_pb2.VolumeRef) -> None:
        self._life.become(LifeState.CREATING, f"ordered to create volume {ref.volume_id}")
        system_identifier = await create_volume(
            self._config, self._engine, VolumeId(ref.volume_id), Epoch(ref.epoch), self._members
        )
        channel = open_channel(self._config.control)
        request = control_pb2.VolumeCreatedRequest(
            volume=ref, instance=self._config.name, system_identifier=system_identifier
        )
        try:
            await self._tell_created(control_pb2_grpc.ControlStub(channel), request)
        finally:
            await channel.close(None)

    async def _tell_created(
        self,
        stub: control_pb2_grpc.ControlAsyncStub,
        request: control_pb2.VolumeCreatedRequest,
    ) -> None:
        while True:
            try:
                with calling("the control plane", "VolumeCreated"):
                    await stub.VolumeCreated(request, timeout=_CONTROL_TIMEOUT_S)
            except BorealError as error:
                if not error.retryable:
                    raise
                await asyncio.sleep(_HEARTBEAT_S)
            else:
                return

    async def _serve(self, ref: common_pb2.VolumeRef) -> None:
        fleet = Fleet(VolumeId(ref.volume_id), Epoch(ref.epoch))
        try:
            await fleet.set_members(self._members)
            self._instance = Instance(
                self._config, self._engine, self._shim, fleet, self._life, self._bundles
            )
            if self._stopping.is_set():
                return
            await self._live_on(self._instance)
        finally:
            self._instance = None
            await fleet.close()

    async def _live_on(self, instance: Instance) -> None:
        try:
            await instance.run(self._write_order)
        finally:
            wrote = self._life.state in {LifeState.WRITER, LifeState.STOPPING}
            self._bundles.ended(instance.bundle_end, wrote=wrote)

    async def _write_order(self) -> Epoch:
        self._report_now.set()
        order = await self._order_other_than(Order.WAIT, Order.READ)
        if order.kind != Order.WRITE:
            raise Internal(f"a reader was ordered to {Order.Kind.Name(order.kind)}")
        return Epoch(order.volume.epoch)

    async def _order_other_than(self, *kinds: Order.Kind.ValueType) -> Order:
        async with self._ordered:
            await self._ordered.wait_for(lambda: self._order.kind not in kinds)
            return self._order
