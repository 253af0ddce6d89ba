"""The pages of a hash index (access/hash.h, hashpage.c, hashovfl.c): how they are built, the links
between them, the bitmaps of free overflow pages.

Each of the functions that change a page raises RedoMismatch if it is not of the kind they change.
"""

from __future__ import annotations

import struct

from boreal.pages.layout import HEADER_BYTES
from boreal.types import PAGE_BYTES
from storage_node.redo.items import RedoMismatch, init_page, special_at

INVALID = 0xFFFFFFFF
"""InvalidBlockNumber, InvalidBucket."""

# hasho_flag
UNUSED = 0
OVERFLOW = 1 << 0
BUCKET = 1 << 1
BITMAP = 1 << 2
META = 1 << 3
NEEDS_SPLIT_CLEANUP = 1 << 6
HAS_DEAD_TUPLES = 1 << 7

SPECIAL_BYTES = 16
_SPECIAL = PAGE_BYTES - SPECIAL_BYTES
_OPAQUE = struct.Struct("<IIIHH")
"""HashPageOpaqueData: previous block, next block, bucket, flags, page id."""
_PAGE_ID = 0xFF80
_PREVIOUS_AT, _NEXT_AT = _SPECIAL, _SPECIAL + 4
_FLAGS_AT, _PAGE_ID_AT = _SPECIAL + 12, _SPECIAL + 14
_U32 = struct.Struct("<I")
_U16 = struct.Struct("<H")
_LOWER_AT = 12


def build(page: bytearray, flags: int, *, previous: int = INVALID, bucket: int = INVALID) -> None:
    """Make it an empty page that none follows (_hash_initbuf)."""
    init_page(page, SPECIAL_BYTES)
    _OPAQUE.pack_into(page, _SPECIAL, previous, INVALID, bucket, flags, _PAGE_ID)


def build_bitmap(page: bytearray, size_bytes: int) -> None:
    """Make it a bitmap in which every page is taken (_hash_initbitmapbuffer)."""
    if size_bytes > _SPECIAL - HEADER_BYTES:
        raise RedoMismatch(f"a bitmap of {size_bytes} bytes does not fit on a page")
    build(page, BITMAP)
    end = HEADER_BYTES + size_bytes
    page[HEADER_BYTES:end] = b"\xff" * size_bytes
    _U16.pack_into(page, _LOWER_AT, end)


def expect(page: bytearray, kinds: int) -> None:
    """RedoMismatch unless it is a page of one of these kinds (_hash_checkpage)."""
    (flags,) = _U16.unpack_from(page, _FLAGS_AT)
    (page_id,) = _U16.unpack_from(page, _PAGE_ID_AT)
    if special_at(page) != _SPECIAL or page_id != _PAGE_ID or not flags & kinds:
        raise RedoMismatch(f"a hash page with a flag of {kinds:#x} is called for")


def set_previous(page: bytearray, block: int) -> None:
    """Link an overflow page back; of a bucket's first page, note the highest bucket there is."""
    expect(page, BUCKET | OVERFLOW)
    _U32.pack_into(page, _PREVIOUS_AT, block)


def set_next(page: bytearray, block: int) -> None:
    """Say which page follows in the bucket."""
    expect(page, BUCKET | OVERFLOW)
    _U32.pack_into(page, _NEXT_AT, block)


def set_flags(page: bytearray, flags: int) -> None:
    """Set a bucket's flags to just these."""
    expect(page, BUCKET)
    _U16.pack_into(page, _FLAGS_AT, flags)


def clear_flags(page: bytearray, flags: int) -> None:
    """Take these flags from those of a page of a bucket."""
    expect(page, BUCKET | OVERFLOW)
    _U16.pack_into(page, _FLAGS_AT, _U16.unpack_from(page, _FLAGS_AT)[0] & ~flags)


def take_bit(page: bytearray, bit: int) -> None:
    """Mark an overflow page as in use."""
    page[_bit_at(page, bit)] |= 1 << bit % 8


def free_bit(page: bytearray, bit: int) -> None:
    """Mark an overflow page as free."""
    page[_bit_at(page, bit)] &= ~(1 << bit % 8)


def _bit_at(page: bytearray, bit: int) -> int:
    """The byte with the bit. (The words of 32 bits are little-endian: byte order is bit order.)"""
    expect(page, BITMAP)
    at = HEADER_BYTES + bit // 8
    if at >= _U16.unpack_from(page, _LOWER_AT)[0]:
        raise RedoMismatch(f"the bitmap has no bit {bit}")
    return at
