"""What the control plane decides, as pure functions of what it knows.

`decide` looks at a `ClusterView` and says what must change durably: begin a creation, appoint a
writer. `order_for` derives each instance's standing order from what *is* durable. The shell between
them (coordinator.py) makes decisions durable before any order that rests on them is given.

The rules:

- A volume is created once, by one instance, when all its storage nodes are alive. A creation whose
  instance is gone is given up, and the next one makes another volume.
- **One writer for an epoch**: an epoch is given to one incarnation of one instance, and an
  incarnation is given at most one epoch. An incarnation is one life of a PostgreSQL: what a dead or
  superseded one left in its files must never be written on.
- Epochs only grow: beyond every one ever allocated, and beyond every one a storage node promised
  (which would be more only if this control plane's state had been put back to an older copy).
- A writer that is merely silent keeps its volume as long as nobody else could take it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from boreal.quorum import SIX_WAY, QuorumRule
from boreal.types import Epoch, InstanceName, Lsn, NodeName, VolumeId

CREATION_EPOCH = Epoch(1)
"""The epoch that creates a volume; the first writer's is the next."""


class InstanceState(Enum):
    """What an instance says it does: ComputeState of compute.proto."""

    WAITING = "waiting"
    CREATING = "creating"
    RESTORING = "restoring"
    READER = "reader"
    PROMOTING = "promoting"
    WRITER = "writer"
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
    """Silent for so long that others may be preferred."""
    appointed: Epoch | None
    """The epoch this incarnation was given, ever."""
    replay: Lsn

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
    """A volume that is being made."""

    volume: VolumeId
    instance: InstanceName
    incarnation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Appointment:
    """The last writer: it may be gone by now."""

    epoch: Epoch
    instance: InstanceName
    incarnation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """Everything a decision may rest on."""

    storage: tuple[StorageView, ...]
    instances: tuple[InstanceView, ...]
    known_volumes: frozenset[VolumeId]
    """Every volume this control plane ever named, given up ones included."""
    creation: Creation | None
    volume: VolumeId | None
    """The cluster's volume, once it is ready."""
    writer: Appointment | None
    rule: QuorumRule = SIX_WAY

    def instance(self, name: InstanceName) -> InstanceView | None:
        """Look up an instance."""
        return next((each for each in self.instances if each.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginCreation:
    """Name a new volume, give up an unfinished one, and let this incarnation make it."""

    instance: InstanceName
    incarnation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AppointWriter:
    """Allocate `epoch` to this incarnation."""

    volume: VolumeId
    epoch: Epoch
    instance: InstanceName
    incarnation: str


Decision = BeginCreation | AppointWriter


class OrderKind(Enum):
    """Order.Kind of control.proto."""

    WAIT = "wait"
    CREATE_VOLUME = "create volume"
    READ = "read"
    WRITE = "write"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """An instance's standing order. WAIT has a reason and no volume, the others the reverse."""

    kind: OrderKind
    volume: VolumeId | None = None
    epoch: Epoch | None = None
    reason: str = ""


def decide(view: ClusterView) -> Decision | None:
    """The next durable change, or None if everything stands as it should."""
    if view.volume is None:
        return _begin_creation(view)
    return _appoint_writer(view, view.volume)


def order_for(view: ClusterView, name: InstanceName) -> Order:
    """What instance `name` is to do, given what is durable."""
    instance = view.instance(name)
    if instance is None:
        return Order(kind=OrderKind.WAIT, reason="this instance is not registered yet")
    if view.volume is None:
        return _order_without_volume(view, instance)
    writer = view.writer
    if writer and _is(instance, writer):
        return Order(kind=OrderKind.WRITE, volume=view.volume, epoch=writer.epoch)
    # A writer that was superseded reads too: it finds the newer epoch in its order, and must start
    # over to obey. Whoever is at work already is not sent back to waiting.
    if _holder_lives(view, writer) or instance.state is not InstanceState.WAITING:
        epoch = writer.epoch if writer else CREATION_EPOCH
        return Order(kind=OrderKind.READ, volume=view.volume, epoch=epoch)
    reason = _no_writer_reason(view) or "a writer is being chosen"
    return Order(kind=OrderKind.WAIT, reason=reason)


# --- creating ------------------------------------------------------------------------------------


def _begin_creation(view: ClusterView) -> BeginCreation | None:
    if _holder_lives(view, view.creation) or _no_creation_reason(view):
        return None
    chosen = _choose(view.instances)
    if chosen is None or chosen.incarnation is None:
        return None
    return BeginCreation(instance=chosen.name, incarnation=chosen.incarnation)


def _order_without_volume(view: ClusterView, instance: InstanceView) -> Order:
    creation = view.creation
    if creation and _is(instance, creation):
        return Order(kind=OrderKind.CREATE_VOLUME, volume=creation.volume, epoch=CREATION_EPOCH)
    if creation and _holder_lives(view, creation):
        reason = f"{creation.instance} is creating the volume"
    else:
        reason = _no_creation_reason(view) or "an instance is being chosen to create the volume"
    return Order(kind=OrderKind.WAIT, reason=reason)


def _no_creation_reason(view: ClusterView) -> str:
    """Why a volume cannot be created now; empty if it can."""
    unknown = {
        volume
        for node in view.storage
        for volume, _ in node.promised
        if volume not in view.known_volumes
    }
    if unknown:
        return (
            f"the storage nodes hold {', '.join(sorted(unknown))}, which this control plane does "
            "not know: its state was lost. Put its data directory back, or start with empty "
            "storage nodes"
        )
    alive = _alive(view)
    if alive < view.rule.copies:
        return f"{alive} of {view.rule.copies} storage nodes are alive; creating a volume takes all"
    return ""


# --- writing -------------------------------------------------------------------------------------


def _appoint_writer(view: ClusterView, volume: VolumeId) -> AppointWriter | None:
    if _holder_lives(view, view.writer) or _no_writer_reason(view):
        return None
    chosen = _choose(each for each in view.instances if each.appointed is None)
    if chosen is None or chosen.incarnation is None:
        return None
    return AppointWriter(
        volume=volume,
        epoch=_next_epoch(view, volume),
        instance=chosen.name,
        incarnation=chosen.incarnation,
    )


def _no_writer_reason(view: ClusterView) -> str:
    """Why no writer could do its work now; empty if one could.

    A writer could not recover without a write quorum, so there is no point in an epoch for it yet.
    """
    alive = _alive(view)
    if alive < view.rule.write:
        return (
            f"{alive} of {view.rule.copies} storage nodes are alive; a writer needs "
            f"{view.rule.write}"
        )
    return ""


def _next_epoch(view: ClusterView, volume: VolumeId) -> Epoch:
    promised = [epoch for node in view.storage for held, epoch in node.promised if held == volume]
    last = view.writer.epoch if view.writer else CREATION_EPOCH
    return Epoch(max(last, *promised, CREATION_EPOCH) + 1)


# --- both ----------------------------------------------------------------------------------------


def _choose(instances: Iterable[InstanceView]) -> InstanceView | None:
    """The available instance that is furthest in replay; names decide among equals.

    (A failover priority, once there is one, compares before the replay LSN.)
    """
    available = sorted((each for each in instances if each.available), key=lambda each: each.name)
    return max(available, key=lambda each: each.replay, default=None)


def _is(instance: InstanceView, holder: Creation | Appointment) -> bool:
    return (instance.name, instance.incarnation) == (holder.instance, holder.incarnation)


def _holder_lives(view: ClusterView, holder: Creation | Appointment | None) -> bool:
    """Whether whoever was given the task may still be at it.

    An instance not heard of since the control plane started may well be: it gets time to report.
    """
    if holder is None:
        return False
    instance = view.instance(holder.instance)
    return (
        instance is not None
        and not instance.lost
        and (instance.incarnation is None or _is(instance, holder))
    )


def _alive(view: ClusterView) -> int:
    return sum(node.alive for node in view.storage)
