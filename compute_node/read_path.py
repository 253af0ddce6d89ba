"""Reads that any one storage node can serve: whom to ask, and when to ask another.

Any node that is complete to the LSN gives the same answer (a node that is not says so), so the
choice is only about speed: the lowest smoothed latency, with a look at the others now and then, for
a node's latency is only known by asking it (Aurora, SIGMOD 2018, section 3.1). A node that takes
longer than nearly all answers of late is not waited for alone: a second one is asked the same, and
the first answer counts (Dean and Barroso, "The tail at scale", CACM 2013).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

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
    NotNow,
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
    NotNow,
    Internal,
)
"""A read that fails so on one node is repeated on the next: the fault is that node's own."""

_SMOOTHING = 0.2
_RECENT = 128
"""Answers of late by which the hedge delay is set; it is set anew every so many answers."""
_DELAY_EVERY = 16
_MOST_AT_ONCE = 3
"""Nodes asked the same at a time: two may hang together, being of one zone."""
_NEVER = float("-inf")
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 1.0

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")
Ask = Callable[[StorageClient, float], Coroutine[object, object, _T]]
"""Asks one node, within so many seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeHealth:
    """What the caller knows of one node. Times are of a monotonic clock, in seconds."""

    latency_s: float = 0.0
    """Exponentially smoothed; 0 until the first answer, so that a new node is tried at once."""
    failed_at: float = _NEVER
    under_way: int = 0
    """Calls not answered yet."""

    @property
    def expected_s(self) -> float:
        """How long one more call may take: it waits for those under way."""
        return self.latency_s * (1 + self.under_way)

    def asked(self) -> NodeHealth:
        """One more call is under way."""
        return replace(self, under_way=self.under_way + 1)

    def ended(self) -> NodeHealth:
        """One call is over, whatever came of it."""
        return replace(self, under_way=self.under_way - 1)

    def answered(self, latency_s: float) -> NodeHealth:
        """The node gave an answer after `latency_s`."""
        known = self.latency_s
        smoothed = latency_s if known == 0.0 else known + _SMOOTHING * (latency_s - known)
        return NodeHealth(latency_s=smoothed, under_way=self.under_way)

    def waited_for(self, so_far_s: float) -> NodeHealth:
        """The node has not answered for that long: it is at least so slow."""
        return replace(self, latency_s=max(self.latency_s, so_far_s))

    def failed(self, now: float) -> NodeHealth:
        """The node did not do what it was asked."""
        return replace(self, failed_at=now)


_UNKNOWN = NodeHealth()


def order_nodes(health: Mapping[NodeName, NodeHealth], *, now: float, turn: int) -> list[NodeName]:
    """Every node, the one to ask first in front.

    The one whose answer is due first: so calls that are under way together, as the windows of a
    sequential scan, spread over nodes of like speed. Nodes that failed within AVOID_S come last,
    those whose failure is longest ago first. `turn`
    counts the caller's calls: every PROBE_EVERY-th puts another of the good nodes in front.
    """
    good = [name for name, known in health.items() if now - known.failed_at >= AVOID_S]
    bad = [name for name, known in health.items() if now - known.failed_at < AVOID_S]
    good.sort(key=lambda name: (health[name].expected_s, health[name].under_way, name))
    bad.sort(key=lambda name: (health[name].failed_at, name))
    if turn % PROBE_EVERY == 0 and len(good) > 1:
        good.insert(0, good.pop(1 + turn // PROBE_EVERY % (len(good) - 1)))
    return good + bad


@dataclass(frozen=True, slots=True, kw_only=True)
class Hedging:
    """When another node is asked the same, in seconds, and how often at most."""

    first_s: float = 0.05
    """Until enough answers came to know better."""
    least_s: float = 0.005
    most_s: float = 0.5
    quantile: float = 0.95
    """So much of the answers of late took no longer than the delay."""
    share: float = 0.1
    """Hedges for each read: more, when everything is slow, would make it slower."""
    burst: int = 64
    """Hedges that may follow each other at once, so that all reads can leave a node that hangs."""


class HedgeBudget:
    """Sets the hedge delay by the answers of late, and counts out the hedges."""

    def __init__(self, hedging: Hedging) -> None:
        self._hedging = hedging
        self._latencies: deque[float] = deque(maxlen=_RECENT)
        self._answers = 0
        self._left: float = hedging.burst
        self.delay_s = hedging.first_s
        self.spent = 0

    def answered(self, latency_s: float) -> None:
        """An answer came after so long."""
        rule = self._hedging
        self._left = min(self._left + rule.share, rule.burst)
        self._latencies.append(latency_s)
        self._answers += 1
        if self._answers % _DELAY_EVERY == 0:
            ordered = sorted(self._latencies)
            usual_s = ordered[int(rule.quantile * (len(ordered) - 1))]
            self.delay_s = min(max(usual_s, rule.least_s), rule.most_s)

    def spend(self) -> bool:
        """Whether a hedge may be made; then it counts as made."""
        if self._left < 1:
            return False
        self._left -= 1
        self.spent += 1
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a read may take, in seconds: a node's first chance, and all chances together."""

    attempt_s: float
    total_s: float
    hedging: Hedging | None = None
    """None: a node has its whole chance to itself."""


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
        self.hedges = HedgeBudget(patience.hedging) if patience.hedging else None

    async def read(self, clients: Mapping[NodeName, StorageClient], what: str, ask: Ask[_T]) -> _T:
        """The first good answer. `clients` may change meanwhile; `what` is named in the error."""
        give_up_at = self._clock() + self._patience.total_s
        attempt_s = self._patience.attempt_s
        pause_s = _FIRST_PAUSE_S
        reasons: dict[NodeName, str] = {}
        while True:
            within_s = min(attempt_s, give_up_at - self._clock())
            one = _Round(self, self.order(clients), clients, ask, within_s)
            try:
                return await one.run()
            except _NobodyServed:
                reasons |= one.reasons
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

    def health(self, name: NodeName) -> NodeHealth:
        """What is known of a node."""
        return self._health.get(name, _UNKNOWN)

    def order(self, clients: Collection[NodeName]) -> list[NodeName]:
        """The nodes, the one to ask first in front. Counts as one read."""
        self._health = {name: self._health.get(name, _UNKNOWN) for name in clients}
        self._turn += 1
        return order_nodes(self._health, now=self._clock(), turn=self._turn)

    def rank(self, names: Iterable[NodeName]) -> list[NodeName]:
        """Those nodes, the one to ask first in front, as far as is known by now."""
        health = {name: self._health[name] for name in names if name in self._health}
        return order_nodes(health, now=self._clock(), turn=1)

    async def attempt(self, client: StorageClient, ask: Ask[_T], within_s: float) -> _T:
        """Ask one node, and remember how it did."""
        name, started = client.name, self._clock()
        self._note(name, NodeHealth.asked)
        try:
            answer = await ask(client, within_s)
        except ANOTHER_MAY_SERVE as error:
            self._note(name, lambda known: known.failed(self._clock()))
            _log.warning("a node did not serve a read", node=name, why=f"{error.code}: {error}")
            raise
        finally:
            self._note(name, NodeHealth.ended)
        latency_s = self._clock() - started
        self._note(name, lambda known: known.answered(latency_s))
        if self.hedges:
            self.hedges.answered(latency_s)
        return answer

    def waited_for(self, name: NodeName, so_far_s: float) -> None:
        """The node let a read wait for that long, and still does."""
        self._note(name, lambda known: known.waited_for(so_far_s))

    def _note(self, name: NodeName, change: Callable[[NodeHealth], NodeHealth]) -> None:
        if name in self._health:  # else it has left the fleet
            self._health[name] = change(self._health[name])


class _NobodyServed(Exception):
    pass


class _Round(Generic[_T]):
    """One read's way through the nodes, each asked once: the next when one failed, or is slow."""

    def __init__(
        self,
        path: ReadPath,
        order: list[NodeName],
        clients: Mapping[NodeName, StorageClient],
        ask: Ask[_T],
        within_s: float,
    ) -> None:
        self._path = path
        self._to_ask = deque(order)
        self._clients = clients
        self._ask = ask
        self._within_s = within_s
        self._running: dict[asyncio.Task[_T], NodeName] = {}
        self.reasons: dict[NodeName, str] = {}

    async def run(self) -> _T:
        """The first good answer; _NobodyServed if there is none. Leaves nothing running."""
        hedges = self._path.hedges
        try:
            while self._running or self._start_next():
                crowded = len(self._running) >= _MOST_AT_ONCE or not self._to_ask
                delay_s = hedges.delay_s if hedges and not crowded else None
                done, _ = await asyncio.wait(
                    self._running, timeout=delay_s, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    name = self._running.pop(task)
                    try:
                        return task.result()
                    except ANOTHER_MAY_SERVE as error:
                        self.reasons[name] = f"{error.code}: {error.message}"
                if not done and hedges and delay_s is not None:
                    for name in self._running.values():
                        self._path.waited_for(name, delay_s)
                    if hedges.spend():  # else perhaps after the next delay
                        self._to_ask = deque(self._path.rank(self._to_ask))
                        self._start_next()
        finally:
            await self._end()
        raise _NobodyServed

    def _start_next(self) -> bool:
        """Ask one more node; False if there is none left."""
        while self._to_ask and self._within_s > 0:
            client = self._clients.get(self._to_ask.popleft())
            if client is not None:
                attempt = self._path.attempt(client, self._ask, self._within_s)
                self._running[asyncio.create_task(attempt)] = client.name
                return True
        return False

    async def _end(self) -> None:
        if self._running:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
