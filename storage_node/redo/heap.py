"""Redo of the HEAP resource manager (heap_redo, heapam.c; structs in access/heapam_xlog.h).

Bits to clear in the visibility map are not this module's: they are effects of the record
(`boreal.wal.effects`). TRUNCATE names no page.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from boreal.wal import HEAP_INIT_PAGE, HEAP_OPERATION_MASK, BlockRef, HeapInfo, WalRecord
from storage_node.redo.heap_tuple import (
    FIRST_COMMAND,
    FIXED_PART,
    HOFF_AT,
    HOT_UPDATED,
    LOGGED_HEADER_BYTES,
    MIN_TUPLE_BYTES,
    U16,
    add_tuple,
    clear_all_visible,
    find_tuple,
    is_locked_only,
    set_all_visible,
    set_ctid,
    set_prunable,
    with_xmax,
    without_combo,
)
from storage_node.redo.items import RedoMismatch, init_page

_INSERT = struct.Struct("<HB")
"""xl_heap_insert: offset, flags."""
_CHANGE = struct.Struct("<IHBB")
"""xl_heap_delete and xl_heap_lock: xmax, offset, infobits, flags."""
_UPDATE = struct.Struct("<IHBBIH")
"""xl_heap_update: of the old tuple xmax, offset, infobits; flags; of the new one xmax, offset."""

_ALL_VISIBLE_CLEARED = 0x01
"""XLH_INSERT_..., XLH_DELETE_...; in an update the page of the old tuple (XLH_UPDATE_OLD_...)."""
_ALL_FROZEN_SET = 0x20
"""XLH_INSERT_ALL_FROZEN_SET."""
_IS_SUPER = 0x08
"""XLH_DELETE_IS_SUPER: a speculative insertion is taken back."""
_IS_PARTITION_MOVE = 0x10
_NEW_ALL_VISIBLE_CLEARED = 0x02
_PREFIX_FROM_OLD = 0x20
_SUFFIX_FROM_OLD = 0x40

_MOVED_PARTITIONS = (0xFFFF, 0xFFFF, 0xFFFD)
"""The t_ctid of a row that went to another partition (ItemPointerSetMovedPartitions)."""


def apply(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """Change `page` from before `record` to after it, all but its LSN.

    Raises RedoMismatch, LookupError or struct.error if they do not fit.
    """
    _APPLY[record.info & HEAP_OPERATION_MASK](page, record, block)


def _insert(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    number, flags = _INSERT.unpack_from(record.main_data)
    if record.info & HEAP_INIT_PAGE:
        init_page(page, 0)
    add_tuple(page, block.page.block, number, block.data, xmin=record.xid)
    if flags & _ALL_VISIBLE_CLEARED:
        clear_all_visible(page)
    if flags & _ALL_FROZEN_SET:
        set_all_visible(page)


def _delete(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    new_xmax, number, infobits, flags = _CHANGE.unpack_from(record.main_data)
    start, _ = find_tuple(page, number)
    xmin, xmax, *_, infomask2, infomask = FIXED_PART.unpack_from(page, start)
    infomask2, infomask = with_xmax(infomask2, infomask, infobits)
    if flags & _IS_SUPER:
        xmin = 0
    else:
        xmax = new_xmax
    target = block.page.block
    ctid = (target >> 16, target & 0xFFFF, number)
    if flags & _IS_PARTITION_MOVE:
        ctid = _MOVED_PARTITIONS
    infomask2 &= ~HOT_UPDATED
    FIXED_PART.pack_into(
        page, start, xmin, xmax, FIRST_COMMAND, *ctid, infomask2, without_combo(infomask)
    )
    set_prunable(page, record.xid)
    if flags & _ALL_VISIBLE_CLEARED:
        clear_all_visible(page)


def _update(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """Block 0 gets the new tuple. The old one is on block 1, or on the same page if there is none.

    On the same page parts of the new tuple may be left out of the record: the old one has them.
    """
    old = None
    if block.id == 1 or len(record.blocks) == 1:
        old = _supersede(page, record)
        if block.id == 1:
            return
    elif record.info & HEAP_INIT_PAGE:
        init_page(page, 0)
    _, _, _, flags, xmax, number = _UPDATE.unpack_from(record.main_data)
    logged = block.data
    if flags & (_PREFIX_FROM_OLD | _SUFFIX_FROM_OLD):
        if old is None:
            raise RedoMismatch("the new tuple takes parts of an old one on another page")
        logged = _completed(page, old, logged, flags)
    add_tuple(page, block.page.block, number, logged, xmin=record.xid, xmax=xmax)
    if flags & _NEW_ALL_VISIBLE_CLEARED:
        clear_all_visible(page)


def _supersede(page: bytearray, record: WalRecord) -> tuple[int, int]:
    """Let the old tuple point to the new one. Returns where the old one begins, and its length."""
    xmax, number, infobits, flags, _, new_number = _UPDATE.unpack_from(record.main_data)
    old = find_tuple(page, number)
    xmin, _, _, _, _, _, infomask2, infomask = FIXED_PART.unpack_from(page, old[0])
    infomask2, infomask = with_xmax(infomask2, infomask, infobits)
    if record.info & HEAP_OPERATION_MASK == HeapInfo.HOT_UPDATE:
        infomask2 |= HOT_UPDATED
    else:
        infomask2 &= ~HOT_UPDATED
    target = record.blocks[0].page.block
    ctid = (target >> 16, target & 0xFFFF, new_number)
    FIXED_PART.pack_into(
        page, old[0], xmin, xmax, FIRST_COMMAND, *ctid, infomask2, without_combo(infomask)
    )
    set_prunable(page, record.xid)
    if flags & _ALL_VISIBLE_CLEARED:
        clear_all_visible(page)
    return old


def _completed(page: bytearray, old: tuple[int, int], data: bytes, flags: int) -> bytes:
    """The new tuple from t_infomask2 on, with what begins or ends it as it does the old one.

    The lengths of the two parts come first in `data`; the new header and its null bitmap are always
    there in full.
    """
    at = prefix = suffix = 0
    if flags & _PREFIX_FROM_OLD:
        (prefix,) = U16.unpack_from(data)
        at = 2
    if flags & _SUFFIX_FROM_OLD:
        (suffix,) = U16.unpack_from(data, at)
        at += 2
    header_end = at + LOGGED_HEADER_BYTES
    # t_hoff, the header's last byte, says where in the new tuple the null bitmap ends.
    split = header_end + data[header_end - 1] - MIN_TUPLE_BYTES
    start, length = old
    end = start + length
    values = start + page[start + HOFF_AT]
    if max(prefix, suffix) > end - values or not header_end <= split <= len(data):
        raise RedoMismatch(
            f"the old tuple of {length} bytes cannot give {prefix} and {suffix} bytes"
        )
    return b"".join(
        (data[at:split], page[values : values + prefix], data[split:], page[end - suffix : end])
    )


def _confirm(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    (number,) = U16.unpack_from(record.main_data)
    start, _ = find_tuple(page, number)
    set_ctid(page, start, block.page.block, number)


def _lock(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    new_xmax, number, infobits, _ = _CHANGE.unpack_from(record.main_data)
    start, _ = find_tuple(page, number)
    xmin, _, _, *ctid, infomask2, infomask = FIXED_PART.unpack_from(page, start)
    infomask2, infomask = with_xmax(infomask2, infomask, infobits)
    if is_locked_only(infomask):
        # No update is left: the tuple is the last of its chain.
        target = block.page.block
        ctid = [target >> 16, target & 0xFFFF, number]
        infomask2 &= ~HOT_UPDATED
    FIXED_PART.pack_into(
        page, start, xmin, new_xmax, FIRST_COMMAND, *ctid, infomask2, without_combo(infomask)
    )


def _inplace(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    (number,) = U16.unpack_from(record.main_data)
    start, length = find_tuple(page, number)
    values, end = start + page[start + HOFF_AT], start + length
    if len(block.data) != end - values:
        raise RedoMismatch(f"item {number} has {end - values} bytes, not {len(block.data)}")
    page[values:end] = block.data


_APPLY: Final[dict[int, Callable[[bytearray, WalRecord, BlockRef], None]]] = {
    HeapInfo.INSERT: _insert,
    HeapInfo.DELETE: _delete,
    HeapInfo.UPDATE: _update,
    HeapInfo.HOT_UPDATE: _update,
    HeapInfo.CONFIRM: _confirm,
    HeapInfo.LOCK: _lock,
    HeapInfo.INPLACE: _inplace,
}
