"""From PostgreSQL's WAL to six storage nodes, and back as the VDL.

Each node gets one batch at a time, by the framed lane; while it makes that durable the next one
fills. So a fast node gets many small batches, a slow one few large ones, and neither waits for the
other. (Aurora's boxcar, driven by acknowledgements instead of a timer.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from time import monotonic
from typing import NoReturn

import structlog

from boreal.errors import Internal, StaleEpoch
from boreal.histogram import Durations, Sizes
from boreal.quorum import DurabilityTracker, Lineage
from boreal.rpc import control_pb2
from boreal.types import Lsn, NodeName, VolumeId
from compute_node.shipping.durable import Durability
from compute_node.shipping.link import (
    LinkReport,
    LinkState,
    LinkTiming,
    StorageAddress,
    StorageLink,
)
from compute_node.shipping.outbox import Outbox
from compute_node.shipping.window import LogWindow

__all__ = [
    "LinkReport",
    "LinkState",
    "LinkTiming",
    "Shipper",
    "StorageAddress",
    "storage_addresses",
]

WINDOW_BYTES = 64 * 1024 * 1024
VDL_DELAY_S = 0.02
"""An idle writer tells the nodes its last VDL after this time; a busy one with the next batch."""
LEAST_GATHERING_S = 0.001
"""So long a wave gathers after one that was crowded, at least: the loop's timers go no finer."""
MOST_GATHERING_S = 0.010
_SMOOTHING = 8
"""Waves that count for how long one takes."""

_DEFAULT_TIMING = LinkTiming()

_log = structlog.get_logger(__name__)


def storage_addresses(nodes: Iterable[control_pb2.StorageNode]) -> tuple[StorageAddress, ...]:
    """The members of a fleet, as the control plane tells them."""
    return tuple(
        StorageAddress(
            name=NodeName(node.name), log=node.addresses.log, frames=node.addresses.frames
        )
        for node in nodes
    )


class Shipper:
    """Ships the log of one writer incarnation, whose epoch is `lineage.last.epoch`.

    Invariant: memory is bounded by `window_bytes`; `on_vdl` is called with growing LSNs only, each
    durable on a write quorum of nodes that adopted `lineage`.
    """

    def __init__(
        self,
        *,
        volume: VolumeId,
        lineage: Lineage,
        start: Lsn,
        tracker: DurabilityTracker,
        members: Iterable[StorageAddress],
        on_vdl: Callable[[Lsn], None],
        window_bytes: int = WINDOW_BYTES,
        timing: LinkTiming = _DEFAULT_TIMING,
    ) -> None:
        self._on_vdl = on_vdl
        self.window_bytes = window_bytes
        self._outbox = Outbox(
            volume=volume,
            lineage=lineage,
            start=start,
            tracker=tracker,
            window_bytes=window_bytes,
            on_vdl=self._vdl_advanced,
        )
        self._timing = timing
        self._links: dict[NodeName, StorageLink] = {}
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._fenced = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._vdl_timer: asyncio.TimerHandle | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._wave_began_at: float | None = None
        self._wave_took_s = 0.0
        """Until its quorum, smoothed."""
        self._durability = Durability()
        self.set_members(members)

    async def run(self) -> NoReturn:
        """Keep the links until cancelled. Raises StaleEpoch when a newer writer owns the volume."""
        try:
            async with asyncio.TaskGroup() as self._group:
                for link in self._links.values():
                    self._start(link)
                await self._fenced.wait()
                for task in self._tasks:
                    task.cancel()
        finally:
            self._group = None
            for timer in (self._vdl_timer, self._patience):
                if timer is not None:
                    timer.cancel()
        raise self._outbox.fenced or Internal("the links ended for no reason")

    def push(self, start: Lsn, data: bytes) -> None:
        """Take WAL that follows `end`; an overlap is compared and skipped.

        When it leaves `full` true, stop reading WAL and await `room()`; up to 1 MiB more is taken,
        then it raises Internal. Raises StaleEpoch once fenced, CorruptWal if an overlap differs.
        """
        outbox = self._outbox
        outbox.push(start, data)
        self._durability.arrived(outbox.window.end, monotonic())
        if outbox.full:
            self._room.clear()
        self._begin_wave()

    @property
    def window(self) -> LogWindow:
        """The newest part of the log. To read only."""
        return self._outbox.window

    @property
    def end(self) -> Lsn:
        """The next byte wanted: where START_REPLICATION starts (again)."""
        return self._outbox.window.end

    @property
    def vdl(self) -> Lsn:
        """Durable on a write quorum up to here."""
        return self._outbox.vdl

    @property
    def held_everywhere(self) -> Lsn | None:
        """Every node of the volume has the log up to here; None: one has not been heard of."""
        return self._outbox.held_everywhere

    @property
    def full(self) -> bool:
        """Whether what waits for a quorum filled the window, and has not half drained since."""
        return not self._room.is_set()

    async def room(self) -> None:
        """Return once `full` is false. Raises StaleEpoch once fenced."""
        await self._room.wait()
        if self._outbox.fenced is not None:
            raise self._outbox.fenced

    @property
    def fenced(self) -> StaleEpoch | None:
        """Why this writer must stop, once it must. `run()` raises it too."""
        return self._outbox.fenced

    def set_members(self, members: Iterable[StorageAddress]) -> None:
        """New addresses for known nodes, used at their next connection; new nodes are linked."""
        for member in members:
            link = self._links.get(member.name)
            if link is not None:
                link.address = member
                continue
            link = self._links[member.name] = StorageLink(member, self._outbox, self._timing)
            if self._group is not None:
                self._start(link)

    def set_pgmrpl(self, lsn: Lsn) -> None:
        """Tell the nodes, with the next appends, that nobody reads below `lsn` again."""
        self._outbox.pgmrpl = lsn

    @property
    def links(self) -> tuple[LinkReport, ...]:
        """Every link, by node name."""
        return tuple(sorted((link.report for link in self._links.values()), key=_by_name))

    @property
    def contacts(self) -> tuple[float, ...]:
        """When the last append was sent that a node acknowledged, monotonic, for each that did."""
        heard = (link.contact_at for link in self._links.values())
        return tuple(at for at in heard if at is not None)

    @property
    def shipped_bytes(self) -> int:
        """Bytes of log sent, over all nodes."""
        return sum(link.shipped_bytes for link in self._links.values())

    @property
    def batches(self) -> int:
        """Batches of log sent, over all nodes."""
        return sum(link.batches for link in self._links.values())

    @property
    def durability(self) -> Durations:
        """How long log took from its arrival here until it was durable. To read only."""
        return self._durability.took

    @property
    def batch_bytes(self) -> Sizes:
        """Log in each append that was sent to a node. To read only."""
        return self._outbox.batch_bytes

    def _start(self, link: StorageLink) -> None:
        if self._group is not None:
            task = self._group.create_task(self._keep(link), name=f"link {link.address.name}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _keep(self, link: StorageLink) -> None:
        try:
            await link.run()
        except StaleEpoch as error:
            self._fence(link.address.name, error)

    def _fence(self, node: NodeName, error: StaleEpoch) -> None:
        if self._outbox.fenced is None:
            _log.error("fenced", node=node, why=error.message, **error.details)
            self._outbox.fenced = error
            self._room.set()
            self._fenced.set()

    def _vdl_advanced(self, vdl: Lsn) -> None:
        if self._wave_began_at is not None and vdl >= self._outbox.wave_end:
            took_s = asyncio.get_running_loop().time() - self._wave_began_at
            self._wave_took_s += (took_s - self._wave_took_s) / _SMOOTHING
            self._wave_began_at = None
        self._on_vdl(vdl)
        self._durability.durable(vdl, monotonic())
        self._begin_wave()
        if self._outbox.roomy:
            self._room.set()
        if self._vdl_timer is None:
            self._tell_vdl_later()

    def _begin_wave(self, *, patient: bool = True) -> None:
        if self._outbox.begin_wave(patient=patient):
            self._wave_began_at = asyncio.get_running_loop().time()
            for link in self._links.values():
                link.kick()
        elif self._outbox.gathering and self._patience is None:
            # As long as a wave takes: that is more the busier the machine is, and fewer and larger
            # waves are what relieves it.
            gathering_s = min(max(self._wave_took_s, LEAST_GATHERING_S), MOST_GATHERING_S)
            self._patience = asyncio.get_running_loop().call_later(gathering_s, self._lose_patience)

    def _lose_patience(self) -> None:
        self._patience = None
        self._begin_wave(patient=False)

    def _tell_vdl_later(self) -> None:
        self._vdl_timer = asyncio.get_running_loop().call_later(
            VDL_DELAY_S, self._tell_vdl, self._outbox.window.end
        )

    def _tell_vdl(self, end: Lsn) -> None:
        """The VDL goes by itself only if no WAL came meanwhile to carry it."""
        self._vdl_timer = None
        if end == self._outbox.window.end:
            told = [link.tell_vdl() for link in self._links.values()]
            if all(told):
                return
        self._tell_vdl_later()


def _by_name(report: LinkReport) -> str:
    return report.node
