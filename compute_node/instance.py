"""One life of a compute node: restored from storage, reading, and, when told to, writing.

Every instance starts as a reader; the writer is a reader that was promoted (design section 5).
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import psycopg
import structlog

from boreal.engine import Engine
from boreal.errors import (
    BorealError,
    Internal,
    NoBundle,
    NotNow,
    ProcessFailed,
    QuorumUnavailable,
    StaleEpoch,
    Unreachable,
)
from boreal.quorum import SIX_WAY, DurabilityTracker, RecoveryPlan
from boreal.rpc import control_pb2
from boreal.types import Epoch, Lsn, Timeline, format_lsn
from compute_node import bundle
from compute_node.bundle_choice import BundleChoice
from compute_node.cache import BoundedCache, RelationFiles, keep_within
from compute_node.config import ADMIN, SHIPPER_NAME, SLOT, ComputeConfig
from compute_node.feed import Feed
from compute_node.fleet import BundlePut, Fleet
from compute_node.floors import Floors
from compute_node.life import Life, LifeState
from compute_node.log_source import LogSource, view_log
from compute_node.page_service import PageService
from compute_node.postgres import (
    Postgres,
    end_leftover,
    prepare_directories,
    query_lsn,
    write_configuration,
)
from compute_node.recovery import recover
from compute_node.replication_client import WalStream
from compute_node.shipper import Shipper, storage_addresses

_log = structlog.get_logger(__name__)

_BUNDLE_CHECK_S = 1.0
_BUNDLE_WAL_BYTES = 64 * 1024 * 1024
"""A bundle is taken after so much WAL: it bounds what a new compute node has to replay."""
_BUNDLE_AGE_S = 30.0
_BUNDLE_LEAST_BYTES = 64 * 1024
"""... or after so long, if there was so much: a bundle's own checkpoint is not worth another."""
_FINAL_BUNDLE_S = 20.0
_FLOORS_S = 0.3
_REPLAY_POLL_S = 0.01
_RETRY_S = 0.2


class Instance:
    """A restored PostgreSQL and everything that serves it.

    `run` is the whole of it. It returns after `request_stop`, and raises whatever ends this life:
    ProcessFailed when PostgreSQL is gone, StaleEpoch when another writer has taken over. Either way
    nothing it started is left.
    """

    def __init__(
        self,
        config: ComputeConfig,
        engine: Engine,
        shim: Path,
        fleet: Fleet,
        life: Life,
        choice: BundleChoice,
    ) -> None:
        self._config = config
        self._engine = engine
        self._fleet = fleet
        self._life = life
        self._choice = choice
        self._postgres = Postgres(config, engine, shim)
        self._stop_requested = asyncio.Event()
        self._bundling = asyncio.Lock()
        self._fenced: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._plan: RecoveryPlan | None = None
        self._bundle_end = self._restored_redo = Lsn(0)
        self._floors: Floors | None = None
        self._source: LogSource | None = None
        self.shipper: Shipper | None = None

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
    def timeline(self) -> Timeline:
        """The timeline it writes; 0 unless it is a writer."""
        return self._plan.lineage.timelines()[-1].timeline if self._plan else Timeline(0)

    @property
    def vdl(self) -> Lsn:
        """How far the log is durable, as known here."""
        if self.shipper:
            return self.shipper.vdl
        return self._source.durable if self._source else Lsn(0)

    @property
    def bundle_end(self) -> Lsn:
        """The end of the newest bundle known here."""
        return self._bundle_end

    def request_stop(self) -> None:
        """Ask for a clean end: final bundle, PostgreSQL's fast shutdown."""
        self._stop_requested.set()

    async def set_members(self, members: Sequence[control_pb2.StorageNode]) -> None:
        """Take the storage fleet as the control plane tells it."""
        await self._fleet.set_members(members)
        if self.shipper:
            self.shipper.set_members(storage_addresses(members))

    # --- its life ------------------------------------------------------------------------------

    async def run(self, write_order: Callable[[], Coroutine[Any, Any, Epoch]]) -> None:
        """Live. `write_order` returns once the control plane made this instance the writer."""
        self._life.become(LifeState.RESTORING, "ordered to serve the volume")
        await end_leftover(self._config)
        await asyncio.to_thread(prepare_directories, self._config, self._engine)
        try:
            async with asyncio.TaskGroup() as group:
                await self._serve(group, write_order)
        except BaseExceptionGroup as failures:
            # Several tasks may fall over the same end; the first one names it.
            raise first_of(failures) from None
        finally:
            await self._postgres.stop(signal.SIGQUIT)

    async def _serve(
        self, group: asyncio.TaskGroup, write_order: Callable[[], Coroutine[Any, Any, Epoch]]
    ) -> None:
        source = await self._restore()
        feed = await Feed.start(
            source, socket_dir=self._config.feed_dir, port=self._config.postgres_port
        )
        pages = await PageService.start(
            self._fleet,
            socket=self._config.page_socket,
            account=self._engine.account,
            on_fenced=self._on_fenced,
        )
        helpers: list[asyncio.Task[Any]] = [group.create_task(self._watch_fence(), name="fence")]
        try:
            self._postgres.start()
            helpers.append(group.create_task(self._watch_postgres(), name="watch"))
            await self._postgres.wait_ready()
            self._life.become(LifeState.READER, "PostgreSQL is consistent")
            order = group.create_task(write_order(), name="write order")
            stop = group.create_task(self._stop_requested.wait(), name="stop")
            helpers += [order, stop]
            if self._config.cache_bytes:
                helpers.append(group.create_task(self._bound_cache(pages), name="cache"))
            await asyncio.wait({order, stop}, return_when=asyncio.FIRST_COMPLETED)
            if order.done() and not stop.done():
                helpers += await self._become_writer(group, source, pages, order.result())
                await stop
            await self._end()
        finally:
            for task in helpers:
                task.cancel()
            await pages.close()
            await feed.close()

    async def _bound_cache(self, pages: PageService) -> None:
        config = self._config
        files = RelationFiles(config.pgdata)
        bounded = BoundedCache(files, pages.losses, config.cache_bytes)
        await keep_within(bounded, self._postgres, self._fleet, pages, self._life)

    async def _restore(self) -> LogSource:
        while True:
            try:
                view = view_log(await self._fleet.positions())
                manifest = await self._fleet.latest_bundle(self._choice.max_end)
                break
            except NoBundle:
                if not self._choice.max_end:
                    raise
                self._choice.begin_again()
            except QuorumUnavailable as error:
                _log.warning("waiting for storage nodes", reason=error.message)
                await asyncio.sleep(_RETRY_S)
        self._fleet.follow_lineage(view.lineage.last.epoch)
        self._bundle_end = manifest.end
        written = await bundle.restore(manifest, self._fleet, self._config.pgdata, self._engine)
        write_configuration(self._config, self._engine)
        self._restored_redo = manifest.redo
        _log.info(
            "restored",
            redo=format_lsn(manifest.redo),
            end=format_lsn(manifest.end),
            bytes=written,
            files=len(manifest.files),
        )
        self._source = LogSource(self._fleet, view, durable=manifest.end)
        return self._source

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

    # --- becoming the writer ---------------------------------------------------------------------

    async def _become_writer(
        self, group: asyncio.TaskGroup, source: LogSource, pages: PageService, epoch: Epoch
    ) -> list[asyncio.Task[None]]:
        self._life.become(LifeState.PROMOTING, f"ordered to write under epoch {epoch}")
        self._fleet.raise_epoch(epoch)
        plan = self._plan = await recover(self._fleet, epoch)
        self._fleet.follow_lineage(epoch)
        await source.extend(plan.end)
        await self._replayed(plan.end)
        # Connected before the promotion, as a cascading walsender, so that no WAL is ever written
        # that has no way out.
        stream = await WalStream.connect(
            socket_dir=self._config.run_dir,
            port=self._config.postgres_port,
            user=ADMIN,
            application_name=SHIPPER_NAME,
        )
        await stream.ensure_slot(SLOT)
        stream.send_status(plan.end)
        self.shipper = Shipper(
            volume=self._fleet.volume,
            lineage=plan.lineage,
            start=plan.end,
            tracker=DurabilityTracker(SIX_WAY, plan.end),
            members=storage_addresses(self._fleet.nodes),
            on_vdl=stream.send_status,
        )
        tasks = [
            group.create_task(self.shipper.run(), name="shipper"),
            group.create_task(self._ship(stream, self.shipper, plan), name="ship"),
        ]
        self._floors = Floors(start=plan.end, restored_redo=self._restored_redo)
        pages.become_writer(plan.end)
        await self._postgres.promote()
        await self._postgres.admit_clients()
        self._life.become(LifeState.WRITER, f"promoted at {format_lsn(plan.end)}")
        tasks += [
            group.create_task(self._keep_bundles(), name="bundles"),
            group.create_task(self._keep_floors(self.shipper, self._floors, pages), name="floors"),
        ]
        return tasks

    async def _replayed(self, end: Lsn) -> None:
        async with self._postgres.connect() as connection:
            while await query_lsn(connection, "select pg_last_wal_replay_lsn()") < end:
                await asyncio.sleep(_REPLAY_POLL_S)

    async def _ship(self, stream: WalStream, shipper: Shipper, plan: RecoveryPlan) -> None:
        def on_wal(start: Lsn, data: bytes) -> None:
            if shipper.fenced:
                return  # its `run` ends this life
            shipper.push(start, data)
            if shipper.full and not waiting.is_set():
                waiting.set()
                stream.pause_reading()

        async def relieve() -> None:
            while True:
                await waiting.wait()
                await shipper.room()
                waiting.clear()
                stream.resume_reading()

        waiting = asyncio.Event()
        former, ours = plan.lineage.timelines()[-2:]
        relief = asyncio.create_task(relieve())
        try:
            # Nothing of the former timeline is ours to ship, but its end is how the walsender tells
            # that PostgreSQL was promoted, and where.
            ended = await stream.stream(
                slot=SLOT, start=plan.end, timeline=former.timeline, on_wal=None
            )
            if (ended.next_timeline, ended.switch) != ours:
                raise Internal(
                    f"PostgreSQL went to timeline {ended.next_timeline} at "
                    f"{format_lsn(ended.switch)}; the lineage says {ours}"
                )
            await stream.stream(slot=SLOT, start=plan.end, timeline=ours.timeline, on_wal=on_wal)
            raise Internal("the writer's timeline ended while it was the writer")
        except Unreachable:
            if self._life.state is not LifeState.STOPPING:
                raise
        finally:
            relief.cancel()
            await stream.close()

    async def _keep_floors(self, shipper: Shipper, floors: Floors, pages: PageService) -> None:
        """Let storage forget what nobody will ask for again."""
        while True:
            before = floors.read_point
            floors.advance(shipper.held_everywhere)
            if floors.read_point > before:
                pages.advance_read_point(floors.read_point)
            shipper.set_pgmrpl(floors.pgmrpl)
            await asyncio.sleep(_FLOORS_S)

    # --- bundles ---------------------------------------------------------------------------------

    async def _keep_bundles(self) -> None:
        """Take a bundle now and then, so that a new compute node has little to replay."""
        if self.shipper is None:
            raise Internal("only a writer takes bundles")
        last_end, last_at = self._bundle_end, 0.0
        clock = asyncio.get_running_loop().time
        while True:
            written = self.shipper.vdl - last_end
            aged = clock() - last_at >= _BUNDLE_AGE_S
            if written >= _BUNDLE_WAL_BYTES or (aged and written >= _BUNDLE_LEAST_BYTES):
                try:
                    await self.take_bundle()
                except StaleEpoch:
                    raise
                except (BorealError, psycopg.Error) as error:
                    _log.warning("no bundle this time", reason=str(error))
                last_end, last_at = self.shipper.vdl, clock()
            await asyncio.sleep(_BUNDLE_CHECK_S)

    async def take_bundle(self) -> BundlePut:
        """Take one bundle and store it on a write quorum. Only a writer can."""
        if self.shipper is None:
            raise Internal("only a writer takes bundles")
        async with self._bundling:
            async with self._postgres.connect() as connection:
                taken = await bundle.take(connection, self._config.pgdata, self.timeline)
            if await asyncio.to_thread(
                bundle.would_wait, self._config.pgdata, taken.redo, taken.end, self.timeline
            ):
                raise NotNow(
                    "a transaction has more than 64 subtransactions open; a compute node restored "
                    "from this moment could not serve until it ends"
                )
            if taken.end > self.shipper.vdl:
                raise Internal(
                    f"a bundle up to {format_lsn(taken.end)} was to be stored, but the log is only "
                    f"durable up to {format_lsn(self.shipper.vdl)}"
                )
            put = await taken.store(self._fleet)
            self._bundle_end = taken.end
            if self._floors is not None:
                self._floors.bundle_stored(taken.redo)
            _log.info(
                "bundle stored",
                redo=format_lsn(taken.redo),
                end=format_lsn(taken.end),
                bytes_sent=put.bytes_sent,
                files_sent=put.files_sent,
            )
            return put


def first_of(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure of a task group, however deeply it is nested."""
    first = failures.exceptions[0]
    return first_of(first) if isinstance(first, BaseExceptionGroup) else first
