"""Redo of what takes tuples and pages out of a B-tree (nbtxlog.c).

A page is deleted in stages: its leaf becomes half dead as its downlink goes, then each page of the
subtree above it, and the leaf last, is unlinked from its siblings and left as a tombstone.
"""

from __future__ import annotations

import struct

from boreal.pages.layout import HEADER_BYTES
from boreal.wal import BlockRef, WalRecord
from storage_node.redo.btree_page import (
    ALTERNATIVE_TID,
    TUPLE_HEADER_BYTES,
    Flag,
    Opaque,
    check_is_btree,
    clear_flag,
    make_page,
    set_next,
    set_previous,
)
from storage_node.redo.btree_posting import without
from storage_node.redo.items import (
    RedoMismatch,
    delete_item,
    delete_items,
    item_bytes,
    item_range,
    overwrite_item,
    set_bounds,
    special_at,
)

_VACUUM = struct.Struct("<HH")
"""xl_btree_vacuum: ndeleted, nupdated."""
_DELETE = struct.Struct("<4xHH")
"""xl_btree_delete, the part redo needs: ndeleted, nupdated."""
_HALFDEAD = struct.Struct("<H2xIIII")
"""xl_btree_mark_page_halfdead: poffset, leafblk, leftblk, rightblk, topparent."""
_UNLINK = struct.Struct("<III4xQIII")
"""xl_btree_unlink_page: leftsib, rightsib, level, safexid; leafleftsib, leafrightsib,
leaftopparent."""
_TUPLE_HEADER = struct.Struct("<HHHH")
_DOWNLINK = struct.Struct("<HH")
"""A block number within a tuple's t_tid: high, low half."""
_U16 = struct.Struct("<H")
_U64 = struct.Struct("<Q")


def vacuum(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """VACUUM removes tuples, or rows from posting lists (btree_xlog_vacuum)."""
    _remove(page, block.data, *_VACUUM.unpack_from(record.main_data))


def delete(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """An insertion that finds no room removes dead tuples first (btree_xlog_delete)."""
    _remove(page, block.data, *_DELETE.unpack_from(record.main_data))


def _remove(page: bytearray, data: bytes, deleted: int, updated: int) -> None:
    """The data: numbers of items to delete, of posting lists to shorten, then for each of those
    the count and the indexes of TIDs to remove (xl_btree_update)."""
    check_is_btree(page)
    numbers = struct.unpack_from(f"<{deleted + updated}H", data)
    at = _U16.size * len(numbers)
    for number in numbers[deleted:]:
        (count,) = _U16.unpack_from(data, at)
        indexes = struct.unpack_from(f"<{count}H", data, at + _U16.size)
        at += _U16.size * (1 + count)
        overwrite_item(page, number, without(item_bytes(page, number), indexes))
    if deleted:
        delete_items(page, numbers[:deleted])
    clear_flag(page, Flag.HAS_GARBAGE)


def halve_leaf(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    """The empty leaf becomes half dead (btree_xlog_mark_page_halfdead)."""
    _, _, left, right, top_parent = _HALFDEAD.unpack_from(record.main_data)
    _make_half_dead(page, left, right, top_parent)


def halve_parent(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    """The parent loses the downlink, and the key of the one after it.

    The item keeps its key and takes over the next one's downlink; the next one goes.
    """
    check_is_btree(page)
    (number, *_) = _HALFDEAD.unpack_from(record.main_data)
    start, _ = item_range(page, number)
    following, _ = item_range(page, number + 1)
    page[start : start + _DOWNLINK.size] = page[following : following + _DOWNLINK.size]
    delete_item(page, number + 1)


def unlink_target(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    """The page itself becomes a tombstone (btree_xlog_unlink_page, BTPageSetDeleted).

    The transaction it holds tells from when on no scan can still come here.
    """
    left, right, level, safe_xid, *_ = _UNLINK.unpack_from(record.main_data)
    flags = Flag.DELETED | Flag.HAS_FULL_XID | (Flag.LEAF if level == 0 else 0)
    make_page(page, Opaque(left, right, level, flags))
    set_bounds(page, lower=HEADER_BYTES + _U64.size, upper=special_at(page))
    _U64.pack_into(page, HEADER_BYTES, safe_xid)


def unlink_left(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    """Its left sibling."""
    _, right, *_ = _UNLINK.unpack_from(record.main_data)
    set_next(page, right)


def unlink_right(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    """Its right sibling."""
    left, *_ = _UNLINK.unpack_from(record.main_data)
    set_previous(page, left)


def unlink_leaf(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    """The leaf of the subtree, if an inner page was unlinked: it now leads to the next one."""
    _, _, level, _, left, right, top_parent = _UNLINK.unpack_from(record.main_data)
    if level == 0:
        raise RedoMismatch("a leaf that is unlinked has no leaf below it")
    _make_half_dead(page, left, right, top_parent)


def _make_half_dead(page: bytearray, left: int, right: int, top_parent: int) -> None:
    """Only a dummy high key is left; it leads to the topmost page to be deleted with the leaf.

    (BTreeTupleSetTopParent; 0xFFFFFFFF if the leaf is alone.)
    """
    high_key = _TUPLE_HEADER.pack(
        top_parent >> 16, top_parent & 0xFFFF, 0, ALTERNATIVE_TID | TUPLE_HEADER_BYTES
    )
    make_page(page, Opaque(left, right, 0, Flag.HALF_DEAD | Flag.LEAF), [high_key])
