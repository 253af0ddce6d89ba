"""Redo's first form: take the page as the record itself carries it.

Under `wal_consistency_checking` PostgreSQL adds to each record an image of every block *after* the
change (xloginsert.c, XLogRecordAssemble). Its own redo uses such an image only to check its result;
here it is the result, once two things the image cannot hold are put right: the page's LSN, which is
known only after the record has been inserted, and what GiST does to a left child even later.
"""

from __future__ import annotations

import struct

from boreal.errors import IngestStopped
from boreal.pages.layout import PageHeader, is_zero, set_page_lsn
from boreal.types import format_lsn
from boreal.wal import HEAP_OPERATION_MASK, BlockRef, Heap2Info, Rmgr, WalRecord, XlogInfo
from storage_node.redo import Step

_IMAGED = frozenset(
    {
        Rmgr.HEAP2,
        Rmgr.HEAP,
        Rmgr.BTREE,
        Rmgr.GIN,
        Rmgr.GIST,
        Rmgr.SEQ,
        Rmgr.SPGIST,
        Rmgr.BRIN,
        Rmgr.GENERIC,
    }
)
"""Resource managers whose every block reference the writer must send with an image. Hash is not
among them: with hash in the setting, PostgreSQL 16 writes records with a wrong checksum."""

_GIST_PAGE_UPDATE = 0x00
_GIST_PAGE_SPLIT = 0x30
_GIST_OPAQUE = struct.Struct("<IIIH")
"""GISTPageOpaqueData (access/gist.h): NSN (high, low), right link, flags; a page id follows."""
_GIST_FOLLOW_RIGHT = 1 << 3


class AfterImageRedo:
    """Implements `Redo` by full-page images and after-images alone."""

    def step(self, record: WalRecord, block: BlockRef) -> Step:
        """See `Redo.step`."""
        if block.has_image:
            # A compressed one is only met if a superuser turned wal_compression on.
            return Step.UNKNOWN if block.compressed else Step.BASE
        if record.rmgr == Rmgr.HASH:
            return Step.UNKNOWN
        if record.rmgr == Rmgr.XLOG and record.info == XlogInfo.FPI_FOR_HINT:
            # Nothing but hint bits: the writer leaves the image out when it is not needed.
            return Step.NOTHING
        reason = "lacks the image" if record.rmgr in _IMAGED else "unexpectedly names"
        raise IngestStopped(
            f"the record at {format_lsn(record.start)} (resource manager {record.rmgr}, info "
            f"{record.info:#04x}) {reason} of {block.page}. The writer must run with "
            "wal_consistency_checking for every resource manager but hash",
            lsn=record.start,
        )

    def apply(self, page: bytearray, record: WalRecord, block: BlockRef) -> None:
        """See `Redo.apply`. Never stamps an all-zero page (xlogutils.c: PageIsNew)."""
        page[:] = block.restore_image()
        if is_zero(page):
            return
        if block.apply_image or not _keeps_its_lsn(record, block):
            set_page_lsn(page, record.end)
        if _is_gist_left_child(record, block):
            _finish_gist_split(page, record.end)


def _keeps_its_lsn(record: WalRecord, block: BlockRef) -> bool:
    """Setting PD_ALL_VISIBLE on a heap page leaves its LSN alone (heapam.c, heap_xlog_visible)."""
    return (
        block.id == 1
        and record.rmgr == Rmgr.HEAP2
        and record.info & HEAP_OPERATION_MASK == Heap2Info.VISIBLE
    )


def _is_gist_left_child(record: WalRecord, block: BlockRef) -> bool:
    """Whether gistRedoClearFollowRight runs on the block (gistxlog.c)."""
    return record.rmgr == Rmgr.GIST and (record.info, block.id) in {
        (_GIST_PAGE_UPDATE, 1),
        (_GIST_PAGE_SPLIT, 0),
    }


def _finish_gist_split(page: bytearray, lsn: int) -> None:
    """What gistplacetopage does to the left child once the downlink's record has its LSN."""
    special = PageHeader.of(page).special
    _, _, right_link, flags = _GIST_OPAQUE.unpack_from(page, special)
    flags &= ~_GIST_FOLLOW_RIGHT
    _GIST_OPAQUE.pack_into(page, special, lsn >> 32, lsn & 0xFFFFFFFF, right_link, flags)
