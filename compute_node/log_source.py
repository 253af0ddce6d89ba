"""What the feed may hand to PostgreSQL: the volume's log up to what is known to be durable."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import structlog

from boreal.errors import BorealError, QuorumUnavailable, StaleEpoch
from boreal.quorum import SIX_WAY, Lineage, TimelineStart
from boreal.types import Lsn, NodeName, format_lsn
from compute_node.fleet import Fleet
from compute_node.storage_client import SegmentPosition

_log = structlog.get_logger(__name__)

_RETRY_S = 0.2
_READ_ATTEMPTS = 50


class Held(NamedTuple):
    """The stretch of the log that a node has."""

    start: Lsn
    scl: Lsn


@dataclass(frozen=True, slots=True, kw_only=True)
class LogView:
    """The log as a read quorum of storage nodes tells of it."""

    system_identifier: int
    lineage: Lineage
    holders: Mapping[NodeName, Held]
    """What the nodes have that follow the lineage: the only ones to read the log from."""


def view_log(positions: Mapping[NodeName, SegmentPosition]) -> LogView:
    """Take the lineage of the highest position; QuorumUnavailable with less than a read quorum."""
    if len(positions) < SIX_WAY.read:
        raise QuorumUnavailable(
            f"{len(positions)} storage nodes tell their position; {SIX_WAY.read} are needed",
            answered=len(positions),
            needed=SIX_WAY.read,
        )
    newest = max(positions.values(), key=lambda position: position.state.position)
    lineage = newest.state.lineage
    states = {name: p.state for name, p in positions.items() if p.state.lineage == lineage}
    return LogView(
        system_identifier=newest.system_identifier,
        lineage=lineage,
        holders={name: Held(state.start, state.scl) for name, state in states.items()},
    )


class LogSource:
    """A FeedSource over the storage fleet.

    Invariant: `durable` is a record's end, never shrinks, and every byte below it is on a write
    quorum and belongs to the view's lineage. (A VDL may lie inside a record that recovery cuts
    off; PostgreSQL, given its beginning, would not end its timeline at the cut.)
    """

    def __init__(self, fleet: Fleet, view: LogView, *, durable: Lsn) -> None:
        self._fleet = fleet
        self._view = view
        self._durable = durable
        self._grew = asyncio.Condition()

    @property
    def system_identifier(self) -> int:
        """PostgreSQL's identifier of the volume."""
        return self._view.system_identifier

    @property
    def durable(self) -> Lsn:
        """Nothing at or past it is handed out."""
        return self._durable

    def timelines(self) -> Sequence[TimelineStart]:
        """The timelines that hold at least one durable byte.

        A writer's timeline exists for its readers once something it wrote is durable. Told of it
        any earlier, a standby would count it as used, and number its own promotion one too high.
        """
        return [t for t in self._view.lineage.timelines() if t.start < self._durable]

    async def read(self, start: Lsn, end: Lsn) -> bytes:
        """The log's bytes [start, end), from any node that has them."""
        for _ in range(_READ_ATTEMPTS):
            for name, held in self._view.holders.items():
                if not held.start <= start < end <= held.scl:
                    continue
                try:
                    return await self._fleet.read_log(start, end, node=name)
                except StaleEpoch:
                    raise
                except BorealError as error:
                    _log.info("log not to be had from this node", node=name, reason=error.message)
            await asyncio.sleep(_RETRY_S)
            await self.refresh()
        raise QuorumUnavailable(f"no storage node gives the log up to {format_lsn(end)}")

    async def wait_beyond(self, lsn: Lsn) -> None:
        """Return once `durable` is past `lsn`."""
        async with self._grew:
            await self._grew.wait_for(lambda: self._durable > lsn)

    async def refresh(self) -> None:
        """Ask the nodes again where they stand."""
        self._view = view_log(await self._fleet.positions())

    async def extend(self, durable: Lsn) -> None:
        """The log turned out to be durable up to `durable`, a record's end."""
        await self.refresh()
        async with self._grew:
            self._durable = max(self._durable, durable)
            self._grew.notify_all()
