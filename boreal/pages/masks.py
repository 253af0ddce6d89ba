"""What may differ between two copies of a page that are the same to PostgreSQL.

Hint bits, free space and a few fields that are set without a WAL record. The rules are those its
own consistency check applies to after-images: access/common/bufmask.c and the `*_mask` function of
each resource manager. Mask both copies, then compare bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import Enum
from typing import Final

from boreal.errors import CorruptData
from boreal.pages.layout import HEADER_BYTES, PageHeader, is_zero
from boreal.types import PAGE_BYTES

_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")

_LSN_AND_CHECKSUM = slice(0, 10)
_FLAGS_AT = 10
_LOWER_AND_UPPER = slice(12, 16)
_PRUNE_XID = slice(20, 24)


class PageKind(Enum):
    """Whose rules a page follows: the relation's access method and, for maps, the fork."""

    HEAP = "heap"
    BTREE = "btree"
    HASH = "hash"
    GIN = "gin"
    GIST = "gist"
    SPGIST = "spgist"
    BRIN = "brin"
    SEQUENCE = "sequence"
    GENERIC = "generic"
    """Extensions that log through the GENERIC resource manager (contrib/bloom)."""
    VISIBILITY_MAP = "visibility map"


def mask_page(page: bytearray, kind: PageKind, block: int) -> None:
    """Blank, in place, what may differ. `block` is the page's number in its fork.

    An all-zero page stays as it is. Raises CorruptData if the page is not laid out as its kind is.
    """
    if len(page) != PAGE_BYTES:
        raise CorruptData(f"a page has {PAGE_BYTES} bytes, not {len(page)}")
    if is_zero(page):
        return
    try:
        _MASKS[kind](page, block)
    except (struct.error, IndexError) as error:
        raise CorruptData(f"block {block} is not a {kind.value} page") from error


# --- parts (bufmask.c) ---------------------------------------------------------------------------


def _mask_lsn_and_checksum(page: bytearray) -> None:
    page[_LSN_AND_CHECKSUM] = bytes(10)


def _mask_hints(page: bytearray) -> None:
    """pd_prune_xid; PD_HAS_FREE_LINES, PD_PAGE_FULL and PD_ALL_VISIBLE."""
    page[_PRUNE_XID] = bytes(4)
    page[_FLAGS_AT] &= ~0x07


def _mask_unused_space(page: bytearray) -> None:
    header = PageHeader.of(page)
    if not HEADER_BYTES <= header.lower <= header.upper <= header.special <= PAGE_BYTES:
        raise CorruptData(
            f"a page's free space is said to be at {header.lower} to {header.upper}, "
            f"its special area at {header.special}"
        )
    page[header.lower : header.upper] = bytes(header.upper - header.lower)


def _mask_content(page: bytearray) -> None:
    page[HEADER_BYTES:] = bytes(PAGE_BYTES - HEADER_BYTES)
    page[_LOWER_AND_UPPER] = bytes(4)


def _line_pointers_at(page: bytearray) -> range:
    """Where the page's line pointers are, each an ItemIdData of 32 bits."""
    return range(HEADER_BYTES, PageHeader.of(page).lower - 3, _U32.size)


def _mask_line_pointer_flags(page: bytearray) -> None:
    """Index scans mark entries dead without logging it."""
    for at in _line_pointers_at(page):
        (pointer,) = _U32.unpack_from(page, at)
        _U32.pack_into(page, at, pointer & ~(3 << 15))


def _clear_bits(page: bytearray, at: int, bits: int) -> None:
    _U16.pack_into(page, at, _U16.unpack_from(page, at)[0] & ~bits)


def _standard(page: bytearray) -> None:
    _mask_lsn_and_checksum(page)
    _mask_hints(page)
    _mask_unused_space(page)


# --- heap (heapam.c) -----------------------------------------------------------------------------

_LP_NORMAL = 1
_TUPLE_CID = 8  # offsets in HeapTupleHeaderData
_TUPLE_CTID = 12
_TUPLE_INFOMASK = 20
_CTID = struct.Struct("<HHH")  # block number high, low; offset
_SPECULATIVE_OFFSET = 0xFFFE
_XACT_BITS = 0xFFF0
_XMIN_FROZEN = 0x0300
_XMAX_COMMITTED_OR_INVALID = 0x0C00


def _heap(page: bytearray, block: int) -> None:
    _standard(page)
    for offset, at in enumerate(_line_pointers_at(page), start=1):
        (pointer,) = _U32.unpack_from(page, at)
        start, flags, length = pointer & 0x7FFF, (pointer >> 15) & 3, pointer >> 17
        end, padding = start + length, -length % 8
        if end + padding > PAGE_BYTES:
            raise CorruptData(f"tuple {offset} of block {block} lies outside of its page")
        if flags == _LP_NORMAL:
            _mask_tuple(page, start, block, offset)
        page[end : end + padding] = bytes(padding)


def _mask_tuple(page: bytearray, start: int, block: int, offset: int) -> None:
    (infomask,) = _U16.unpack_from(page, start + _TUPLE_INFOMASK)
    frozen = infomask & _XMIN_FROZEN == _XMIN_FROZEN
    hints = _XMAX_COMMITTED_OR_INVALID if frozen else _XACT_BITS
    _U16.pack_into(page, start + _TUPLE_INFOMASK, infomask & ~hints & 0xFFFF)
    # Command ids are not in the WAL.
    page[start + _TUPLE_CID : start + _TUPLE_CID + 4] = bytes(4)
    # Nor are speculative tokens: redo makes such a tuple point to itself.
    if _CTID.unpack_from(page, start + _TUPLE_CTID)[2] == _SPECULATIVE_OFFSET:
        _CTID.pack_into(page, start + _TUPLE_CTID, block >> 16, block & 0xFFFF, offset)


def _sequence(page: bytearray, _block: int) -> None:
    _mask_lsn_and_checksum(page)
    _mask_unused_space(page)


def _visibility_map(page: bytearray, _block: int) -> None:
    """Only the bits count. (PostgreSQL's heap mask blanks them too, which compares nothing.)

    The map is extended without WAL, so its header may be zero in one copy and not in the other; its
    LSN is not moved when bits are cleared.
    """
    page[:HEADER_BYTES] = bytes(HEADER_BYTES)


# --- indexes -------------------------------------------------------------------------------------

_BTREE_FLAGS = 12  # offsets in BTPageOpaqueData
_BTREE_CYCLE_ID = 14
_BTP_LEAF = 1 << 0
_BTP_SPLIT_END_OR_HAS_GARBAGE = 1 << 5 | 1 << 6


def _btree(page: bytearray, _block: int) -> None:
    """nbtxlog.c."""
    _standard(page)
    special = PageHeader.of(page).special
    (flags,) = _U16.unpack_from(page, special + _BTREE_FLAGS)
    if flags & _BTP_LEAF:
        _mask_line_pointer_flags(page)
    _clear_bits(page, special + _BTREE_FLAGS, _BTP_SPLIT_END_OR_HAS_GARBAGE)
    _U16.pack_into(page, special + _BTREE_CYCLE_ID, 0)


_HASH_FLAGS = 12  # offset in HashPageOpaqueData
_LH_PAGE_TYPE = 0x0F
_LH_UNUSED = 0
_LH_BUCKET_OR_OVERFLOW = 1 << 0 | 1 << 1
_LH_PAGE_HAS_DEAD_TUPLES = 1 << 7


def _hash(page: bytearray, _block: int) -> None:
    """hash_xlog.c. A page without a type is unused: nothing on it counts."""
    _standard(page)
    special = PageHeader.of(page).special
    (flags,) = _U16.unpack_from(page, special + _HASH_FLAGS)
    if flags & _LH_PAGE_TYPE == _LH_UNUSED:
        _mask_content(page)
        return
    if flags & _LH_BUCKET_OR_OVERFLOW:
        _mask_line_pointer_flags(page)
    _clear_bits(page, special + _HASH_FLAGS, _LH_PAGE_HAS_DEAD_TUPLES)


_GIN_FLAGS = 6  # offset in GinPageOpaqueData
_GIN_DELETED = 1 << 2


def _gin(page: bytearray, _block: int) -> None:
    """ginxlog.c. Some of its pages do not keep pd_lower: then free space cannot be told."""
    _mask_lsn_and_checksum(page)
    _mask_hints(page)
    header = PageHeader.of(page)
    (flags,) = _U16.unpack_from(page, header.special + _GIN_FLAGS)
    if flags & _GIN_DELETED:
        _mask_content(page)
    elif header.lower > HEADER_BYTES:
        _mask_unused_space(page)


_GIST_NSN_BYTES = 8  # offsets in GISTPageOpaqueData
_GIST_FLAGS = 12
_F_LEAF = 1 << 0
_F_TUPLES_DELETED = 1 << 2
_F_FOLLOW_RIGHT_OR_HAS_GARBAGE = 1 << 3 | 1 << 4


def _gist(page: bytearray, _block: int) -> None:
    """gistxlog.c. F_FOLLOW_RIGHT and the NSN change after the record that tells of the split.

    F_TUPLES_DELETED, which nobody reads, is set by redo of a DELETE (gistRedoDeleteRecord), but not
    by the session that logs it (gistprunepage).
    """
    _standard(page)
    special = PageHeader.of(page).special
    (flags,) = _U16.unpack_from(page, special + _GIST_FLAGS)
    page[special : special + _GIST_NSN_BYTES] = bytes(_GIST_NSN_BYTES)
    if flags & _F_LEAF:
        _mask_line_pointer_flags(page)
    hints = _F_FOLLOW_RIGHT_OR_HAS_GARBAGE | _F_TUPLES_DELETED
    _clear_bits(page, special + _GIST_FLAGS, hints)


def _spgist(page: bytearray, _block: int) -> None:
    """spgxlog.c."""
    _mask_lsn_and_checksum(page)
    _mask_hints(page)
    if PageHeader.of(page).lower >= HEADER_BYTES:
        _mask_unused_space(page)


_BRIN_FLAGS_AT = PAGE_BYTES - 4  # the last two of the special space's four half-words
_BRIN_TYPE_AT = PAGE_BYTES - 2
_BRIN_META = 0xF091
_BRIN_REGULAR = 0xF093
_BRIN_EVACUATE_PAGE = 1 << 0


def _brin(page: bytearray, _block: int) -> None:
    """brin_xlog.c. The reverse map's pages have no free space."""
    _mask_lsn_and_checksum(page)
    _mask_hints(page)
    (page_type,) = _U16.unpack_from(page, _BRIN_TYPE_AT)
    keeps_lower = PageHeader.of(page).lower > HEADER_BYTES
    if page_type == _BRIN_REGULAR or (page_type == _BRIN_META and keeps_lower):
        _mask_unused_space(page)
    _clear_bits(page, _BRIN_FLAGS_AT, _BRIN_EVACUATE_PAGE)


def _generic(page: bytearray, _block: int) -> None:
    """generic_xlog.c."""
    _mask_lsn_and_checksum(page)
    _mask_unused_space(page)


_MASKS: Final[dict[PageKind, Callable[[bytearray, int], None]]] = {
    PageKind.HEAP: _heap,
    PageKind.BTREE: _btree,
    PageKind.HASH: _hash,
    PageKind.GIN: _gin,
    PageKind.GIST: _gist,
    PageKind.SPGIST: _spgist,
    PageKind.BRIN: _brin,
    PageKind.SEQUENCE: _sequence,
    PageKind.GENERIC: _generic,
    PageKind.VISIBILITY_MAP: _visibility_map,
}
