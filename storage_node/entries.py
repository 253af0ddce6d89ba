"""What the page store knows of a page's history: entries, and the keys they are found under.

An entry is one number, `start of the record | kind`: records begin at multiples of 8, so the low
three bits are free. All else about it is read from the record itself when it is applied.

A page has two keys. In memory, next to the log: the 16 bytes records name a page of a main fork by,
and one more for the fork if it is another. On disk: big-endian, so that byte order is page order.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

from boreal.types import BlockNumber, Fork, Lsn, PageKey, RelationFork
from boreal.wal.touches import RAW_KEY

FORK_KEY_BYTES: Final = 13
PAGE_KEY_BYTES: Final = 17
"""Of a page's key on disk: its fork's, then the block."""
DATABASE_KEY_BYTES: Final = 8

_FORK_KEY = struct.Struct(">IIIB")
_PAGE_KEY = struct.Struct(">IIIBI")
_DATABASE_KEY = struct.Struct(">II")
_RAW_FORK = struct.Struct("<III")
_KIND_BITS = 7


class Kind(IntEnum):
    """What an entry stands for. Stored."""

    CHANGE = 0
    """Redo of the record turns the page before into the page after; if it changes it at all."""
    BASE = 1
    """The record holds the whole page."""
    UNKNOWN = 2
    """Nobody here can tell the page after."""
    MAP_CLEAR = 3
    """The record clears bits of this visibility map page."""
    MAP_CUT = 4
    """The record truncates the heap: bits past the cut are cleared on this map page."""


_KINDS = tuple(Kind)


def start_of(entry: int) -> Lsn:
    """Where the entry's record begins."""
    return Lsn(entry & ~_KIND_BITS)


def kind_of(entry: int) -> Kind:
    """What the record does to the page."""
    return _KINDS[entry & _KIND_BITS]


def raw_key(page: PageKey) -> bytes:
    """The key in memory."""
    fork = page.relation
    key = RAW_KEY.pack(fork.tablespace, fork.database, fork.relation, page.block)
    return key if fork.fork is Fork.MAIN else key + bytes((fork.fork,))


def page_of(raw: bytes) -> PageKey:
    """The page of a key in memory."""
    tablespace, database, relation, block = RAW_KEY.unpack_from(raw)
    fork = Fork(raw[16]) if len(raw) > RAW_KEY.size else Fork.MAIN
    return PageKey(RelationFork(tablespace, database, relation, fork), BlockNumber(block))


def part_of_fork(fork: RelationFork) -> bytes:
    """The fork as keys in memory have it, without a block."""
    part = _RAW_FORK.pack(fork.tablespace, fork.database, fork.relation)
    return part if fork.fork is Fork.MAIN else part + bytes((fork.fork,))


def fork_part(raw: bytes) -> bytes:
    """A key in memory without its block."""
    return raw[:12] if len(raw) == RAW_KEY.size else raw[:12] + raw[16:]


def fork_of_part(part: bytes) -> RelationFork:
    """The fork a `fork_part` stands for."""
    fork = Fork(part[12]) if len(part) > _RAW_FORK.size else Fork.MAIN
    tablespace, database, relation = _RAW_FORK.unpack_from(part)
    return RelationFork(tablespace, database, relation, fork)


def raw_key_of(part: bytes, block: int) -> bytes:
    """The key in memory of a block of the fork `part`."""
    return part[:12] + block.to_bytes(4, "little") + part[12:]


def page_key(page: PageKey) -> bytes:
    """The key on disk."""
    return _PAGE_KEY.pack(*page.relation, page.block)


def page_of_key(key: bytes) -> PageKey:
    """The page of a key on disk."""
    tablespace, database, relation, fork, block = _PAGE_KEY.unpack(key)
    return PageKey(RelationFork(tablespace, database, relation, Fork(fork)), BlockNumber(block))


def fork_key(fork: RelationFork) -> bytes:
    """A fork's key on disk."""
    return _FORK_KEY.pack(*fork)


def fork_of_key(key: bytes) -> RelationFork:
    """The fork of a key on disk."""
    tablespace, database, relation, fork = _FORK_KEY.unpack(key)
    return RelationFork(tablespace, database, relation, Fork(fork))


def database_key(tablespace: int, database: int) -> bytes:
    """A database's key on disk: what it has in one tablespace."""
    return _DATABASE_KEY.pack(tablespace, database)


def database_of_key(key: bytes) -> tuple[int, int]:
    """(tablespace, database) of a key on disk that begins with them."""
    tablespace, database = _DATABASE_KEY.unpack_from(key)
    return tablespace, database
