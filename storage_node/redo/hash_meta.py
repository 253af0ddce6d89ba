"""The meta page of a hash index (access/hash.h, HashMetaPageData): block 0.

Buckets come into being in phases; what is allocated for overflow pages and bitmaps before each
phase's buckets is counted in `spares`, and `maps` says where the bitmaps are.
"""

from __future__ import annotations

import struct

from boreal.pages.layout import HEADER_BYTES
from boreal.types import PAGE_BYTES
from storage_node.redo import hash_page
from storage_node.redo.items import RedoMismatch

_MAGIC, _VERSION = 0x6440640, 4
_HEAD = struct.Struct("<IIdHHHHIIIIIII")
"""Magic, version, tuples, fill factor, page size, bitmap's size, its shift, highest bucket, high
mask, low mask, overflow point, first free overflow page, bitmaps, hash function."""
_U32 = struct.Struct("<I")
_F64 = struct.Struct("<d")
_LOWER_AT = 12

_TUPLES_AT = HEADER_BYTES + 8
_MAX_BUCKET_AT = HEADER_BYTES + 24
_HIGH_MASK_AT = HEADER_BYTES + 28
_LOW_MASK_AT = HEADER_BYTES + 32
_OVERFLOW_POINT_AT = HEADER_BYTES + 36
_FIRST_FREE_AT = HEADER_BYTES + 40
_MAPS_COUNT_AT = HEADER_BYTES + 44
_SPARES_AT = HEADER_BYTES + _HEAD.size
_SPARES = 98
"""HASH_MAX_SPLITPOINTS."""
_MAPS_AT = _SPARES_AT + 4 * _SPARES
_MAPS = 1024
"""HASH_MAX_BITMAPS."""
_LOWER = struct.pack("<H", (_MAPS_AT + 4 * _MAPS + 7) & ~7)

_PAGE_ROOM = PAGE_BYTES - HEADER_BYTES - hash_page.SPECIAL_BYTES
_BITMAP_SHIFT = _PAGE_ROOM.bit_length() - 1
"""A bitmap has as many bytes as the highest power of two that fits on a page."""

_SINGLE_PHASES = 10
"""HASH_SPLITPOINT_GROUPS_WITH_ONE_PHASE: each doubling up to here is one phase, later ones four."""
_PHASE_BITS = 2
_PHASES = 1 << _PHASE_BITS
_MAX_INITIAL_BUCKETS = 0x40000000


def build(page: bytearray, tuples_expected: float, function: int, fill_factor: int) -> None:
    """Make it the meta page of a new index (_hash_init_metabuffer)."""
    if not fill_factor:
        raise RedoMismatch("a bucket is to hold no tuples")
    buckets = _initial_buckets(tuples_expected / fill_factor)
    phase = _phase(buckets)
    high_mask = (1 << buckets.bit_length()) - 1
    hash_page.build(page, hash_page.META)
    _HEAD.pack_into(
        page,
        HEADER_BYTES,
        _MAGIC,
        _VERSION,
        0.0,
        fill_factor,
        _PAGE_ROOM,
        1 << _BITMAP_SHIFT,
        _BITMAP_SHIFT + 3,
        buckets - 1,
        high_mask,
        high_mask >> 1,
        phase,
        0,
        0,
        function,
    )
    _U32.pack_into(page, _SPARES_AT + 4 * phase, 1)
    page[_LOWER_AT : _LOWER_AT + 2] = _LOWER


def add_tuples(page: bytearray, count: int) -> None:
    """Count tuples in, or out."""
    _expect(page)
    _F64.pack_into(page, _TUPLES_AT, _F64.unpack_from(page, _TUPLES_AT)[0] + count)


def set_tuples(page: bytearray, count: float) -> None:
    """Say how many tuples there are."""
    _expect(page)
    _F64.pack_into(page, _TUPLES_AT, count)


def set_first_free(page: bytearray, bit: int) -> None:
    """Say from which bit on a free overflow page is to be looked for."""
    _expect(page)
    _U32.pack_into(page, _FIRST_FREE_AT, bit)


def add_first_bitmap(page: bytearray) -> None:
    """A new index has its bitmap right behind the buckets it begins with."""
    _expect(page)
    (max_bucket,) = _U32.unpack_from(page, _MAX_BUCKET_AT)
    _add_map(page, max_bucket + 2)


def add_overflow_page(page: bytearray, bitmap: int | None) -> None:
    """The index got longer by an overflow page and, if it is not None, before it the new bitmap."""
    _expect(page)
    if bitmap is not None:
        _add_map(page, bitmap)
    (phase,) = _U32.unpack_from(page, _OVERFLOW_POINT_AT)
    at = _spare_at(phase)
    _U32.pack_into(page, at, _U32.unpack_from(page, at)[0] + (1 if bitmap is None else 2))


def set_max_bucket(page: bytearray, bucket: int) -> None:
    """Say which bucket is the highest."""
    _expect(page)
    _U32.pack_into(page, _MAX_BUCKET_AT, bucket)


def set_masks(page: bytearray, low: int, high: int) -> None:
    """Set the masks that make a bucket of a hash value."""
    _expect(page)
    _U32.pack_into(page, _LOW_MASK_AT, low)
    _U32.pack_into(page, _HIGH_MASK_AT, high)


def begin_phase(page: bytearray, phase: int, spares: int) -> None:
    """New overflow pages come behind the buckets of this phase from now on."""
    _expect(page)
    _U32.pack_into(page, _spare_at(phase), spares)
    _U32.pack_into(page, _OVERFLOW_POINT_AT, phase)


def _expect(page: bytearray) -> None:
    hash_page.expect(page, hash_page.META)


def _add_map(page: bytearray, block: int) -> None:
    (count,) = _U32.unpack_from(page, _MAPS_COUNT_AT)
    if count >= _MAPS:
        raise RedoMismatch(f"there is no room for more than {_MAPS} bitmaps")
    _U32.pack_into(page, _MAPS_AT + 4 * count, block)
    _U32.pack_into(page, _MAPS_COUNT_AT, count + 1)


def _spare_at(phase: int) -> int:
    if phase >= _SPARES:
        raise RedoMismatch(f"there is no phase {phase}")
    return _SPARES_AT + 4 * phase


def _initial_buckets(wanted: float) -> int:
    """What a whole number of phases has; two at least."""
    if wanted <= 2:
        return 2
    if wanted >= _MAX_INITIAL_BUCKETS:
        return _MAX_INITIAL_BUCKETS
    return _buckets_through(_phase(int(wanted)))


def _phase(buckets: int) -> int:
    """The phase in which the last of so many buckets comes into being (_hash_spareindex)."""
    doubling = (buckets - 1).bit_length()
    if doubling < _SINGLE_PHASES:
        return doubling
    quarter = (buckets - 1 >> doubling - _PHASE_BITS - 1) % _PHASES
    return _SINGLE_PHASES + (doubling - _SINGLE_PHASES) * _PHASES + quarter


def _buckets_through(phase: int) -> int:
    """How many buckets there are once the phase is done (_hash_get_totalbuckets)."""
    if phase < _SINGLE_PHASES:
        return 1 << phase
    doubling, quarter = divmod(phase - _SINGLE_PHASES, _PHASES)
    before = 1 << _SINGLE_PHASES + doubling - 1
    return before + before // _PHASES * (quarter + 1)
