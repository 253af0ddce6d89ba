"""The page index of one volume: which records touch which page, and how large each fork is, by LSN.

Derived from the log and rebuilt from it when in doubt, so it is kept without syncing: LMDB's
copy-on-write survives the death of the process, and after a restart of the machine (another boot
id) it is thrown away.

    records    fork, block, end LSN  ->  start LSN, kind, payload      what happened to a page
    sizes      fork, LSN             ->  blocks, or absent             every change of a fork's size
    cuts       fork, LSN             ->  blocks                        what lay at or past is void
    databases  tablespace, database, LSN -> source, or none            FILE_COPY and drops
    meta       indexed LSN and what the index was made for

Keys are big-endian, so that LMDB's byte order is (fork, block, LSN) order and "the newest at or
below this LSN" is one seek. Records themselves stay in the log; `start, end` find them there.
Whatever happens at an LSN is part of every state at or past it.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import structlog

from boreal.types import Fork, Lsn, PageKey, RelationFork

MAP_BYTES = 1 << 40
"""Address space, not disk: the file grows as it is written."""

_FORMAT = 1
_ABSENT = 0xFFFFFFFF
_TOP = b"\xff" * 8

_PAGE_KEY = struct.Struct(">IIIBIQ")
_FORK_KEY = struct.Struct(">IIIBQ")
_DATABASE_KEY = struct.Struct(">IIQ")
_ENTRY = struct.Struct(">QB")
_BLOCKS = struct.Struct(">I")
_SOURCE = struct.Struct(">II")
_META = struct.Struct(">IQQ36s")
_META_KEY = b"meta"
_PAGE_PREFIX, _FORK_PREFIX, _DATABASE_PREFIX = 17, 13, 8

_log = structlog.get_logger(__name__)


class Kind(IntEnum):
    """What an entry of `records` stands for. Stored."""

    BASE = 1  # the record holds the whole page
    CHANGE = 2  # redo of the record turns the page before into the page after
    UNKNOWN = 3  # nobody here can tell the page after
    MAP_CLEAR = 4  # payload: visibility bits to clear
    MAP_CUT = 5  # payload: the heap's new size in blocks


class Entry(NamedTuple):
    """One thing that happened to one page."""

    end: Lsn
    start: Lsn
    kind: Kind
    payload: bytes


class Ground(NamedTuple):
    """What lies beneath a page's records: all of them are past `since`.

    `source` is the page this one was copied from (as of `since`); if there is none the page began
    as zeros, or, with `imported`, as the imported page.
    """

    since: Lsn
    source: PageKey | None = None
    imported: bool = False


class _Sized(NamedTuple):
    lsn: int
    blocks: int | None


class _DatabaseEvent(NamedTuple):
    lsn: int
    source: tuple[int, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What the volume began with: indexing starts at `lsn`, with forks of these sizes."""

    lsn: Lsn
    forks: tuple[tuple[RelationFork, int], ...]


class IndexView:
    """The index as of one LMDB transaction, for any LSN from the import to the indexed LSN."""

    def __init__(self, transaction: Any, tables: _Tables, imported_lsn: Lsn) -> None:
        self._records = transaction.cursor(tables.records)
        self._sizes = transaction.cursor(tables.sizes)
        self._cuts = transaction.cursor(tables.cuts)
        self._databases = transaction.cursor(tables.databases)
        self._imported_lsn = imported_lsn

    def size(self, fork: RelationFork, lsn: Lsn) -> int | None:
        """The fork's size in blocks; None where it does not exist."""
        own = self._own_size(fork, lsn)
        event = self._database_event(fork.tablespace, fork.database, lsn)
        if event is None or (own is not None and own.lsn > event.lsn):
            return own.blocks if own is not None else None
        if event.source is None:
            return None
        return self.size(_moved(fork, event.source), Lsn(event.lsn - 1))

    def ground(self, page: PageKey, lsn: Lsn) -> Ground:
        """The newest thing at or below `lsn` that made all the page's earlier history void."""
        fork, block = page
        cut = self._cut(fork, block, lsn)
        event = self._database_event(fork.tablespace, fork.database, lsn)
        if event is not None and event.lsn > cut:
            if event.source is None:
                return Ground(Lsn(event.lsn))
            return Ground(Lsn(event.lsn), PageKey(_moved(fork, event.source), block))
        return Ground(Lsn(cut)) if cut else Ground(self._imported_lsn, imported=True)

    def history(self, page: PageKey, since: Lsn, until: Lsn) -> Iterator[Entry]:
        """The page's entries with `since < end <= until`, newest first."""
        cursor = self._records
        found = _seek_last(cursor, _PAGE_KEY.pack(*page.relation, page.block, until), _PAGE_PREFIX)
        while found is not None:
            key, value = found
            end = int.from_bytes(key[_PAGE_PREFIX:], "big")
            if end <= since:
                return
            start, kind = _ENTRY.unpack_from(value)
            yield Entry(Lsn(end), Lsn(start), Kind(kind), value[_ENTRY.size :])
            previous = cursor.item() if cursor.prev() else None
            same_page = previous is not None and previous[0][:_PAGE_PREFIX] == key[:_PAGE_PREFIX]
            found = previous if same_page else None

    def relations(self, lsn: Lsn) -> dict[RelationFork, int]:
        """Every fork that exists at `lsn`, with its size in blocks."""
        databases = {
            _DATABASE_KEY.unpack(key + _TOP)[:2]
            for cursor in (self._sizes, self._databases)
            for key in _prefixes(cursor, b"", _DATABASE_PREFIX)
        }
        found: dict[RelationFork, int] = {}
        for tablespace, database in sorted(databases):
            found |= self._relations_of(tablespace, database, lsn)
        return found

    def _relations_of(self, tablespace: int, database: int, lsn: Lsn) -> dict[RelationFork, int]:
        event = self._database_event(tablespace, database, lsn)
        found: dict[RelationFork, int] = {}
        if event is not None and event.source is not None:
            copied = self._relations_of(*event.source, Lsn(event.lsn - 1))
            found = {_moved(fork, (tablespace, database)): n for fork, n in copied.items()}
        prefix = _DATABASE_KEY.pack(tablespace, database, 0)[:_DATABASE_PREFIX]
        for key in list(_prefixes(self._sizes, prefix, _FORK_PREFIX)):
            relation, number = _FORK_KEY.unpack(key + _TOP)[2:4]
            fork = RelationFork(tablespace, database, relation, Fork(number))
            own = self._own_size(fork, lsn)
            if own is None or (event is not None and own.lsn <= event.lsn):
                continue
            if own.blocks is None:
                found.pop(fork, None)
            else:
                found[fork] = own.blocks
        return found

    def _own_size(self, fork: RelationFork, lsn: Lsn) -> _Sized | None:
        found = _seek_last(self._sizes, _FORK_KEY.pack(*fork, lsn), _FORK_PREFIX)
        if found is None:
            return None
        (blocks,) = _BLOCKS.unpack(found[1])
        at = int.from_bytes(found[0][_FORK_PREFIX:], "big")
        return _Sized(at, None if blocks == _ABSENT else blocks)

    def _database_event(self, tablespace: int, database: int, lsn: Lsn) -> _DatabaseEvent | None:
        key = _DATABASE_KEY.pack(tablespace, database, lsn)
        found = _seek_last(self._databases, key, _DATABASE_PREFIX)
        if found is None:
            return None
        at = int.from_bytes(found[0][_DATABASE_PREFIX:], "big")
        return _DatabaseEvent(at, _SOURCE.unpack(found[1]) if found[1] else None)

    def _cut(self, fork: RelationFork, block: int, lsn: Lsn) -> int:
        """The newest cut at or below `lsn` that took `block`; 0 if none did."""
        found = _seek_last(self._cuts, _FORK_KEY.pack(*fork, lsn), _FORK_PREFIX)
        while found is not None:
            key, value = found
            at = int.from_bytes(key[_FORK_PREFIX:], "big")
            if _BLOCKS.unpack(value)[0] <= block:
                return at
            found = _seek_last(self._cuts, _FORK_KEY.pack(*fork, at - 1), _FORK_PREFIX)
        return 0


class IndexBatch(IndexView):
    """One write transaction. `indexed` says how far its records reach; set it before the end.

    What a failed record left half written is harmless: it lies past `indexed`, where no reader
    looks, and indexing the record again writes the same.
    """

    def __init__(self, transaction: Any, tables: _Tables, imported_lsn: Lsn, indexed: Lsn) -> None:
        super().__init__(transaction, tables, imported_lsn)
        self.indexed = indexed
        self._pages: list[tuple[bytes, bytes]] = []

    def touch(self, page: PageKey, start: Lsn, end: Lsn, kind: Kind, payload: bytes = b"") -> None:
        """The record in [start, end) does something to `page`."""
        key = _PAGE_KEY.pack(*page.relation, page.block, end)
        self._pages.append((key, _ENTRY.pack(start, kind) + payload))

    def resize(self, fork: RelationFork, lsn: Lsn, blocks: int | None) -> None:
        """From `lsn` on the fork has so many blocks; None: it does not exist."""
        value = _BLOCKS.pack(_ABSENT if blocks is None else blocks)
        self._sizes.put(_FORK_KEY.pack(*fork, lsn), value)

    def cut(self, fork: RelationFork, lsn: Lsn, blocks: int) -> None:
        """Whatever the fork held at or past `blocks` before `lsn` is gone for good."""
        self._cuts.put(_FORK_KEY.pack(*fork, lsn), _BLOCKS.pack(blocks))

    def drop_database(self, tablespace: int, database: int, lsn: Lsn) -> None:
        """From `lsn` on nothing of the database is left in the tablespace."""
        self._databases.put(_DATABASE_KEY.pack(tablespace, database, lsn), b"")

    def copy_database(
        self, source: tuple[int, int], tablespace: int, database: int, lsn: Lsn
    ) -> None:
        """At `lsn` the (tablespace, database) `source` was copied, file by file."""
        key = _DATABASE_KEY.pack(tablespace, database, lsn)
        self._databases.put(key, _SOURCE.pack(*source))

    def flush(self) -> None:
        """Hand the gathered entries to LMDB."""
        self._records.putmulti(self._pages)
        self._pages = []


class _Tables(NamedTuple):
    records: Any
    sizes: Any
    cuts: Any
    databases: Any


class PageIndex:
    """The index on disk. One process opens it; one task writes it."""

    def __init__(self, environment: Any, imported_lsn: Lsn, boot: bytes) -> None:
        self._environment = environment
        self._imported_lsn = imported_lsn
        self._boot = boot
        self._tables = _Tables(*(environment.open_db(name.encode()) for name in _Tables._fields))
        self._indexed = imported_lsn
        with environment.begin() as transaction:
            meta = transaction.get(_META_KEY)
        if meta is not None:
            self._indexed = Lsn(_META.unpack(meta)[1])

    @classmethod
    def open(cls, path: Path, imported: Imported, boot: str) -> PageIndex:
        """Open the index at `path`, or begin a new one where it cannot be trusted.

        It is trusted if it opens, and was made from this import under this boot of the machine.
        """
        environment = _open(path)
        if environment is not None:
            with environment.begin() as transaction:
                meta = transaction.get(_META_KEY)
            if meta is not None:
                format_number, _, import_lsn, made_under = _META.unpack(meta)
                if (format_number, import_lsn) == (_FORMAT, imported.lsn) and (
                    made_under.rstrip(b"\0") == boot.encode()
                ):
                    return cls(environment, imported.lsn, boot.encode())
            environment.close()
            _log.info("page index begins anew", path=str(path), had_content=meta is not None)
        shutil.rmtree(path, ignore_errors=True)
        environment = _open(path)
        if environment is None:
            raise OSError(f"cannot make a page index in {path}")
        index = cls(environment, imported.lsn, boot.encode())
        with index.batch() as batch:
            for fork, blocks in imported.forks:
                batch.resize(fork, imported.lsn, blocks)
        return index

    @property
    def indexed(self) -> Lsn:
        """The end of the last indexed record; every record before it is in the index too."""
        return self._indexed

    @property
    def imported_lsn(self) -> Lsn:
        """The lowest LSN the index can answer for."""
        return self._imported_lsn

    @contextmanager
    def view(self) -> Iterator[IndexView]:
        """A consistent look. Short: LMDB keeps every page a reader might still see."""
        with self._environment.begin() as transaction:
            yield IndexView(transaction, self._tables, self._imported_lsn)

    @contextmanager
    def batch(self) -> Iterator[IndexBatch]:
        """One write transaction, committed at the end unless an exception passes."""
        with self._environment.begin(write=True) as transaction:
            batch = IndexBatch(transaction, self._tables, self._imported_lsn, self._indexed)
            yield batch
            batch.flush()
            meta = _META.pack(_FORMAT, batch.indexed, self._imported_lsn, self._boot)
            transaction.put(_META_KEY, meta)
        self._indexed = batch.indexed

    def close(self) -> None:
        """Release the environment."""
        self._environment.close()


def _open(path: Path) -> Any:
    """The environment at `path`; None if LMDB finds no sense in what is there."""
    path.mkdir(parents=True, exist_ok=True)
    try:
        return lmdb.open(
            str(path), map_size=MAP_BYTES, max_dbs=8, sync=False, metasync=False, readahead=False
        )
    except lmdb.Error as error:
        _log.warning("page index does not open", path=str(path), error=str(error))
        return None


def _moved(fork: RelationFork, database: tuple[int, int]) -> RelationFork:
    return fork._replace(tablespace=database[0], database=database[1])


def _seek_last(cursor: Any, key: bytes, prefix: int) -> tuple[bytes, bytes] | None:
    """The last item at or below `key` that shares its first `prefix` bytes."""
    if cursor.set_range(key):
        if cursor.key() != key and not cursor.prev():
            return None
    elif not cursor.last():
        return None
    item: tuple[bytes, bytes] = cursor.item()
    return item if item[0][:prefix] == key[:prefix] else None


def _prefixes(cursor: Any, within: bytes, length: int) -> Iterable[bytes]:
    """The distinct key prefixes of `length` bytes that begin with `within`, in order."""
    found = cursor.set_range(within) if within else cursor.first()
    while found:
        key = cursor.key()[:length]
        if not key.startswith(within):
            return
        yield key
        found = cursor.set_range(key + _TOP)
