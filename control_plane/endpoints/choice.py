"""Which instance a client's connection goes to. Pure: values in, a value out.

A route is an instance that takes clients, as the control plane says; a door is what this process
found when it last knocked there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from boreal.types import InstanceName


class Endpoint(Enum):
    """The two of them, by the role they lead to."""

    WRITER = "writer"
    READER = "reader"


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """An instance that takes clients (Route of control.proto)."""

    instance: InstanceName
    writer: bool
    host: str
    port: int
    handover: str
    """Path of the unix socket that takes accepted connections; empty: they are relayed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """How an instance has been taking what was handed to it."""

    offers: int = 0
    """Connections that are being offered to it, and those that queue for that."""
    turn: int = 0
    """When it was last chosen: 1 is the first choice ever made, 0 never."""
    rests_until: float = 0.0
    """Monotonic seconds: an offer came to nothing, so none is made before."""


_FRESH = Door()


def choose(
    endpoint: Endpoint,
    routes: Sequence[Route],
    doors: Mapping[InstanceName, Door],
    now: float,
) -> Route | None:
    """The instance for the next connection to `endpoint`; None if there is none at this moment.

    The writer's endpoint leads to the writer alone. The readers' leads to each reader in turn, but
    to one that has not answered its last offer only when the others have not either; to the writer
    when no reader can be had.
    """
    able = [route for route in routes if _door(doors, route).rests_until <= now]
    writers = [route for route in able if route.writer]
    readers = [route for route in able if not route.writer]
    candidates = writers if endpoint is Endpoint.WRITER else readers or writers

    def order(route: Route) -> tuple[int, int]:
        door = _door(doors, route)
        return door.offers, door.turn

    return min(candidates, key=order, default=None)


def next_rested(
    routes: Sequence[Route], doors: Mapping[InstanceName, Door], now: float
) -> float | None:
    """When the next of the instances has rested; None if none rests."""
    ends = [_door(doors, route).rests_until for route in routes]
    return min((end for end in ends if end > now), default=None)


def _door(doors: Mapping[InstanceName, Door], route: Route) -> Door:
    return doors.get(route.instance, _FRESH)
