"""Who serves clients, as a pure function of the view: what the endpoints follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from boreal.types import InstanceName
from control_plane.view import ClusterView, InstanceState, InstanceView


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an instance takes connections."""

    host: str
    postgres_port: int
    handover: str
    """The unix socket, on that host, that takes accepted ones; empty: they are relayed to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """An instance that takes clients."""

    instance: InstanceName
    writer: bool
    place: Place


def routes(view: ClusterView, places: Mapping[InstanceName, Place]) -> tuple[Route, ...]:
    """Every instance that takes clients now, by name; at most one is the writer.

    A writer that is merely silent keeps its route as long as it keeps its volume. A superseded one
    has none: what it says of itself no longer counts. A reader nobody hears of has none either.
    """
    found = []
    for instance in sorted(view.instances, key=lambda each: each.name):
        place = places.get(instance.name)
        if place is None or not instance.takes_clients:
            continue
        if instance.state is InstanceState.WRITER and _is_writer(view, instance):
            found.append(Route(instance=instance.name, writer=True, place=place))
        elif instance.state is InstanceState.READER and not instance.lost:
            found.append(Route(instance=instance.name, writer=False, place=place))
    return tuple(found)


def _is_writer(view: ClusterView, instance: InstanceView) -> bool:
    writer = view.writer
    return (
        writer is not None
        and (instance.name, instance.incarnation) == (writer.instance, writer.incarnation)
        and view.switchover is None
    )
