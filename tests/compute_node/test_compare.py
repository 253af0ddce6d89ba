"""Goal: `differences` tells of each page PostgreSQL would read otherwise, and of no other.

Method: heap pages made byte by byte, compared as values; then over the real process's pipes. (Whole
clusters are verified in tests/cluster, the masks in tests/pages.)
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from boreal.errors import ProcessFailed
from boreal.pages import PageKind
from boreal.types import PAGE_BYTES, RELATION_SEGMENT_BLOCKS, BlockNumber, Fork, RelationFork
from compute_node.compare import Comparer, differences, disagreements, read_local
from tests.compute_node.heap_pages import heap_page

FIRST = BlockNumber(70)
HEAP = PageKind.HEAP
ZEROS = bytes(PAGE_BYTES)
TABLE = RelationFork(1663, 5, 16384, Fork.MAIN)

PAGE = heap_page()
HINTED = heap_page(infomask=0x0002 | 0x0100 | 0x0800)
OTHER = heap_page(data=b"abd", lsn=0x200)


def found(local: list[bytes], stored: list[bytes | None], kind: PageKind = HEAP) -> list[int]:
    return [fault.block for fault in differences(kind, FIRST, local, stored)]


def test_equal_pages_do_not_differ() -> None:
    assert found([PAGE, OTHER], [PAGE, OTHER]) == []
    assert found([], []) == []


def test_hint_bits_lsn_and_checksum_are_no_difference() -> None:
    assert HINTED != PAGE
    stamped = b"\x5a" * 10 + PAGE[10:]
    assert found([PAGE, PAGE], [HINTED, stamped]) == []
    assert found([HINTED], [PAGE]) == []


def test_a_real_difference_is_named_by_block_and_place() -> None:
    (fault,) = differences(HEAP, FIRST, [PAGE, PAGE], [PAGE, OTHER])
    assert fault.block == FIRST + 1
    at = PAGE_BYTES - 32 + 26
    assert f"1 bytes differ, the first at offset {at}" in fault.reason
    assert "0/100" in fault.reason
    assert "0/200" in fault.reason


@pytest.mark.parametrize("missing", [None, ZEROS], ids=["None", "zeros"])
def test_a_page_storage_lacks_is_named(missing: bytes | None) -> None:
    (fault,) = differences(HEAP, FIRST, [PAGE], [missing])
    assert fault == (FIRST, "storage has zeros")


@pytest.mark.parametrize("local", [ZEROS, b"", PAGE[:4096]], ids=["zeros", "absent", "short"])
def test_of_a_page_not_in_the_local_file_nothing_is_known(local: bytes) -> None:
    assert found([local, PAGE], [OTHER, OTHER]) == [FIRST + 1]
    assert found([local], [None]) == []


def test_a_page_that_is_garbage_is_a_difference_too() -> None:
    assert found([PAGE], [b"\xff" * PAGE_BYTES]) == [FIRST]


def test_an_empty_heap_page_may_be_missing_in_storage() -> None:
    empty = bytearray(PAGE_BYTES)
    struct.pack_into("<IIHHHHHHI", empty, 0, 0, 0, 0, 0, 24, PAGE_BYTES, PAGE_BYTES, 0x2004, 0)
    assert found([bytes(empty)], [None]) == []
    assert found([bytes(empty)], [None], PageKind.GENERIC) == [FIRST]


def test_a_map_may_lack_bits_in_storage_but_not_have_more() -> None:
    def bits(byte: int) -> bytes:
        return bytes(24) + bytes([byte]) + bytes(PAGE_BYTES - 25)

    stored: list[bytes | None] = [bits(0b01), bits(0b11), bits(0b111)]
    (fault,) = differences(PageKind.VISIBILITY_MAP, FIRST, [bits(0b11)] * 3, stored)
    assert fault.block == FIRST + 2


def test_between_nodes_every_byte_and_existence_count() -> None:
    assert disagreements(FIRST, [PAGE, None, ZEROS], [PAGE, None, ZEROS]) == []
    blocks = disagreements(FIRST, [PAGE, None, ZEROS, PAGE], [HINTED, ZEROS, None, PAGE])
    assert [fault.block for fault in blocks] == [FIRST, FIRST + 1, FIRST + 2]
    assert "1 bytes differ" in blocks[0].reason


# --- local files, and the process ----------------------------------------------------------------


@pytest.fixture
def pgdata(tmp_path: Path) -> Path:
    (tmp_path / "base" / "5").mkdir(parents=True)
    return tmp_path


def test_local_blocks_are_read_over_the_end_of_a_segment_file(pgdata: Path) -> None:
    file = pgdata / "base" / "5" / "16384"
    with file.open("wb") as first:
        first.seek((RELATION_SEGMENT_BLOCKS - 1) * PAGE_BYTES)
        first.write(PAGE)
    file.with_name("16384.1").write_bytes(OTHER + PAGE[:100])
    found = read_local(pgdata, TABLE, RELATION_SEGMENT_BLOCKS - 2, 5)
    assert found == [ZEROS, PAGE, OTHER, PAGE[:100], b""]
    assert read_local(pgdata, TABLE._replace(relation=1), 0, 2) == [b"", b""]


async def test_a_process_compares_with_the_files(pgdata: Path) -> None:
    (pgdata / "base" / "5" / "16384").write_bytes(PAGE + ZEROS + PAGE + OTHER)
    comparer = await Comparer.start(pgdata)
    try:
        stored: list[bytes | None] = [HINTED, OTHER, None, PAGE, OTHER]
        faults = await comparer.compare(HEAP, TABLE, 0, stored)
        assert [fault.block for fault in faults] == [2, 3]
        assert await comparer.compare(HEAP, TABLE, 3, [OTHER]) == []
    finally:
        await comparer.close()


async def test_a_process_that_is_gone_is_told(pgdata: Path) -> None:
    comparer = await Comparer.start(pgdata)
    comparer._process.kill()
    await comparer._process.wait()
    with pytest.raises(ProcessFailed):
        await comparer.compare(HEAP, TABLE, 0, [PAGE])
    await comparer.close()
