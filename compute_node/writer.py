"""What an instance does as the writer: its log goes to storage and to the readers, bundles are
taken, floors raised, the lease is kept.
"""

from __future__ import annotations

import asyncio
from typing import NoReturn

import structlog

from boreal.errors import Internal, Unreachable
from boreal.quorum import SIX_WAY, DurabilityTracker, RecoveryPlan
from boreal.types import Lsn, Timeline, format_lsn
from compute_node.bundling import Bundling
from compute_node.config import ADMIN, SHIPPER_NAME, SLOT, ComputeConfig
from compute_node.floors import Floors
from compute_node.lease import Lease
from compute_node.life import LifeState
from compute_node.parts import Parts
from compute_node.publisher import Publisher
from compute_node.replication_client import WalStream
from compute_node.shipper import Shipper, storage_addresses

_FLOORS_S = 0.3
_LEASE_S = 0.1
"""How often the lease is renewed; it lasts much longer (boreal.quorum.lease)."""

_log = structlog.get_logger(__name__)


async def connect_stream(config: ComputeConfig) -> WalStream:
    """A walsender of our PostgreSQL and the slot to read from. Works on a standby too."""
    stream = await WalStream.connect(
        socket_dir=config.run_dir,
        port=config.postgres_port,
        user=ADMIN,
        application_name=SHIPPER_NAME,
    )
    await stream.ensure_slot(SLOT)
    return stream


class Writer:
    """The writer's duties, for a PostgreSQL that is about to be promoted at `plan.end`.

    They begin with `run`, before the promotion, so that no WAL is ever written that has no way out.
    Invariant: PostgreSQL is told that nothing is durable beyond `plan.end` until `serve`; so no
    commit is acknowledged to a client while the former writer might still be serving.
    """

    def __init__(self, parts: Parts, plan: RecoveryPlan, stream: WalStream) -> None:
        self._parts = parts
        self._plan = plan
        self._stream = stream
        self._serving = asyncio.Event()
        self.shipper = Shipper(
            volume=parts.fleet.volume,
            lineage=plan.lineage,
            start=plan.end,
            tracker=DurabilityTracker(SIX_WAY, plan.end),
            members=storage_addresses(parts.fleet.nodes),
            on_vdl=self._on_vdl,
        )
        self.publisher = Publisher(
            parts.fleet.volume, plan.lineage.last.epoch, plan.end, self.shipper.window
        )
        self._floors = Floors(start=plan.end, restored_redo=parts.restored_redo)
        self.bundling = Bundling(parts, self.shipper, self.timeline, self._floors.bundle_stored)
        stream.send_status(plan.end)

    @property
    def timeline(self) -> Timeline:
        """The timeline it writes."""
        return self._plan.lineage.timelines()[-1].timeline

    @property
    def lease(self) -> Lease:
        """Under which its clients are served. To read."""
        return self._parts.lease

    @property
    def pgmrpl(self) -> Lsn:
        """Nobody will ask storage for anything below it; 0: not known yet."""
        return self._floors.pgmrpl

    async def run(self) -> NoReturn:
        """Do all of it until cancelled. Raises StaleEpoch when a newer writer owns the volume."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.shipper.run(), name="shipper")
                group.create_task(self._ship(), name="ship")
                await self._serving.wait()
                group.create_task(self._keep_lease(), name="lease")
                group.create_task(self._keep_floors(), name="floors")
                group.create_task(self.bundling.keep(), name="bundles")
        finally:
            self.publisher.close()
        raise Internal("the writer's duties ended for no reason")

    def serve(self) -> None:
        """The former writer serves nobody any more: acknowledge commits, under our own lease."""
        lease = self._parts.lease
        lease.hold_back()  # until three nodes have acknowledged something
        lease.renew(self.shipper.contacts)
        self._stream.send_status(self.shipper.vdl)
        self._serving.set()

    def _on_vdl(self, vdl: Lsn) -> None:
        if self._serving.is_set():
            self._stream.send_status(vdl)
        self.publisher.durable(vdl)

    # --- the log -------------------------------------------------------------------------------

    async def _ship(self) -> None:
        plan, stream = self._plan, self._stream
        full = asyncio.Event()
        relief = asyncio.create_task(self._relieve(full))
        former, ours = plan.lineage.timelines()[-2:]

        def on_wal(start: Lsn, data: bytes) -> None:
            if self.shipper.fenced:
                return  # its `run` ends this life
            self.shipper.push(start, data)
            if self.shipper.full and not full.is_set():
                full.set()
                stream.pause_reading()

        try:
            # Nothing of the former timeline is ours to ship, but its end is how the walsender tells
            # that PostgreSQL was promoted, and where.
            ended = await stream.stream(
                slot=SLOT, start=plan.end, timeline=former.timeline, on_wal=None
            )
            if (ended.next_timeline, ended.switch) != ours:
                raise Internal(
                    f"PostgreSQL went to timeline {ended.next_timeline} at "
                    f"{format_lsn(ended.switch)}; the lineage says {ours}"
                )
            await stream.stream(slot=SLOT, start=plan.end, timeline=ours.timeline, on_wal=on_wal)
            raise Internal("the writer's timeline ended while it was the writer")
        except Unreachable:
            if self._parts.life.state is not LifeState.STOPPING:
                raise
        finally:
            relief.cancel()
            await stream.close()

    async def _relieve(self, full: asyncio.Event) -> None:
        """Read on once the storage nodes have taken enough."""
        while True:
            await full.wait()
            await self.shipper.room()
            full.clear()
            self._stream.resume_reading()

    # --- lease and floors ------------------------------------------------------------------------

    async def _keep_lease(self) -> None:
        while True:
            self._parts.lease.renew(self.shipper.contacts)
            await asyncio.sleep(_LEASE_S)

    async def _keep_floors(self) -> None:
        """Let storage forget what nobody will ask for again, and vacuum what nobody sees."""
        floors, publisher = self._floors, self.publisher
        while True:
            before = floors.read_point
            floors.advance(self.shipper.held_everywhere, publisher.floor())
            if floors.read_point > before:
                self._parts.pages.advance_read_point(floors.read_point)
            self.shipper.set_pgmrpl(floors.pgmrpl)
            self._stream.send_feedback(publisher.oldest_xmin())
            await asyncio.sleep(_FLOORS_S)
