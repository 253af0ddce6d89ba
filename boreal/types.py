"""The domain's words as types. Plain values: no I/O, no clock."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple, NewType

Lsn = NewType("Lsn", int)
"""A byte position in the volume's log, which is PostgreSQL's WAL byte stream."""

Epoch = NewType("Epoch", int)
"""A volume epoch: one writer incarnation. Allocated by the control plane, only ever growing."""

VolumeId = NewType("VolumeId", str)
NodeName = NewType("NodeName", str)
"""A storage node: `sn-1` ... `sn-6`."""
InstanceName = NewType("InstanceName", str)
"""A compute node: `db-1` ..."""

BlockNumber = NewType("BlockNumber", int)
Timeline = NewType("Timeline", int)

KEPT_BUNDLES = 3
"""How many bundles of a volume a storage node keeps: the newest ones."""

PAGE_BYTES = 8192
"""BLCKSZ and XLOG_BLCKSZ of the pinned engine."""
WAL_SEGMENT_BYTES = 16 * 1024 * 1024
RELATION_SEGMENT_BLOCKS = 131072
"""Blocks in one relation segment file (RELSEG_SIZE: 1 GiB)."""


class Fork(IntEnum):
    """PostgreSQL's ForkNumber (common/relpath.h)."""

    MAIN = 0
    FSM = 1
    VM = 2
    INIT = 3

    @property
    def suffix(self) -> str:
        """What the fork's file name carries after the relation number: `_vm`, or nothing."""
        return "" if self is Fork.MAIN else f"_{self.name.lower()}"


class RelationFork(NamedTuple):
    """One fork of one relation: RelFileLocator plus fork. Orders as its storage key does."""

    tablespace: int
    database: int
    relation: int
    fork: Fork

    def __str__(self) -> str:
        return f"{self.tablespace}/{self.database}/{self.relation}{self.fork.suffix}"


class PageKey(NamedTuple):
    """One page of the volume."""

    relation: RelationFork
    block: BlockNumber

    def __str__(self) -> str:
        return f"{self.relation}:{self.block}"


def format_lsn(lsn: int) -> str:
    """Write an LSN as PostgreSQL does: `0/16B3748`."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> Lsn:
    """Read `0/16B3748`; ValueError if it is not of that form."""
    high, _, low = text.partition("/")
    return Lsn(int(high, 16) << 32 | int(low, 16))


def record_end_before(insert: int) -> Lsn:
    """The end of the last record, from PostgreSQL's insert position.

    That position is where the next record begins: behind the page's header if the last record ended
    exactly with its page (XLogBytePosToRecPtr, xlog.c; the header sizes are xlog_internal.h's).
    """
    header = 40 if insert % WAL_SEGMENT_BYTES < PAGE_BYTES else 24
    return Lsn(insert - header if insert % PAGE_BYTES == header else insert)


def wal_segment_start(lsn: int) -> Lsn:
    """The first byte of the WAL segment that holds `lsn`."""
    return Lsn(lsn - lsn % WAL_SEGMENT_BYTES)


def wal_file_name(timeline: int, lsn: int) -> str:
    """The name of the WAL segment file that holds `lsn` (XLogFileName, xlog_internal.h)."""
    segment = lsn // WAL_SEGMENT_BYTES
    per_id = 0x1_0000_0000 // WAL_SEGMENT_BYTES
    return f"{timeline:08X}{segment // per_id:08X}{segment % per_id:08X}"
