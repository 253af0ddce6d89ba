"""What the control plane decides, as pure functions of what it knows.

`decide` looks at a `ClusterView` and says what must change durably next: begin a creation, appoint
a writer, note that it serves, give up a planned failover. `order_for` derives each instance's
standing order from what *is* durable. The shell between them (coordinator.py) makes decisions
durable before any order that rests on them is given. So a control plane that dies between any two
steps finds, when it is back, the same view, and goes on with the same next step.

The rules:

- A volume is created once, by one instance, when all its storage nodes are alive. A creation whose
  instance is gone is given up, and the next one makes another volume.
- **One writer for an epoch**: an epoch is given to one incarnation of one instance, and an
  incarnation is given at most one epoch. An incarnation is one life of a PostgreSQL: what a dead or
  superseded one left in its files must never be written on.
- Epochs only grow: beyond every one ever allocated, and beyond every one a storage node promised
  (which would be more only if this control plane's state had been put back to an older copy).
- A writer is *gone* once its instance reports another incarnation, for an agent reports only after
  it ended whatever it left behind. It is *lost* while nothing is heard of it: then it may still run
  and only a reader, which can take over at once, is preferred to it. A writer that is merely silent
  keeps its volume as long as nobody else could take it.
- Who takes over: readers that have caught up, then readers, then the writer's own next life, then
  anyone; among equals the lowest tier, then the furthest in replay, then by name.
- A planned failover tells the writer to yield and appoints the target once that writer is gone, or
  lost, or takes too long about it: nothing acknowledged is lost even then, for the target fences
  it. If the target stops being fit before that, the failover is given up, and whoever is best
  follows if the writer had made way already. So it always ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from boreal.types import Epoch, InstanceName, VolumeId
from control_plane.view import (
    CREATION_EPOCH,
    Appointment,
    AppointWriter,
    BeginCreation,
    Cause,
    ClusterView,
    Creation,
    Decision,
    GiveUpSwitchover,
    InstanceState,
    InstanceView,
    Order,
    OrderKind,
    Outcome,
    WriterServes,
)


class Fate(Enum):
    """What is known of an incarnation that was given a task."""

    LIVES = "lives"
    """It reports; or it was not heard since the control plane started, and gets time to."""
    LOST = "lost"
    """Nothing is heard of it. It may run."""
    GONE = "gone"
    """Nothing of it runs any more."""


def decide(view: ClusterView) -> Decision | None:
    """The next durable change, or None if everything stands as it should."""
    if view.volume is None:
        return _begin_creation(view)
    return (
        _note_service(view) or _pursue_switchover(view, view.volume) or _replace(view, view.volume)
    )


def order_for(view: ClusterView, name: InstanceName) -> Order:
    """What instance `name` is to do, given what is durable."""
    instance = view.instance(name)
    if instance is None:
        return Order(kind=OrderKind.WAIT, reason="this instance is not registered yet")
    if view.volume is None:
        return _order_without_volume(view, instance)
    writer = view.writer
    if writer and _is(instance, writer):
        return _order_to_writer(view, view.volume, writer)
    # Whoever is at work already is not sent back to waiting.
    if instance.state is InstanceState.WAITING and _fate(view, writer) is not Fate.LIVES:
        reason = no_writer_reason(view) or ("" if writer else "a writer is being chosen")
        if reason:
            return Order(kind=OrderKind.WAIT, reason=reason)
    # A writer that was superseded reads too: it finds the newer epoch in its order, and must start
    # over to obey.
    epoch = writer.epoch if writer else CREATION_EPOCH
    return Order(kind=OrderKind.READ, volume=view.volume, epoch=epoch)


def _order_to_writer(view: ClusterView, volume: VolumeId, writer: Appointment) -> Order:
    if view.switchover is not None:
        return Order(kind=OrderKind.YIELD, volume=volume, epoch=writer.epoch)
    return Order(
        kind=OrderKind.WRITE,
        volume=volume,
        epoch=writer.epoch,
        former_gone=all(_fate(view, former) is Fate.GONE for former in view.formers),
    )


# --- creating ------------------------------------------------------------------------------------


def _begin_creation(view: ClusterView) -> BeginCreation | None:
    if _fate(view, view.creation) is Fate.LIVES or _no_creation_reason(view):
        return None
    chosen = best(each for each in view.instances if each.available)
    if chosen is None or chosen.incarnation is None:
        return None
    return BeginCreation(instance=chosen.name, incarnation=chosen.incarnation)


def _order_without_volume(view: ClusterView, instance: InstanceView) -> Order:
    creation = view.creation
    if creation and _is(instance, creation):
        return Order(kind=OrderKind.CREATE_VOLUME, volume=creation.volume, epoch=CREATION_EPOCH)
    if creation and _fate(view, creation) is Fate.LIVES:
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


def _note_service(view: ClusterView) -> WriterServes | None:
    writer = view.writer
    if writer is None or writer.outcome is not Outcome.PENDING:
        return None
    instance = view.instance(writer.instance)
    if instance and _is(instance, writer) and instance.state is InstanceState.WRITER:
        return WriterServes(epoch=writer.epoch)
    return None


def _pursue_switchover(view: ClusterView, volume: VolumeId) -> Decision | None:
    switchover, writer = view.switchover, view.writer
    if switchover is None or writer is None:
        return None
    if unfit := unfit_reason(view, switchover.target):
        return GiveUpSwitchover(why=unfit)
    fate = _fate(view, writer)
    if fate is Fate.LIVES and not view.switchover_overdue:
        return None
    if reason := no_writer_reason(view):
        return GiveUpSwitchover(why=reason) if view.switchover_overdue else None
    return _appointment(view, volume, view.instance(switchover.target), _why(writer, fate))


def _replace(view: ClusterView, volume: VolumeId) -> AppointWriter | None:
    """Appoint a writer if there is none, or the one there is should be replaced."""
    fate = _fate(view, view.writer)
    if view.switchover or fate is Fate.LIVES or no_writer_reason(view):
        return None
    if view.writer is None and view.maker and _fate(view, view.maker) is Fate.LIVES:
        return None  # its next life comes in a moment
    chosen = best(
        (
            each
            for each in view.instances
            if each.available
            and each.appointed is None
            and not (view.maker and _is(each, view.maker))
            and (fate is Fate.GONE or each.state is InstanceState.READER)
        ),
        view.writer,
    )
    return _appointment(view, volume, chosen, _why(view.writer, fate))


def _appointment(
    view: ClusterView, volume: VolumeId, chosen: InstanceView | None, why: str
) -> AppointWriter | None:
    if chosen is None or chosen.incarnation is None:
        return None
    return AppointWriter(
        volume=volume,
        epoch=_next_epoch(view, volume),
        instance=chosen.name,
        incarnation=chosen.incarnation,
        cause=_cause(view.writer, chosen),
        why=why,
    )


def _cause(writer: Appointment | None, chosen: InstanceView) -> Cause:
    if writer is None:
        return Cause.FIRST
    if chosen.name != writer.instance:
        return Cause.FAILOVER
    unfinished = writer.cause is Cause.FAILOVER and writer.outcome is not Outcome.SERVED
    return Cause.FAILOVER if unfinished else Cause.RESTART


def _why(writer: Appointment | None, fate: Fate) -> str:
    if writer is None:
        return "the volume has no writer yet"
    return {
        Fate.GONE: f"{writer.instance} has ended its life as the writer",
        Fate.LOST: f"{writer.instance} does not report any more",
        Fate.LIVES: f"{writer.instance} takes too long to yield",
    }[fate]


def no_writer_reason(view: ClusterView) -> str:
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


# --- candidates ----------------------------------------------------------------------------------


def best(
    candidates: Iterable[InstanceView], writer: Appointment | None = None
) -> InstanceView | None:
    """Whom the rules prefer, to follow `writer` if there was one; None of none."""

    def rank(each: InstanceView) -> tuple[int, int, int, str]:
        return _readiness(each, writer), each.tier, -each.replay, each.name

    return min(candidates, key=rank, default=None)


def _readiness(instance: InstanceView, writer: Appointment | None) -> int:
    """How soon it could serve; the role does not move for nothing."""
    if instance.state is InstanceState.READER:
        return 0 if instance.takes_clients else 1
    return 2 if writer and writer.instance == instance.name else 3


def unfit_reason(view: ClusterView, target: InstanceName) -> str:
    """Why `target` cannot take over from a living writer; empty if it can, or may be able to.

    (One not heard of since the control plane started gets time to report.)
    """
    instance = view.instance(target)
    if instance is None:
        return f"{target} is not part of this cluster"
    if instance.lost:
        return f"{target} does not report"
    if instance.incarnation is None:
        return ""
    if instance.state is not InstanceState.READER or instance.appointed is not None:
        return f"{target} is {instance.state.value}, not a reader"
    return ""


# --- fates ---------------------------------------------------------------------------------------


def _is(instance: InstanceView, holder: Creation | Appointment) -> bool:
    return (instance.name, instance.incarnation) == (holder.instance, holder.incarnation)


def _fate(view: ClusterView, holder: Creation | Appointment | None) -> Fate:
    """What is known of whoever was given the task; GONE if nobody was.

    An instance that was removed while lost stays lost: nobody saw its end.
    """
    if holder is None:
        return Fate.GONE
    instance = view.instance(holder.instance)
    if instance is None:
        return Fate.LOST
    if instance.incarnation not in {None, holder.incarnation}:
        return Fate.GONE
    return Fate.LOST if instance.lost else Fate.LIVES


def _alive(view: ClusterView) -> int:
    return sum(node.alive for node in view.storage)
