"""The page index of one volume: which records touch which page, how large each fork is, by LSN,
and the stored versions of pages.

A small log-structured store. What the log did since the last sealed layer is in memory
(storage_node.layer) and is made again from the log after a restart; older log is covered by sealed
layers (storage_node.layer_file), the oldest of which go when their pages have been stored
(storage_node.retire). In LMDB, synced with every commit:

    sizes, cuts, databases   what happened to whole forks (storage_node.facts)
    versions                 pages (storage_node.versions)
    layers                   end -> begin: a layer counts once it is here
    meta                     how far the layers reach, and from which LSN on pages can be had

Every write is made by one thread of its own, so that no page read waits for the disk; everything in
memory belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import shutil
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import google_crc32c
import lmdb
import structlog

from boreal.errors import CorruptData
from boreal.types import Lsn, PageKey, RelationFork, format_lsn
from storage_node.config import CHAIN_RECORDS, RETAIN_LOG_BYTES
from storage_node.entries import fork_key, page_key, part_of_fork, raw_key, raw_key_of
from storage_node.facts import FACT_TABLES, Facts, FactView, Ground, initial_sizes
from storage_node.layer import LAYER_LOG_BYTES, OpenLayer
from storage_node.layer_file import SUFFIX, LayerImage, SealedLayer, layer_path
from storage_node.map_clears import MapClears
from storage_node.page_store import MAP_BYTES, Imported
from storage_node.versions import Version, delete_older, last_version, lsn_of_row

_LEAST_LAYER_BYTES = 64 * 1024
_LAYERS_RETAINED = 16
_FORMAT = 2
_META = struct.Struct(">IQQQ")
"""Format, import LSN, end of the last sealed layer, lowest LSN of which pages can be had."""
_META_KEY = b"meta"
_U64 = struct.Struct(">Q")

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


class IndexView:
    """The index at one moment. Answers for any LSN from `PageIndex.lowest` to `indexed`.

    Use it within the turn of the event loop that made it.
    """

    def __init__(self, transaction: Any, index: PageIndex) -> None:
        tables = index.tables
        self._versions = transaction.cursor(tables.versions)
        self._layers = index.layers
        self._memory = index.memory
        self.indexed = index.indexed
        self.retired = index.retired
        cursors = [transaction.cursor(getattr(tables, name)) for name in FACT_TABLES]
        facts = [layer.facts for layer in reversed(self._memory)]
        self.facts = FactView(cursors, facts, index.imported_lsn)

    def size(self, fork: RelationFork, lsn: int) -> int | None:
        """The fork's size in blocks; None where it does not exist."""
        return self.facts.size(fork, lsn)

    def ground(self, page: PageKey, lsn: int) -> Ground:
        """The newest thing at or below `lsn` that made all the page's earlier history void."""
        return self.facts.ground(page, lsn)

    def relations(self, lsn: int) -> dict[RelationFork, int]:
        """Every fork that exists at `lsn`, with its size in blocks."""
        return self.facts.relations(lsn)

    def version(self, key: bytes, lsn: int) -> Version | None:
        """The newest version at or below `lsn` of the page `key` (storage_node.entries)."""
        return last_version(self._versions, key, lsn)

    def versions(self, fork: RelationFork, blocks: Iterable[int], lsn: int) -> list[Version | None]:
        """For each block its version, if that is all there is to know of the page as of `lsn`: no
        record came after it, nor what voids it. None: look closer.

        CorruptData as `entries`.
        """
        ground = self.facts.latest_ground(fork, lsn)
        disk, memory = fork_key(fork), part_of_fork(fork)
        found: list[Version | None] = []
        for block in blocks:
            key = disk + block.to_bytes(4, "big")
            version = last_version(self._versions, key, lsn)
            if version is not None and (
                version.lsn < ground
                or self._entries(key, raw_key_of(memory, block), version.lsn, lsn)
            ):
                version = None
            found.append(version)
        return found

    def entries(self, page: PageKey, since: int, until: int) -> list[int]:
        """The page's entries whose records begin in [since, until), ascending.

        CorruptData if a layer that would tell is damaged.
        """
        return self._entries(page_key(page), raw_key(page), since, until)

    def _entries(self, key: bytes, raw: bytes, since: int, until: int) -> list[int]:
        found: list[int] = []
        crc = google_crc32c.value(key)
        for layer in self._layers:
            if layer.end > since and layer.begin < until:
                found += layer.entries(key, crc)
        for memory in self._memory:
            found += memory.entries(raw)
        if found and (found[0] < since or found[-1] >= until):
            found = found[bisect_left(found, since) : bisect_left(found, until)]
        return found

    def clears(self, page: PageKey) -> tuple[MapClears, ...]:
        """What the layers in memory know of the page's MAP_CLEAR entries; no need to be all."""
        raw = raw_key(page)
        known = (memory.clears(raw) for memory in self._memory)
        return tuple(clears for clears in known if clears is not None)


class Tables(NamedTuple):
    """Handles of the LMDB tables."""

    sizes: Any
    cuts: Any
    databases: Any
    versions: Any
    layers: Any


class PageIndex:
    """The index on disk and in memory. One process opens it; one task adds to its open layer.

    Invariant: the sealed layers, the frozen one and the open one follow each other without a gap
    from `retired` to `indexed`. Every page that existed at any LSN from `lowest` on can be made
    from its versions, those layers, and the log from `retired` on.
    """

    def __init__(
        self,
        path: Path,
        environment: Any,
        imported: Imported,
        retain_bytes: int,
        chain_records: int,
    ) -> None:
        self._path = path
        self._environment = environment
        self.imported = imported
        self.layer_bytes = max(
            min(LAYER_LOG_BYTES, retain_bytes // _LAYERS_RETAINED), _LEAST_LAYER_BYTES
        )
        # Half a chain, rounded down to a power of two.
        self._hot_at = 1 << max(chain_records // 2, 1).bit_length() - 1
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="index")
        self.tables = Tables(*(environment.open_db(name.encode()) for name in Tables._fields))
        self._sealed_to = self._lowest = imported.lsn
        self.layers: Sequence[SealedLayer] = ()
        """Oldest first. Replaced, never changed."""
        self.frozen: OpenLayer | None = None
        """On its way to being sealed."""
        self.layer = self._new_layer(imported.lsn)
        """The open one."""
        with environment.begin() as transaction:
            meta = transaction.get(_META_KEY)
        if meta is not None:
            _, _, sealed_to, lowest = _META.unpack(meta)
            self._sealed_to, self._lowest = Lsn(sealed_to), Lsn(lowest)

    @classmethod
    def open(
        cls,
        path: Path,
        imported: Imported,
        *,
        log_start: Lsn,
        retain_bytes: int = RETAIN_LOG_BYTES,
        chain_records: int = CHAIN_RECORDS,
    ) -> PageIndex:
        """Open the index at `path`, or begin a new one.

        What is damaged is made again from the log, which begins at `log_start`; CorruptData if that
        part of the log is gone.
        """
        environment = _open(path)
        if environment is not None:
            with environment.begin() as transaction:
                meta = transaction.get(_META_KEY)
            if meta is not None and _META.unpack(meta)[:2] == (_FORMAT, imported.lsn):
                index = cls(path, environment, imported, retain_bytes, chain_records)
                index._open_layers(log_start)
                return index
            environment.close()
            _log.info("page index begins anew", path=str(path), had_content=meta is not None)
        if log_start > imported.lsn:
            raise CorruptData(
                f"the page index in {path} cannot be read, and the log it was made from is gone "
                f"below {format_lsn(log_start)}: rebuild this node's copy of the volume"
            )
        shutil.rmtree(path, ignore_errors=True)
        environment = _open(path)
        if environment is None:
            raise OSError(f"cannot make a page index in {path}")
        index = cls(path, environment, imported, retain_bytes, chain_records)
        with environment.begin(write=True) as transaction:
            index._put_facts(transaction, initial_sizes(imported.forks, imported.lsn))
            index._put_meta(transaction, sealed_to=imported.lsn, lowest=imported.lsn)
        index._open_layers(log_start)
        return index

    # --- how far it reaches --------------------------------------------------------------------

    @property
    def imported_lsn(self) -> Lsn:
        """Where indexing began."""
        return self.imported.lsn

    @property
    def lowest(self) -> Lsn:
        """The lowest LSN as of which pages can be had."""
        return self._lowest

    @property
    def retired(self) -> Lsn:
        """No byte of the log below it is needed any more; durably so."""
        return self.layers[0].begin if self.layers else self._sealed_to

    @property
    def sealed_to(self) -> Lsn:
        """The end of the last sealed layer. Later log is indexed again after a restart."""
        return self._sealed_to

    @property
    def indexed(self) -> Lsn:
        """The end of the last indexed record; every record before it is in the index too."""
        return self.layer.end

    @property
    def memory(self) -> Sequence[OpenLayer]:
        """The layers in memory, oldest first."""
        return (self.layer,) if self.frozen is None else (self.frozen, self.layer)

    @property
    def version_count(self) -> int:
        """Stored versions."""
        with self._environment.begin() as transaction:
            return int(transaction.stat(self.tables.versions)["entries"])

    # --- reading -------------------------------------------------------------------------------

    @contextmanager
    def view(self) -> Iterator[IndexView]:
        """A consistent look, for this turn of the event loop."""
        with self._environment.begin() as transaction:
            yield IndexView(transaction, self)

    # --- writing -------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Begin a new open layer. There must be no frozen one."""
        if self.frozen is not None:
            raise RuntimeError("the layer frozen before is not sealed yet")
        self.frozen, self.layer = self.layer, self._new_layer(self.layer.end)

    async def seal(self, image: LayerImage) -> None:
        """Make the frozen layer durable; `image` is all of it. OSError, lmdb.Error: try again."""
        frozen = self.frozen
        if frozen is None:
            raise RuntimeError("no layer is frozen")

        def work() -> SealedLayer:
            path = image.write(self._path)
            with self._environment.begin(write=True) as transaction:
                self._put_facts(transaction, frozen.facts)
                layers = self.tables.layers
                transaction.put(_U64.pack(frozen.end), _U64.pack(frozen.begin), db=layers)
                self._put_meta(transaction, sealed_to=frozen.end)
            return SealedLayer(path, verify=False)

        sealed = await self._write(work)
        self.layers = (*self.layers, sealed)
        self._sealed_to = sealed.end
        self.frozen = None

    async def store(
        self,
        rows: Sequence[tuple[bytes, bytes]],
        superseded: Sequence[tuple[bytes, int]] = (),
        needless: Sequence[bytes] = (),
    ) -> None:
        """Make versions durable; delete those of `superseded` pages below an LSN, and those whose
        keys are `needless`."""

        def work() -> None:
            with self._environment.begin(write=True) as transaction:
                cursor = transaction.cursor(self.tables.versions)
                for key, lsn in superseded:
                    delete_older(cursor, key, lsn)
                for key in needless:
                    transaction.delete(key, db=self.tables.versions)
                cursor.putmulti(rows)

        await self._write(work)

    async def raise_lowest(self, lsn: Lsn) -> None:
        """From now on nobody gets a page as of an LSN below `lsn`; before anything is deleted."""
        if lsn <= self._lowest:
            return

        def work() -> None:
            with self._environment.begin(write=True) as transaction:
                self._put_meta(transaction, lowest=lsn)

        await self._write(work)
        self._lowest = lsn

    async def change(self, work: Callable[[Any, Tables], None]) -> None:
        """Do something else to the tables, in one transaction."""

        def inside() -> None:
            with self._environment.begin(write=True) as transaction:
                work(transaction, self.tables)

        await self._write(inside)

    async def drop_layers(self, count: int) -> None:
        """Forget the oldest layers. Whatever is still to be read needs none of their log."""
        dropped = self.layers[:count]

        def work() -> None:
            with self._environment.begin(write=True) as transaction:
                for layer in dropped:
                    transaction.delete(_U64.pack(layer.end), db=self.tables.layers)

        await self._write(work)
        self.layers = self.layers[count:]  # there may be another at the end by now
        for layer in dropped:
            layer.close()
            layer.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Release everything, once a write under way has ended."""
        self._thread.shutdown()
        for layer in self.layers:
            layer.close()
        self.layers = ()
        self._environment.close()

    # -------------------------------------------------------------------------------------------

    async def _write(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _put_facts(self, transaction: Any, facts: Facts) -> None:
        for name, rows in facts.rows():
            transaction.cursor(getattr(self.tables, name)).putmulti(rows)

    def _put_meta(
        self, transaction: Any, *, sealed_to: Lsn | None = None, lowest: Lsn | None = None
    ) -> None:
        """Change what is given. In a transaction, for several tasks have something to write."""
        stored = transaction.get(_META_KEY)
        before = (0, 0) if stored is None else _META.unpack(stored)[2:]
        meta = _META.pack(
            _FORMAT,
            self.imported_lsn,
            before[0] if sealed_to is None else sealed_to,
            before[1] if lowest is None else lowest,
        )
        transaction.put(_META_KEY, meta)

    def _new_layer(self, begin: Lsn) -> OpenLayer:
        return OpenLayer(begin, self._size_of, log_bytes=self.layer_bytes, hot_at=self._hot_at)

    def _size_of(self, fork: RelationFork, lsn: int) -> int | None:
        with self.view() as view:
            return view.size(fork, lsn)

    def _open_layers(self, log_start: Lsn) -> None:
        """Open the layers that count, up to the first damaged one; remove all other files."""
        with self._environment.begin() as transaction:
            rows = _layer_rows(transaction, self.tables.layers)
        opened: list[SealedLayer] = []
        for begin, end in rows:
            try:
                opened.append(SealedLayer(layer_path(self._path, begin, end)))
            except (CorruptData, FileNotFoundError) as error:
                _log.error("layer is made again from the log", error=str(error))
                if begin < log_start:
                    raise CorruptData(
                        f"a layer of the page index in {self._path} is damaged, and the log it was "
                        f"made from is gone below {format_lsn(log_start)}: rebuild this node's "
                        "copy of the volume"
                    ) from error
                self._go_back(begin, [end for first, end in rows if first >= begin])
                break
        self.layers = tuple(opened)
        kept = {layer.path for layer in opened}
        for path in self._path.glob(f"*{SUFFIX}"):
            if path not in kept:
                path.unlink()
        self.layer = self._new_layer(self._sealed_to)

    def _go_back(self, sealed_to: Lsn, ends: Sequence[Lsn]) -> None:
        # Facts past it stay: they are the same when they are found again.
        with self._environment.begin(write=True) as transaction:
            for end in ends:
                transaction.delete(_U64.pack(end), db=self.tables.layers)
            self._put_meta(transaction, sealed_to=sealed_to)
        self._sealed_to = sealed_to


class StoredIndex:
    """What the index of a stopped node says of itself, true or not. For the offline check."""

    def __init__(self, path: Path, transaction: Any, *, layers: Any, versions: Any) -> None:
        """CorruptData if it does not say how far it reaches."""
        meta = transaction.get(_META_KEY)
        if meta is None or len(meta) != _META.size:
            raise CorruptData(f"the page index in {path} does not say what it is")
        self.sealed_to = Lsn(_META.unpack(meta)[2])
        """Where the last sealed layer ends."""
        self.layers = _layer_rows(transaction, layers)
        """Where each sealed layer begins and ends, the oldest first."""
        self._versions = transaction.cursor(versions)

    def versions(self) -> Iterator[Version]:
        """Every stored version, damaged ones too."""
        for key, stored in self._versions:
            yield Version(key, Lsn(lsn_of_row(key)), stored)


@contextmanager
def stored_index(path: Path) -> Iterator[StoredIndex]:
    """The index at `path`, for reading only. CorruptData if it is none."""
    try:
        environment = lmdb.open(str(path), readonly=True, lock=False, create=False, max_dbs=8)
    except lmdb.Error as error:
        raise CorruptData(f"the page index in {path} does not open: {error}") from error
    try:
        tables = {
            name: environment.open_db(name.encode(), create=False)
            for name in ("layers", "versions")
        }
        with environment.begin() as transaction:
            yield StoredIndex(path, transaction, **tables)
    except lmdb.Error as error:
        raise CorruptData(f"the page index in {path} cannot be read: {error}") from error
    finally:
        environment.close()


def _layer_rows(transaction: Any, table: Any) -> list[tuple[Lsn, Lsn]]:
    """Begin and end of each layer that counts, ascending."""
    return [
        (Lsn(_U64.unpack(begin)[0]), Lsn(_U64.unpack(end)[0]))
        for end, begin in transaction.cursor(table)
    ]


def _open(path: Path) -> Any:
    """The environment at `path`; None if LMDB finds no sense in what is there."""
    path.mkdir(parents=True, exist_ok=True)
    try:
        return lmdb.open(str(path), map_size=MAP_BYTES, max_dbs=8, readahead=False)
    except lmdb.Error as error:
        _log.warning("page index does not open", path=str(path), error=str(error))
        return None
