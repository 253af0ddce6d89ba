"""BRIN indexes (access/brin/brin_xlog.c).

Block 0 of an index is its meta page; behind it come the pages of the reverse map, which say where
the summary of each range of heap blocks is, then the regular pages with the summaries. When the map
grows, the next regular page is emptied and becomes the map's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from boreal.pages.layout import HEADER_BYTES
from boreal.types import PAGE_BYTES
from boreal.wal import BlockRef, WalRecord
from storage_node.redo.items import (
    RedoMismatch,
    add_item,
    delete_item_in_place,
    init_page,
    overwrite_item,
)

# access/brin_xlog.h
_OPERATION_MASK = 0x70
_INIT_PAGE = 0x80
_CREATE_INDEX, _INSERT, _UPDATE, _SAMEPAGE_UPDATE, _REVMAP_EXTEND, _DESUMMARIZE = range(0, 96, 16)
_CREATE = struct.Struct("<IH")
"""xl_brin_createidx: pages per range, version."""
_INSERTED = struct.Struct("<IIH")
"""xl_brin_insert: heap block, pages per range, item number. It ends an xl_brin_update."""
_UPDATED_INSERT_AT = 4
_SUMMARY_GONE = struct.Struct("<IIH")
"""xl_brin_desummarize: pages per range, heap block, item number."""
_ITEM = struct.Struct("<H")
"""xl_brin_samepage_update; xl_brin_update begins with one too."""
_MAP_BLOCK = struct.Struct("<I")
"""xl_brin_revmap_extend."""

# access/brin_page.h
_SPECIAL_BYTES = 8
_TYPE_AT = PAGE_BYTES - 2
_TYPE = struct.Struct("<H")
_META, _REVMAP, _REGULAR = 0xF091, 0xF092, 0xF093
_META_CONTENT = struct.Struct("<IIII")
"""BrinMetaPageData: magic, version, pages per range, the map's last block (0: it has none)."""
_META_MAGIC = 0xA8109CFA
_LAST_MAP_BLOCK_AT = HEADER_BYTES + 12
_LOWER_AT = 12
_META_LOWER = struct.pack("<H", HEADER_BYTES + _META_CONTENT.size)
_POINTER = struct.Struct("<HHH")
"""ItemPointerData: block number (high, low), item number."""
_NOWHERE = (0xFFFF, 0xFFFF, 0)
_POINTERS_PER_PAGE = (PAGE_BYTES - HEADER_BYTES - _SPECIAL_BYTES) // _POINTER.size


def apply(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """Redo the record on one of its blocks. RedoMismatch, LookupError or struct.error if it does
    not fit."""
    _REDO[record.info & _OPERATION_MASK, block.id](page, record, block)


def _create_index(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    pages_per_range, version = _CREATE.unpack_from(record.main_data)
    _build(page, _META)
    _META_CONTENT.pack_into(page, HEADER_BYTES, _META_MAGIC, version, pages_per_range, 0)
    page[_LOWER_AT : _LOWER_AT + 2] = _META_LOWER


def _add_summary(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    _, _, number = _inserted(record)
    if record.info & _INIT_PAGE:
        _build(page, _REGULAR)
    _expect(page, _REGULAR)
    add_item(page, block.data, number, overwrite=True)


def _point_to_summary(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    heap_block, pages_per_range, number = _inserted(record)
    regular = record.block(0)
    if regular is None:
        raise RedoMismatch("it does not name the summary's page")
    at = regular.page.block
    _set_pointer(page, heap_block, pages_per_range, (at >> 16, at & 0xFFFF, number))


def _remove_old_summary(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    _expect(page, _REGULAR)
    delete_item_in_place(page, _ITEM.unpack_from(record.main_data)[0])


def _replace_summary(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    _expect(page, _REGULAR)
    overwrite_item(page, _ITEM.unpack_from(record.main_data)[0], block.data)


def _note_map_block(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    _expect(page, _META)
    _MAP_BLOCK.pack_into(page, _LAST_MAP_BLOCK_AT, *_MAP_BLOCK.unpack_from(record.main_data))
    page[_LOWER_AT : _LOWER_AT + 2] = _META_LOWER


def _build_map_block(page: bytearray, _record: WalRecord, _block: BlockRef) -> None:
    """All zeros is a map that points nowhere."""
    _build(page, _REVMAP)


def _point_nowhere(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    pages_per_range, heap_block, _ = _SUMMARY_GONE.unpack_from(record.main_data)
    _set_pointer(page, heap_block, pages_per_range, _NOWHERE)


def _remove_summary(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    _expect(page, _REGULAR)
    delete_item_in_place(page, _SUMMARY_GONE.unpack_from(record.main_data)[2])


def _inserted(record: WalRecord) -> tuple[int, int, int]:
    """Heap block, pages per range, item number."""
    updates = record.info & _OPERATION_MASK == _UPDATE
    heap_block, pages_per_range, number = _INSERTED.unpack_from(
        record.main_data, _UPDATED_INSERT_AT if updates else 0
    )
    return heap_block, pages_per_range, number


def _set_pointer(
    page: bytearray, heap_block: int, pages_per_range: int, pointer: tuple[int, int, int]
) -> None:
    """Say where a range's summary is (brinSetHeapBlockItemptr)."""
    _expect(page, _REVMAP)
    if not pages_per_range:
        raise RedoMismatch("a range has no pages")
    slot = heap_block // pages_per_range % _POINTERS_PER_PAGE
    _POINTER.pack_into(page, HEADER_BYTES + slot * _POINTER.size, *pointer)


def _build(page: bytearray, page_type: int) -> None:
    init_page(page, _SPECIAL_BYTES)
    _TYPE.pack_into(page, _TYPE_AT, page_type)


def _expect(page: bytearray, page_type: int) -> None:
    (found,) = _TYPE.unpack_from(page, _TYPE_AT)
    if found != page_type:
        raise RedoMismatch(f"a page of type {page_type:#x} is called for, this is of {found:#x}")


_REDO: Final[dict[tuple[int, int], Callable[[bytearray, WalRecord, BlockRef], None]]] = {
    (_CREATE_INDEX, 0): _create_index,
    (_INSERT, 0): _add_summary,
    (_INSERT, 1): _point_to_summary,
    (_UPDATE, 0): _add_summary,
    (_UPDATE, 1): _point_to_summary,
    (_UPDATE, 2): _remove_old_summary,
    (_SAMEPAGE_UPDATE, 0): _replace_summary,
    (_REVMAP_EXTEND, 0): _note_map_block,
    (_REVMAP_EXTEND, 1): _build_map_block,
    (_DESUMMARIZE, 0): _point_nowhere,
    (_DESUMMARIZE, 1): _remove_summary,
}
"""By operation and block id."""
