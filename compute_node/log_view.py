"""What the storage nodes' positions say about the volume's log. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from boreal.errors import QuorumUnavailable
from boreal.quorum import SIX_WAY, Lineage, SegmentState
from boreal.types import Epoch, Lsn, NodeName
from compute_node.storage_client import SegmentPosition


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
    durable: Lsn
    """Of the lineage's log, everything below is on a write quorum. Not always a record's end."""

    @property
    def epoch(self) -> Epoch:
        """The epoch of the writer whose log it is."""
        return self.lineage.last.epoch


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
        durable=_durable(lineage, states.values()),
    )


def _durable(lineage: Lineage, states: Iterable[SegmentState]) -> Lsn:
    """How far the log of `lineage` is known to be durable, given segments that follow it.

    A writer told them; or a write quorum of them holds more than that. The latter counts only from
    the last writer's start on: older bytes prove nothing yet (see DurabilityTracker). That the
    positions are not of one moment does no harm: under one lineage a segment never loses anything.
    """
    told, scls = Lsn(0), list[Lsn]()
    for state in states:
        told = max(told, state.vdl)
        scls.append(state.scl)
    if len(scls) < SIX_WAY.write:
        return told
    quorum_scl = sorted(scls, reverse=True)[SIX_WAY.write - 1]
    return max(told, quorum_scl) if quorum_scl >= lineage.last.start else told
