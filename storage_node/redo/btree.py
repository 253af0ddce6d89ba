"""Redo of B-tree records: what PostgreSQL 16 (btree_redo, nbtxlog.c) does to each of their blocks.

No block needs another's page: PostgreSQL repeats in the record what it would have to look up
there, such as the left page's high key in a split. Every block registered is changed, so there is
no `touches`. Structs are those of access/nbtxlog.h. Vacuum cycles, which are meaningless after a
crash, are left zero as redo does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from boreal.wal import BlockRef, WalRecord
from storage_node.redo import btree_delete
from storage_node.redo.btree_meta import restore_meta
from storage_node.redo.btree_page import (
    NO_PAGE,
    Flag,
    Opaque,
    check_is_btree,
    clear_flag,
    cut_tuple,
    logged_items,
    make_page,
    opaque_of,
    set_previous,
    stored_items,
)
from storage_node.redo.btree_posting import merge, swap_posting
from storage_node.redo.items import RedoMismatch, add_item, item_range

INSERT_LEAF = 0x00
INSERT_UPPER = 0x10
INSERT_META = 0x20
SPLIT_L = 0x30
SPLIT_R = 0x40
INSERT_POST = 0x50
DEDUP = 0x60
DELETE = 0x70
UNLINK_PAGE = 0x80
UNLINK_PAGE_META = 0x90
NEWROOT = 0xA0
MARK_PAGE_HALFDEAD = 0xB0
VACUUM = 0xC0
META_CLEANUP = 0xE0

_U16 = struct.Struct("<H")
_SPLIT = struct.Struct("<IHHH")
"""xl_btree_split: level, firstrightoff, newitemoff, postingoff."""
_NEWROOT = struct.Struct("<II")
"""xl_btree_newroot: rootblk, level."""


def apply(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """Change `page` in place from before `record` to after it, all but its LSN.

    Raises RedoMismatch, struct.error or IndexError if the two do not fit; the page is then spoilt.
    """
    redo = _REDO.get((record.info, block.id))
    if redo is None:
        raise RedoMismatch(f"no B-tree record {record.info:#04x} has a block {block.id}")
    redo(page, record, block)


def _insert(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    check_is_btree(page)
    add_item(page, block.data, _new_item_number(record))


def _insert_into_posting(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """The new tuple falls within the list before its place: see `swap_posting`."""
    check_is_btree(page)
    number = _new_item_number(record)
    data = block.data
    (split_at,) = _U16.unpack_from(data)
    new = cut_tuple(data, _U16.size)
    start, length = item_range(page, number - 1)
    final, posting = swap_posting(new, bytes(page[start : start + length]), split_at)
    page[start : start + length] = posting
    add_item(page, final, number)


def _new_item_number(record: WalRecord) -> int:
    """xl_btree_insert's offnum. Zero, which would mean any free place, is never logged."""
    number: int = _U16.unpack_from(record.main_data)[0]
    if number == 0:
        raise RedoMismatch("the record does not say where its tuple goes")
    return number


def _finish_split(page: bytearray, _record: WalRecord, _block: BlockRef) -> None:
    """The record inserts the downlink that a split of this page left out so far."""
    if not opaque_of(page).flags & Flag.INCOMPLETE_SPLIT:
        raise RedoMismatch("the page's split is not incomplete")
    clear_flag(page, Flag.INCOMPLETE_SPLIT)


def _split_left(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """The original page, which keeps what is left of the split point (btree_xlog_split).

    It is built anew, in item order, so that items lie where the original's split put them.
    """
    level, first_right, new_number, split_at = _SPLIT.unpack_from(record.main_data)
    new_on_left = record.info == SPLIT_L
    new, high_key = _logged_for_left(block.data, has_new=new_on_left or split_at != 0)
    opaque = opaque_of(page)
    first = opaque.first_data_item
    items = stored_items(page)
    if not first <= first_right <= len(items) + 1:
        raise RedoMismatch(f"a page of {len(items)} items is not split at {first_right}")
    if split_at:
        # Of the two tuples that come of it, the second may go to the right page.
        on_left = new_number <= first_right if new_on_left else new_number == first_right
        if not (on_left and new_number > first):
            raise RedoMismatch(f"there is no posting list before item {new_number}")
        new, items[new_number - 2] = swap_posting(new, items[new_number - 2], split_at)
    kept = items[first - 1 : first_right - 1]
    if new_on_left:
        if not first <= new_number <= first_right:
            raise RedoMismatch(f"item {new_number} is not on the left of {first_right}")
        kept.insert(new_number - first, new)
    flags = Flag.INCOMPLETE_SPLIT | (Flag.LEAF if level == 0 else 0)
    right = _block_number(record, 1)
    make_page(page, opaque._replace(next=right, flags=flags), [high_key, *kept])


def _logged_for_left(data: bytes, *, has_new: bool) -> tuple[bytes, bytes]:
    """The new tuple (empty if there is none), and the left page's high key."""
    new = cut_tuple(data, 0) if has_new else b""
    high_key = cut_tuple(data, len(new))
    if len(new) + len(high_key) != len(data):
        raise RedoMismatch("the record has more for the left page than it ought to")
    return new, high_key


def _split_right(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """The new page, on the right of the original."""
    (level, *_) = _SPLIT.unpack_from(record.main_data)
    neighbour = record.block(2)
    opaque = Opaque(
        previous=_block_number(record, 0),
        next=NO_PAGE if neighbour is None else neighbour.page.block,
        level=level,
        flags=Flag.LEAF if level == 0 else 0,
    )
    make_page(page, opaque, logged_items(block.data))


def _split_neighbour(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    """The page that was the original's right sibling."""
    set_previous(page, _block_number(record, 1))


def _deduplicate(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """Merge each interval of tuples into one; the others stay as they are (btree_xlog_dedup)."""
    (count,) = _U16.unpack_from(record.main_data)
    numbers = struct.unpack_from(f"<{2 * count}H", block.data)  # first item, number of items
    opaque = opaque_of(page)
    items = stored_items(page)
    done = opaque.first_data_item - 1
    result = items[:done]
    for first, length in zip(numbers[::2], numbers[1::2], strict=True):
        begin, end = first - 1, first - 1 + length
        if begin < done or length < 2 or end > len(items):
            raise RedoMismatch(f"{length} items from {first} on cannot be merged")
        result += items[done:begin]
        result.append(merge(items[begin:end]))
        done = end
    result += items[done:]
    make_page(page, opaque._replace(flags=opaque.flags & ~Flag.HAS_GARBAGE), result)


def _new_root(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """A root above the two halves of the old one, or the first, empty one (btree_xlog_newroot)."""
    _, level = _NEWROOT.unpack_from(record.main_data)
    flags = Flag.ROOT | (Flag.LEAF if level == 0 else 0)
    items = logged_items(block.data) if level else []
    make_page(page, Opaque(NO_PAGE, NO_PAGE, level, flags), items)


def _block_number(record: WalRecord, block_id: int) -> int:
    block = record.block(block_id)
    if block is None:
        raise RedoMismatch(f"the record has no block {block_id}")
    return block.page.block


_REDO: Final[dict[tuple[int, int], Callable[[bytearray, WalRecord, BlockRef], None]]] = {
    (INSERT_LEAF, 0): _insert,
    (INSERT_UPPER, 0): _insert,
    (INSERT_UPPER, 1): _finish_split,
    (INSERT_META, 0): _insert,
    (INSERT_META, 1): _finish_split,
    (INSERT_META, 2): restore_meta,
    (SPLIT_L, 0): _split_left,
    (SPLIT_L, 1): _split_right,
    (SPLIT_L, 2): _split_neighbour,
    (SPLIT_L, 3): _finish_split,
    (SPLIT_R, 0): _split_left,
    (SPLIT_R, 1): _split_right,
    (SPLIT_R, 2): _split_neighbour,
    (SPLIT_R, 3): _finish_split,
    (INSERT_POST, 0): _insert_into_posting,
    (DEDUP, 0): _deduplicate,
    (DELETE, 0): btree_delete.delete,
    (VACUUM, 0): btree_delete.vacuum,
    (UNLINK_PAGE, 0): btree_delete.unlink_target,
    (UNLINK_PAGE, 1): btree_delete.unlink_left,
    (UNLINK_PAGE, 2): btree_delete.unlink_right,
    (UNLINK_PAGE, 3): btree_delete.unlink_leaf,
    (UNLINK_PAGE_META, 0): btree_delete.unlink_target,
    (UNLINK_PAGE_META, 1): btree_delete.unlink_left,
    (UNLINK_PAGE_META, 2): btree_delete.unlink_right,
    (UNLINK_PAGE_META, 3): btree_delete.unlink_leaf,
    (UNLINK_PAGE_META, 4): restore_meta,
    (NEWROOT, 0): _new_root,
    (NEWROOT, 1): _finish_split,
    (NEWROOT, 2): restore_meta,
    (MARK_PAGE_HALFDEAD, 0): btree_delete.halve_leaf,
    (MARK_PAGE_HALFDEAD, 1): btree_delete.halve_parent,
    (META_CLEANUP, 0): restore_meta,
}
"""By XLOG_BTREE_* and block id. REUSE_PAGE (0xD0) registers no block."""
