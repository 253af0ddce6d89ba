"""What this process knows of the instances, and whom to tell when that changes."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import structlog

from boreal.types import InstanceName
from control_plane.endpoints.choice import Door, Endpoint, Route, choose, next_rested

_OFFERS_AT_ONCE = 16
"""To one instance. Far fewer than its backlog holds, so that an offer is answered soon."""
_REMEMBERED = 64

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Doorway:
    """A door, and the order in which connections come to it."""

    door: Door = field(default_factory=Door)
    offers: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_OFFERS_AT_ONCE))


class Directory:
    """The routes of the last routing and the doors behind them.

    Invariant: there is a door for each instance that has a route and for no other, so one that left
    and came back is a new one, well rested.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._routes: tuple[Route, ...] = ()
        self._doorways: dict[InstanceName, _Doorway] = {}
        self._choices = 0
        self._known: OrderedDict[InstanceName, tuple[str, int]] = OrderedDict()
        self.interested: set[asyncio.Event] = set()
        """Set, each of them, when there are other routes."""

    @property
    def routes(self) -> tuple[Route, ...]:
        """Those of the last routing."""
        return self._routes

    @property
    def known(self) -> tuple[tuple[str, int], ...]:
        """Host and port of every instance that has been routed to of late, now or not.

        One that takes no new clients may still have sessions that can be cancelled.
        """
        return tuple(self._known.values())

    def replace_routes(self, routes: tuple[Route, ...]) -> None:
        """Take over a new routing."""
        if routes == self._routes:
            return
        _log.info(
            "routing changes",
            writer=next((route.instance for route in routes if route.writer), None),
            readers=[route.instance for route in routes if not route.writer],
        )
        self._routes = routes
        self._doorways = {
            route.instance: self._doorways.get(route.instance) or _Doorway() for route in routes
        }
        for route in routes:
            self._known[route.instance] = (route.host, route.port)
            self._known.move_to_end(route.instance)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        self.tell()

    def tell(self) -> None:
        """Have everybody who is interested look again."""
        for event in self.interested:
            event.set()

    def choose(self, endpoint: Endpoint) -> Route | None:
        """The instance for the next connection; None if there is none at this moment."""
        return choose(endpoint, self._routes, self._doors(), self._clock())

    def next_rested(self) -> float | None:
        """When the next instance has rested, in seconds of the clock; None if none rests."""
        return next_rested(self._routes, self._doors(), self._clock())

    @asynccontextmanager
    async def turn(self, route: Route) -> AsyncIterator[None]:
        """Within it, the caller may make its offer to a route just chosen.

        The turn may be long in coming; then the route need not stand any more.
        """
        self._choices += 1
        doorway = self._doorways[route.instance]
        door = doorway.door
        doorway.door = replace(door, offers=door.offers + 1, turn=self._choices)
        try:
            async with doorway.offers:
                yield
        finally:
            doorway.door = replace(doorway.door, offers=doorway.door.offers - 1)

    def stands(self, route: Route) -> bool:
        """Whether it is still a route, and does not rest."""
        if route not in self._routes:
            return False
        return self._doorways[route.instance].door.rests_until <= self._clock()

    def rest(self, route: Route, for_s: float) -> None:
        """Choose it no more for so long."""
        if route in self._routes:
            doorway = self._doorways[route.instance]
            doorway.door = replace(doorway.door, rests_until=self._clock() + for_s)

    def _doors(self) -> dict[InstanceName, Door]:
        return {name: doorway.door for name, doorway in self._doorways.items()}
