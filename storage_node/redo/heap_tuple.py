"""Heap tuples on their page: finding one, its header's fields, the page's hints about visibility.

Layout and bits are those of HeapTupleHeaderData (access/htup_details.h) and PageHeaderData
(storage/bufpage.h). A tuple is named by its line pointer's number, as in PostgreSQL.
"""

from __future__ import annotations

import struct
from typing import Final

from boreal.types import PAGE_BYTES
from storage_node.redo.items import LP_NORMAL, RedoMismatch, add_item, is_new

MIN_TUPLE_BYTES: Final = 23
"""SizeofHeapTupleHeader: up to and with t_hoff; the null bitmap and data follow."""
LOGGED_HEADER_BYTES: Final = 5
"""SizeOfHeapHeader (xl_heap_header): t_infomask2, t_infomask, t_hoff, as they end the header."""

FIXED_PART: Final = struct.Struct("<IIIHHHHH")
"""xmin, xmax, command id, t_ctid (block's upper and lower half, offset), t_infomask2, t_infomask.
t_hoff comes next."""
_BEFORE_INFOMASKS = struct.Struct("<IIIHHH")
_CTID = struct.Struct("<HHH")
U16: Final = struct.Struct("<H")
U32: Final = struct.Struct("<I")

XMAX_AT: Final = 4
_CTID_AT = 12
INFOMASK2_AT: Final = 18
HOFF_AT: Final = 22

# t_infomask
_KEY_SHARE_LOCK = 0x0010
_COMBO_CID = 0x0020
_EXCLUSIVE_LOCK = 0x0040
_LOCK_ONLY = 0x0080
_IS_MULTI = 0x1000
_LOCK_MASK = _KEY_SHARE_LOCK | _EXCLUSIVE_LOCK
_XMAX_BITS = 0x0C00 | _IS_MULTI | _LOCK_MASK | _LOCK_ONLY
_MOVED = 0xC000
# t_infomask2
KEYS_UPDATED: Final = 0x2000
HOT_UPDATED: Final = 0x4000

FIRST_COMMAND: Final = 0
"""FirstCommandId, which redo puts wherever a transaction had its own."""

_POINTERS_AT = 24
_LOWER_AT = 12
_FLAGS_AT = 10
_ALL_VISIBLE = 0x04
_PRUNE_XID_AT = 20
_FIRST_NORMAL_XID = 3


def _bits_told(infobits: int) -> tuple[int, int]:
    """What XLHL_* bits stand for in t_infomask and t_infomask2 (fix_infomask_from_infobits)."""
    told = (_IS_MULTI, _LOCK_ONLY, _EXCLUSIVE_LOCK, _KEY_SHARE_LOCK)
    infomask = sum(bit for place, bit in enumerate(told) if infobits >> place & 1)
    return infomask, KEYS_UPDATED if infobits >> len(told) & 1 else 0


_BITS_TOLD = tuple(_bits_told(infobits) for infobits in range(32))


def find_tuple(page: bytearray, number: int) -> tuple[int, int]:
    """Where the tuple begins, and its length. RedoMismatch if that item is not a tuple."""
    at = _POINTERS_AT - 4 + number * 4
    if number < 1 or at >= U16.unpack_from(page, _LOWER_AT)[0]:
        raise RedoMismatch(f"there is no item {number}")
    pointer: int = U32.unpack_from(page, at)[0]
    start, length = pointer & 0x7FFF, pointer >> 17
    if pointer >> 15 & 3 != LP_NORMAL or length < MIN_TUPLE_BYTES or start + length > PAGE_BYTES:
        raise RedoMismatch(f"item {number} is not a tuple")
    return start, length


def add_tuple(
    page: bytearray, block: int, number: int, logged: bytes, *, xmin: int, xmax: int = 0
) -> None:
    """Store a new version that points to itself.

    `logged` is the tuple from t_infomask2 on, as the log has it. (A tuple that was just formed has
    no combo command id to clear.) RedoMismatch if that item is in use or the tuple does not fit.
    """
    if number < 1 or len(logged) < LOGGED_HEADER_BYTES:
        raise RedoMismatch(f"the record gives {len(logged)} bytes for item {number}")
    header = _BEFORE_INFOMASKS.pack(xmin, xmax, FIRST_COMMAND, block >> 16, block & 0xFFFF, number)
    add_item(page, header + logged, number, overwrite=True, heap=True)


def with_xmax(infomask2: int, infomask: int, infobits: int) -> tuple[int, int]:
    """The masks of a tuple that gets another xmax, which the record tells of by `infobits`."""
    infomask_told, infomask2_told = _BITS_TOLD[infobits & 31]
    return (
        infomask2 & ~KEYS_UPDATED | infomask2_told,
        infomask & ~(_XMAX_BITS | _MOVED) & 0xFFFF | infomask_told,
    )


def without_combo(infomask: int) -> int:
    """The mask of a tuple that gets a plain command id (HeapTupleHeaderSetCmax)."""
    return infomask & ~_COMBO_CID


def is_locked_only(infomask: int) -> bool:
    """Whether xmax, if valid, only locks (HEAP_XMAX_IS_LOCKED_ONLY)."""
    return bool(infomask & _LOCK_ONLY or infomask & (_IS_MULTI | _LOCK_MASK) == _EXCLUSIVE_LOCK)


def set_ctid(page: bytearray, start: int, block: int, number: int) -> None:
    """Let the tuple at `start` point to this item."""
    _CTID.pack_into(page, start + _CTID_AT, block >> 16, block & 0xFFFF, number)


def set_prunable(page: bytearray, xid: int) -> None:
    """Lower pd_prune_xid to `xid` (PageSetPrunable)."""
    before: int = U32.unpack_from(page, _PRUNE_XID_AT)[0]
    if before == 0 or _precedes(xid, before):
        U32.pack_into(page, _PRUNE_XID_AT, xid)


def _precedes(one: int, other: int) -> bool:
    """TransactionIdPrecedes: normal ids are compared on their circle."""
    if one < _FIRST_NORMAL_XID or other < _FIRST_NORMAL_XID:
        return one < other
    return (one - other) & 0xFFFFFFFF >= 0x80000000


def clear_all_visible(page: bytearray) -> None:
    """Clear PD_ALL_VISIBLE."""
    page[_FLAGS_AT] &= ~_ALL_VISIBLE


def set_all_visible(page: bytearray) -> None:
    """Set PD_ALL_VISIBLE. RedoMismatch if the page was never initialized."""
    if is_new(page):
        raise RedoMismatch("the page was never initialized")
    page[_FLAGS_AT] |= _ALL_VISIBLE
