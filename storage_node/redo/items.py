"""Line pointers and the items they point to: what redo does to a page of standard layout.

The same as storage/page/bufpage.c, to the byte: where an item lies on its page depends on how the
page was compacted before, and the next record's offsets rest on it. Item numbers are PostgreSQL's
OffsetNumbers: they begin at 1.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from boreal.pages.layout import HEADER_BYTES
from boreal.types import PAGE_BYTES

LP_UNUSED, LP_NORMAL, LP_REDIRECT, LP_DEAD = range(4)

MAX_HEAP_TUPLES = 291
"""MaxHeapTuplesPerPage (access/htup_details.h), of 8 KiB pages."""

_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_BOUNDS = struct.Struct("<HHH")
"""pd_lower, pd_upper, pd_special."""
_BOUNDS_AT = 12
_LOWER_AT, _UPPER_AT, _SPECIAL_AT = 12, 14, 16
_SIZE_AND_VERSION_AT = 18
_SIZE_AND_VERSION = _U16.pack(PAGE_BYTES | 4)
_FLAGS_AT = 10
_HAS_FREE_LINES = 0x0001
_POINTER_BYTES = 4
_LARGEST_WITHOUT_LENGTH = (1 << 17) - 1
"""A line pointer's length is its upper 15 bits."""
_FLAG_BITS = 3 << 15
"""Where a line pointer has its flags; all zero is LP_UNUSED."""


class RedoMismatch(Exception):
    """The record does not fit the page it is applied to."""


class Item(NamedTuple):
    """One line pointer (ItemIdData). Of LP_REDIRECT, `offset` is the number it leads to."""

    offset: int
    flags: int
    length: int


def init_page(page: bytearray, special_bytes: int) -> None:
    """Make it an empty page with a special area of so many bytes, aligned (PageInit)."""
    page[:] = bytes(PAGE_BYTES)
    special = PAGE_BYTES - _aligned(special_bytes)
    _BOUNDS.pack_into(page, _BOUNDS_AT, HEADER_BYTES, special, special)
    page[_SIZE_AND_VERSION_AT : _SIZE_AND_VERSION_AT + 2] = _SIZE_AND_VERSION


def is_new(page: bytearray) -> bool:
    """Whether it was never initialized (PageIsNew)."""
    return page[_UPPER_AT] == 0 and page[_UPPER_AT + 1] == 0


def special_at(page: bytearray) -> int:
    """Where the access method's area begins."""
    special: int = _U16.unpack_from(page, _SPECIAL_AT)[0]
    return special


def set_bounds(page: bytearray, *, lower: int, upper: int) -> None:
    """Set pd_lower and pd_upper."""
    _U16.pack_into(page, _LOWER_AT, lower)
    _U16.pack_into(page, _UPPER_AT, upper)


def free_bytes(page: bytearray) -> int:
    """The room between line pointers and items (PageGetExactFreeSpace)."""
    lower, upper, _ = _BOUNDS.unpack_from(page, _BOUNDS_AT)
    return max(0, int(upper - lower))


def item_count(page: bytearray) -> int:
    """The number of line pointers (PageGetMaxOffsetNumber)."""
    lower: int = _U16.unpack_from(page, _LOWER_AT)[0]
    return max(0, (lower - HEADER_BYTES) // _POINTER_BYTES)


def get_item(page: bytearray, number: int) -> Item:
    """The line pointer of that number. RedoMismatch if there is none."""
    return _unpack(_U32.unpack_from(page, _pointer_at(page, number))[0])


def set_item(page: bytearray, number: int, item: Item) -> None:
    """Change a line pointer. RedoMismatch if there is none of that number."""
    _U32.pack_into(page, _pointer_at(page, number), _pack(*item))


def item_bytes(page: bytearray, number: int) -> bytes:
    """A copy of the item. RedoMismatch if the line pointer has no storage."""
    start, length = item_range(page, number)
    return bytes(page[start : start + length])


def item_range(page: bytearray, number: int) -> tuple[int, int]:
    """Where an item begins, and its length. RedoMismatch if the line pointer has no storage."""
    offset, _, length = get_item(page, number)
    if not length or offset + length > PAGE_BYTES:
        raise RedoMismatch(f"item {number} has no storage")
    return offset, length


def add_item(
    page: bytearray, data: bytes, number: int, *, overwrite: bool = False, heap: bool = False
) -> int:
    """Put an item on the page and return its number (PageAddItemExtended).

    At `number`, which must be the next one, or with `overwrite` an unused one; else those from
    `number` on move up. 0: at the first unused line pointer, or the next one. RedoMismatch where
    PostgreSQL would refuse.
    """
    lower, upper, _ = _BOUNDS.unpack_from(page, _BOUNDS_AT)
    beyond = (lower - HEADER_BYTES) // _POINTER_BYTES + 1
    if number == 0:
        number = _first_unused(page, beyond)
        overwrite = True
    at = HEADER_BYTES + (number - 1) * _POINTER_BYTES
    if number > beyond or (heap and number > MAX_HEAP_TUPLES):
        raise RedoMismatch(f"item {number} does not follow on the {beyond - 1} there are")
    if number == beyond or not overwrite:
        new_lower = lower + _POINTER_BYTES
    else:
        _, flags, length = _unpack(_U32.unpack_from(page, at)[0])
        if flags != LP_UNUSED or length:
            raise RedoMismatch(f"item {number} is in use")
        new_lower = lower
    length = len(data)
    upper -= _aligned(length)
    if new_lower > upper:
        raise RedoMismatch(f"an item of {length} bytes does not fit")
    if new_lower != lower and number < beyond:
        page[at + _POINTER_BYTES : new_lower] = page[at:lower]
    _U32.pack_into(page, at, _pack(upper, LP_NORMAL, length))
    page[upper : upper + length] = data
    set_bounds(page, lower=new_lower, upper=upper)
    return number


def delete_item(page: bytearray, number: int) -> None:
    """Remove an item and its line pointer; later ones move down (PageIndexTupleDelete)."""
    at = _pointer_at(page, number)
    offset, length = item_range(page, number)
    lower = _U16.unpack_from(page, _LOWER_AT)[0]
    page[at : lower - _POINTER_BYTES] = page[at + _POINTER_BYTES : lower]
    _U16.pack_into(page, _LOWER_AT, lower - _POINTER_BYTES)
    _close_gap(page, offset, _aligned(length))


def delete_items(page: bytearray, numbers: Sequence[int]) -> None:
    """Remove several, ascending numbers (PageIndexMultiDelete)."""
    if len(numbers) <= 2:
        for number in reversed(numbers):
            delete_item(page, number)
        return
    doomed = set(numbers)
    pointers = _pointers(page)
    if not doomed <= set(range(1, len(pointers) + 1)):
        raise RedoMismatch(f"of the items {sorted(doomed)} only {len(pointers)} are there")
    kept = [pointer for number, pointer in enumerate(pointers, start=1) if number not in doomed]
    _U16.pack_into(page, _LOWER_AT, HEADER_BYTES + len(kept) * _POINTER_BYTES)
    _compact(page, kept)


def delete_item_in_place(page: bytearray, number: int) -> None:
    """Remove an item; later ones keep their numbers (PageIndexTupleDeleteNoCompact)."""
    offset, length = item_range(page, number)
    count = item_count(page)
    if number < count:
        set_item(page, number, Item(0, LP_UNUSED, 0))
    else:
        _U16.pack_into(page, _LOWER_AT, HEADER_BYTES + (count - 1) * _POINTER_BYTES)
    _close_gap(page, offset, _aligned(length))


def overwrite_item(page: bytearray, number: int, data: bytes) -> None:
    """Replace an item by one of any size (PageIndexTupleOverwrite)."""
    offset, length = item_range(page, number)
    growth = _aligned(len(data)) - _aligned(length)
    if growth > free_bytes(page):
        raise RedoMismatch(f"an item of {len(data)} bytes does not fit in place of {length}")
    if growth:
        _close_gap(page, offset, -growth)
    set_item(page, number, Item(offset - growth, get_item(page, number).flags, len(data)))
    page[offset - growth : offset - growth + len(data)] = data


def repair_fragmentation(page: bytearray) -> None:
    """Close all gaps and drop unused line pointers at the end (PageRepairFragmentation)."""
    pointers = [pointer if pointer & _FLAG_BITS else 0 for pointer in _pointers(page)]
    while pointers and not pointers[-1]:
        pointers.pop()
    _U16.pack_into(page, _LOWER_AT, HEADER_BYTES + len(pointers) * _POINTER_BYTES)
    _compact(page, pointers)
    _set_has_free_lines(page, 0 in pointers)


def truncate_line_pointers(page: bytearray) -> None:
    """Drop unused line pointers at the end, but keep one (PageTruncateLinePointerArray)."""
    used = [pointer & _FLAG_BITS != 0 for pointer in _pointers(page)]
    while len(used) > 1 and not used[-1]:
        used.pop()
    _U16.pack_into(page, _LOWER_AT, HEADER_BYTES + len(used) * _POINTER_BYTES)
    _set_has_free_lines(page, not all(used))


def all_items(page: bytearray) -> list[Item]:
    """Every line pointer, in order."""
    return [_unpack(pointer) for pointer in _pointers(page)]


def _aligned(length: int) -> int:
    """MAXALIGN."""
    return (length + 7) & ~7


def _pack(offset: int, flags: int, length: int) -> int:
    return offset | flags << 15 | length << 17


def _unpack(pointer: int) -> Item:
    return Item(pointer & 0x7FFF, (pointer >> 15) & 3, pointer >> 17)


def _pointers(page: bytearray) -> tuple[int, ...]:
    """Every line pointer, as stored."""
    return struct.unpack_from(f"<{item_count(page)}I", page, HEADER_BYTES)


def _pointer_at(page: bytearray, number: int) -> int:
    at = HEADER_BYTES + (number - 1) * _POINTER_BYTES
    if number < 1 or at >= _U16.unpack_from(page, _LOWER_AT)[0]:
        raise RedoMismatch(f"there is no item {number}")
    return at


def _first_unused(page: bytearray, beyond: int) -> int:
    if page[_FLAGS_AT] & _HAS_FREE_LINES:
        for number in range(1, beyond):
            item = get_item(page, number)
            if item.flags == LP_UNUSED and not item.length:
                return number
        _set_has_free_lines(page, False)
    return beyond


def _set_has_free_lines(page: bytearray, has: bool) -> None:
    page[_FLAGS_AT] = page[_FLAGS_AT] & ~_HAS_FREE_LINES | (_HAS_FREE_LINES if has else 0)


def _close_gap(page: bytearray, offset: int, size: int) -> None:
    """What lies below `offset` moves up by `size` bytes (down, if negative), pointers too."""
    upper = _U16.unpack_from(page, _UPPER_AT)[0]
    page[upper + size : offset + size] = page[upper:offset]
    _U16.pack_into(page, _UPPER_AT, upper + size)
    # A pointer's offset is its low bits, so adding to the pointer adds to the offset.
    moved = [
        pointer + size
        if pointer > _LARGEST_WITHOUT_LENGTH and pointer & 0x7FFF <= offset
        else pointer
        for pointer in _pointers(page)
    ]
    struct.pack_into(f"<{len(moved)}I", page, HEADER_BYTES, *moved)


def _compact(page: bytearray, pointers: list[int]) -> None:
    """Make these the page's line pointers, their items packed against the special area in this
    order (compactify_tuples). pd_lower is set already."""
    lower, _, special = _BOUNDS.unpack_from(page, _BOUNDS_AT)
    upper = special
    before = bytes(page)
    for index, pointer in enumerate(pointers):
        length = pointer >> 17
        if not length:
            continue
        offset = pointer & 0x7FFF
        size = (length + 7) & ~7
        upper -= size
        if upper < lower or offset + size > special:
            raise RedoMismatch(f"item {index + 1} lies outside of its page or overlaps another")
        if offset != upper:
            page[upper : upper + size] = before[offset : offset + size]
            pointers[index] = pointer - offset + upper
    struct.pack_into(f"<{len(pointers)}I", page, HEADER_BYTES, *pointers)
    _U16.pack_into(page, _UPPER_AT, upper)
