"""B-tree pages as a whole: their special area, how they are made, how they are filled.

The layout is access/nbtree.h's. Nothing here knows of records.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntFlag
from typing import NamedTuple

from boreal.pages.layout import HEADER_BYTES
from boreal.types import PAGE_BYTES
from storage_node.redo.items import (
    LP_NORMAL,
    RedoMismatch,
    init_page,
    item_count,
    set_bounds,
    special_at,
)

NO_PAGE = 0
"""P_NONE: block 0 is the metapage, to which no sibling link leads."""
HIGH_KEY = 1
"""P_HIKEY: the item that holds it on every page but the rightmost of its level."""
TUPLE_HEADER_BYTES = 8
"""sizeof(IndexTupleData)."""
SIZE_MASK = 0x1FFF
"""INDEX_SIZE_MASK: the tuple's length within its t_info."""
ALTERNATIVE_TID = 0x2000
"""INDEX_ALT_TID_MASK in t_info: t_tid does not point into the table."""

_OPAQUE = struct.Struct("<IIIHH")
_OPAQUE_AT = PAGE_BYTES - _OPAQUE.size
_PREVIOUS_AT = _OPAQUE_AT
_NEXT_AT = _OPAQUE_AT + 4
_FLAGS_AT = _OPAQUE_AT + 12
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_TUPLE_INFO_AT = 6
_POINTER_BYTES = 4


class Flag(IntFlag):
    """BTP_*, bits of btpo_flags."""

    LEAF = 1 << 0
    ROOT = 1 << 1
    DELETED = 1 << 2
    META = 1 << 3
    HALF_DEAD = 1 << 4
    SPLIT_END = 1 << 5
    HAS_GARBAGE = 1 << 6
    INCOMPLETE_SPLIT = 1 << 7
    HAS_FULL_XID = 1 << 8


class Opaque(NamedTuple):
    """BTPageOpaqueData, without the vacuum cycle, which redo always leaves zero."""

    previous: int
    next: int
    level: int
    flags: int

    @property
    def first_data_item(self) -> int:
        """P_FIRSTDATAKEY: the rightmost page of a level has no high key."""
        return HIGH_KEY if self.next == NO_PAGE else HIGH_KEY + 1


def check_is_btree(page: bytearray) -> None:
    """Raise RedoMismatch unless the page has a B-tree's special area."""
    if special_at(page) != _OPAQUE_AT:
        raise RedoMismatch("the page is not a B-tree's")


def opaque_of(page: bytearray) -> Opaque:
    """Read the special area. RedoMismatch if the page has none of a B-tree."""
    check_is_btree(page)
    previous, following, level, flags, _cycle = _OPAQUE.unpack_from(page, _OPAQUE_AT)
    return Opaque(previous, following, level, flags)


def make_page(page: bytearray, opaque: Opaque, items: Iterable[bytes] = ()) -> None:
    """Make it a page of these items only, put there in order (_bt_pageinit, PageAddItem).

    They are stored as if added one by one: the last lies lowest. RedoMismatch if there are too
    many for one page.
    """
    init_page(page, _OPAQUE.size)
    _OPAQUE.pack_into(page, _OPAQUE_AT, *opaque, 0)
    upper = _OPAQUE_AT
    pointers = []
    padded = []
    for item in items:
        length = len(item)
        padding = -length % 8
        upper -= length + padding
        pointers.append(upper | LP_NORMAL << 15 | length << 17)
        padded.append(item + bytes(padding) if padding else item)
    lower = HEADER_BYTES + len(pointers) * _POINTER_BYTES
    if lower > upper:
        raise RedoMismatch(f"{len(pointers)} items do not fit on a page")
    struct.pack_into(f"<{len(pointers)}I", page, HEADER_BYTES, *pointers)
    page[upper:_OPAQUE_AT] = b"".join(reversed(padded))
    set_bounds(page, lower=lower, upper=upper)


def stored_items(page: bytearray) -> list[bytes]:
    """Copies of all items, in order. RedoMismatch if one lies outside of the page's items."""
    content = bytes(page)
    items = []
    for pointer in struct.unpack_from(f"<{item_count(page)}I", page, HEADER_BYTES):
        start, length = pointer & 0x7FFF, pointer >> 17
        if start < HEADER_BYTES or start + length > _OPAQUE_AT:
            raise RedoMismatch("an item lies outside of its page")
        items.append(content[start : start + length])
    return items


def cut_tuple(data: bytes, at: int) -> bytes:
    """The tuple that begins there, with its padding. RedoMismatch if `data` ends before it does."""
    if at + TUPLE_HEADER_BYTES > len(data):
        raise RedoMismatch("the record ends within a tuple")
    size = ((_U16.unpack_from(data, at + _TUPLE_INFO_AT)[0] & SIZE_MASK) + 7) & ~7
    if size < TUPLE_HEADER_BYTES or at + size > len(data):
        raise RedoMismatch("the record ends within a tuple")
    return data[at : at + size]


def logged_items(data: bytes) -> list[bytes]:
    """The items of a page logged as its upper part, in order (_bt_restore_page, nbtxlog.c).

    The part is as it was on the page: the last item comes first.
    """
    items = []
    at = 0
    while at < len(data):
        item = cut_tuple(data, at)
        items.append(item)
        at += len(item)
    items.reverse()
    return items


def clear_flag(page: bytearray, flag: Flag) -> None:
    """Clear a flag. RedoMismatch if the page is not a B-tree's."""
    flags = opaque_of(page).flags
    _U16.pack_into(page, _FLAGS_AT, flags & ~flag)


def set_previous(page: bytearray, block: int) -> None:
    """Change the link to the left sibling. RedoMismatch if the page is not a B-tree's."""
    check_is_btree(page)
    _U32.pack_into(page, _PREVIOUS_AT, block)


def set_next(page: bytearray, block: int) -> None:
    """Change the link to the right sibling. RedoMismatch if the page is not a B-tree's."""
    check_is_btree(page)
    _U32.pack_into(page, _NEXT_AT, block)
