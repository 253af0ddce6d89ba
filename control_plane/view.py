"""What the control plane knows, what it can decide and what it orders: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from boreal.quorum import SIX_WAY, QuorumRule
from boreal.types import Epoch, InstanceName, Lsn, NodeName, VolumeId

CREATION_EPOCH = Epoch(1)
"""The epoch that creates a volume; the first writer's is the next."""

MAX_TIER = 15
"""Failover priorities are 0 (first) to 15, as Aurora's."""


# --- the view ------------------------------------------------------------------------------------


class InstanceState(Enum):
    """What an instance says it does: ComputeState of compute.proto."""

    WAITING = "waiting"
    CREATING = "creating"
    RESTORING = "restoring"
    READER = "reader"
    PROMOTING = "promoting"
    WRITER = "writer"
    YIELDING = "yielding"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageView:
    """A storage node at this moment."""

    name: NodeName
    alive: bool
    promised: tuple[tuple[VolumeId, Epoch], ...]
    """The volumes it holds, each with the highest epoch it promised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceView:
    """A compute node at this moment."""

    name: InstanceName
    incarnation: str | None
    """None: not heard of since the control plane started."""
    state: InstanceState
    lost: bool
    """Silent or cut off for so long that others may be preferred. It may still run."""
    appointed: Epoch | None
    """The epoch this incarnation was given, ever."""
    tier: int
    replay: Lsn
    takes_clients: bool
    """A reader: it has caught up."""

    @property
    def available(self) -> bool:
        """Whether it could be given something new to do."""
        return (
            self.incarnation is not None
            and not self.lost
            and self.state not in {InstanceState.CREATING, InstanceState.STOPPING}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Creation:
    """Who makes, or made, a volume. That incarnation does nothing else: it ends with it."""

    volume: VolumeId
    instance: InstanceName
    incarnation: str


class Cause(Enum):
    """Why somebody was made the writer."""

    FIRST = "first"
    """The volume had no writer before."""
    RESTART = "restart"
    """The writer ended, and there was nobody but its own next incarnation."""
    FAILOVER = "failover"
    """The role moved to another instance, or did not come to rest since it last moved."""


class Outcome(Enum):
    """What became of an appointment."""

    PENDING = "pending"
    SERVED = "served"
    """It said that it was the writer, open for clients."""
    FAILED = "failed"
    """Another was appointed before it came to serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Appointment:
    """A writer. It may be gone by now."""

    epoch: Epoch
    instance: InstanceName
    incarnation: str
    cause: Cause = Cause.FIRST
    outcome: Outcome = Outcome.PENDING
    started_ms: int = 0
    """Unix time at which this change of writers began; only for display."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Switchover:
    """A planned failover whose writer has not made way yet."""

    epoch: Epoch
    """Of the writer that is to yield."""
    target: InstanceName
    started_ms: int = 0
    """Unix time; only for display."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """Everything a decision may rest on."""

    storage: tuple[StorageView, ...]
    instances: tuple[InstanceView, ...]
    known_volumes: frozenset[VolumeId]
    """Every volume this control plane ever named, given up ones included."""
    creation: Creation | None
    """The one that is under way."""
    volume: VolumeId | None
    """The cluster's volume, once it is ready."""
    writer: Appointment | None
    """The one appointed last."""
    maker: Creation | None = None
    """The creation that made the volume."""
    formers: tuple[Appointment, ...] = ()
    """The writers before it, from the last one that served on: whose lease may not have ended."""
    switchover: Switchover | None = None
    switchover_overdue: bool = False
    """The writer was told to yield long ago."""
    rule: QuorumRule = SIX_WAY

    def instance(self, name: InstanceName) -> InstanceView | None:
        """Look up an instance."""
        return next((each for each in self.instances if each.name == name), None)


# --- decisions: what must change durably ---------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginCreation:
    """Name a new volume, give up an unfinished one, and let this incarnation make it."""

    instance: InstanceName
    incarnation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AppointWriter:
    """Allocate `epoch` to this incarnation.

    In the same step an appointment that is still pending has failed, and a switchover has left the
    stage in which its writer yields.
    """

    volume: VolumeId
    epoch: Epoch
    instance: InstanceName
    incarnation: str
    cause: Cause
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterServes:
    """The appointed writer serves: note it."""

    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUpSwitchover:
    """The planned failover will not come about."""

    why: str


Decision = BeginCreation | AppointWriter | WriterServes | GiveUpSwitchover


# --- orders --------------------------------------------------------------------------------------


class OrderKind(Enum):
    """Order.Kind of control.proto."""

    WAIT = "wait"
    CREATE_VOLUME = "create volume"
    READ = "read"
    WRITE = "write"
    YIELD = "yield"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """An instance's standing order. WAIT has a reason and no volume, the others the reverse."""

    kind: OrderKind
    volume: VolumeId | None = None
    epoch: Epoch | None = None
    reason: str = ""
    former_gone: bool = False
    """With WRITE: nothing of any writer runs whose lease would have to be waited for."""
