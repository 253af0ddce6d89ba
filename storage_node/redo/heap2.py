"""Redo of the HEAP2 resource manager (heap2_redo, heapam.c; structs in access/heapam_xlog.h).

Bits to clear in the visibility map are effects of the record (`boreal.wal.effects`); those to set
come with VISIBLE, which names the map's page. REWRITE and NEW_CID name no page.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

from boreal.pages import visibility
from boreal.wal import HEAP_INIT_PAGE, HEAP_OPERATION_MASK, BlockRef, Heap2Info, WalRecord
from storage_node.redo.heap_tuple import (
    INFOMASK2_AT,
    U16,
    U32,
    XMAX_AT,
    add_tuple,
    clear_all_visible,
    find_tuple,
    set_all_visible,
    with_xmax,
)
from storage_node.redo.items import (
    LP_DEAD,
    LP_REDIRECT,
    LP_UNUSED,
    Item,
    RedoMismatch,
    init_page,
    is_new,
    repair_fragmentation,
    set_item,
    truncate_line_pointers,
)

_PRUNE = struct.Struct("<4xHH")
"""xl_heap_prune: the conflict horizon; numbers of redirected and of dead items."""
_FREEZE_PAGE = struct.Struct("<4xH")
"""xl_heap_freeze_page: the conflict horizon; number of plans."""
_PLAN = struct.Struct("<IHHBxH")
"""xl_heap_freeze_plan: xmax, t_infomask2, t_infomask, what to do with xvac, number of tuples."""
_VISIBLE = struct.Struct("<4xB")
"""xl_heap_visible: the conflict horizon; flags."""
_MULTI_INSERT = struct.Struct("<BxH")
"""xl_heap_multi_insert: flags, number of tuples; their offsets, unless the page is new."""
_LOCK_UPDATED = struct.Struct("<IHBB")
"""xl_heap_lock_updated: xmax, offset, infobits, flags."""
_INFOMASKS = struct.Struct("<HH")

_MULTI_TUPLE_BYTES = 7
"""xl_multi_insert_tuple: length of the values, t_infomask2, t_infomask, t_hoff."""
_ALL_VISIBLE_CLEARED = 0x01
_ALL_FROZEN_SET = 0x20

_XVAC_AT = 8
_FREEZE_XVAC, _INVALID_XVAC = 0x02, 0x04
_FROZEN_XID, _INVALID_XID = 2, 0


def keeps_lsn(record: WalRecord, block: BlockRef) -> bool:
    """Setting PD_ALL_VISIBLE on a heap page leaves its LSN alone (heap_xlog_visible)."""
    return block.id == 1 and record.info & HEAP_OPERATION_MASK == Heap2Info.VISIBLE


def apply(page: bytearray, record: WalRecord, block: BlockRef) -> bool | None:
    """Change `page` from before `record` to after it, all but its LSN.

    False: there was nothing to change, the page keeps its LSN. Raises RedoMismatch, LookupError or
    struct.error if record and page do not fit.
    """
    return _APPLY[record.info & HEAP_OPERATION_MASK](page, record, block)


def _prune(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """heap_page_prune_execute: line pointers change, then tuples no longer pointed to go."""
    redirected, dead = _PRUNE.unpack_from(record.main_data)
    numbers = _numbers(block.data)
    first_dead = 2 * redirected
    first_unused = first_dead + dead
    if first_unused > len(numbers):
        raise RedoMismatch(f"the record names {len(numbers)} items, not {first_unused}")
    for number, target in zip(numbers[:first_dead:2], numbers[1:first_dead:2], strict=True):
        set_item(page, number, Item(target, LP_REDIRECT, 0))
    for number in numbers[first_dead:first_unused]:
        set_item(page, number, Item(0, LP_DEAD, 0))
    for number in numbers[first_unused:]:
        set_item(page, number, Item(0, LP_UNUSED, 0))
    repair_fragmentation(page)


def _vacuum(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """Dead items had no tuple any more: nothing moves."""
    (unused,) = U16.unpack_from(record.main_data)
    for number in _numbers(block.data, count=unused):
        set_item(page, number, Item(0, LP_UNUSED, 0))
    truncate_line_pointers(page)


def _freeze_page(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """Each plan says what its tuples' headers become. After the plans come all tuples' numbers."""
    (count,) = _FREEZE_PAGE.unpack_from(record.main_data)
    plans = [_PLAN.unpack_from(block.data, index * _PLAN.size) for index in range(count)]
    numbers = iter(_numbers(block.data, at=count * _PLAN.size, count=sum(p[-1] for p in plans)))
    for xmax, infomask2, infomask, xvac, tuples in plans:
        for number in islice(numbers, tuples):
            start, _length = find_tuple(page, number)
            U32.pack_into(page, start + XMAX_AT, xmax)
            if xvac & (_FREEZE_XVAC | _INVALID_XVAC):
                became = _INVALID_XID if xvac & _INVALID_XVAC else _FROZEN_XID
                U32.pack_into(page, start + _XVAC_AT, became)
            _INFOMASKS.pack_into(page, start + INFOMASK2_AT, infomask2, infomask)


def _visible(page: bytearray, record: WalRecord, block: BlockRef) -> bool:
    """Block 0 is the map's page, perhaps never written before; block 1 the heap's.

    The map's page gets the record's LSN only if its bits change (visibilitymap_set).
    """
    if block.id == 1:
        set_all_visible(page)
        return True
    heap = record.block(1)
    if heap is None or visibility.map_block(heap.page.block) != block.page.block:
        raise RedoMismatch("the record does not name the heap page whose bits it sets")
    (flags,) = _VISIBLE.unpack_from(record.main_data)
    if is_new(page):
        init_page(page, 0)
    return visibility.set_bits(page, heap.page.block, flags & visibility.VALID_BITS)


def _multi_insert(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    flags, count = _MULTI_INSERT.unpack_from(record.main_data)
    numbers: Sequence[int]
    if record.info & HEAP_INIT_PAGE:
        init_page(page, 0)
        numbers = range(1, count + 1)
    else:
        numbers = _numbers(record.main_data, at=_MULTI_INSERT.size, count=count)
    data, at = block.data, 0
    for number in numbers:
        at += at & 1
        (length,) = U16.unpack_from(data, at)
        end = at + _MULTI_TUPLE_BYTES + length
        add_tuple(page, block.page.block, number, data[at + U16.size : end], xmin=record.xid)
        at = end
    if at != len(data):
        raise RedoMismatch(f"its tuples take {at} bytes, not {len(data)}")
    if flags & _ALL_VISIBLE_CLEARED:
        clear_all_visible(page)
    if flags & _ALL_FROZEN_SET:
        set_all_visible(page)


def _lock_updated(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    """Unlike HEAP's LOCK it leaves the chain and the command id as they are."""
    xmax, number, infobits, _ = _LOCK_UPDATED.unpack_from(record.main_data)
    start, _ = find_tuple(page, number)
    infomask2, infomask = _INFOMASKS.unpack_from(page, start + INFOMASK2_AT)
    infomask2, infomask = with_xmax(infomask2, infomask, infobits)
    U32.pack_into(page, start + XMAX_AT, xmax)
    _INFOMASKS.pack_into(page, start + INFOMASK2_AT, infomask2, infomask)


def _numbers(data: bytes, *, at: int = 0, count: int | None = None) -> tuple[int, ...]:
    """OffsetNumbers from `at` on; all there are, if it is not said how many."""
    if count is None:
        count = (len(data) - at) // U16.size
    return struct.unpack_from(f"<{count}H", data, at)


_APPLY: Final[dict[int, Callable[[bytearray, WalRecord, BlockRef], bool | None]]] = {
    Heap2Info.PRUNE: _prune,
    Heap2Info.VACUUM: _vacuum,
    Heap2Info.FREEZE_PAGE: _freeze_page,
    Heap2Info.VISIBLE: _visible,
    Heap2Info.MULTI_INSERT: _multi_insert,
    Heap2Info.LOCK_UPDATED: _lock_updated,
}
