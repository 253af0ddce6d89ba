"""What happened to whole forks and databases, by LSN: sizes, cuts, drops, copies.

Three histories, each of (key, LSN) -> value: sizes and cuts by fork, databases by (tablespace,
database). What is not sealed yet is in memory (`Facts`), the rest in LMDB tables under
`key + LSN`, big-endian, so that "the newest at or below this LSN" is one seek. A view looks at the
memory first: what is there is newer than anything on disk, or the same.

Whatever happens at an LSN is part of every state at or past it.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Final, NamedTuple

from boreal.types import Lsn, PageKey, RelationFork
from storage_node.entries import (
    DATABASE_KEY_BYTES,
    FORK_KEY_BYTES,
    database_key,
    database_of_key,
    fork_key,
    fork_of_key,
)

ABSENT: Final = 0xFFFFFFFF
"""The size of a fork that does not exist."""
_TOP = b"\xff" * 8
_BLOCKS = struct.Struct(">I")
_SOURCE = struct.Struct(">II")
_LSN = struct.Struct(">Q")
_at = itemgetter(0)

History = dict[bytes, list[tuple[int, bytes]]]
"""By key: (LSN, value), ascending."""


class Ground(NamedTuple):
    """What lies beneath a page's history: only what is at or past `since` counts.

    `source` is the page this one was copied from (as of `since`); if there is none the page began
    as zeros, or, with `imported`, as the imported page.
    """

    since: Lsn
    source: PageKey | None = None
    imported: bool = False


@dataclass(slots=True)
class Facts:
    """What a stretch of log adds to the three histories."""

    sizes: History = field(default_factory=dict)
    cuts: History = field(default_factory=dict)
    databases: History = field(default_factory=dict)

    def resize(self, fork: RelationFork, lsn: int, blocks: int | None) -> None:
        """From `lsn` on the fork has so many blocks; None: it does not exist."""
        value = _BLOCKS.pack(ABSENT if blocks is None else blocks)
        self.sizes.setdefault(fork_key(fork), []).append((lsn, value))

    def cut(self, fork: RelationFork, lsn: int, blocks: int) -> None:
        """Whatever the fork held at or past `blocks` before `lsn` is gone for good."""
        self.cuts.setdefault(fork_key(fork), []).append((lsn, _BLOCKS.pack(blocks)))

    def drop_database(self, tablespace: int, database: int, lsn: int) -> None:
        """From `lsn` on nothing of the database's past is left in the tablespace."""
        self.databases.setdefault(database_key(tablespace, database), []).append((lsn, b""))

    def copy_database(
        self, source: tuple[int, int], tablespace: int, database: int, lsn: int
    ) -> None:
        """At `lsn` the (tablespace, database) `source` was copied, file by file."""
        key = database_key(tablespace, database)
        self.databases.setdefault(key, []).append((lsn, _SOURCE.pack(*source)))

    def cut_back(self, end: int) -> None:
        """Take out what happened after `end`."""
        for name in FACT_TABLES:
            history: History = getattr(self, name)
            for key, items in list(history.items()):
                while items and items[-1][0] > end:
                    items.pop()
                if not items:
                    del history[key]

    def rows(self) -> Iterator[tuple[str, list[tuple[bytes, bytes]]]]:
        """What goes into each table."""
        for name in FACT_TABLES:
            history: History = getattr(self, name)
            yield (
                name,
                [
                    (key + _LSN.pack(lsn), value)
                    for key, items in history.items()
                    for lsn, value in items
                ],
            )


FACT_TABLES: Final = ("sizes", "cuts", "databases")


class _Table:
    """One history over all its parts."""

    def __init__(self, cursor: Any, memory: Sequence[History]) -> None:
        self._cursor = cursor
        self._memory = [history for history in memory if history]

    def last(self, key: bytes, lsn: int) -> tuple[int, bytes] | None:
        """The newest (LSN, value) at or below `lsn`."""
        for history in self._memory:
            items = history.get(key)
            if items:
                number = bisect_right(items, lsn, key=_at)
                if number:
                    return items[number - 1]
        found = seek_last(self._cursor, key + _LSN.pack(lsn), len(key))
        return None if found is None else (_LSN.unpack(found[0][len(key) :])[0], found[1])

    def keys(self, within: bytes, length: int) -> set[bytes]:
        """The first `length` bytes of every key that begins with `within`."""
        found = set(_prefixes(self._cursor, within, length))
        for history in self._memory:
            found |= {key[:length] for key in history if key.startswith(within)}
        return found


class FactView:
    """All facts as of one LMDB transaction, for any LSN from the trimmed one to the indexed."""

    def __init__(self, cursors: Sequence[Any], memory: Sequence[Facts], imported_lsn: Lsn) -> None:
        """`cursors` in the order of FACT_TABLES; `memory` newest first."""
        sizes, cuts, databases = cursors
        self._sizes = _Table(sizes, [facts.sizes for facts in memory])
        self._cuts = _Table(cuts, [facts.cuts for facts in memory])
        self._databases = _Table(databases, [facts.databases for facts in memory])
        self._imported_lsn = imported_lsn

    def size(self, fork: RelationFork, lsn: int) -> int | None:
        """The fork's size in blocks; None where it does not exist."""
        own = self._own_size(fork_key(fork), lsn)
        event = self._database_event(fork.tablespace, fork.database, lsn)
        if event is None or (own is not None and own[0] >= event[0]):
            return own[1] if own is not None else None
        at, source = event
        return None if source is None else self.size(_moved(fork, source), at - 1)

    def ground(self, page: PageKey, lsn: int) -> Ground:
        """The newest thing at or below `lsn` that made all the page's earlier history void."""
        fork, block = page
        cut = self._cut(fork, block, lsn)
        event = self._database_event(fork.tablespace, fork.database, lsn)
        if event is not None and event[0] > cut:
            at, source = event
            if source is None:
                return Ground(Lsn(at))
            return Ground(Lsn(at), PageKey(_moved(fork, source), block))
        return Ground(Lsn(cut)) if cut else Ground(self._imported_lsn, imported=True)

    def latest_ground(self, fork: RelationFork, lsn: int) -> int:
        """No page of the fork has a newer ground as of `lsn` than one at this LSN."""
        cut = self._cuts.last(fork_key(fork), lsn)
        event = self._database_event(fork.tablespace, fork.database, lsn)
        return max(
            self._imported_lsn, 0 if cut is None else cut[0], 0 if event is None else event[0]
        )

    def relations(self, lsn: int) -> dict[RelationFork, int]:
        """Every fork that exists at `lsn`, with its size in blocks."""
        keys = self._sizes.keys(b"", DATABASE_KEY_BYTES) | self._databases.keys(
            b"", DATABASE_KEY_BYTES
        )
        found: dict[RelationFork, int] = {}
        for key in sorted(keys):
            found |= self.relations_of(*database_of_key(key), lsn)
        return found

    def relations_of(self, tablespace: int, database: int, lsn: int) -> dict[RelationFork, int]:
        """... of what a database has in one tablespace."""
        event = self._database_event(tablespace, database, lsn)
        found: dict[RelationFork, int] = {}
        if event is not None and event[1] is not None:
            copied = self.relations_of(*event[1], event[0] - 1)
            found = {_moved(fork, (tablespace, database)): n for fork, n in copied.items()}
        for key in self._sizes.keys(database_key(tablespace, database), FORK_KEY_BYTES):
            own = self._own_size(key, lsn)
            if own is None or (event is not None and own[0] < event[0]):
                continue
            fork = fork_of_key(key)
            if own[1] is None:
                found.pop(fork, None)
            else:
                found[fork] = own[1]
        return found

    def copies(self, lsn: int) -> list[tuple[int, tuple[int, int], tuple[int, int]]]:
        """Copies made at or below `lsn` that are still to be carried out, oldest first.

        (LSN, source, copy), each database with its tablespace first.
        """
        found = []
        for key in self._databases.keys(b"", DATABASE_KEY_BYTES):
            event = self._database_event(*database_of_key(key), lsn)
            while event is not None:
                if event[1] is not None:
                    found.append((event[0], event[1], database_of_key(key)))
                event = self._database_event(*database_of_key(key), event[0] - 1)
        return sorted(found)

    def _own_size(self, key: bytes, lsn: int) -> tuple[int, int | None] | None:
        found = self._sizes.last(key, lsn)
        if found is None:
            return None
        (blocks,) = _BLOCKS.unpack(found[1])
        return found[0], None if blocks == ABSENT else blocks

    def _database_event(
        self, tablespace: int, database: int, lsn: int
    ) -> tuple[int, tuple[int, int] | None] | None:
        found = self._databases.last(database_key(tablespace, database), lsn)
        if found is None:
            return None
        return found[0], _SOURCE.unpack(found[1]) if found[1] else None

    def _cut(self, fork: RelationFork, block: int, lsn: int) -> int:
        """The newest cut at or below `lsn` that took `block`; 0 if none did."""
        key = fork_key(fork)
        found = self._cuts.last(key, lsn)
        while found is not None:
            at, value = found
            if _BLOCKS.unpack(value)[0] <= block:
                return at
            found = self._cuts.last(key, at - 1)
        return 0


def initial_sizes(forks: Iterable[tuple[RelationFork, int]], lsn: int) -> Facts:
    """The sizes a volume begins with."""
    facts = Facts()
    for fork, blocks in forks:
        facts.resize(fork, lsn, blocks)
    return facts


def _moved(fork: RelationFork, database: tuple[int, int]) -> RelationFork:
    return fork._replace(tablespace=database[0], database=database[1])


def seek_last(cursor: Any, key: bytes, prefix: int) -> tuple[bytes, bytes] | None:
    """The last item at or below `key` that shares its first `prefix` bytes."""
    if cursor.set_range(key):
        if cursor.key() != key and not cursor.prev():
            return None
    elif not cursor.last():
        return None
    item: tuple[bytes, bytes] = cursor.item()
    return item if item[0][:prefix] == key[:prefix] else None


def _prefixes(cursor: Any, within: bytes, length: int) -> Iterator[bytes]:
    """The distinct key prefixes of `length` bytes that begin with `within`, in order."""
    found = cursor.set_range(within) if within else cursor.first()
    while found:
        key: bytes = cursor.key()[:length]
        if not key.startswith(within):
            return
        yield key
        found = cursor.set_range(key + _TOP * 2)
