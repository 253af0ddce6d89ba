"""GiST (access/gistxlog.h; gistxlog.c).

A split is told in two records: the one that splits marks the left halves F_FOLLOW_RIGHT, the one
that gives them their downlink clears that and sets their NSN, to its own LSN. The second record
names the left half as the *left child* of what it changes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final

from boreal.pages.layout import HEADER_BYTES
from boreal.types import PAGE_BYTES
from boreal.wal import BlockRef, WalRecord
from storage_node.redo.items import (
    RedoMismatch,
    add_item,
    delete_item,
    delete_items,
    init_page,
    item_count,
    overwrite_item,
    special_at,
)

_PAGE_UPDATE = 0x00
_DELETE = 0x10
_PAGE_SPLIT = 0x30
_PAGE_DELETE = 0x60

_ROOT_BLOCK = 0
_NO_BLOCK = 0xFFFFFFFF
_PAGE_ID = 0xFF81

_OPAQUE = struct.Struct("<IIIHH")
"""GISTPageOpaqueData (access/gist.h): NSN (high, low), right link, flags, page id."""
_FLAGS_AT = 12  # in it
_SPECIAL_AT = PAGE_BYTES - _OPAQUE.size
_PAGE_ID_BYTES = _PAGE_ID.to_bytes(2, "little")
_LEAF = 1 << 0
_DELETED = 1 << 1
_TUPLES_DELETED = 1 << 2
_FOLLOW_RIGHT = 1 << 3
_HAS_GARBAGE = 1 << 4

_UPDATE = struct.Struct("<HH")
"""gistxlogPageUpdate: ntodelete, ntoinsert."""
_DELETE_COUNT = struct.Struct("<4xH2x")
"""gistxlogDelete: snapshotConflictHorizon, ntodelete, isCatalogRel; offsets follow."""
_SPLIT = struct.Struct("<I4xQ?xH?3x")
"""gistxlogPageSplit: origrlink, orignsn, origleaf, npage, markfollowright."""
_TUPLE_COUNT = struct.Struct("<i")
_PAGE_DELETED = struct.Struct("<QH")
"""gistxlogPageDelete: deleteXid, downlinkOffset."""
_DELETE_XID = struct.Struct("<Q")
"""GISTDeletedPageContents."""
_LOWER_AT = 12
_U16 = struct.Struct("<H")
_INDEX_TUPLE_INFO_AT = 6
_INDEX_SIZE_MASK = 0x1FFF


def apply(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """Change `page` from before the record to after it. RedoMismatch if they do not fit."""
    redo = _REDO.get(record.info)
    if redo is None:
        raise RedoMismatch("no such record")
    builds_page = record.info == _PAGE_SPLIT and block.id > 0
    if not builds_page and (special_at(page) != _SPECIAL_AT or page[-2:] != _PAGE_ID_BYTES):
        raise RedoMismatch("it is not a page of a GiST index")
    redo(page, record, block)


def after_image(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """What is still to do when `page` was restored from the record's image.

    The left child is changed only after the record has its LSN, so no image shows it.
    """
    if (record.info, block.id) in _LEFT_CHILDREN:
        _finish_split(page, record, block)


def _page_update(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """gistRedoPageUpdateRecord."""
    if block.id == 1:
        _finish_split(page, record, block)
        return
    data = block.data
    doomed_count, new_count = _UPDATE.unpack_from(record.main_data)
    doomed = struct.unpack_from(f"<{doomed_count}H", data)
    tuples = list(_tuples(data, 2 * doomed_count))
    if len(tuples) != new_count:
        raise RedoMismatch(f"the record has {len(tuples)} tuples, not {new_count}")
    if doomed_count == new_count == 1:
        # In place, as gistplacetopage does it: the item keeps its number.
        overwrite_item(page, doomed[0], tuples[0])
        return
    if doomed:
        delete_items(page, doomed)
        if _flags(page) & _LEAF:
            _change_flags(page, add=_TUPLES_DELETED)
    _append(page, tuples)


def _delete(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    """gistRedoDeleteRecord.

    The session that logged it does not set F_TUPLES_DELETED (gistprunepage); nobody reads it.
    """
    (count,) = _DELETE_COUNT.unpack_from(record.main_data)
    delete_items(page, struct.unpack_from(f"<{count}H", record.main_data, _DELETE_COUNT.size))
    _change_flags(page, add=_TUPLES_DELETED, remove=_HAS_GARBAGE)


def _page_split(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """gistRedoPageSplitRecord. Blocks 1 and up are the pages the split ends in, left to right."""
    if block.id == 0:
        _finish_split(page, record, block)
        return
    right_link, nsn, was_leaf, page_count, mark = _SPLIT.unpack_from(record.main_data)
    splits_root = any(part.page.block == _ROOT_BLOCK for part in record.blocks if part.id == 1)
    is_root = block.page.block == _ROOT_BLOCK
    flags = _LEAF if was_leaf and not is_root else 0
    if is_root:
        right_link = _NO_BLOCK
    elif block.id < page_count:
        right_link = _block_after(record, block)
        if mark and not splits_root:
            flags |= _FOLLOW_RIGHT
    init_page(page, _OPAQUE.size)
    opaque = (nsn >> 32, nsn & 0xFFFFFFFF, right_link, flags, _PAGE_ID)
    _OPAQUE.pack_into(page, special_at(page), *opaque)
    (count,) = _TUPLE_COUNT.unpack_from(block.data)
    tuples = list(_tuples(block.data, _TUPLE_COUNT.size))
    if len(tuples) != count:
        raise RedoMismatch(f"the record has {len(tuples)} tuples, not {count}")
    _append(page, tuples)


def _page_delete(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """gistRedoPageDelete. Block 0 is the page, block 1 its parent."""
    delete_xid, downlink = _PAGE_DELETED.unpack_from(record.main_data)
    if block.id == 1:
        delete_item(page, downlink)
        return
    # As GistPageSetDeleted of access/gist.h does.
    _change_flags(page, add=_DELETED)
    _U16.pack_into(page, _LOWER_AT, HEADER_BYTES + _DELETE_XID.size)
    _DELETE_XID.pack_into(page, HEADER_BYTES, delete_xid)


def _finish_split(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    """The left child has its downlink (gistRedoClearFollowRight)."""
    special = special_at(page)
    _, _, right_link, flags, page_id = _OPAQUE.unpack_from(page, special)
    nsn = (record.end >> 32, record.end & 0xFFFFFFFF)
    _OPAQUE.pack_into(page, special, *nsn, right_link, flags & ~_FOLLOW_RIGHT, page_id)


def _tuples(data: bytes, position: int) -> Iterator[bytes]:
    """The index tuples that fill `data` from `position` on; each says how long it is."""
    while position < len(data):
        (info,) = _U16.unpack_from(data, position + _INDEX_TUPLE_INFO_AT)
        end = position + (info & _INDEX_SIZE_MASK)
        if not position < end <= len(data):
            raise RedoMismatch("a tuple ends outside of the record")
        yield data[position:end]
        position = end


def _append(page: bytearray, tuples: list[bytes]) -> None:
    for number, data in enumerate(tuples, start=item_count(page) + 1):
        add_item(page, data, number)


def _block_after(record: WalRecord, block: BlockRef) -> int:
    following = record.block(block.id + 1)
    if following is None:
        raise RedoMismatch(f"the record lacks block {block.id + 1}")
    return following.page.block


def _flags(page: bytearray) -> int:
    flags: int = _U16.unpack_from(page, special_at(page) + _FLAGS_AT)[0]
    return flags


def _change_flags(page: bytearray, *, add: int = 0, remove: int = 0) -> None:
    _U16.pack_into(page, special_at(page) + _FLAGS_AT, _flags(page) & ~remove | add)


_LEFT_CHILDREN: Final = frozenset(((_PAGE_UPDATE, 1), (_PAGE_SPLIT, 0)))
"""Record and block id of a left child."""
_REDO: Final[dict[int, Callable[[bytearray, WalRecord, BlockRef], None]]] = {
    _PAGE_UPDATE: _page_update,
    _DELETE: _delete,
    _PAGE_SPLIT: _page_split,
    _PAGE_DELETE: _page_delete,
}
