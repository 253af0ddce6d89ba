"""The agent: reports to the control plane, and carries out its orders, one life after another."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import SubprocessError
from typing import NoReturn

import psycopg
import structlog

from boreal.engine import Engine
from boreal.errors import BorealError, NotWriter
from boreal.rpc import compute_pb2, control_pb2, control_pb2_grpc
from boreal.rpc.edge import calling, open_channel, volume_ref
from compute_node.bundle_choice import BundleChoice
from compute_node.config import ComputeConfig
from compute_node.create_volume import create_volume
from compute_node.fleet import Fleet
from compute_node.instance import Instance
from compute_node.leftover import end_leftover
from compute_node.life import Life, LifeState
from compute_node.orders import Order, OrderKind, Orders, order_from_wire, order_to_wire
from compute_node.publisher import Publisher
from compute_node.replica_status import ReplicaStatusFile
from compute_node.reporting import Reporting
from compute_node.status import status_of, writing

_log = structlog.get_logger(__name__)

_CONTROL_TIMEOUT_S = 2.0
_RETRY_S = 0.3
_REPLICA_STATUS_S = 0.3
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 2.0
_SERVING = {LifeState.READER, LifeState.PROMOTING, LifeState.WRITER}


class Agent:
    """One compute node.

    `run` goes on until `request_stop`. It holds at most one Instance; when that ends, for whatever
    reason but a request to stop, it begins the next life from storage. Invariant: what the control
    plane hears under an identity is true of it, and once it hears a new one, no process of the
    former is left.
    """

    def __init__(self, config: ComputeConfig, engine: Engine, shim: Path) -> None:
        self._config = config
        self._engine = engine
        self._shim = shim
        self._reporting = Reporting(config.control, self)
        self._life = Life(self._reporting.news)
        self._orders = Orders()
        self._instance: Instance | None = None
        self._bundles = BundleChoice()
        self._members: Sequence[control_pb2.StorageNode] = ()
        self._instances: Sequence[control_pb2.InstanceStatus] = ()
        self.told_at = time.monotonic()
        """When the control plane answered last, monotonic. To read."""
        self.lives = 0
        """How often it began to serve; only ever grows."""
        self._stopping = asyncio.Event()

    @property
    def writer(self) -> Instance:
        """The instance, if it is the writer; NotWriter if not."""
        if self._instance is None or self._life.state is not LifeState.WRITER:
            raise NotWriter(f"{self._config.name} is {self._life.state.value}, not the writer")
        return self._instance

    @property
    def takes_clients(self) -> bool:
        """Whether clients are served here, in whichever role."""
        return self._instance is not None and self._instance.takes_clients

    @property
    def state(self) -> LifeState:
        """The state of the present life."""
        return self._life.state

    @property
    def instance(self) -> Instance | None:
        """The instance, whatever its role; None between two lives."""
        return self._instance

    @property
    def publisher(self) -> Publisher:
        """Where readers get the log; NotWriter if this is not the writer."""
        writer = self._instance.writer if self._instance else None
        if writer is None:
            raise NotWriter(f"{self._config.name} is {self._life.state.value}, not the writer")
        return writer.publisher

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
        await end_leftover(self._config.pgdata)
        async with asyncio.TaskGroup() as group:
            helpers = [
                group.create_task(self._reporting.run(), name="reporting"),
                group.create_task(self._tell_postgres(), name="replica status"),
            ]
            lives = group.create_task(self._keep_living(), name="lives")
            await self._stopping.wait()
            if self._life.state not in {LifeState.READER, LifeState.WRITER}:
                lives.cancel()  # what is under way may wait for storage nodes without end
            await asyncio.wait({lives})
            for task in helpers:
                task.cancel()

    # --- reporting -------------------------------------------------------------------------------

    def status(self) -> compute_pb2.ComputeStatus:
        """What this node reports of itself."""
        return status_of(self._config, self._life, self._instance)

    def report(self) -> control_pb2.ComputeHeartbeatRequest:
        """The next heartbeat."""
        known = self._orders.current
        return control_pb2.ComputeHeartbeatRequest(
            address=self._config.address,
            postgres_port=self._config.postgres_port,
            pid=os.getpid(),
            status=self.status(),
            known=order_to_wire(known) if known else None,
        )

    async def answered(
        self,
        request: control_pb2.ComputeHeartbeatRequest,
        answer: control_pb2.ComputeHeartbeatResponse,
    ) -> None:
        """Take the answer to a heartbeat."""
        self._members, self._instances = answer.members, answer.instances
        self.told_at = time.monotonic()
        if self._instance:
            await self._instance.set_members(answer.members)
            self._instance.writer_at(self._writer_address())
        if request.status.incarnation == self._life.identity:  # else it is for a life that ended
            self._orders.give(order_from_wire(answer.order))

    def _writer_address(self) -> str | None:
        """Of the writer's agent; of two that say they write, the older one was deposed."""
        writers = [each for each in self._instances if each.alive and writing(each.status)]
        newest = max(writers, key=lambda each: each.status.volume.epoch, default=None)
        return newest.address if newest else None

    async def _tell_postgres(self) -> NoReturn:
        """Keep up what aurora_replica_status() shows."""
        file = ReplicaStatusFile(self._config.pgdata, self._engine)
        while True:
            if self._life.state in _SERVING:
                age_s = time.monotonic() - self.told_at
                try:
                    file.write(self._instances, self.status(), age_s=age_s)
                except OSError as error:
                    _log.debug("replica status not written", reason=str(error))
            await asyncio.sleep(_REPLICA_STATUS_S)

    # --- living ----------------------------------------------------------------------------------

    async def _keep_living(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while not self._stopping.is_set():
            try:
                await self._live()
                failed = False
            except (BorealError, OSError, SubprocessError, psycopg.Error) as error:
                _log.error("this life ended", reason=str(error), kind=type(error).__name__)
                failed = True
            # The new identity first: the control plane may wait for nothing else.
            await end_leftover(self._config.pgdata)
            self._life, self._orders = Life(self._reporting.news), Orders()
            self._reporting.news()
            if failed:
                await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S) if failed else _FIRST_BACKOFF_S

    async def _live(self) -> None:
        order = await self._orders.other_than(None)
        while order.kind not in {OrderKind.CREATE_VOLUME, OrderKind.READ, OrderKind.WRITE}:
            order = await self._orders.other_than(order)
        if order.kind is OrderKind.CREATE_VOLUME:
            await self._create(order)
        else:
            await self._serve(order)

    async def _create(self, order: Order) -> None:
        self._life.become(LifeState.CREATING, f"ordered to create volume {order.volume}")
        system_identifier = await create_volume(
            self._config, self._engine, order.volume, order.epoch, self._members
        )
        request = control_pb2.VolumeCreatedRequest(
            volume=volume_ref(order.volume, order.epoch),
            instance=self._config.name,
            system_identifier=system_identifier,
        )
        async with open_channel(self._config.control) as channel:
            await self._tell_created(control_pb2_grpc.ControlStub(channel), request)

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
                await asyncio.sleep(_RETRY_S)
            else:
                return

    async def _serve(self, order: Order) -> None:
        fleet = Fleet(order.volume, order.epoch)
        try:
            await fleet.set_members(self._members)
            self.lives += 1
            instance = self._instance = Instance(
                self._config,
                self._engine,
                self._shim,
                fleet,
                self._life,
                self._bundles,
                self._reporting.news,
            )
            instance.writer_at(self._writer_address())
            if self._stopping.is_set():
                return
            await self._live_on(instance)
        finally:
            self._instance = None
            await fleet.close()

    async def _live_on(self, instance: Instance) -> None:
        try:
            await instance.run(self._orders)
        finally:
            served = instance.has_served or self._stopping.is_set()
            self._bundles.ended(instance.bundle_end, served=served)
