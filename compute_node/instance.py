"""One life of a compute node: restored from storage, reading, and, when told to, writing.

Every instance starts as a reader; the writer is a reader that was promoted (design section 5).
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psycopg
import structlog

from boreal.engine import Engine
from boreal.errors import (
    BorealError,
    Internal,
    NotWriter,
    ProcessFailed,
    StaleEpoch,
)
from boreal.rpc import control_pb2
from boreal.types import Epoch, Lsn, Timeline
from compute_node.bundle_choice import BundleChoice
from compute_node.cache import BoundedCache, RelationFiles, keep_within
from compute_node.config import ComputeConfig
from compute_node.draining import drain
from compute_node.feed import Feed
from compute_node.fleet import BundlePut, Fleet
from compute_node.lease import Lease
from compute_node.life import Life, LifeState
from compute_node.orders import Order, OrderKind, Orders
from compute_node.page_service import PageService
from compute_node.parts import Parts
from compute_node.postgres import Postgres
from compute_node.promotion import Spawn, promote
from compute_node.reader import Reader
from compute_node.restoring import restore
from compute_node.shipper import storage_addresses
from compute_node.statistics import Statistics
from compute_node.writer import Writer

_log = structlog.get_logger(__name__)

_FINAL_BUNDLE_S = 20.0


class Instance:
    """A restored PostgreSQL and everything that serves it.

    `run` is the whole of it. It returns after `request_stop`, or once it made way for another
    writer, and raises whatever else ends this life: ProcessFailed when PostgreSQL is gone,
    StaleEpoch when another writer has taken over. Either way nothing it started is left.
    """

    def __init__(
        self,
        config: ComputeConfig,
        engine: Engine,
        shim: Path,
        fleet: Fleet,
        life: Life,
        choice: BundleChoice,
        on_news: Callable[[], None],
    ) -> None:
        """`on_news` is called when something changed that the control plane should know."""
        self._config = config
        self._engine = engine
        self._fleet = fleet
        self._life = life
        self._choice = choice
        self._on_news = on_news
        self._postgres = Postgres(config, engine, shim)
        self._stop_requested = asyncio.Event()
        self._fenced: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._parts: Parts | None = None
        self._writer_address: str | None = None
        self.statistics = Statistics(self._postgres)
        """What PostgreSQL counts of itself, if metrics are served."""
        self.cache: BoundedCache | None = None
        """What keeps its local pages within their bound, if they have one."""
        self.reader: Reader | None = None
        """Its duties as a reader, also while it restores; over once it is to write."""
        self.writer: Writer | None = None
        """Its duties as the writer, once it is promoted."""

    # --- what others may know ------------------------------------------------------------------

    @property
    def postgres(self) -> Postgres:
        """Its PostgreSQL."""
        return self._postgres

    @property
    def fleet(self) -> Fleet:
        """The volume's storage nodes."""
        return self._fleet

    @property
    def pgdata(self) -> Path:
        """Its PostgreSQL's data directory."""
        return self._config.pgdata

    @property
    def pages(self) -> PageService | None:
        """What answers its PostgreSQL's page shim; None while it restores."""
        return self._parts.pages if self._parts else None

    @property
    def timeline(self) -> Timeline:
        """The timeline it writes; 0 unless it is a writer."""
        return self.writer.timeline if self.writer else Timeline(0)

    @property
    def vdl(self) -> Lsn:
        """How far the log is durable, as known here."""
        if self.writer:
            return self.writer.shipper.vdl
        return self._parts.source.durable if self._parts else Lsn(0)

    @property
    def received(self) -> Lsn:
        """How far the log is durable as the writer told a reader."""
        return self._parts.source.received if self._parts and not self.writer else Lsn(0)

    @property
    def bundle_end(self) -> Lsn:
        """The end of the newest bundle known here."""
        if self.writer:
            return self.writer.bundling.end
        return self._parts.restored_end if self._parts else Lsn(0)

    @property
    def takes_clients(self) -> bool:
        """Whether clients are welcome."""
        if self._life.state is LifeState.READER and self.reader:
            return self.reader.takes_clients
        return self._life.state is LifeState.WRITER

    @property
    def has_served(self) -> bool:
        """Whether it did what it was last told to: its bundle was as good as any."""
        if self._life.state is LifeState.PROMOTING:
            return False
        return self.writer is not None or (self.reader is not None and self.reader.takes_clients)

    def request_stop(self) -> None:
        """Ask for a clean end: final bundle, PostgreSQL's fast shutdown."""
        self._stop_requested.set()

    async def set_members(self, members: Sequence[control_pb2.StorageNode]) -> None:
        """Take the storage fleet as the control plane tells it."""
        await self._fleet.set_members(members)
        if self.writer:
            self.writer.shipper.set_members(storage_addresses(members))

    def writer_at(self, address: str | None) -> None:
        """Where the writer's agent listens, as the control plane tells it."""
        self._writer_address = address
        if self.reader:
            self.reader.writer_at(address)

    async def take_bundle(self) -> BundlePut:
        """Take one bundle and store it on a write quorum. NotWriter: only a writer can."""
        if self.writer is None:
            raise NotWriter(f"{self._config.name} is not the writer")
        return await self.writer.bundling.take()

    # --- its life ------------------------------------------------------------------------------

    async def run(self, orders: Orders) -> None:
        """Live, and do as ordered."""
        self._life.become(LifeState.RESTORING, "ordered to serve the volume")
        try:
            async with asyncio.TaskGroup() as group, AsyncExitStack() as stack:
                await self._serve(group, stack, orders)
        except BaseExceptionGroup as failures:
            # Several tasks may fall over the same end; the first one names it.
            raise first_of(failures) from None
        finally:
            await self._postgres.stop(signal.SIGQUIT)

    async def _serve(self, group: asyncio.TaskGroup, stack: AsyncExitStack, orders: Orders) -> None:
        def spawn(work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
            task = group.create_task(work, name=name)
            stack.callback(task.cancel)
            return task

        parts = self._parts = await self._start(stack)
        reader = self.reader = Reader(parts, self._on_news)
        reader.writer_at(self._writer_address)
        spawn(self._watch_fence(), "fence")
        spawn(self._watch_postgres(), "watch")
        # Before PostgreSQL is consistent, for even that far it may not get under the old epoch.
        reading = spawn(reader.run(), "reader")
        await self._postgres.wait_ready()
        self._life.become(LifeState.READER, "PostgreSQL is consistent")
        reader.consistent()
        spawn(self._postgres.watch_answers(), "answers")
        if self._config.metrics_port is not None:
            spawn(self.statistics.run(), "statistics")
        if self._config.cache_bytes:
            spawn(self._bound_cache(parts.pages), "cache")
        obeying = spawn(self._obey(parts, reader, reading, orders, spawn), "orders")
        stop = spawn(self._stop_requested.wait(), "stop")
        await asyncio.wait({obeying, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not obeying.done():
            obeying.cancel()
            await self._end()

    async def _start(self, stack: AsyncExitStack) -> Parts:
        """Restore, and start PostgreSQL and what serves it; `stack` ends that."""
        config = self._config
        manifest, source = await restore(config, self._engine, self._fleet, self._choice)
        feed = await Feed.start(source, socket_dir=config.feed_dir, port=config.postgres_port)
        stack.push_async_callback(feed.close)
        pages = await PageService.start(
            self._fleet,
            socket=config.page_socket,
            account=self._engine.account,
            on_fenced=self._on_fenced,
        )
        stack.push_async_callback(pages.close)
        lease = Lease(config.page_socket, self._engine.account)
        stack.callback(lease.close)
        self._postgres.start()
        return Parts(
            config=config,
            life=self._life,
            fleet=self._fleet,
            postgres=self._postgres,
            source=source,
            feed=feed,
            pages=pages,
            lease=lease,
            restored_redo=manifest.redo,
            restored_end=manifest.end,
        )

    async def _bound_cache(self, pages: PageService) -> None:
        config = self._config
        files = RelationFiles(config.pgdata)
        self.cache = BoundedCache(files, pages.losses, config.cache_bytes)
        await keep_within(self.cache, self._postgres, self._fleet, pages, self._life)

    def _on_fenced(self, error: StaleEpoch) -> None:
        if not self._fenced.done():
            self._fenced.set_exception(error)

    async def _watch_fence(self) -> None:
        await self._fenced

    async def _watch_postgres(self) -> None:
        code = await self._postgres.exited()
        if self._life.state is not LifeState.STOPPING:
            raise ProcessFailed(f"PostgreSQL ended by itself with exit code {code}")

    async def _end(self) -> None:
        if self._life.state is LifeState.WRITER:
            try:
                async with asyncio.timeout(_FINAL_BUNDLE_S):
                    await self.take_bundle()
            except (TimeoutError, BorealError, psycopg.Error) as error:
                _log.warning("stopping without a final bundle", reason=str(error))
        self._life.become(LifeState.STOPPING, "asked to stop")
        await self._postgres.stop(signal.SIGINT)

    # --- orders --------------------------------------------------------------------------------

    async def _obey(
        self,
        parts: Parts,
        reader: Reader,
        reading: asyncio.Task[Any],
        orders: Orders,
        spawn: Spawn,
    ) -> None:
        """Do as ordered; returns once this instance made way for another writer."""
        promotion: asyncio.Task[None] | None = None
        order: Order | None = None
        while True:
            order = await orders.other_than(order)
            self._check(order, writes=promotion is not None)
            if order.kind is OrderKind.READ and promotion is None:
                await reader.follow(order.epoch)
            elif order.kind is OrderKind.WRITE and promotion is None:
                self._life.become(LifeState.PROMOTING, f"ordered to write under {order.epoch}")
                reading.cancel()
                await asyncio.wait({reading})  # a reader takes over any newer epoch it hears of
                promotion = spawn(self._become_writer(parts, order.epoch, orders, spawn), "promote")
            elif order.kind is OrderKind.YIELD and promotion is not None:
                await promotion
                await self._make_way(parts.lease)
                return

    def _check(self, order: Order, *, writes: bool) -> None:
        """Raise what ends this life if it cannot go on under such an order."""
        if order.kind is OrderKind.WAIT:
            return
        if order.kind is OrderKind.CREATE_VOLUME or order.volume != self._fleet.volume:
            raise Internal(
                f"an instance of volume {self._fleet.volume} was ordered to {order.kind.value} "
                f"{order.volume}"
            )
        if writes and order.epoch > self._fleet.epoch:
            raise StaleEpoch(
                f"epoch {self._fleet.epoch} was superseded: {order.epoch} is another's",
                promised_epoch=order.epoch,
            )

    async def _become_writer(
        self,
        parts: Parts,
        epoch: Epoch,
        orders: Orders,
        spawn: Spawn,
    ) -> None:
        self.writer = await promote(parts, epoch, orders, spawn)

    async def _make_way(self, lease: Lease) -> None:
        """Let another instance write: nothing that was acknowledged or is under way gets lost."""
        self._life.become(LifeState.YIELDING, "ordered to make way for another writer")
        try:
            await drain(self._config, self._postgres, lease)
        except (BorealError, psycopg.Error, TimeoutError) as error:
            # What was acknowledged is durable; the next writer finds it without our help.
            _log.warning("making way without being drained", reason=str(error))
        self._life.become(LifeState.STOPPING, "made way for another writer")
        await self._postgres.stop(signal.SIGQUIT)


def first_of(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure of a task group, however deeply it is nested."""
    first = failures.exceptions[0]
    return first_of(first) if isinstance(first, BaseExceptionGroup) else first
