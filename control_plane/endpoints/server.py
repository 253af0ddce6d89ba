"""The endpoints themselves: from accepting a connection to handing it over."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum

import structlog

from boreal.histogram import Durations
from control_plane.endpoints.cancel import copy_to_all
from control_plane.endpoints.choice import Endpoint, Route
from control_plane.endpoints.directory import Directory
from control_plane.endpoints.encrypted import refuse_encrypted
from control_plane.endpoints.greeting import CANCEL_BYTES, Greeting
from control_plane.endpoints.handover import Offer, Outcome
from control_plane.endpoints.hangups import Hangups
from control_plane.endpoints.sessions import Sessions
from control_plane.endpoints.visitor import Visitor

_ACCEPT_PAUSE_S = 0.1
"""After an accept() that failed: for want of descriptors, most likely."""
_REST_S = {Outcome.REFUSED: 0.5, Outcome.WITHDRAWN: 0.5, Outcome.BUSY: 0.02}
_TOO_MANY = ("53300", "too many connections wait for an instance of this cluster")
_TOO_MANY_RELAYED = ("53300", "too many connections are relayed by this endpoint")
_NOBODY = {
    Endpoint.WRITER: ("57P03", "the cluster has had no writer for too long"),
    Endpoint.READER: ("57P03", "the cluster has had no instance for too long"),
}
_ENDS = ("57P03", "this endpoint is shutting down")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds of what is done for one connection, and for all."""

    connections: int = 1024
    """That are not PostgreSQL's yet. One more is refused."""
    greeting_s: float = 30.0
    """For a client to say what it wants."""
    patience_s: float = 30.0
    """A connection waits so long for an instance; then it is refused."""
    offer_s: float = 1.0
    """For an instance to take a connection."""
    sessions: int = 8192
    """Which this process can end when their writer is deposed. No more than that are relayed."""


class Fate(Enum):
    """What became of a connection."""

    SERVED = "served"
    """An instance has it."""
    CANCEL = "cancel"
    """It was a cancel request, and was passed on."""
    REFUSED = "refused"
    """It was told why it gets no session."""
    GONE = "gone"
    """It hung up, broke, or said nothing in time."""


@dataclass(slots=True)
class EndpointCounts:
    """What one endpoint did since the process began."""

    fates: Counter[Fate] = field(default_factory=Counter)
    served_after: Durations = field(default_factory=Durations)
    """From a connection's arrival until an instance had it, its greeting included."""


@dataclass(slots=True)
class _Waiting:
    """The connections of one endpoint that wait for an instance."""

    now: int = 0
    most: int = 0
    since: float = 0.0


class Endpoints:
    """Both endpoints. `run` serves until `stop` is called."""

    def __init__(self, limits: Limits, tls: ssl.SSLContext | None) -> None:
        """`tls`: by it clients are refused who asked for TLS; None: nobody gets it."""
        self._tls = tls
        self._directory = Directory(asyncio.get_running_loop().time)
        self._limits = limits
        self._hangups = Hangups()
        self._sessions = Sessions(self._hangups, limits.sessions)
        self._waiting = {endpoint: _Waiting() for endpoint in Endpoint}
        self.counts = {endpoint: EndpointCounts() for endpoint in Endpoint}
        """To read only."""
        self._connections = 0
        self._full = False
        self.routed = False
        """Whether the control plane has told a routing yet. Read only."""
        self._greeting: set[Visitor] = set()
        self._stopping = asyncio.Event()

    @property
    def waiting(self) -> Mapping[Endpoint, int]:
        """Connections that wait for an instance."""
        return {endpoint: waiting.now for endpoint, waiting in self._waiting.items()}

    @property
    def sessions(self) -> int:
        """Connections that instances have, as far as their end would be noticed here."""
        return len(self._sessions)

    @property
    def routes(self) -> tuple[Route, ...]:
        """Where connections are led now."""
        return self._directory.routes

    def take_over(self, routes: tuple[Route, ...]) -> None:
        """Serve by a new routing from now on."""
        self.routed = True
        self._directory.replace_routes(routes)
        for route in routes:
            if route.writer:
                self._sessions.writer_is(route.instance)

    def stop(self) -> None:
        """Accept nobody any more, refuse who waits, hang up on who has said nothing yet."""
        self._stopping.set()
        self._directory.tell()
        for visitor in self._greeting:
            visitor.hung_up()

    async def run(self, listeners: Mapping[Endpoint, socket.socket]) -> None:
        """Serve on these listening sockets, which do not block. Returns when all has ended."""
        try:
            async with asyncio.TaskGroup() as visits:
                accepting = [
                    visits.create_task(self._accept(listener, endpoint, visits))
                    for endpoint, listener in listeners.items()
                ]
                await self._stopping.wait()
                for task in accepting:
                    task.cancel()
        finally:
            self._sessions.close()
            self._hangups.close()

    async def _accept(
        self, listener: socket.socket, endpoint: Endpoint, visits: asyncio.TaskGroup
    ) -> None:
        while True:
            try:
                client, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:
                _log.error("cannot accept a connection", why=str(error))
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            visits.create_task(self._visit(Visitor(client, endpoint, self._tls is not None)))
            await asyncio.sleep(0)  # a flood of connections must not keep the others from moving on

    async def _visit(self, visitor: Visitor) -> None:
        """All that happens to one connection until it is PostgreSQL's, or nobody's."""
        arrived, fate = asyncio.get_running_loop().time(), Fate.GONE
        self._connections += 1
        self._directory.interested.add(visitor.news)
        self._hangups.watch(visitor.client, visitor.hung_up)
        try:
            if self._has_room():
                fate = await self._serve(visitor)
            else:
                visitor.refuse(*_TOO_MANY)  # not even TLS: that takes time
                fate = Fate.REFUSED
        except OSError as error:  # the client's side of it broke
            _log.debug("a connection broke", why=str(error))
        finally:
            self._hangups.forget(visitor.client)
            visitor.client.close()
            self._directory.interested.discard(visitor.news)
            self._connections -= 1
            self._count(visitor.endpoint, fate, arrived)

    def _count(self, endpoint: Endpoint, fate: Fate, arrived: float) -> None:
        counts = self.counts[endpoint]
        counts.fates[fate] += 1
        if fate is Fate.SERVED:
            counts.served_after.observe(asyncio.get_running_loop().time() - arrived)

    def _has_room(self) -> bool:
        full = self._connections > self._limits.connections
        if full and not self._full:
            _log.warning("connections are refused", waiting=self._limits.connections)
        self._full = full
        return not full

    async def _serve(self, visitor: Visitor) -> Fate:
        self._greeting.add(visitor)
        try:
            until = asyncio.get_running_loop().time() + self._limits.greeting_s
            greeting = await visitor.greet(until)
        finally:
            self._greeting.discard(visitor)
        match greeting:
            case Greeting.CANCEL:
                await copy_to_all(visitor.take(CANCEL_BYTES), self._directory.known)
                return Fate.CANCEL
            case None:
                return Fate.GONE
            case _:  # TLS, unread, is for PostgreSQL to answer, and so is what was asked too often
                return await self._hand_over_or_refuse(visitor, greeting)

    async def _hand_over_or_refuse(self, visitor: Visitor, greeting: Greeting) -> Fate:
        outcome = await self._hand_over(visitor)
        if isinstance(outcome, Fate):
            return outcome
        if greeting is not Greeting.TLS or self._tls is None:  # or asked once too often
            visitor.refuse(*outcome)
        elif not visitor.gone:
            await refuse_encrypted(visitor.client, self._tls, *outcome)
        return Fate.REFUSED

    async def _hand_over(self, visitor: Visitor) -> Fate | tuple[str, str]:
        """Give the connection to an instance; why not, when there was none for too long."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._limits.patience_s
        with ExitStack() as waits:
            waiting = False
            while not visitor.gone:
                if self._stopping.is_set():
                    return _ENDS
                route = self._directory.choose(visitor.endpoint)
                if route is not None:
                    if not route.handover and self._sessions.full:
                        return _TOO_MANY_RELAYED
                    if await self._offered(visitor, route):
                        return Fate.SERVED
                    continue
                if loop.time() >= until:
                    return _NOBODY[visitor.endpoint]
                if not waiting:
                    waits.enter_context(self._counted(visitor.endpoint))
                    waiting = True
                await visitor.wait(min(until, self._directory.next_rested() or until))
        return Fate.GONE

    async def _offered(self, visitor: Visitor, route: Route) -> bool:
        """Offer the connection to one instance; whether it was taken."""
        async with self._directory.turn(route):
            if visitor.gone or not self._directory.stands(route):
                return False
            give = self._given if route.handover else self._relayed
            outcome = await give(visitor, route)
        if outcome is Outcome.TAKEN:
            return True
        if not visitor.gone and self._directory.stands(route):
            self._directory.rest(route, _REST_S[outcome])
            if outcome is not Outcome.BUSY:
                _log.warning(
                    "an instance took no connection",
                    instance=route.instance,
                    outcome=outcome.value,
                )
        return False

    async def _given(self, visitor: Visitor, route: Route) -> Outcome:
        """Hand the connection itself over."""
        with Offer(visitor.client, route.handover) as offer:
            outcome = offer.make() or await self._answer(visitor, route, offer)
            if outcome is Outcome.TAKEN:
                self._sessions.keep(visitor.client, offer.carrier, route)
            return outcome

    async def _relayed(self, visitor: Visitor, route: Route) -> Outcome:
        """Connect to the instance and relay."""
        relay = self._sessions.relayed(route)
        with ExitStack() as undoing:
            undoing.callback(relay.end)
            try:
                async with asyncio.timeout(self._limits.offer_s):
                    await relay.connect(route.host, route.port)
            except TimeoutError:
                return Outcome.WITHDRAWN
            except OSError:
                return Outcome.REFUSED
            if visitor.gone or not self._directory.stands(route):
                return Outcome.WITHDRAWN
            await relay.begin(visitor.client)
            undoing.pop_all()
        return Outcome.TAKEN

    async def _answer(self, visitor: Visitor, route: Route, offer: Offer) -> Outcome:
        """How an offer that was made ends. It is withdrawn when it has no point any more."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._limits.offer_s
        while (outcome := offer.answer()) is None:
            if visitor.gone or loop.time() >= until or not self._directory.stands(route):
                return offer.withdraw()
            await visitor.wait(until, offer.carrier)
        return outcome

    @contextmanager
    def _counted(self, endpoint: Endpoint) -> Iterator[None]:
        """Within it, one more connection waits for an instance; the first and the last are told."""
        loop = asyncio.get_running_loop()
        waiting = self._waiting[endpoint]
        if not waiting.now:
            waiting.since, waiting.most = loop.time(), 0
            _log.info("connections wait", endpoint=endpoint.value)
        waiting.now += 1
        waiting.most = max(waiting.most, waiting.now)
        try:
            yield
        finally:
            waiting.now -= 1
            if not waiting.now:
                _log.info(
                    "connections wait no more",
                    endpoint=endpoint.value,
                    most=waiting.most,
                    waited_s=round(loop.time() - waiting.since, 3),
                )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket that does not block. OSError if there cannot be one."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(Limits().connections)
        listener.setblocking(False)
    except OSError:
        with suppress(OSError):
            listener.close()
        raise
    return listener
