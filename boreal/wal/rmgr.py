"""Resource managers and the record kinds storage must know by name (access/rmgrlist.h and friends).

A record's kind is `(record.rmgr, record.info)`. Only kinds that matter beyond their own redo are
named here: those that change pages they do not register, and those the log's framing depends on.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag


class Rmgr(IntEnum):
    """RM_*_ID: the order of access/rmgrlist.h."""

    XLOG = 0
    XACT = 1
    SMGR = 2
    CLOG = 3
    DBASE = 4
    TBLSPC = 5
    MULTIXACT = 6
    RELMAP = 7
    STANDBY = 8
    HEAP2 = 9
    HEAP = 10
    BTREE = 11
    HASH = 12
    GIN = 13
    GIST = 14
    SEQ = 15
    SPGIST = 16
    BRIN = 17
    COMMIT_TS = 18
    REPLORIGIN = 19
    GENERIC = 20
    LOGICALMSG = 21


FIRST_CUSTOM_RMGR = 128
"""RM_MIN_CUSTOM_ID (access/rmgr.h): from here on an extension's, which storage cannot know."""


class XlogInfo(IntEnum):
    """catalog/pg_control.h."""

    CHECKPOINT_SHUTDOWN = 0x00
    CHECKPOINT_ONLINE = 0x10
    NOOP = 0x20
    NEXTOID = 0x30
    SWITCH = 0x40
    BACKUP_END = 0x50
    PARAMETER_CHANGE = 0x60
    RESTORE_POINT = 0x70
    FPW_CHANGE = 0x80
    END_OF_RECOVERY = 0x90
    FPI_FOR_HINT = 0xA0
    FPI = 0xB0
    OVERWRITE_CONTRECORD = 0xD0


XACT_OPERATION_MASK = 0x70
"""XLOG_XACT_OPMASK (access/xact.h)."""
XACT_HAS_INFO = 0x80
"""XLOG_XACT_HAS_INFO: an `xinfo` word follows the fixed part."""


class XactInfo(IntEnum):
    """access/xact.h; compare after `& XACT_OPERATION_MASK`."""

    COMMIT = 0x00
    PREPARE = 0x10
    ABORT = 0x20
    COMMIT_PREPARED = 0x30
    ABORT_PREPARED = 0x40
    ASSIGNMENT = 0x50
    INVALIDATIONS = 0x60


class SmgrInfo(IntEnum):
    """catalog/storage_xlog.h."""

    CREATE = 0x10
    TRUNCATE = 0x20


class DbaseInfo(IntEnum):
    """commands/dbcommands_xlog.h."""

    CREATE_FILE_COPY = 0x00
    CREATE_WAL_LOG = 0x10
    DROP = 0x20


HEAP_OPERATION_MASK = 0x70
"""XLOG_HEAP_OPMASK (access/heapam_xlog.h), for HEAP and HEAP2."""
HEAP_INIT_PAGE = 0x80
"""XLOG_HEAP_INIT_PAGE: redo builds the page anew."""


class HeapInfo(IntEnum):
    """access/heapam_xlog.h; compare after `& HEAP_OPERATION_MASK`."""

    INSERT = 0x00
    DELETE = 0x10
    UPDATE = 0x20
    TRUNCATE = 0x30
    HOT_UPDATE = 0x40
    CONFIRM = 0x50
    LOCK = 0x60
    INPLACE = 0x70


class Heap2Info(IntEnum):
    """access/heapam_xlog.h; compare after `& HEAP_OPERATION_MASK`."""

    REWRITE = 0x00
    PRUNE = 0x10
    VACUUM = 0x20
    FREEZE_PAGE = 0x30
    VISIBLE = 0x40
    MULTI_INSERT = 0x50
    LOCK_UPDATED = 0x60
    NEW_CID = 0x70


class RecordFlag(IntFlag):
    """The low bits of xl_info (access/xlogrecord.h); `WalRecord.flags`."""

    SPECIAL_REL_UPDATE = 0x01
    CHECK_CONSISTENCY = 0x02
    """Every registered block carries an image of itself after the change."""
