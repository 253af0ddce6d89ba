"""PostgreSQL 16's WAL format: bytes in, records out. Pure.

`WalDecoder` follows the log, `read_record` and `record_at` fetch one record of it,
`last_record_end` says where a log that broke off ends, `boreal.wal.touches` reads which pages the
log changes. `effects` tells what a record changes beyond the blocks it registers.
"""

from boreal.wal.decoder import WalDecoder, last_record_end, read_record, record_at
from boreal.wal.effects import (
    DatabaseCopied,
    DatabaseCreated,
    DatabaseDropped,
    Effect,
    RelationCreated,
    RelationDropped,
    RelationTruncated,
    VisibilityCleared,
    effects,
)
from boreal.wal.record import BlockRef, WalRecord
from boreal.wal.rmgr import (
    HEAP_INIT_PAGE,
    HEAP_OPERATION_MASK,
    XACT_OPERATION_MASK,
    DbaseInfo,
    Heap2Info,
    HeapInfo,
    RecordFlag,
    Rmgr,
    SmgrInfo,
    XactInfo,
    XlogInfo,
)

__all__ = [
    "HEAP_INIT_PAGE",
    "HEAP_OPERATION_MASK",
    "XACT_OPERATION_MASK",
    "BlockRef",
    "DatabaseCopied",
    "DatabaseCreated",
    "DatabaseDropped",
    "DbaseInfo",
    "Effect",
    "Heap2Info",
    "HeapInfo",
    "RecordFlag",
    "RelationCreated",
    "RelationDropped",
    "RelationTruncated",
    "Rmgr",
    "SmgrInfo",
    "VisibilityCleared",
    "WalDecoder",
    "WalRecord",
    "XactInfo",
    "XlogInfo",
    "effects",
    "last_record_end",
    "read_record",
    "record_at",
]
