"""Everything the page process keeps of one volume, and the collection of all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from boreal.errors import (
    BelowLogStart,
    BorealError,
    MalformedRequest,
    NotIndexedYet,
    StaleEpoch,
    UnknownVolume,
    VolumeMismatch,
)
from boreal.histogram import Durations
from boreal.types import Epoch, Lsn, RelationFork, VolumeId, format_lsn
from storage_node.compaction import Compaction
from storage_node.config import StorageConfig, VolumeLayout
from storage_node.index import PageIndex
from storage_node.ingest import Ingest
from storage_node.log import LogReader
from storage_node.materialize import Materializer
from storage_node.page_store import Imported, PageStore
from storage_node.redo.native import NativeRedo
from storage_node.retire import Retirement
from storage_node.shared_state import SharedState

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Materialization:
    """What a volume has once its import is complete."""

    index: PageIndex
    ingest: Ingest
    materializer: Materializer
    compaction: Compaction
    retirement: Retirement
    tasks: tuple[asyncio.Task[None], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexGauges:
    """How the page index of a volume is doing."""

    indexed: Lsn
    """The end of the last indexed record."""
    lag_bytes: int
    """Durable log that is not indexed yet."""
    retired: Lsn
    """No log below it is needed."""
    lowest: Lsn
    """Pages can be had as of this LSN and later ones."""
    layers: int
    """Sealed ones."""
    unsettled: int
    """Layers with pages to be stored once the log is quiet, the open one included."""
    versions: int
    """Stored pages, besides the imported ones."""
    longest_chain: int
    """The most records that lately had to be applied to make a page."""
    refused_pages: int
    """Pages given up when log was retired, since the process began: unknown records, damage."""
    held: str
    """Why no log is retired though it is time; empty in health."""


class PageVolume:
    """One volume's imported pages, index and ingest."""

    def __init__(
        self,
        volume: VolumeId,
        layout: VolumeLayout,
        tasks: asyncio.TaskGroup,
        *,
        retain_log_bytes: int,
        chain_records: int,
    ) -> None:
        self.volume = volume
        self.importing = asyncio.Lock()
        """Held by the one import that runs."""
        self.waits = Durations()
        """How long readers waited for the index to get to their LSN."""
        self._layout = layout
        self._tasks = tasks
        self._retain_log_bytes = retain_log_bytes
        self._chain_records = chain_records
        self._file_number = layout.shared.stat().st_ino
        self.shared = SharedState(layout.shared)
        if self.shared.scl == 0:
            self.shared.close()
            raise UnknownVolume(f"{volume} is only being made")
        self.store = PageStore(layout.pages)
        self._log = LogReader(layout.root)
        self._materialization: _Materialization | None = None
        self._imported = asyncio.Event()
        if self.store.imported is not None:
            self._begin(self.store.imported)

    @property
    def gone(self) -> bool:
        """Whether the volume was dropped, and perhaps made anew.

        The file number tells: it is not used again as long as the file is mapped here.
        """
        try:
            replaced = self._layout.shared.stat().st_ino != self._file_number
        except FileNotFoundError:
            return True
        return replaced or self.shared.dropped

    def check_epoch(self, epoch: Epoch) -> None:
        """Raise StaleEpoch for a caller of an epoch older than the promised one."""
        promised = self.shared.promised
        if epoch < promised:
            raise StaleEpoch(
                f"epoch {epoch} is stale: this segment promised epoch {promised}",
                promised_epoch=promised,
            )

    async def seal_import(self, lsn: Lsn) -> None:
        """All pages are here: make them durable and start indexing at `lsn`."""
        if lsn < self.shared.start:
            raise MalformedRequest(
                f"pages as of {format_lsn(lsn)} are older than the log, which starts at "
                f"{format_lsn(self.shared.start)}"
            )
        imported = await asyncio.to_thread(self.store.seal, lsn)
        self._begin(imported)

    def check_same_import(self, lsn: Lsn) -> None:
        """Raise VolumeMismatch unless the complete import is one as of `lsn`."""
        imported = self.store.imported
        if imported is not None and imported.lsn != lsn:
            raise VolumeMismatch(
                f"{self.volume} was imported as of {format_lsn(imported.lsn)}, "
                f"not {format_lsn(lsn)}"
            )

    def wake(self) -> None:
        """The log has grown, or may have."""
        if self._materialization is not None:
            self._materialization.ingest.wake()

    async def wait_for(self, lsn: Lsn, lineage_epoch: Epoch, timeout_s: float) -> None:
        """Return once pages can be had as of `lsn`, durable under the lineage of `lineage_epoch`.

        NotIndexedYet after `timeout_s`, IngestStopped if it will never be, BelowLogStart before the
        import.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        deadline = began + timeout_s
        if self._materialization is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._imported.wait()
        made = self._made()
        _check_not_below(made.index, self.volume, lsn)
        if 0 < lineage_epoch <= self.shared.lineage_epoch:
            # The log here is that lineage's, or one that took over all of it that was durable.
            made.ingest.told_durable(lsn)
        await made.ingest.wait_for(lsn, max(deadline - loop.time(), 0.0))
        self.waits.observe(loop.time() - began)

    def pages(self, fork: RelationFork, blocks: Sequence[int], lsn: Lsn) -> list[bytes | None]:
        """Pages as of `lsn`, which `wait_for` has seen reached; None where there is no block."""
        made = self._made()
        _check_not_below(made.index, self.volume, lsn)
        with made.index.view() as view:
            return made.materializer.pages(view, fork, blocks, lsn)

    def relations(self, lsn: Lsn) -> dict[RelationFork, int]:
        """Every fork that exists as of `lsn`, with its blocks."""
        made = self._made()
        _check_not_below(made.index, self.volume, lsn)
        with made.index.view() as view:
            return view.relations(lsn)

    @property
    def indexed(self) -> Lsn:
        """The end of the last indexed record; 0 before the import."""
        return Lsn(0) if self._materialization is None else self._materialization.index.indexed

    @property
    def failure(self) -> str:
        """Why the index does not go on; empty in health."""
        made = self._materialization
        return "" if made is None or made.ingest.failure is None else made.ingest.failure.message

    @property
    def reads(self) -> Materializer | None:
        """Who makes the pages and counts what it took; to read only. None before the import."""
        return None if self._materialization is None else self._materialization.materializer

    @property
    def gauges(self) -> IndexGauges | None:
        """How the index is doing; None before the import."""
        made = self._materialization
        if made is None:
            return None
        durable = min(self.shared.scl, self.shared.vdl)
        return IndexGauges(
            indexed=made.index.indexed,
            lag_bytes=max(durable - made.index.indexed, 0),
            retired=made.index.retired,
            lowest=made.index.lowest,
            layers=len(made.index.layers),
            unsettled=made.compaction.unsettled,
            versions=made.index.version_count,
            longest_chain=made.materializer.longest_chain,
            refused_pages=made.retirement.refused,
            held=made.compaction.held,
        )

    async def close(self) -> None:
        """Stop the ingest and the work in the background, and release everything."""
        made, self._materialization = self._materialization, None
        if made is not None:
            for task in made.tasks:
                task.cancel()
            await asyncio.wait(made.tasks)
            made.ingest.abandon()
            made.index.close()
        self.store.close()
        self._log.close()
        self.shared.close()

    def _begin(self, imported: Imported) -> None:
        self._materialization = self._make(imported)
        self._imported.set()

    def _make(self, imported: Imported) -> _Materialization:
        log, shared, redo = self._log, self.shared, NativeRedo()
        index = PageIndex.open(
            self._layout.pages / "index",
            imported,
            log_start=shared.start,
            retain_bytes=self._retain_log_bytes,
            chain_records=self._chain_records,
        )
        materializer = Materializer(
            imported_page=self.store.page,
            read_log=lambda start, length: log.read(start, Lsn(start + length)),
            redo=redo,
        )
        retirement = Retirement(
            index=index,
            materializer=materializer,
            floor=lambda: shared.floor,
            retain_bytes=self._retain_log_bytes,
        )
        ingest = Ingest(volume=self.volume, index=index, log=log, shared=shared, redo=redo)
        compaction = Compaction(
            volume=self.volume,
            index=index,
            materializer=materializer,
            shared=shared,
            retirement=retirement,
            chain_records=self._chain_records,
            on_sealed=ingest.wake,
        )
        ingest.on_work = compaction.wake
        tasks = (
            self._tasks.create_task(ingest.run(), name=f"ingest {self.volume}"),
            self._tasks.create_task(compaction.run(), name=f"compaction {self.volume}"),
        )
        return _Materialization(index, ingest, materializer, compaction, retirement, tasks)

    def _made(self) -> _Materialization:
        """UnknownVolume once the volume is closed, NotIndexedYet before the import."""
        if not self.store.open:
            raise UnknownVolume(f"{self.volume} was dropped")
        if self._materialization is None:
            raise NotIndexedYet(f"the pages of {self.volume} are not imported here", indexed_lsn=0)
        return self._materialization


def _check_not_below(index: PageIndex, volume: VolumeId, lsn: Lsn) -> None:
    if lsn < index.lowest:
        raise BelowLogStart(
            f"{volume} has pages as of {format_lsn(index.lowest)} and later; "
            f"not as of {format_lsn(lsn)}",
            start_lsn=index.lowest,
        )


class PageVolumes:
    """The node's volumes as they come and go. Owner of all `PageVolume`s."""

    def __init__(self, config: StorageConfig, tasks: asyncio.TaskGroup) -> None:
        self._config = config
        self._tasks = tasks
        self._open: dict[VolumeId, PageVolume] = {}

    def __iter__(self) -> Iterator[PageVolume]:
        """Those that are open at this moment."""
        return iter(list(self._open.values()))

    async def get(self, volume: str, epoch: Epoch) -> PageVolume:
        """The volume, opened if it is new here. UnknownVolume, StaleEpoch, CorruptData."""
        layout = self._config.volume(VolumeId(volume))
        known = self._open.get(VolumeId(volume))
        if known is not None and known.gone:
            del self._open[known.volume]
            await known.close()
            known = None
        if known is None:
            known = self._open_volume(VolumeId(volume), layout)
        known.check_epoch(epoch)
        return known

    async def wake(self) -> None:
        """The log process says that something changed in a volume, or that one is dropped."""
        for volume in list(self._open.values()):
            if volume.shared.dropped:
                del self._open[volume.volume]
                await volume.close()
            else:
                volume.wake()

    def discover(self) -> None:
        """Open the volumes there are, so that their indexes go on. A new one is opened on use."""
        for path in self._config.volumes_dir.glob("[!.]*"):
            volume_id = VolumeId(path.name)
            try:
                self._open_volume(volume_id, self._config.volume(volume_id))
            except UnknownVolume:
                continue  # on its way in or out
            except (BorealError, OSError) as error:
                _log.error("volume does not open", volume=volume_id, error=str(error))

    async def close(self) -> None:
        """Close all."""
        for volume in self._open.values():
            await volume.close()
        self._open.clear()

    def _open_volume(self, volume_id: VolumeId, layout: VolumeLayout) -> PageVolume:
        try:
            volume = PageVolume(
                volume_id,
                layout,
                self._tasks,
                retain_log_bytes=self._config.retain_log_bytes,
                chain_records=self._config.chain_records,
            )
        except FileNotFoundError as error:
            raise UnknownVolume(f"there is no volume {volume_id} on this node") from error
        self._open[volume_id] = volume
        volume.wake()
        return volume
