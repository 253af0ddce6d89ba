"""What a record changes beyond the blocks it registers.

PostgreSQL's redo does these things by name rather than by block reference, so an index of the log
by page would miss them: visibility-map bits cleared by heap changes, truncations, relations and
databases that come and go. The struct layouts are those of the headers each parser names.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from boreal.errors import CorruptWal
from boreal.pages.visibility import ALL_FROZEN, VALID_BITS, map_block
from boreal.types import BlockNumber, Fork, PageKey, RelationFork, format_lsn
from boreal.wal.record import WalRecord
from boreal.wal.rmgr import (
    HEAP_OPERATION_MASK,
    XACT_HAS_INFO,
    XACT_OPERATION_MASK,
    DbaseInfo,
    Heap2Info,
    HeapInfo,
    Rmgr,
    SmgrInfo,
    XactInfo,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisibilityCleared:
    """Bits of one heap block are cleared in the visibility map, whatever the LSN of any page.

    The map page keeps its LSN. A map too short to hold the block has nothing to clear.
    """

    page: PageKey
    """The map's page; `boreal.pages.visibility.clear` does it."""
    heap_block: BlockNumber
    bits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RelationCreated:
    """A fork comes into being, empty. (It may be there already: redo does not mind.)"""

    relation: RelationFork


@dataclass(frozen=True, slots=True, kw_only=True)
class RelationTruncated:
    """A relation is cut to `blocks` blocks of its main fork.

    `forks` are those cut: MAIN to `blocks`, VM as `boreal.pages.visibility.truncated_blocks` says,
    FSM to whatever serves.
    """

    relation: RelationFork
    """The main fork."""
    blocks: BlockNumber
    forks: frozenset[Fork]


@dataclass(frozen=True, slots=True, kw_only=True)
class RelationDropped:
    """All forks of a relation are gone."""

    tablespace: int
    database: int
    relation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseCreated:
    """A database comes into being, empty; its pages follow as ordinary records (WAL_LOG)."""

    database: int
    tablespace: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseCopied:
    """A database comes into being with every page its source has at this LSN (FILE_COPY).

    What is copied is the source's directory in *one* tablespace; a source that uses several is
    copied by one record for each.
    """

    source_database: int
    source_tablespace: int
    database: int
    tablespace: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseDropped:
    """Everything a database has in these tablespaces is gone."""

    database: int
    tablespaces: tuple[int, ...]


Effect = (
    VisibilityCleared
    | RelationCreated
    | RelationTruncated
    | RelationDropped
    | DatabaseCreated
    | DatabaseCopied
    | DatabaseDropped
)


def effects(record: WalRecord) -> tuple[Effect, ...]:
    """What the record does besides changing its blocks, in order; () for nearly every record.

    Raises CorruptWal if its main data is not what its kind calls for.
    """
    parse = _PARSERS.get(record.rmgr)
    if parse is None:
        return ()
    try:
        return parse(record)
    except (struct.error, IndexError) as error:
        raise _malformed(record) from error


# --- heap: access/heapam_xlog.h ------------------------------------------------------------------

_CLEARED = 0x01
"""XLH_{INSERT,DELETE}_ALL_VISIBLE_CLEARED, XLH_UPDATE_OLD_..., XLH_LOCK_ALL_FROZEN_CLEARED."""
_UPDATE_NEW_CLEARED = 0x02
"""XLH_UPDATE_NEW_ALL_VISIBLE_CLEARED."""

_HEAP_FLAGS_AT: Final = {
    HeapInfo.INSERT: 2,  # offnum, flags
    HeapInfo.DELETE: 7,  # xmax, offnum, infobits_set, flags
    HeapInfo.UPDATE: 7,  # old_xmax, old_offnum, old_infobits_set, flags, ...
    HeapInfo.HOT_UPDATE: 7,
    HeapInfo.LOCK: 7,  # xmax, offnum, infobits_set, flags
}
_HEAP2_FLAGS_AT: Final = {
    Heap2Info.MULTI_INSERT: 0,  # flags, ntuples, ...
    Heap2Info.LOCK_UPDATED: 7,  # xmax, offnum, infobits_set, flags
}


def _heap(record: WalRecord) -> tuple[Effect, ...]:
    operation = record.info & HEAP_OPERATION_MASK
    flags_at = _HEAP_FLAGS_AT.get(operation)  # type: ignore[call-overload]
    if flags_at is None:
        return ()
    flags = record.main_data[flags_at]
    if not flags & (_CLEARED | _UPDATE_NEW_CLEARED):
        return ()
    if operation in {HeapInfo.UPDATE, HeapInfo.HOT_UPDATE}:
        return _update(record, flags)
    if not flags & _CLEARED:
        return ()
    return (_clear(record, 0, ALL_FROZEN if operation == HeapInfo.LOCK else VALID_BITS),)


def _update(record: WalRecord, flags: int) -> tuple[Effect, ...]:
    """Block 0 has the new tuple; block 1 the old one, unless both are on one page."""
    cleared = []
    if flags & _CLEARED:
        old_id = 0 if record.block(1) is None else 1
        cleared.append(_clear(record, old_id, VALID_BITS))
    if flags & _UPDATE_NEW_CLEARED:
        cleared.append(_clear(record, 0, VALID_BITS))
    return tuple(cleared)


def _heap2(record: WalRecord) -> tuple[Effect, ...]:
    operation = record.info & HEAP_OPERATION_MASK
    flags_at = _HEAP2_FLAGS_AT.get(operation)  # type: ignore[call-overload]
    if flags_at is None or not record.main_data[flags_at] & _CLEARED:
        return ()
    lock = operation == Heap2Info.LOCK_UPDATED
    return (_clear(record, 0, ALL_FROZEN if lock else VALID_BITS),)


def _clear(record: WalRecord, block_id: int, bits: int) -> VisibilityCleared:
    block = record.block(block_id)
    if block is None:
        raise _malformed(record)
    heap = block.page
    page = PageKey(heap.relation._replace(fork=Fork.VM), map_block(heap.block))
    return VisibilityCleared(page=page, heap_block=heap.block, bits=bits)


# --- storage manager: catalog/storage_xlog.h -----------------------------------------------------

_SMGR_CREATE = struct.Struct("<IIIi")
_SMGR_TRUNCATE = struct.Struct("<IIIIi")
_TRUNCATED_FORKS = {0x1: Fork.MAIN, 0x2: Fork.VM, 0x4: Fork.FSM}
"""SMGR_TRUNCATE_HEAP, _VM, _FSM."""


def _smgr(record: WalRecord) -> tuple[Effect, ...]:
    if record.info == SmgrInfo.CREATE:
        tablespace, database, number, fork = _SMGR_CREATE.unpack_from(record.main_data)
        relation = RelationFork(tablespace, database, number, _fork(record, fork))
        return (RelationCreated(relation=relation),)
    if record.info == SmgrInfo.TRUNCATE:
        blocks, tablespace, database, number, flags = _SMGR_TRUNCATE.unpack_from(record.main_data)
        return (
            RelationTruncated(
                relation=RelationFork(tablespace, database, number, Fork.MAIN),
                blocks=BlockNumber(blocks),
                forks=frozenset(fork for flag, fork in _TRUNCATED_FORKS.items() if flags & flag),
            ),
        )
    raise _malformed(record)


def _fork(record: WalRecord, number: int) -> Fork:
    try:
        return Fork(number)
    except ValueError as error:
        raise _malformed(record) from error


# --- transactions: access/xact.h -----------------------------------------------------------------

_XACT_TIME_BYTES = 8
_I32 = struct.Struct("<i")
_U32 = struct.Struct("<I")
_LOCATOR = struct.Struct("<III")
_HAS_DBINFO = 1 << 0
_HAS_SUBXACTS = 1 << 1
_HAS_RELATIONS = 1 << 2
_ENDS_TRANSACTION: Final = frozenset(
    (XactInfo.COMMIT, XactInfo.ABORT, XactInfo.COMMIT_PREPARED, XactInfo.ABORT_PREPARED)
)


def _xact(record: WalRecord) -> tuple[Effect, ...]:
    """Relations dropped by a commit, or created by what an abort undoes.

    ParseCommitRecord and ParseAbortRecord (xactdesc.c) agree on everything up to the relations. A
    PREPARE lists them too, but nothing happens to them until it is committed or rolled back, and
    that record lists them again.
    """
    ends = record.info & XACT_OPERATION_MASK in _ENDS_TRANSACTION
    if not ends or not record.info & XACT_HAS_INFO:
        return ()
    data = record.main_data
    (xinfo,) = _U32.unpack_from(data, _XACT_TIME_BYTES)
    if not xinfo & _HAS_RELATIONS:
        return ()
    position = _XACT_TIME_BYTES + _U32.size
    if xinfo & _HAS_DBINFO:
        position += 8
    if xinfo & _HAS_SUBXACTS:
        position += _I32.size + 4 * _count(record, position)
    count = _count(record, position)
    position += _I32.size
    return tuple(
        RelationDropped(tablespace=tablespace, database=database, relation=relation)
        for tablespace, database, relation in (
            _LOCATOR.unpack_from(data, position + n * _LOCATOR.size) for n in range(count)
        )
    )


# --- databases: commands/dbcommands_xlog.h -------------------------------------------------------

_DATABASE_COPIED = struct.Struct("<IIII")
_DATABASE_CREATED = struct.Struct("<II")


def _dbase(record: WalRecord) -> tuple[Effect, ...]:
    data = record.main_data
    if record.info == DbaseInfo.CREATE_FILE_COPY:
        database, tablespace, source, source_tablespace = _DATABASE_COPIED.unpack_from(data)
        return (
            DatabaseCopied(
                source_database=source,
                source_tablespace=source_tablespace,
                database=database,
                tablespace=tablespace,
            ),
        )
    if record.info == DbaseInfo.CREATE_WAL_LOG:
        database, tablespace = _DATABASE_CREATED.unpack_from(data)
        return (DatabaseCreated(database=database, tablespace=tablespace),)
    if record.info == DbaseInfo.DROP:
        (database,) = _U32.unpack_from(data)
        count = _count(record, _U32.size)
        tablespaces = struct.unpack_from(f"<{count}I", data, _U32.size + _I32.size)
        return (DatabaseDropped(database=database, tablespaces=tablespaces),)
    raise _malformed(record)


def _count(record: WalRecord, position: int) -> int:
    """A C `int` that counts what follows it."""
    (count,) = _I32.unpack_from(record.main_data, position)
    if not 0 <= count <= len(record.main_data):
        raise _malformed(record)
    return int(count)


def _malformed(record: WalRecord) -> CorruptWal:
    return CorruptWal(
        f"the {record.rmgr.name} record {record.info:#04x} at {format_lsn(record.start)} "
        "is not of its kind's form",
        lsn=record.start,
    )


_PARSERS: Final[dict[Rmgr, Callable[[WalRecord], tuple[Effect, ...]]]] = {
    Rmgr.HEAP: _heap,
    Rmgr.HEAP2: _heap2,
    Rmgr.SMGR: _smgr,
    Rmgr.XACT: _xact,
    Rmgr.DBASE: _dbase,
}
