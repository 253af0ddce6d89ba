"""The writer's connection to one storage node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from time import monotonic
from typing import Any, NoReturn, cast

import structlog
from google.protobuf.message import DecodeError

from boreal.errors import (
    BorealError,
    Internal,
    LineageNotAdopted,
    MalformedRequest,
    StaleEpoch,
    UnknownOutcome,
    Unreachable,
)
from boreal.frames import FrameReader
from boreal.histogram import Durations
from boreal.rpc import edge, storage_pb2, storage_pb2_grpc
from boreal.types import Lsn, NodeName, format_lsn
from compute_node.shipping.latency import Latencies
from compute_node.shipping.outbox import Batch, Outbox

_LATENCY_SMOOTHING = 1 / 8

_log = structlog.get_logger(__name__)


class LinkState(Enum):
    """Where the writer stands with one storage node. `value` is what status shows."""

    CONNECTING = "connecting"
    ADOPTING = "adopting"
    CATCHING_UP = "catching-up"
    STREAMING = "streaming"
    STOPPED = "stopped"


_TRANSITIONS: dict[LinkState, frozenset[LinkState]] = {
    LinkState.CONNECTING: frozenset({LinkState.ADOPTING, LinkState.STOPPED}),
    LinkState.ADOPTING: frozenset(
        {LinkState.CATCHING_UP, LinkState.STREAMING, LinkState.CONNECTING, LinkState.STOPPED}
    ),
    LinkState.CATCHING_UP: frozenset(
        {LinkState.STREAMING, LinkState.CONNECTING, LinkState.STOPPED}
    ),
    LinkState.STREAMING: frozenset(
        {LinkState.CATCHING_UP, LinkState.CONNECTING, LinkState.STOPPED}
    ),
    LinkState.STOPPED: frozenset(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTiming:
    """How patient a link is."""

    connect_timeout_s: float = 1.0
    call_timeout_s: float = 3.0
    ack_timeout_s: float = 5.0
    """A node that is silent for so long with a batch in its hands is taken for gone."""
    poll_interval_s: float = 0.1
    """How often a node that catches up from its peers is asked where it stands."""
    contact_interval_s: float = 0.3
    """A node that is sent no log is sent an append without any: its answer keeps the lease."""
    backoff_first_s: float = 0.1
    backoff_most_s: float = 0.5
    """A node that was restarted must be found again soon: commits may wait for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageAddress:
    """Where a storage node listens: HOST:PORT of its StorageLog service and of its framed lane."""

    name: NodeName
    log: str
    frames: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkReport:
    """One link, for status."""

    node: NodeName
    state: LinkState
    scl: Lsn
    ack_latency_us: int
    """Smoothed."""
    ack_p50_us: int
    ack_p99_us: int
    """Of the acks of the last seconds that made log durable; 0 without any."""
    shipped_bytes: int
    batches: int
    acks: Durations
    """What the acks that made log durable took, since the link began."""


class _Lane(asyncio.Protocol):
    """The framed lane to one node. `ended` gets the error that ended it."""

    def __init__(self, peer: NodeName, on_response: Callable[[bytes], None]) -> None:
        self._peer = peer
        self._on_response = on_response
        self._frames = FrameReader("Append")
        self._transport: asyncio.Transport | None = None
        self.ended: asyncio.Future[BorealError] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                self._on_response(body)
        except DecodeError:
            self.end(MalformedRequest(f"{self._peer} sent what is not an AppendResponse"))
        except BorealError as error:
            self.end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(Unreachable(f"{self._peer} closed the connection" + (f": {exc}" if exc else "")))

    def write(self, data: bytes) -> None:
        """Send; at most one append is ever under way, so nothing piles up here."""
        if self._transport is not None and not self.ended.done():
            self._transport.write(data)

    def end(self, error: BorealError) -> None:
        """Drop the connection because of `error`; the first reason counts."""
        if not self.ended.done():
            self.ended.set_result(error)
        if self._transport is not None:
            self._transport.abort()


class StorageLink:
    """Keeps one storage node supplied with the log.

    Invariants: at most one batch is under way; batches are sent only while STREAMING, and each
    begins at the node's SCL. Whatever a node does or fails to do, it holds up nobody else.
    """

    def __init__(self, address: StorageAddress, outbox: Outbox, timing: LinkTiming) -> None:
        self.address = address
        """Used at the next connection."""
        self.state = LinkState.CONNECTING
        self._outbox = outbox
        self._window = outbox.window
        self._timing = timing
        self._scl = Lsn(0)
        self._lane: _Lane | None = None
        self._under_way: Batch | None = None
        self._sent_at = 0.0
        self._told_vdl = Lsn(0)
        self._fell_behind = asyncio.Event()
        self._backoff_s = timing.backoff_first_s
        self._ack_latency_s = 0.0
        self._latencies = Latencies()
        self.contact_at: float | None = None
        """When the last append that the node acknowledged was sent, monotonic. Read only."""
        self.shipped_bytes = 0
        """Of log sent. Read only, as is `batches`."""
        self.batches = 0
        self._acks = Durations()

    @property
    def report(self) -> LinkReport:
        """For status."""
        p50_us, p99_us = self._latencies.percentiles_us(monotonic(), 0.5, 0.99)
        return LinkReport(
            node=self.address.name,
            state=self.state,
            scl=self._scl,
            ack_latency_us=round(self._ack_latency_s * 1e6),
            ack_p50_us=p50_us,
            ack_p99_us=p99_us,
            shipped_bytes=self.shipped_bytes,
            batches=self.batches,
            acks=self._acks,
        )

    # --- the commit path -----------------------------------------------------------------------

    def kick(self) -> None:
        """Send what there is, if the node is free to take it; else it piles up until the ack."""
        if self._under_way is None and self.state is LinkState.STREAMING:
            if self._scl < self._window.start:
                self._fell_behind.set()
            elif self._scl < self._outbox.wave_end:
                self._send(self._outbox.batch(self._scl))

    def tell_vdl(self) -> bool:
        """Let a node that is up to date know the VDL. False: it is busy, ask again."""
        if self.state is not LinkState.STREAMING or self._told_vdl >= self._outbox.vdl:
            return True
        if self._under_way is None and self._scl >= self._window.end:
            self._send(self._outbox.batch(self._scl))
        return self._told_vdl >= self._outbox.vdl

    def _keep_contact(self) -> None:
        """Send an append without log to a node that was sent nothing lately."""
        idle = self._under_way is None and self._window.start <= self._scl
        if idle and monotonic() - self._sent_at >= self._timing.contact_interval_s:
            self._send(self._outbox.batch(self._scl))

    def _send(self, batch: Batch) -> None:
        if self._lane is None or self._outbox.fenced is not None:
            return
        self._lane.write(batch.frame)
        self._under_way = batch
        self._told_vdl = batch.vdl
        self._sent_at = monotonic()
        if batch.end > batch.start:
            self.shipped_bytes += batch.end - batch.start
            self.batches += 1
            self._outbox.batch_bytes.observe(batch.end - batch.start)

    def _on_response(self, body: bytes) -> None:
        response = storage_pb2.AppendResponse.FromString(body)
        if not response.HasField("ack"):
            raise edge.error_from_wire(response.error)
        scl, batch = Lsn(response.ack.scl), self._under_way
        if batch is None:
            raise Internal(f"{self.address.name} answered what was not asked")
        if not batch.end <= scl <= self._window.end:
            raise Internal(
                f"{self.address.name} acknowledged {format_lsn(scl)}; it was sent the log up to "
                f"{format_lsn(batch.end)} of {format_lsn(self._window.end)}"
            )
        now = monotonic()
        self.contact_at = self._sent_at
        latency_s = now - self._sent_at
        self._ack_latency_s += (latency_s - self._ack_latency_s) * _LATENCY_SMOOTHING
        if batch.end > batch.start:
            self._latencies.add(latency_s, now)
            self._acks.observe(latency_s)
        self._under_way = None
        self._scl = scl
        self._backoff_s = self._timing.backoff_first_s
        # The VDL first: commits wait for it, and the next batch carries it.
        self._outbox.acked(self.address.name, scl)
        self.kick()

    # --- the life of the connection ------------------------------------------------------------

    async def run(self) -> NoReturn:
        """Keep connected until cancelled. Raises StaleEpoch when the node refuses this writer."""
        try:
            while True:
                try:
                    await self._session()
                except StaleEpoch:
                    raise
                except BorealError as error:
                    self._lost(error)
                await asyncio.sleep(self._backoff_s)
                self._backoff_s = min(2 * self._backoff_s, self._timing.backoff_most_s)
        finally:
            self._transition(LinkState.STOPPED, "the shipper stops")

    def _lost(self, error: BorealError) -> None:
        if self.state is not LinkState.CONNECTING:
            self._transition(LinkState.CONNECTING, f"{error.code}: {error.message}")

    async def _session(self) -> NoReturn:
        """From connection to loss, which it raises."""
        async with self._open_lane() as lane, edge.open_channel(self.address.log) as channel:
            stub = storage_pb2_grpc.StorageLogStub(channel)
            self._transition(LinkState.ADOPTING, "connected")
            self._scl = await self._adopt(stub)
            self._outbox.adopted(self.address.name, self._scl)
            while True:
                if self._scl < self._window.start:
                    self._transition(LinkState.CATCHING_UP, self._distance())
                    await self._catch_up(stub, lane)
                self._transition(LinkState.STREAMING, self._distance())
                self._fell_behind.clear()
                self.kick()
                self._keep_contact()
                await self._watch(lane)

    def _distance(self) -> str:
        return (
            f"at {format_lsn(self._scl)}, the window is "
            f"[{format_lsn(self._window.start)}, {format_lsn(self._window.end)})"
        )

    @asynccontextmanager
    async def _open_lane(self) -> AsyncIterator[_Lane]:
        name, (host, _, port) = self.address.name, self.address.frames.rpartition(":")
        lane = _Lane(name, self._on_response)
        try:
            async with asyncio.timeout(self._timing.connect_timeout_s):
                await asyncio.get_running_loop().create_connection(
                    lambda: lane, host, int(port), **edge.lane_client_arguments()
                )
        except (OSError, TimeoutError) as error:
            raise Unreachable(f"{name} cannot be reached at {host}:{port}: {error!r}") from error
        self._lane, self._under_way, self._told_vdl = lane, None, Lsn(0)
        self._sent_at = 0.0
        try:
            yield lane
        finally:
            self._lane = None
            lane.end(Unreachable(f"the connection to {name} was dropped"))

    async def _adopt(self, stub: storage_pb2_grpc.StorageLogAsyncStub) -> Lsn:
        outbox = self._outbox
        request = storage_pb2.AdoptRequest(
            volume=edge.volume_ref(outbox.volume, outbox.lineage.last.epoch),
            lineage=edge.lineage_to_wire(outbox.lineage),
        )
        with edge.calling(self.address.name, "Adopt"):
            position = await stub.Adopt(
                request, timeout=self._timing.call_timeout_s, wait_for_ready=True
            )
        return self._checked(position)

    async def _catch_up(self, stub: storage_pb2_grpc.StorageLogAsyncStub, lane: _Lane) -> None:
        """Wait until the node has pulled from its peers what the window lacks."""
        outbox, name = self._outbox, self.address.name
        request = storage_pb2.GetPositionRequest(
            volume=edge.volume_ref(outbox.volume, outbox.lineage.last.epoch)
        )
        while self._scl < self._window.start:
            await asyncio.wait({lane.ended}, timeout=self._timing.poll_interval_s)
            if lane.ended.done():
                raise lane.ended.result()
            with edge.calling(name, "GetPosition"):
                position = await stub.GetPosition(request, timeout=self._timing.call_timeout_s)
            self._scl = self._checked(position)
            outbox.acked(name, self._scl)

    def _checked(self, position: storage_pb2.Position) -> Lsn:
        """The SCL of a node of which it is certain that its bytes are this writer's."""
        if edge.lineage_from_wire(position.lineage) != self._outbox.lineage:
            raise LineageNotAdopted(f"{self.address.name} follows another lineage")
        if position.scl > self._window.end:
            raise Internal(
                f"{self.address.name} has the log up to {format_lsn(position.scl)}, beyond what "
                f"its writer wrote: {format_lsn(self._window.end)}"
            )
        return Lsn(position.scl)

    async def _watch(self, lane: _Lane) -> None:
        """Return when the node fell out of the window; raise when it is lost."""
        behind = asyncio.ensure_future(self._fell_behind.wait())
        look_after_s = min(self._timing.ack_timeout_s, self._timing.contact_interval_s) / 2
        try:
            while not behind.done():
                either: set[asyncio.Future[Any]] = {lane.ended, behind}
                await asyncio.wait(either, timeout=look_after_s, return_when="FIRST_COMPLETED")
                if lane.ended.done():
                    raise lane.ended.result()
                self._keep_contact()
                silent_s = monotonic() - self._sent_at
                if self._under_way is not None and silent_s > self._timing.ack_timeout_s:
                    raise UnknownOutcome(f"{self.address.name} was silent for {silent_s:.1f} s")
        finally:
            behind.cancel()

    def _transition(self, to: LinkState, why: str) -> None:
        """The only place where the state changes."""
        if to not in _TRANSITIONS[self.state]:
            raise Internal(f"{self.address.name}: {self.state.value} does not lead to {to.value}")
        _log.info(
            "storage link", node=self.address.name, was=self.state.value, now=to.value, why=why
        )
        self.state = to
