"""Whether storage's copy of a page and the engine's own file hold the same.

The masks compare two copies at one point of the log. A file at rest may differ from the log's view
of it in a few more ways, all of which the engine itself has between a primary and its standby.
"""

from __future__ import annotations

from boreal.pages.layout import HEADER_BYTES, PageHeader, is_zero
from boreal.pages.masks import PageKind, mask_page

_SPGIST_META_BLOCK = 0
_SPGIST_LAST_USED_PAGES = slice(28, 92)  # SpGistMetaPageData: 8 pairs of (block, free space)
_SEQUENCE_TUPLE_HEADER_BYTES = 24
_SEQUENCE_COUNTERS_BYTES = 16  # FormData_pg_sequence_data: last_value, log_cnt


def same_page(stored: bytes, engine: bytes, kind: PageKind, block: int) -> bool:
    """Whether the page storage materializes is as good as the one in the engine's file.

    Raises CorruptData if either is not laid out as its kind is.
    """
    if kind is PageKind.VISIBILITY_MAP:
        return _claims_no_more(stored, engine)
    if kind is PageKind.HEAP and is_zero(stored) and _has_no_tuples(engine):
        return True
    one, other = bytearray(stored), bytearray(engine)
    for page in (one, other):
        mask_page(page, kind, block)
        if kind is PageKind.SEQUENCE:
            _blank_counters(page)
        if kind is PageKind.SPGIST and block == _SPGIST_META_BLOCK:
            # Where there may be room, kept without log (SpGistUpdateMetaPage, spgutils.c).
            page[_SPGIST_LAST_USED_PAGES] = bytes(64)
    return one == other


def _claims_no_more(stored: bytes, engine: bytes) -> bool:
    """Every bit set in the stored map is set in the engine's.

    A lost bit costs time, a bit too many gives wrong answers. Bits do get lost: CREATE DATABASE
    (WAL_LOG) logs maps as pages of standard layout, so their bits lie in the image's hole
    (RelationCopyStorageUsingBuffer, bufmgr.c).
    """
    mine = int.from_bytes(stored[HEADER_BYTES:])
    return mine & int.from_bytes(engine[HEADER_BYTES:]) == mine


def _has_no_tuples(page: bytes) -> bool:
    """Initialized at most: that is not logged when a relation is extended in bulk."""
    return PageHeader.of(page).lower <= HEADER_BYTES


def _blank_counters(page: bytearray) -> None:
    """What is logged of a sequence is its state 32 values ahead (nextval_internal, sequence.c)."""
    if is_zero(page):
        return
    start = PageHeader.of(page).upper + _SEQUENCE_TUPLE_HEADER_BYTES
    page[start : start + _SEQUENCE_COUNTERS_BYTES] = bytes(_SEQUENCE_COUNTERS_BYTES)
