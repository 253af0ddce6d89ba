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
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import structlog

from boreal.errors import (
    BelowLogStart,
    BeyondLog,
    BorealError,
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
from boreal.histogram import Durations
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
Ask = Callable[[StorageClient, float], Awaitable[_T]]
"""Asks one node, within so many seconds. Cancelling what it returns ends the call."""


class NodeHealth(NamedTuple):
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
        return NodeHealth(self.latency_s, self.failed_at, self.under_way + 1)

    def ended(self) -> NodeHealth:
        """One call is over, whatever came of it."""
        return NodeHealth(self.latency_s, self.failed_at, self.under_way - 1)

    def answered(self, latency_s: float) -> NodeHealth:
        """The node gave an answer after `latency_s`."""
        known = self.latency_s
        smoothed = latency_s if known == 0.0 else known + _SMOOTHING * (latency_s - known)
        return NodeHealth(latency_s=smoothed, under_way=self.under_way)

    def waited_for(self, so_far_s: float) -> NodeHealth:
        """The node has not answered for that long: it is at least so slow."""
        return self._replace(latency_s=max(self.latency_s, so_far_s))

    def failed(self, now: float) -> NodeHealth:
        """The node did not do what it was asked."""
        return self._replace(failed_at=now)


_UNKNOWN = NodeHealth()


def order_nodes(health: Mapping[NodeName, NodeHealth], *, now: float, turn: int) -> list[NodeName]:
    """Every node, the one to ask first in front.

    The one whose answer is due first: so calls that are under way together, as the windows of a
    sequential scan, spread over nodes of like speed. Nodes that failed within AVOID_S come last,
    those whose failure is longest ago first. `turn`
    counts the caller's calls: every PROBE_EVERY-th puts another of the good nodes in front.
    """
    good, bad = [], []
    for name, known in health.items():
        if now - known.failed_at >= AVOID_S:
            good.append((known.expected_s, known.under_way, name))
        else:
            bad.append((known.failed_at, 0, name))
    good.sort()
    bad.sort()
    if turn % PROBE_EVERY == 0 and len(good) > 1:
        good.insert(0, good.pop(1 + turn // PROBE_EVERY % (len(good) - 1)))
    return [name for _, _, name in good + bad]


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
        self.answers = Durations()
        """How long nodes took to answer."""
        self.failures = 0
        """Attempts that a node failed; the next one was asked. Only ever grows."""

    async def read(
        self, clients: Mapping[NodeName, StorageClient], what: object, ask: Ask[_T]
    ) -> _T:
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

    def order(self, clients: Mapping[NodeName, object]) -> list[NodeName]:
        """The nodes, the one to ask first in front. Counts as one read."""
        if self._health.keys() != clients.keys():
            self._health = {name: self._health.get(name, _UNKNOWN) for name in clients}
        self._turn += 1
        return order_nodes(self._health, now=self._clock(), turn=self._turn)

    def rank(self, names: Iterable[NodeName]) -> list[NodeName]:
        """Those nodes, the one to ask first in front, as far as is known by now."""
        health = {name: self._health[name] for name in names if name in self._health}
        return order_nodes(health, now=self._clock(), turn=1)

    # --- what becomes of a call to a node ------------------------------------------------------

    def asked(self, name: NodeName) -> float:
        """A call begins; when."""
        self._note(name, NodeHealth.asked)
        return self._clock()

    def answered(self, name: NodeName, asked_at: float) -> None:
        """It was answered well."""
        latency_s = self._clock() - asked_at
        self._note(name, lambda known: known.ended().answered(latency_s))
        self.answers.observe(latency_s)
        if self.hedges:
            self.hedges.answered(latency_s)

    def failed(self, name: NodeName, error: BorealError) -> None:
        """The node did not do it, but another may."""
        self._note(name, lambda known: known.ended().failed(self._clock()))
        self.failures += 1
        _log.warning("a node did not serve a read", node=name, why=f"{error.code}: {error}")

    def ended(self, name: NodeName) -> None:
        """It is over, and says nothing about the node."""
        self._note(name, NodeHealth.ended)

    def waited_for(self, name: NodeName, so_far_s: float) -> None:
        """The node let a read wait for that long, and still does."""
        self._note(name, lambda known: known.waited_for(so_far_s))

    def _note(self, name: NodeName, change: Callable[[NodeHealth], NodeHealth]) -> None:
        if name in self._health:  # else it has left the fleet
            self._health[name] = change(self._health[name])


class _NobodyServed(Exception):
    pass


class _Round(Generic[_T]):
    """One read's way through the nodes, each asked once: the next when one failed, or is slow.

    Driven by what happens to its calls and by one timer, not by a task that waits for them: a page
    comes within a tenth of a millisecond, and tasks to wait by take as long.
    """

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
        self._loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[_T] = self._loop.create_future()
        self._running: dict[asyncio.Future[_T], tuple[NodeName, float]] = {}
        """Whom each call asks, and since when."""
        self._hedge: asyncio.TimerHandle | None = None
        self.reasons: dict[NodeName, str] = {}

    async def run(self) -> _T:
        """The first good answer; _NobodyServed if there is none. Leaves nothing running."""
        try:
            self._go_on()
            return await self._outcome
        finally:
            await self._end()

    def _go_on(self) -> None:
        """See to it that somebody is asked, and that another one is if that takes long."""
        if not self._running and not self._start_next():
            self._outcome.set_exception(_NobodyServed())
            return
        hedges = self._path.hedges
        if hedges and self._to_ask and len(self._running) < _MOST_AT_ONCE:
            delay_s = hedges.delay_s
            self._hedge = self._loop.call_later(delay_s, self._late, hedges, delay_s)

    def _start_next(self) -> bool:
        """Ask one more node; False if there is none left."""
        while self._to_ask and self._within_s > 0:
            name = self._to_ask.popleft()
            client = self._clients.get(name)
            if client is not None:
                asked_at = self._path.asked(name)
                call = asyncio.ensure_future(self._ask(client, self._within_s))
                self._running[call] = (name, asked_at)
                call.add_done_callback(self._came)
                return True
        return False

    def _late(self, hedges: HedgeBudget, delay_s: float) -> None:
        """No answer for so long."""
        for name, _ in self._running.values():
            self._path.waited_for(name, delay_s)
        if hedges.spend():  # else perhaps after the next delay
            self._to_ask = deque(self._path.rank(self._to_ask))
            self._start_next()
        self._go_on()

    def _came(self, call: asyncio.Future[_T]) -> None:
        """A call is over, well or not."""
        error = None if call.cancelled() else call.exception()  # looked at, or Python complains
        if call not in self._running:
            return  # it lost
        name, asked_at = self._running.pop(call)
        if isinstance(error, ANOTHER_MAY_SERVE):
            self._path.failed(name, error)
            self.reasons[name] = f"{error.code}: {error.message}"
        elif error is None and not call.cancelled():
            self._path.answered(name, asked_at)
        else:
            self._path.ended(name)
        if self._outcome.done():
            return
        if isinstance(error, ANOTHER_MAY_SERVE):
            self._stop_hedge()
            self._go_on()
        elif error is not None:
            self._outcome.set_exception(error)
        elif call.cancelled():
            self._outcome.cancel()
        else:
            self._outcome.set_result(call.result())

    def _stop_hedge(self) -> None:
        if self._hedge is not None:
            self._hedge.cancel()
            self._hedge = None

    async def _end(self) -> None:
        self._stop_hedge()
        if self._outcome.done() and not self._outcome.cancelled():
            self._outcome.exception()  # the reader may have gone meanwhile
        if not self._running:
            return
        calls, self._running = self._running, {}
        for call, (name, _) in calls.items():
            self._path.ended(name)
            call.cancel()
        # A page's call is over at once, a task takes its time.
        if ending := [call for call in calls if not call.done()]:
            await asyncio.wait(ending)
