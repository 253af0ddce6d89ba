"""What the simulator moves about: bytes that tell who wrote them, messages, segments, writers, and
the rules all of them obey."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from boreal.quorum import (
    SIX_WAY,
    Accepted,
    DurabilityTracker,
    Lineage,
    RecoveryPlan,
    SegmentState,
    choose_source,
    plan_recovery,
)
from boreal.types import Epoch, Lsn, NodeName

NODES = tuple(NodeName(f"sn-{number}") for number in range(1, 7))
FIRST_EPOCH = Epoch(1)
LOG_START = Lsn(0)


class Violation(AssertionError):
    """An invariant of the volume does not hold."""


def record(epoch: Epoch, at: int, size: int) -> bytes:
    """A log record: its size, then bytes that no other epoch, hardly another place, would have."""
    return bytes([size, *((epoch * 31 + position) & 0xFF for position in range(at + 1, at + size))])


def record_end(log: bytes | bytearray) -> Lsn:
    """Where the last complete record ends."""
    end = 0
    while end < len(log) and end + log[end] <= len(log):
        end += log[end]
    return Lsn(end)


class Rules:
    """The rules the simulated processes obey: those of boreal.quorum.

    A test of the simulator itself plugs in a subclass with one rule wrong.
    """

    adopt_cuts_first = True
    """Whether a node discards the bytes that part before it makes the new lineage durable."""

    trim_says_so_first = True
    """Whether a node makes its new start durable before it drops the log below."""

    def created(self, newest: Epoch) -> SegmentState:
        return SegmentState.created(FIRST_EPOCH, LOG_START)

    def restarted(self, state: SegmentState) -> SegmentState:
        return state

    def fence(self, state: SegmentState, epoch: Epoch) -> SegmentState:
        return state.fence(epoch)

    def adopt(self, state: SegmentState, epoch: Epoch, lineage: Lineage) -> SegmentState:
        return state.adopt(epoch, lineage)

    def append(self, state: SegmentState, epoch: Epoch, at: Lsn, length: int, vdl: Lsn) -> Accepted:
        return state.append(epoch, at, length, vdl)

    def told_durable(self, state: SegmentState, epoch: Epoch, end: Lsn) -> SegmentState:
        """GetPagesRequest.lineage_epoch: a record's end known to be durable under `epoch`."""
        if epoch > state.lineage.last.epoch:
            return state
        return replace(state, vdl=max(state.vdl, min(end, state.scl)))

    def check_source_of_catch_up(self, state: SegmentState, epoch: Epoch) -> None:
        state.check_follows(epoch)

    def check_catch_up(self, state: SegmentState, lineage: Lineage) -> None:
        state.catch_up_from(lineage)

    floor_at_record_end = True
    """Whether the floor a writer tells is a record's end."""

    def floor(self, tracker: DurabilityTracker) -> Lsn | None:
        """What nobody needs the log below: durable, and held by all."""
        held = tracker.held_everywhere
        return None if held is None else min(held, tracker.vdl)

    def trim(self, state: SegmentState, floor: Lsn) -> SegmentState:
        return state.trim(min(floor, state.vdl))

    def choose(self, epoch: Epoch, answers: Mapping[NodeName, SegmentState]) -> NodeName:
        return choose_source(SIX_WAY, epoch, answers)

    def plan(
        self, epoch: Epoch, answers: Mapping[NodeName, SegmentState], end: Lsn
    ) -> RecoveryPlan:
        return plan_recovery(SIX_WAY, epoch, answers, end)

    def may_serve(self, plan: RecoveryPlan, positions: Mapping[NodeName, SegmentState]) -> bool:
        return plan.carried_out(SIX_WAY, positions)

    def first_vdl(self, plan: RecoveryPlan) -> Lsn:
        return plan.end

    def counts(self, plan: RecoveryPlan, position: SegmentState) -> bool:
        return position.lineage == plan.lineage


# --- messages ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLog:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopt:
    lineage: Lineage


@dataclass(frozen=True, slots=True, kw_only=True)
class Append:
    at: Lsn
    data: bytes
    vdl: Lsn


@dataclass(frozen=True, slots=True, kw_only=True)
class AskPosition:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class TellDurable:
    """A reader knows that the record ending at `end` is durable under the message's epoch."""

    end: Lsn


@dataclass(frozen=True, slots=True, kw_only=True)
class Trim:
    """Nobody needs the log below `floor` any more."""

    floor: Lsn


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """A segment asks a peer for the log from `at` on; what comes back it takes as `lineage`'s."""

    to: NodeName
    lineage: Lineage
    at: Lsn


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    lineage: Lineage
    at: Lsn
    data: bytes


Call = Fence | ReadLog | Adopt | Append | AskPosition
"""What a writer asks of a node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the node tells it."""

    call: Call
    state: SegmentState
    data: bytes = b""
    gap: bool = False


Body = Call | Answer | TellDurable | Trim | Pull | Chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """On its way between the process of `epoch` (a writer, a reader, a peer) and `node`."""

    node: NodeName
    epoch: Epoch
    body: Body


# --- processes ---------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Segment:
    """A storage node's part in it. `state` and `log` are on disk."""

    name: NodeName
    state: SegmentState | None = None
    log: bytearray = field(default_factory=bytearray)
    """From the volume's first byte, for comparison; nobody is given what lies below `dropped`."""
    dropped: Lsn = LOG_START
    up: bool = True
    checked: SegmentState | None = None
    """The state the invariants were last checked in; no byte changes without a new one."""
    indexed: bytes = b""
    """The complete records it was told are durable: never to be taken back."""

    @property
    def known(self) -> SegmentState:
        if self.state is None:
            raise Violation(f"{self.name} was never created")
        return self.state


@dataclass(slots=True, kw_only=True)
class Writer:
    """A writer incarnation. Its step shows in what it has: answers, source, plan, tracker."""

    epoch: Epoch
    alive: bool = True
    reach: tuple[NodeName, ...] = NODES
    """The nodes its messages get to, for now."""
    answers: dict[NodeName, SegmentState] = field(default_factory=dict)
    source: NodeName | None = None
    plan: RecoveryPlan | None = None
    positions: dict[NodeName, SegmentState] = field(default_factory=dict)
    tracker: DurabilityTracker | None = None
    log: bytearray = field(default_factory=bytearray)
    """From the volume's first byte, for comparison; it can send what lies at or past `first`."""
    first: Lsn = LOG_START
    sent: dict[NodeName, Lsn] = field(default_factory=dict)
    vdl: Lsn = LOG_START
