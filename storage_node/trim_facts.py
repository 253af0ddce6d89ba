"""What a retirement does to facts and to versions of pages that are gone, in LMDB transactions."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping
from itertools import groupby
from typing import Any, Final

from boreal.types import Lsn, RelationFork
from storage_node.entries import (
    DATABASE_KEY_BYTES,
    FORK_KEY_BYTES,
    PAGE_KEY_BYTES,
    database_key,
    database_of_key,
    fork_key,
    fork_of_key,
)
from storage_node.facts import ABSENT
from storage_node.index import PageIndex, Tables
from storage_node.versions import lsn_of_row

DELETIONS_A_COMMIT: Final = 2048
_LSN = struct.Struct(">Q")
_BLOCKS = struct.Struct(">I")


async def finish_copy(
    index: PageIndex, lsn: int, copy: tuple[int, int], sizes: Mapping[RelationFork, int]
) -> None:
    """The pages copied at `lsn` are stored: from now on the copy stands on its own.

    What is left is a database whose past is void from `lsn` on, and forks of these sizes.
    """

    def work(transaction: Any, tables: Tables) -> None:
        for fork, blocks in sizes.items():
            own = fork._replace(tablespace=copy[0], database=copy[1])
            key = fork_key(own) + _LSN.pack(lsn)
            transaction.put(key, _BLOCKS.pack(blocks), db=tables.sizes)
        transaction.put(database_key(*copy) + _LSN.pack(lsn), b"", db=tables.databases)

    await index.change(work)


async def trim(index: PageIndex, floor: Lsn, imported: Collection[RelationFork]) -> None:
    """Delete what no state from `floor` on needs. Every copy up to there must be finished.

    A fact that hides something must stay as long as a layer tells of what it hides.
    """
    done = False
    retired = index.retired

    def delete_versions(transaction: Any, tables: Tables) -> None:
        nonlocal done
        done = _delete_void_versions(transaction, tables, floor)

    while not done:
        await index.change(delete_versions)

    def delete_facts(transaction: Any, tables: Tables) -> None:
        databases = {(fork.tablespace, fork.database) for fork in imported}
        dropped = _trim_databases(transaction, tables, floor, retired, databases)
        _trim_sizes(transaction, tables, floor, retired, imported, dropped)
        _trim_cuts(transaction, tables, floor, retired, imported, dropped)

    await index.change(delete_facts)


def _delete_void_versions(transaction: Any, tables: Tables, floor: int) -> bool:
    """Delete versions that a cut or a database's drop has made void; whether all are."""
    versions = transaction.cursor(tables.versions)
    left = DELETIONS_A_COMMIT
    for key, value in transaction.cursor(tables.cuts):
        lsn = _lsn(key)
        if lsn <= floor:
            left -= _delete_range(versions, key[:FORK_KEY_BYTES], value, lsn, left)
    for key, _ in transaction.cursor(tables.databases):
        lsn = _lsn(key)
        if lsn <= floor:
            left -= _delete_range(versions, key[:DATABASE_KEY_BYTES], b"", lsn, left)
    return left > 0


def _delete_range(versions: Any, prefix: bytes, first: bytes, lsn: int, most: int) -> int:
    """Delete versions below `lsn` of the pages from `prefix + first` on; how many."""
    deleted = 0
    found = most > 0 and versions.set_range(prefix + first)
    while found and deleted < most:
        key = versions.key()
        if not key.startswith(prefix):
            break
        if lsn_of_row(key) < lsn:
            found = versions.delete()
            deleted += 1
        else:
            # On to the next page: its later versions stay.
            found = versions.set_range(key[:PAGE_KEY_BYTES] + b"\xff" * 8)
    return deleted


def _trim_databases(
    transaction: Any,
    tables: Tables,
    floor: int,
    retired: int,
    imported: Collection[tuple[int, int]],
) -> dict[bytes, int]:
    """Keep the newest event up to the floor; return where each database's past ends."""
    dropped: dict[bytes, int] = {}
    for key, rows in _by_prefix(transaction, tables.databases, DATABASE_KEY_BYTES, floor):
        newest = dropped[key] = _lsn(rows[-1])
        needed = newest > retired or database_of_key(key) in imported
        _delete(transaction, tables.databases, rows[:-1] if needed else rows)
    return dropped


def _trim_sizes(
    transaction: Any,
    tables: Tables,
    floor: int,
    retired: int,
    imported: Collection[RelationFork],
    dropped: Mapping[bytes, int],
) -> None:
    """Keep each fork's newest size up to the floor, unless it says that there is no such fork."""
    for key, rows in _by_prefix(transaction, tables.sizes, FORK_KEY_BYTES, floor):
        (blocks,) = _BLOCKS.unpack(transaction.get(rows[-1], db=tables.sizes))
        newest = _lsn(rows[-1])
        gone = blocks == ABSENT and newest <= retired and fork_of_key(key) not in imported
        void = newest < dropped.get(key[:DATABASE_KEY_BYTES], 0)
        keep = 0 if gone or (void and newest <= retired) else 1
        _delete(transaction, tables.sizes, rows[: len(rows) - keep])


def _trim_cuts(
    transaction: Any,
    tables: Tables,
    floor: int,
    retired: int,
    imported: Collection[RelationFork],
    dropped: Mapping[bytes, int],
) -> None:
    """Keep of a fork's cuts those that still hide something."""
    for key, rows in _by_prefix(transaction, tables.cuts, FORK_KEY_BYTES, floor):
        void_below = dropped.get(key[:DATABASE_KEY_BYTES], 0)
        hides_import = fork_of_key(key) in imported
        lowest = ABSENT
        deleted = []
        for row in reversed(rows):
            (blocks,) = _BLOCKS.unpack(transaction.get(row, db=tables.cuts))
            lsn = _lsn(row)
            hidden = lsn <= void_below or blocks >= lowest
            if hidden or (lsn <= retired and not hides_import):
                deleted.append(row)
            lowest = min(lowest, blocks)
        _delete(transaction, tables.cuts, deleted)


def _by_prefix(
    transaction: Any, table: Any, length: int, floor: int
) -> Iterator[tuple[bytes, list[bytes]]]:
    """The keys of rows up to the floor, by their first `length` bytes."""
    keys = [key for key in transaction.cursor(table).iternext(values=False) if _lsn(key) <= floor]
    for prefix, rows in groupby(keys, key=lambda key: key[:length]):
        yield prefix, list(rows)


def _delete(transaction: Any, table: Any, rows: list[bytes]) -> None:
    for row in rows:
        transaction.delete(row, db=table)


def _lsn(key: bytes) -> int:
    lsn: int = _LSN.unpack(key[-_LSN.size :])[0]
    return lsn
