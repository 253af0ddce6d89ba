"""A volume's work in the background: layers are sealed, long chains shortened, old log retired,
and pages settled once the log is quiet (storage_node.settle).

One task seals, for the ingest may be waiting for that; another does the rest. They give way every
two milliseconds or so to page reads and to the ingest. What they write goes to the disk in few,
large commits.

In memory: a mebibyte of counters and the keys of at most 100,000 pages a volume, and what one
commit takes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import lmdb
import structlog

from boreal.errors import BorealError, CorruptData, NotMaterializable
from boreal.types import VolumeId
from storage_node.entries import page_key, page_of, page_of_key
from storage_node.index import PageIndex
from storage_node.layer_file import LayerImage, SealedLayer
from storage_node.materialize import Materializer, Path
from storage_node.retire import Retirement
from storage_node.settle import QUIET_S, Settling
from storage_node.shared_state import SharedState
from storage_node.turns import Turns
from storage_node.versions import version_row

RECORDS_A_TURN: Final = 16
VERSIONS_A_COMMIT: Final = 256
"""2 MiB at most."""
CANDIDATES: Final = 100_000
"""Pages waiting for a look at their chains; more than that are met again."""
BUSY_LOOKS: Final = 16
"""So often a page comes up before it gets a version while the log grows: with chains of 32 it is
256 records behind then, some ten milliseconds for whoever reads it."""
BUSY_PAUSE_S: Final = 1.0
"""Between two rounds of giving versions while the log grows. A page that is hot comes up in each,
and what a round stores is a commit of its own."""
_SEAL_PAUSE_S: Final = 0.02
"""Between two steps of sealing, while there is time: all nodes have a full layer at the same log,
and where they share a machine commits would wait for six of them at once."""
_RETRY_S = 1.0
_HELD_S = 30.0
"""Before retirement that met what it must not pass tries again."""
_IDLE_S = 1.0
"""The floor moves without anybody telling."""
_TASKS: Final = 2
_UNWRITTEN: Final = "the index cannot be written"

_log = structlog.get_logger(__name__)


class ChainCounts:
    """Roughly how many records lie behind each page's newest version in the sealed layers.

    A mebibyte of counters, found by the page's hash. Pages that share one are looked at too early;
    what a look finds is taken off again, so that the others' records stay counted.
    """

    _SLOTS: Final = 1 << 20

    def __init__(self, limit: int) -> None:
        """`add` reports pages that may have `limit` records, at most 255."""
        self._limit = min(limit, 255)
        self._counts = bytearray(self._SLOTS)

    def add(self, key: bytes, count: int) -> bool:
        """A sealed layer has `count` records of a page; whether its chain should be looked at."""
        slot = hash(key) & (self._SLOTS - 1)
        total = self._counts[slot] + count
        self._counts[slot] = min(total, 255)
        return total >= self._limit

    def take(self, key: bytes, count: int) -> None:
        """`count` records are behind the page's newest version no more."""
        slot = hash(key) & (self._SLOTS - 1)
        self._counts[slot] = max(self._counts[slot] - count, 0)

    def clear(self) -> None:
        """Count anew."""
        self._counts = bytearray(self._SLOTS)


class Compaction:
    """The work in the background of one volume.

    No chain grows past `chain_records`, except for the moments until this task gets to it: a page
    is looked at whenever the open layer has half as many new records of it, and when the sealed
    ones may have, and gets a version if it is that many behind its last. While the log keeps
    growing commits come first, so that is put off until the page is `BUSY_LOOKS` times as far, and
    done every `BUSY_PAUSE_S`.
    """

    def __init__(
        self,
        *,
        volume: VolumeId,
        index: PageIndex,
        materializer: Materializer,
        shared: SharedState,
        retirement: Retirement,
        chain_records: int,
        on_sealed: Callable[[], None],
        quiet_s: float = QUIET_S,
    ) -> None:
        """`on_sealed` is called when another layer may be frozen. The log is quiet after
        `quiet_s`."""
        self._volume = volume
        self._index = index
        self._materializer = materializer
        self._shared = shared
        self._retirement = retirement
        self._long = max(chain_records // 2, 1)
        self._on_sealed = on_sealed
        self._settling = Settling(
            index=index, materializer=materializer, chain_records=self._long, quiet_s=quiet_s
        )
        retirement.has_time = lambda: self._settling.quiet
        self._idle_s = min(_IDLE_S, quiet_s)
        self._counts = ChainCounts(self._long)
        self._candidates: dict[bytes, int] = {}
        """Pages to look at, and how often they came up."""
        self._awake = asyncio.Event()
        self._frozen = asyncio.Event()
        self._waiting = 0
        self._counted = False
        self._shorten_at = 0.0
        self._retire_at = 0.0
        self.held = ""
        """Why no log is retired; empty in health."""

    def wake(self) -> None:
        """There may be something to do."""
        self._awake.set()
        self._frozen.set()

    async def run(self) -> None:
        """Work until cancelled. Whatever fails is logged and tried again."""
        self._shared.retired = self._index.retired
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._repeat(self._seal, self._frozen))
            tasks.create_task(self._repeat(self._tidy, self._awake))

    async def _repeat(self, work: Callable[[], Awaitable[bool]], awake: asyncio.Event) -> None:
        """Do the work whenever it is time; it tells whether there is more of it at once."""
        while True:
            awake.clear()
            try:
                more = await work()
            except (lmdb.Error, OSError) as error:
                # Most likely a full disk. What was not committed is still in the log.
                _log.error("index cannot be written", volume=self._volume, error=str(error))
                before = self._shared.failure
                self._shared.failure = f"{_UNWRITTEN}: {error}"
                await asyncio.sleep(_RETRY_S)
                self._shared.failure = "" if before.startswith(_UNWRITTEN) else before
            except Exception as error:  # noqa: BLE001 - the pages can still be read
                _log.error("background work failed", volume=self._volume, exc_info=error)
                await asyncio.sleep(_RETRY_S)
            else:
                if more:
                    continue
                self._waiting += 1
                try:
                    async with asyncio.timeout(self._idle_s):
                        await awake.wait()
                except TimeoutError:
                    continue
                finally:
                    self._waiting -= 1

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do for the moment."""
        waiting = self._waiting == _TASKS and not self._awake.is_set()
        nothing_due = not self._frozen.is_set() and not self._index.layer.hot
        return waiting and nothing_due and not self._candidates

    @property
    def unsettled(self) -> int:
        """Layers with pages that wait for the log to be quiet (storage_node.settle)."""
        return self._settling.unsettled

    async def _seal(self) -> bool:
        frozen = self._index.frozen
        if frozen is None:
            return False
        self._consider(page_key(page_of(raw)) for raw in frozen.hot)
        image = LayerImage(frozen)
        for _ in image.steps():
            await asyncio.sleep(0 if self._index.layer.half_full else _SEAL_PAUSE_S)
        await self._index.seal(image)
        self._on_sealed()
        await self._count(self._index.layers[-1])
        self._awake.set()
        return True

    async def _tidy(self) -> bool:
        if not self._counted:
            await self._count_anew()
            self._counted = True
        # A frozen layer still has what spares map pages the log (storage_node.map_clears).
        due = self._index.frozen is not None or time.monotonic() >= self._shorten_at
        if due or self._settling.quiet:
            await self._shorten()
            self._shorten_at = time.monotonic() + BUSY_PAUSE_S
        await self._retire()
        return await self._settling.run()

    def _consider(self, keys: Iterable[bytes]) -> None:
        candidates = self._candidates
        for key in keys:
            if key in candidates or len(candidates) < CANDIDATES:
                candidates[key] = candidates.get(key, 0) + 1

    async def _shorten(self) -> None:
        """Give a version to every page far behind its last."""
        layer = self._index.layer
        self._consider(page_key(page_of(raw)) for raw in layer.hot)
        layer.hot.clear()
        rows: list[tuple[bytes, bytes]] = []
        self._materializer.longest_chain = 0
        turns = Turns(lambda: self._materializer.reads)
        quiet = self._settling.quiet
        least = 1 if quiet else BUSY_LOOKS
        for key in [key for key, looks in self._candidates.items() if looks >= least]:
            if quiet and not self._settling.quiet:
                break  # the others have come up too seldom
            del self._candidates[key]
            path = self._long_path(key)
            while path is not None and not path.complete:
                path = self._walk(path)
                if path is not None and path.complete:
                    rows.append(version_row(path.key, path.end, path.content))
                    self._counts.take(key, path.length)
                if turns.over:
                    await turns.give_way(patient=quiet)
            if len(rows) >= VERSIONS_A_COMMIT:
                await self._index.store(rows)
                rows = []
                turns.begin()
        if rows:
            await self._index.store(rows)

    def _long_path(self, key: bytes) -> Path | None:
        """The way to the page as it is now, if it is long."""
        page = page_of_key(key)
        try:
            with self._index.view() as view:
                size = view.size(page.relation, view.indexed)
                if size is None or page.block >= size:
                    return None
                path = self._materializer.path(view, page, view.indexed, cached=False)
        except (NotMaterializable, CorruptData):
            return None  # whoever asks for the page is told
        return path if path.length >= self._long else None

    def _walk(self, path: Path) -> Path | None:
        try:
            self._materializer.walk(path, RECORDS_A_TURN)
        except BorealError as error:
            _log.error("page cannot be made", page=str(path.page), error=error.message)
            return None
        return path

    async def _retire(self) -> None:
        if time.monotonic() < self._retire_at:
            return
        try:
            if not await self._retirement.run():
                return
        except BorealError as error:
            self._retire_at = time.monotonic() + _HELD_S
            self.held = error.message
            _log.error("log cannot be retired", volume=self._volume, error=error.message)
            return
        self.held = ""
        self._shared.retired = self._index.retired
        await self._count_anew()

    async def _count_anew(self) -> None:
        """Count the records of the sealed layers, which are fewer now."""
        self._counts.clear()
        for layer in self._index.layers:
            await self._count(layer)

    async def _count(self, layer: SealedLayer) -> None:
        for number, (key, count) in enumerate(layer.counts()):
            if self._counts.add(key, count):
                self._consider((key,))
            if number % 2048 == 2047:
                await asyncio.sleep(0)
