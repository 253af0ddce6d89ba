"""Hash indexes (access/hash/hash_xlog.c).

A bucket is a chain of pages: its first, and overflow pages. What redo needs to know beyond items is
how these are linked (`hash_page`) and what the meta page counts (`hash_meta`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from boreal.wal import BlockRef, WalRecord
from storage_node.redo import hash_meta, hash_page
from storage_node.redo.items import RedoMismatch, add_item, delete_items

# access/hash_xlog.h
_INIT_META_PAGE = 0x00
_INIT_BITMAP_PAGE = 0x10
_INSERT = 0x20
_ADD_OVERFLOW_PAGE = 0x30
_SPLIT_ALLOCATE_PAGE = 0x40
_SPLIT_PAGE = 0x50
_SPLIT_COMPLETE = 0x60
_MOVE_PAGE_CONTENTS = 0x70
_SQUEEZE_PAGE = 0x80
_DELETE = 0x90
_SPLIT_CLEANUP = 0xA0
_UPDATE_META_PAGE = 0xB0
_VACUUM_ONE_PAGE = 0xC0

_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_TWO_U32 = struct.Struct("<II")
_NEW_INDEX = struct.Struct("<dIH")
"""xl_hash_init_meta_page: tuples expected, hash function, fill factor."""
_OVERFLOW_ADDED = struct.Struct("<H?")
"""xl_hash_add_ovfl_page: size of a bitmap in bytes, whether a free page was found."""
_SPLIT_BEGUN = struct.Struct("<IHHB")
"""xl_hash_split_allocate_page: new bucket, flags of the old one, of the new one, what follows."""
_HAS_MASKS, _HAS_PHASE = 1, 2
_SPLIT_DONE = struct.Struct("<HH")
"""xl_hash_split_complete: flags of the old bucket, of the new one."""
_SQUEEZED = struct.Struct("<IIH??")
"""xl_hash_squeeze_page: previous block, next block, tuples moved, whether to the bucket's first
page, whether to the freed page's predecessor."""
_DELETED = struct.Struct("<?")
"""xl_hash_delete: whether no dead tuples are left; whether it is the bucket's first page."""
_TUPLES = struct.Struct("<d")
"""xl_hash_update_meta_page."""
_VACUUMED = struct.Struct("<IH?x")
"""xl_hash_vacuum_one_page: snapshot horizon, tuples, whether of a catalog; then item numbers."""

_LOCKS_BLOCK_0: Final = frozenset((_MOVE_PAGE_CONTENTS, _SQUEEZE_PAGE, _DELETE))
_TUPLE_INFO_AT = 6
_TUPLE_SIZE_MASK = 0x1FFF
_BUCKET_PAGES = hash_page.BUCKET | hash_page.OVERFLOW


def touches(record: WalRecord, block: BlockRef) -> bool:
    """Whether the record changes the block.

    Three kinds register the bucket's first page as block 0 only to have redo lock it; where it is
    also the page that changes, it is block 1 and there is no block 0 (hashovfl.c, hash.c).
    """
    return block.id != 0 or record.info not in _LOCKS_BLOCK_0


def apply(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """Redo the record on one of its blocks. RedoMismatch, LookupError or struct.error if it does
    not fit."""
    _REDO[record.info, block.id](page, record, block)


# --- a new index ---------------------------------------------------------------------------------


def _build_meta(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    hash_meta.build(page, *_NEW_INDEX.unpack_from(record.main_data))


def _build_first_bitmap(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    hash_page.build_bitmap(page, *_U16.unpack_from(record.main_data))


def _note_first_bitmap(page: bytearray, _record: WalRecord, _block: BlockRef) -> None:
    hash_meta.add_first_bitmap(page)


# --- tuples come ---------------------------------------------------------------------------------


def _insert(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    hash_page.expect(page, _BUCKET_PAGES)
    add_item(page, block.data, _U16.unpack_from(record.main_data)[0])


def _count_insert(page: bytearray, _record: WalRecord, _block: BlockRef) -> None:
    hash_meta.add_tuples(page, 1)


def _build_overflow_page(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    (bucket,) = _U32.unpack(block.data)
    left = _block_number(record, 1)
    hash_page.build(page, hash_page.OVERFLOW, previous=left, bucket=bucket)


def _link_overflow_page(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    hash_page.set_next(page, _block_number(record, 0))


def _take_overflow_page(page: bytearray, _record: WalRecord, block: BlockRef) -> None:
    hash_page.take_bit(page, *_U32.unpack(block.data))


def _build_next_bitmap(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    size_bytes, _ = _OVERFLOW_ADDED.unpack_from(record.main_data)
    hash_page.build_bitmap(page, size_bytes)


def _note_overflow_page(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    hash_meta.set_first_free(page, *_U32.unpack(block.data))
    _, reused = _OVERFLOW_ADDED.unpack_from(record.main_data)
    if not reused:
        bitmap = record.block(3)
        hash_meta.add_overflow_page(page, None if bitmap is None else bitmap.page.block)


# --- a bucket is split ---------------------------------------------------------------------------


def _begin_split_of_old(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    bucket, old_flags, _, _ = _SPLIT_BEGUN.unpack_from(record.main_data)
    hash_page.set_flags(page, old_flags)
    hash_page.set_previous(page, bucket)


def _build_new_bucket(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    bucket, _, new_flags, _ = _SPLIT_BEGUN.unpack_from(record.main_data)
    hash_page.build(page, new_flags, previous=bucket, bucket=bucket)


def _note_new_bucket(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    bucket, _, _, follows = _SPLIT_BEGUN.unpack_from(record.main_data)
    hash_meta.set_max_bucket(page, bucket)
    at = 0
    if follows & _HAS_MASKS:
        hash_meta.set_masks(page, *_TWO_U32.unpack_from(block.data, at))
        at += _TWO_U32.size
    if follows & _HAS_PHASE:
        hash_meta.begin_phase(page, *_TWO_U32.unpack_from(block.data, at))


def _need_image(_page: bytearray, _record: WalRecord, _block: BlockRef) -> None:
    """The tuples a split moved are logged as the page they were moved to."""
    raise RedoMismatch("it lacks its image")


def _end_split_of_old(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    old_flags, _ = _SPLIT_DONE.unpack_from(record.main_data)
    hash_page.set_flags(page, old_flags)


def _end_split_of_new(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    _, new_flags = _SPLIT_DONE.unpack_from(record.main_data)
    hash_page.set_flags(page, new_flags)


def _end_split_cleanup(page: bytearray, _record: WalRecord, _block: BlockRef) -> None:
    hash_page.clear_flags(page, hash_page.NEEDS_SPLIT_CLEANUP)


# --- tuples move together ------------------------------------------------------------------------


def _receive_tuples(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    (count,) = _U16.unpack_from(record.main_data)
    _add_tuples(page, count, block.data)


def _remove_tuples(page: bytearray, _record: WalRecord, block: BlockRef) -> None:
    hash_page.expect(page, _BUCKET_PAGES)
    delete_items(page, _numbers(block.data))


def _receive_last_tuples(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    _, following, count, _, to_predecessor = _SQUEEZED.unpack_from(record.main_data)
    _add_tuples(page, count, block.data)
    if to_predecessor:
        hash_page.set_next(page, following)


def _free_page(page: bytearray, _record: WalRecord, _block: BlockRef) -> None:
    hash_page.build(page, hash_page.UNUSED)


def _skip_freed_forward(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    hash_page.set_next(page, _SQUEEZED.unpack_from(record.main_data)[1])


def _skip_freed_backward(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    hash_page.set_previous(page, _SQUEEZED.unpack_from(record.main_data)[0])


def _free_bit(page: bytearray, _record: WalRecord, block: BlockRef) -> None:
    hash_page.free_bit(page, *_U32.unpack(block.data))


def _note_first_free(page: bytearray, _record: WalRecord, block: BlockRef) -> None:
    hash_meta.set_first_free(page, *_U32.unpack(block.data))


# --- tuples go -----------------------------------------------------------------------------------


def _delete(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    _remove_tuples(page, record, block)
    (none_dead,) = _DELETED.unpack_from(record.main_data)
    if none_dead:
        hash_page.clear_flags(page, hash_page.HAS_DEAD_TUPLES)


def _count_anew(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    hash_meta.set_tuples(page, *_TUPLES.unpack(record.main_data))


def _vacuum_page(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    _, count, _ = _VACUUMED.unpack_from(record.main_data)
    numbers = _numbers(record.main_data[_VACUUMED.size :])
    if len(numbers) != count:
        raise RedoMismatch(f"it tells {len(numbers)} of {count} tuples")
    hash_page.clear_flags(page, hash_page.HAS_DEAD_TUPLES)
    delete_items(page, numbers)


def _count_vacuumed(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    hash_meta.add_tuples(page, -_VACUUMED.unpack_from(record.main_data)[1])


# --- parts ---------------------------------------------------------------------------------------


def _block_number(record: WalRecord, block_id: int) -> int:
    block = record.block(block_id)
    if block is None:
        raise RedoMismatch(f"it has no block {block_id}")
    return block.page.block


def _numbers(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 2}H", data)


def _add_tuples(page: bytearray, count: int, data: bytes) -> None:
    """Put tuples where they belong: `data` has their item numbers, then themselves, aligned."""
    hash_page.expect(page, _BUCKET_PAGES)
    at = 2 * count
    for number in _numbers(data[:at]):
        (info,) = _U16.unpack_from(data, at + _TUPLE_INFO_AT)
        end = at + ((info & _TUPLE_SIZE_MASK) + 7 & ~7)
        if end > len(data):
            raise RedoMismatch("a tuple is cut short")
        add_item(page, data[at:end], number)
        at = end
    if at != len(data):
        raise RedoMismatch(f"it has more than the {count} tuples it tells of")


_REDO: Final[dict[tuple[int, int], Callable[[bytearray, WalRecord, BlockRef], None]]] = {
    (_INIT_META_PAGE, 0): _build_meta,
    (_INIT_BITMAP_PAGE, 0): _build_first_bitmap,
    (_INIT_BITMAP_PAGE, 1): _note_first_bitmap,
    (_INSERT, 0): _insert,
    (_INSERT, 1): _count_insert,
    (_ADD_OVERFLOW_PAGE, 0): _build_overflow_page,
    (_ADD_OVERFLOW_PAGE, 1): _link_overflow_page,
    (_ADD_OVERFLOW_PAGE, 2): _take_overflow_page,
    (_ADD_OVERFLOW_PAGE, 3): _build_next_bitmap,
    (_ADD_OVERFLOW_PAGE, 4): _note_overflow_page,
    (_SPLIT_ALLOCATE_PAGE, 0): _begin_split_of_old,
    (_SPLIT_ALLOCATE_PAGE, 1): _build_new_bucket,
    (_SPLIT_ALLOCATE_PAGE, 2): _note_new_bucket,
    (_SPLIT_PAGE, 0): _need_image,
    (_SPLIT_COMPLETE, 0): _end_split_of_old,
    (_SPLIT_COMPLETE, 1): _end_split_of_new,
    (_MOVE_PAGE_CONTENTS, 1): _receive_tuples,
    (_MOVE_PAGE_CONTENTS, 2): _remove_tuples,
    (_SQUEEZE_PAGE, 1): _receive_last_tuples,
    (_SQUEEZE_PAGE, 2): _free_page,
    (_SQUEEZE_PAGE, 3): _skip_freed_forward,
    (_SQUEEZE_PAGE, 4): _skip_freed_backward,
    (_SQUEEZE_PAGE, 5): _free_bit,
    (_SQUEEZE_PAGE, 6): _note_first_free,
    (_DELETE, 1): _delete,
    (_SPLIT_CLEANUP, 0): _end_split_cleanup,
    (_UPDATE_META_PAGE, 0): _count_anew,
    (_VACUUM_ONE_PAGE, 0): _vacuum_page,
    (_VACUUM_ONE_PAGE, 1): _count_vacuumed,
}
"""By kind and block id."""
