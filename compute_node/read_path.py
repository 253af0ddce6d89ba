"""Reads that any one storage node can serve: whom to ask, and when to ask another.

Any node that is complete to the LSN gives the same answer (a node that is not says so), so the
choice is only about speed: the lowest smoothed latency, with a look at the others now and then, for
a node's latency is only known by asking it (Aurora, SIGMOD 2018, section 3.1).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog

from boreal.errors import (
    BelowLogStart,
    BeyondLog,
    CorruptData,
    IngestStopped,
    Internal,
    LineageNotAdopted,
    NoBundle,
    NotIndexedYet,
    QuorumUnavailable,
    UnknownOutcome,
    UnknownVolume,
    Unreachable,
)
from boreal.types import NodeName
from compute_node.storage_client import StorageClient

AVOID_S = 5.0
"""A node that failed is asked last for so long; then it gets another chance."""
PROBE_EVERY = 64
"""One call in so many goes first to a node that is not the fastest."""
ANOTHER_MAY_SERVE = (
    Unreachable,
    UnknownOutcome,
    UnknownVolume,
    LineageNotAdopted,
    NotIndexedYet,
    IngestStopped,
    CorruptData,
    BelowLogStart,
    BeyondLog,
    NoBundle,
    Internal,
)
"""A read that fails so on one node is repeated on the next: the fault is that node's own."""

_SMOOTHING = 0.2
_NEVER = float("-inf")
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 1.0

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")
Ask = Callable[[StorageClient, float], Awaitable[_T]]
"""Asks one node, within so many seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeHealth:
    """What the caller knows of one node. Times are of a monotonic clock, in seconds."""

    latency_s: float = 0.0
    """Exponentially smoothed; 0 until the first answer, so that a new node is tried at once."""
    failed_at: float = _NEVER

    def answered(self, latency_s: float) -> NodeHealth:
        """The node gave an answer after `latency_s`."""
        known = self.latency_s
        smoothed = latency_s if known == 0.0 else known + _SMOOTHING * (latency_s - known)
        return NodeHealth(latency_s=smoothed)

    def failed(self, now: float) -> NodeHealth:
        """The node did not do what it was asked."""
        return replace(self, failed_at=now)


_UNKNOWN = NodeHealth()


def order_nodes(health: Mapping[NodeName, NodeHealth], *, now: float, turn: int) -> list[NodeName]:
    """Every node, the one to ask first in front.

    Nodes that failed within AVOID_S come last, those whose failure is longest ago first. `turn`
    counts the caller's calls: every PROBE_EVERY-th puts another of the good nodes in front.
    """
    good = [name for name, known in health.items() if now - known.failed_at >= AVOID_S]
    bad = [name for name, known in health.items() if now - known.failed_at < AVOID_S]
    good.sort(key=lambda name: (health[name].latency_s, name))
    bad.sort(key=lambda name: (health[name].failed_at, name))
    if turn % PROBE_EVERY == 0 and len(good) > 1:
        good.insert(0, good.pop(1 + turn // PROBE_EVERY % (len(good) - 1)))
    return good + bad


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a read may take, in seconds: a node's first chance, and all chances together."""

    attempt_s: float
    total_s: float


class ReadPath:
    """Serves one kind of read from whichever node does it best.

    Goes from node to node, round after round, and gives each round twice the time for an attempt: a
    hung node costs little, a slow one is waited for in the end. Raises QuorumUnavailable with every
    node's last reason once `total_s` passed. Errors that no other node would mend are raised as
    they come: StaleEpoch, NotMaterializable, MalformedRequest.
    """

    def __init__(self, patience: Patience, clock: Callable[[], float]) -> None:
        self._patience = patience
        self._clock = clock
        self._health: dict[NodeName, NodeHealth] = {}
        self._turn = 0

    async def read(self, clients: Mapping[NodeName, StorageClient], what: str, ask: Ask[_T]) -> _T:
        """The first good answer. `clients` may change meanwhile; `what` is named in the error."""
        give_up_at = self._clock() + self._patience.total_s
        attempt_s = self._patience.attempt_s
        pause_s = _FIRST_PAUSE_S
        reasons: dict[NodeName, str] = {}
        while True:
            for name in self._order(clients):
                within_s = min(attempt_s, give_up_at - self._clock())
                client = clients.get(name)
                if client is None or within_s <= 0:
                    continue
                try:
                    return await self._timed(client, ask, within_s)
                except ANOTHER_MAY_SERVE as error:
                    reasons[name] = f"{error.code}: {error.message}"
                    _log.warning("asking another node", what=what, node=name, why=reasons[name])
            if self._clock() + pause_s >= give_up_at:
                raise QuorumUnavailable(
                    f"no storage node served {what} within {self._patience.total_s:g} s. "
                    + "; ".join(f"{name}: {why}" for name, why in reasons.items()),
                    answered=0,
                    needed=1,
                )
            await asyncio.sleep(pause_s)
            attempt_s *= 2
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _order(self, clients: Mapping[NodeName, StorageClient]) -> list[NodeName]:
        self._health = {name: self._health.get(name, _UNKNOWN) for name in clients}
        self._turn += 1
        return order_nodes(self._health, now=self._clock(), turn=self._turn)

    async def _timed(self, client: StorageClient, ask: Ask[_T], within_s: float) -> _T:
        started = self._clock()
        known = self._health.get(client.name, _UNKNOWN)
        try:
            answer = await ask(client, within_s)
        except ANOTHER_MAY_SERVE:
            self._health[client.name] = known.failed(self._clock())
            raise
        self._health[client.name] = known.answered(self._clock() - started)
        return answer
