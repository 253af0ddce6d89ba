"""Planned failovers: whether one can begin, and to whom."""

from __future__ import annotations

from boreal.errors import BadUsage, NotNow
from boreal.types import InstanceName
from control_plane.decide import best, no_writer_reason, unfit_reason
from control_plane.view import ClusterView, InstanceState, Outcome, Switchover


def plan(
    view: ClusterView, target: InstanceName | None, now_ms: int
) -> tuple[InstanceName, Switchover]:
    """The writer that is to yield, and the switchover to `target` or the reader that is best.

    BadUsage if the target cannot take over; NotNow if the moment does not allow it.
    """
    writer = view.writer
    if view.volume is None or writer is None:
        raise NotNow("there is no writer yet")
    if target == writer.instance:
        raise BadUsage(f"{target} is the writer already")
    if view.switchover is not None:
        raise NotNow(f"a failover to {view.switchover.target} is under way")
    present = view.instance(writer.instance)
    if (
        writer.outcome is not Outcome.SERVED
        or present is None
        or present.incarnation != writer.incarnation
        or present.state is not InstanceState.WRITER
        or present.lost
    ):
        raise NotNow(
            f"{writer.instance}, appointed under epoch {writer.epoch}, does not serve at this "
            "moment: there is a failover under way, or about to be"
        )
    if reason := no_writer_reason(view):
        raise NotNow(reason)
    chosen = _settle_target(view, target)
    return writer.instance, Switchover(epoch=writer.epoch, target=chosen, started_ms=now_ms)


def _settle_target(view: ClusterView, target: InstanceName | None) -> InstanceName:
    if target is None:
        fit = (each for each in view.instances if not _obstacle(view, each.name))
        chosen = best(fit)
        if chosen is None:
            raise BadUsage("there is no reader that could take over; `boreal add-reader` adds one")
        return chosen.name
    if obstacle := _obstacle(view, target):
        names = ", ".join(each.name for each in view.instances)
        raise BadUsage(f"{obstacle}, so it cannot take over. The instances are {names}")
    return target


def _obstacle(view: ClusterView, target: InstanceName) -> str:
    """Why it cannot take over now; empty if it can."""
    if unfit := unfit_reason(view, target):
        return unfit
    instance = view.instance(target)
    if instance is None or instance.incarnation is None:
        return f"{target} was not heard since the control plane started"
    return "" if instance.takes_clients else f"{target} is still catching up"
