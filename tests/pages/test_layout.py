"""Goal: header fields and visibility bits are where PostgreSQL has them.

Method: against a page laid out by struct from bufpage.h, and a model of the map as a dictionary.
"""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from boreal.pages import PageHeader, is_zero, page_lsn, set_page_lsn, visibility
from boreal.pages.visibility import ALL_FROZEN, ALL_VISIBLE, HEAP_BLOCKS_PER_PAGE, VALID_BITS
from boreal.types import PAGE_BYTES

_MAP = st.dictionaries(
    st.integers(0, HEAP_BLOCKS_PER_PAGE - 1), st.integers(1, VALID_BITS), max_size=50
)


def test_the_lsn_is_stored_high_half_first() -> None:
    page = bytearray(PAGE_BYTES)
    set_page_lsn(page, 0x1_2345_6789)
    assert page[:8] == struct.pack("<II", 0x1, 0x23456789)
    assert page_lsn(page) == 0x1_2345_6789


def test_the_header() -> None:
    page = bytearray(PAGE_BYTES)
    assert is_zero(page)
    struct.pack_into("<IIHHHHHHI", page, 0, 1, 2, 3, 4, 28, 8000, 8176, 0x2004, 9)
    assert not is_zero(page)
    assert PageHeader.of(page) == PageHeader(
        lsn=page_lsn(page),
        checksum=3,
        flags=4,
        lower=28,
        upper=8000,
        special=8176,
        size_and_version=0x2004,
        prune_xid=9,
    )


def _page(bits_of: dict[int, int]) -> bytearray:
    page = bytearray(PAGE_BYTES)
    page[:24] = b"header, not bits, stays."
    for block, bits in bits_of.items():
        page[24 + block // 4] |= bits << (block % 4 * 2)
    return page


@given(bits_of=_MAP, block=st.integers(0, 3 * HEAP_BLOCKS_PER_PAGE), bits=st.integers(1, 3))
def test_clear(bits_of: dict[int, int], block: int, bits: int) -> None:
    page = _page(bits_of)
    visibility.clear(page, block, bits)
    slot = block % HEAP_BLOCKS_PER_PAGE
    expected = {**bits_of, slot: bits_of.get(slot, 0) & ~bits}
    assert page == _page(expected)


@given(bits_of=_MAP, heap_blocks=st.integers(0, 3 * HEAP_BLOCKS_PER_PAGE))
def test_truncate(bits_of: dict[int, int], heap_blocks: int) -> None:
    page = _page(bits_of)
    visibility.truncate(page, heap_blocks)
    cut = heap_blocks % HEAP_BLOCKS_PER_PAGE or HEAP_BLOCKS_PER_PAGE
    assert page == _page({block: bits for block, bits in bits_of.items() if block < cut})
    assert len(page) == PAGE_BYTES


def test_where_bits_are() -> None:
    assert HEAP_BLOCKS_PER_PAGE == 32672
    assert visibility.map_block(32671) == 0
    assert visibility.map_block(32672) == 1
    assert [visibility.truncated_blocks(n) for n in (0, 1, 32672, 32673)] == [0, 1, 1, 2]
    assert (ALL_VISIBLE, ALL_FROZEN, VALID_BITS) == (1, 2, 3)
