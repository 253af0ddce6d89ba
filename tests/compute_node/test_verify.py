"""Goal: `differences` tells of each page PostgreSQL would read otherwise, and of no other.

Method: heap pages made byte by byte, compared as values. (Whole clusters are verified in
tests/cluster, the masks in tests/pages.)
"""

from __future__ import annotations

import struct

import pytest

from boreal.pages import HEADER_BYTES, PageKind
from boreal.types import PAGE_BYTES, BlockNumber, NodeName
from compute_node.verify import differences

A, B, C = NodeName("sn-1"), NodeName("sn-2"), NodeName("sn-3")
FIRST = BlockNumber(70)
HEAP = PageKind.HEAP
ZEROS = bytes(PAGE_BYTES)


def heap_page(*, infomask: int = 0x0002, data: bytes = b"abc", lsn: int = 0x100) -> bytes:
    """One tuple of 27 bytes, padded to 32, at the page's end."""
    page = bytearray(PAGE_BYTES)
    start = PAGE_BYTES - 32
    struct.pack_into("<IIHHHHHHI", page, 0, 0, lsn, 0, 0, 28, start, PAGE_BYTES, 0x2004, 0)
    struct.pack_into("<I", page, HEADER_BYTES, start | 1 << 15 | 27 << 17)
    struct.pack_into("<IIIHHHHHB", page, start, 700, 0, 0, 0, 70, 1, 1, infomask, 24)
    page[start + 24 : start + 27] = data
    return bytes(page)


PAGE = heap_page()
HINTED = heap_page(infomask=0x0002 | 0x0100 | 0x0800)
OTHER = heap_page(data=b"abd", lsn=0x200)


def found(
    local: list[bytes], stored: dict[NodeName, list[bytes | None]], kind: PageKind = HEAP
) -> list[tuple[str, int]]:
    return [(d.node, d.block) for d in differences(kind, FIRST, local, stored)]


def test_equal_pages_do_not_differ() -> None:
    assert found([PAGE, OTHER], {A: [PAGE, OTHER], B: [PAGE, OTHER]}) == []


def test_nothing_to_compare_is_no_difference() -> None:
    assert found([], {A: []}) == []
    assert found([PAGE], {}) == []


def test_hint_bits_lsn_and_checksum_are_no_difference() -> None:
    assert HINTED != PAGE
    stamped = b"\x5a" * 10 + PAGE[10:]
    assert found([PAGE], {A: [HINTED], B: [stamped]}) == []
    assert found([HINTED], {A: [PAGE]}) == []


def test_a_real_difference_is_named_by_node_block_and_place() -> None:
    (difference,) = differences(HEAP, FIRST, [PAGE, PAGE], {A: [PAGE, PAGE], B: [PAGE, OTHER]})
    assert (difference.node, difference.block) == (B, FIRST + 1)
    at = PAGE_BYTES - 32 + 26
    assert f"1 bytes differ, the first at offset {at}" in difference.reason
    assert "0/100" in difference.reason
    assert "0/200" in difference.reason


def test_each_node_is_held_against_postgresql_not_against_the_others() -> None:
    assert found([PAGE], {A: [OTHER], B: [PAGE], C: [OTHER]}) == [(A, FIRST), (C, FIRST)]


@pytest.mark.parametrize("missing", [None, ZEROS], ids=["None", "zeros"])
def test_a_page_storage_lacks_is_named(missing: bytes | None) -> None:
    (difference,) = differences(HEAP, FIRST, [PAGE], {A: [missing]})
    assert (difference.node, difference.block) == (A, FIRST)
    assert difference.reason == "storage has zeros"


@pytest.mark.parametrize("local", [ZEROS, b"", PAGE[:4096]], ids=["zeros", "absent", "short"])
def test_for_a_page_not_in_the_local_file_the_first_node_speaks(local: bytes) -> None:
    assert found([local], {A: [PAGE], B: [HINTED], C: [PAGE]}) == []
    assert found([local], {A: [PAGE], B: [OTHER], C: [PAGE]}) == [(B, FIRST)]
    assert found([local], {A: [PAGE], B: [None]}) == [(B, FIRST)]


def test_the_reference_of_one_block_is_not_that_of_the_next() -> None:
    assert found([ZEROS, ZEROS], {A: [PAGE, OTHER], B: [PAGE, OTHER]}) == []
    assert found([ZEROS, PAGE], {A: [OTHER, PAGE], B: [OTHER, OTHER]}) == [(B, FIRST + 1)]


def test_a_block_storage_does_not_have_equals_local_zeros() -> None:
    assert found([ZEROS], {A: [None], B: [ZEROS], C: [None]}) == []
    assert found([b""], {A: [None], B: [ZEROS]}) == []


def test_nodes_that_disagree_on_whether_a_page_exists_differ() -> None:
    assert found([ZEROS], {A: [None], B: [PAGE], C: [PAGE]}) != []


def test_a_page_that_is_garbage_is_a_difference_too() -> None:
    assert found([PAGE], {A: [PAGE], B: [b"\xff" * PAGE_BYTES]}) == [(B, FIRST)]


def test_an_empty_heap_page_may_be_missing_in_storage() -> None:
    empty = bytearray(PAGE_BYTES)
    struct.pack_into("<IIHHHHHHI", empty, 0, 0, 0, 0, 0, 24, PAGE_BYTES, PAGE_BYTES, 0x2004, 0)
    assert found([bytes(empty)], {A: [None]}) == []
    assert found([bytes(empty)], {A: [None]}, PageKind.GENERIC) == [(A, FIRST)]


def test_a_map_may_lack_bits_in_storage_but_not_have_more() -> None:
    def bits(byte: int) -> bytes:
        return bytes(HEADER_BYTES) + bytes([byte]) + bytes(PAGE_BYTES - HEADER_BYTES - 1)

    stored: dict[NodeName, list[bytes | None]] = {
        A: [bits(0b01)],
        B: [bits(0b11)],
        C: [bits(0b111)],
    }
    assert found([bits(0b11)], stored, PageKind.VISIBILITY_MAP) == [(C, FIRST)]
