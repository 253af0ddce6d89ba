"""Goal: a B-tree record that does not fit its page is refused; one that does, does as it says.

Method: pages and records made by hand, down to the bytes: most of these no PostgreSQL writes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest

from boreal.errors import CorruptWal
from boreal.types import PAGE_BYTES, BlockNumber, Fork, Lsn, PageKey, RelationFork
from boreal.wal import BlockRef, Rmgr, WalRecord
from storage_node.redo import btree
from storage_node.redo.btree_page import Flag, Opaque, make_page, opaque_of, stored_items
from storage_node.redo.btree_posting import merge, swap_posting, without
from storage_node.redo.items import LP_DEAD, Item, RedoMismatch, get_item, set_item
from storage_node.redo.native import NativeRedo

_SPLIT = struct.Struct("<IHHH")
"""xl_btree_split: level, firstrightoff, newitemoff, postingoff."""

# --- posting lists -------------------------------------------------------------------------------


def _tid(number: int) -> bytes:
    return struct.pack("<HHH", 0, number, 1)


def _tuple(number: int, key: bytes = b"the key.") -> bytes:
    """An ordinary tuple, which points to the row of that number."""
    return _tid(number) + struct.pack("<H", 8 + len(key)) + key


def _posting(*numbers: int) -> bytes:
    """A list of rows, made without the code under test."""
    tids = b"".join(map(_tid, numbers))
    tids += bytes(-len(tids) % 8)
    header = struct.pack("<HHHH", 0, 16, 0x2000 | len(numbers), 0x2000 | 16 + len(tids))
    return header + b"the key." + tids


def _downlink(block: int, key: bytes = b"") -> bytes:
    """A pivot tuple."""
    return struct.pack("<HHHH", block >> 16, block & 0xFFFF, 0, 0x2000 | 8 + len(key)) + key


def test_a_new_row_within_a_list_pushes_the_last_one_out() -> None:
    new, posting = swap_posting(_tuple(5), _posting(2, 4, 6, 8), 2)
    assert (new, posting) == (_tuple(8), _posting(2, 4, 5, 6))
    new, posting = swap_posting(_tuple(7), _posting(2, 4, 6, 8), 3)
    assert (new, posting) == (_tuple(8), _posting(2, 4, 6, 7))


@pytest.mark.parametrize(
    ("new", "posting", "split_at"),
    [
        (_tuple(5), _posting(2, 4), 0),
        (_tuple(5), _posting(2, 4), 2),
        (_tuple(5), _tuple(2), 1),
        (_tuple(5), _downlink(2, b"the key."), 1),
        (_posting(5, 6), _posting(2, 4), 1),
        (_tuple(5), _posting(2, 4)[:24], 1),
    ],
)
def test_a_list_is_split_only_within(new: bytes, posting: bytes, split_at: int) -> None:
    with pytest.raises(RedoMismatch):
        swap_posting(new, posting, split_at)


def test_rows_are_taken_out_of_a_list() -> None:
    assert without(_posting(1, 2, 3, 4), (0, 2)) == _posting(2, 4)
    assert without(_posting(1, 2, 3, 4), (0, 1, 3)) == _tuple(3)


@pytest.mark.parametrize("indexes", [(), (3,), (0, 1, 2), (1, 1)])
def test_only_rows_of_the_list_are_taken_out(indexes: tuple[int, ...]) -> None:
    with pytest.raises(RedoMismatch):
        without(_posting(1, 2, 3), indexes)


def test_tuples_and_lists_merge() -> None:
    assert merge([_tuple(1), _tuple(2)]) == _posting(1, 2)
    assert merge([_posting(1, 2), _tuple(3), _posting(4, 5)]) == _posting(1, 2, 3, 4, 5)


def test_a_list_keeps_the_bits_of_its_first_tuple() -> None:
    """That it has nulls, or attributes of varying width."""
    has_nulls = 0x8000
    base = _tid(1) + struct.pack("<H", has_nulls | 16) + b"the key."
    (info,) = struct.unpack_from("<H", merge([base, _tuple(2)]), 6)
    assert info == has_nulls | 0x2000 | 32


@pytest.mark.parametrize(
    "tuples",
    [[_tuple(1), _downlink(2, b"the key.")], [_posting(*range(300)), _posting(*range(300, 600))]],
)
def test_no_list_of_pivots_and_none_too_large(tuples: list[bytes]) -> None:
    with pytest.raises(RedoMismatch):
        merge(tuples)


# --- records made by hand ------------------------------------------------------------------------

_RELATION = RelationFork(1663, 5, 16384, Fork.MAIN)
_LEAF = Opaque(previous=3, next=5, level=0, flags=Flag.LEAF)
_HIGH_KEY = _downlink(0, b"highest.")


def _page(items: Sequence[bytes], opaque: Opaque = _LEAF) -> bytearray:
    page = bytearray(PAGE_BYTES)
    make_page(page, opaque, items)
    return page


def _block(number: int, data: bytes = b"", at: int | None = None) -> BlockRef:
    page = PageKey(_RELATION, BlockNumber(10 + number if at is None else at))
    return BlockRef(number, page, False, data, None, False, False, 0, 0)


def _apply(
    page: bytearray, info: int, main_data: bytes, block: BlockRef, *others: BlockRef
) -> None:
    blocks = (block, *others)
    record = WalRecord(Lsn(0x1000), Lsn(0x1100), 0, Rmgr.BTREE, info, Lsn(0), main_data, blocks, 0)
    NativeRedo().apply(page, record, block)


def _u16(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}H", *numbers)


@pytest.mark.parametrize("number", [0, 4, 65535])
def test_a_tuple_goes_next_to_others_only(number: int) -> None:
    page = _page([_HIGH_KEY, _tuple(1)])
    with pytest.raises(CorruptWal):
        _apply(page, btree.INSERT_LEAF, _u16(number), _block(0, _tuple(2)))


def test_a_tuple_that_does_not_fit_is_refused() -> None:
    page = _page([_HIGH_KEY, *[_tuple(number, bytes(1000)) for number in range(8)]])
    with pytest.raises(CorruptWal):
        _apply(page, btree.INSERT_LEAF, _u16(2), _block(0, _tuple(9, bytes(1000))))


def test_a_downlink_finishes_the_childs_split() -> None:
    page = _page([_HIGH_KEY], _LEAF._replace(flags=Flag.LEAF | Flag.INCOMPLETE_SPLIT))
    _apply(page, btree.INSERT_UPPER, _u16(2), _block(1))
    assert opaque_of(page) == _LEAF
    with pytest.raises(CorruptWal, match="not incomplete"):
        _apply(page, btree.INSERT_UPPER, _u16(2), _block(1))


@pytest.mark.parametrize(("number", "split_at"), [(2, 1), (3, 1), (4, 0), (4, 3), (5, 1)])
def test_a_list_must_precede_the_tuple_that_splits_it(number: int, split_at: int) -> None:
    page = _page([_HIGH_KEY, _tuple(1), _posting(2, 4, 6)])
    with pytest.raises(CorruptWal):
        _apply(page, btree.INSERT_POST, _u16(number), _block(0, _u16(split_at) + _tuple(5)))


def test_a_split_of_the_rightmost_page_has_no_high_key_to_leave_out() -> None:
    page = _page([_tuple(1), _tuple(2), _tuple(3)], _LEAF._replace(next=0))
    main_data = _SPLIT.pack(0, 3, 2, 0)
    _apply(page, btree.SPLIT_L, main_data, _block(0, _tuple(9) + _HIGH_KEY), _block(1))
    assert stored_items(page) == [_HIGH_KEY, _tuple(1), _tuple(9), _tuple(2)]
    assert opaque_of(page) == Opaque(3, 11, 0, Flag.LEAF | Flag.INCOMPLETE_SPLIT)


def test_the_new_tuple_may_be_the_last_on_the_left() -> None:
    page = _page([_HIGH_KEY, _tuple(1), _tuple(2), _tuple(3)])
    main_data = _SPLIT.pack(0, 3, 3, 0)
    _apply(page, btree.SPLIT_L, main_data, _block(0, _tuple(9) + _HIGH_KEY), _block(1))
    assert stored_items(page) == [_HIGH_KEY, _tuple(1), _tuple(9)]


def test_of_a_split_list_the_tuple_pushed_out_may_go_right() -> None:
    page = _page([_HIGH_KEY, _tuple(1), _posting(2, 4, 6), _tuple(7)])
    main_data = _SPLIT.pack(0, 4, 4, 1)
    _apply(page, btree.SPLIT_R, main_data, _block(0, _tuple(3) + _HIGH_KEY), _block(1))
    assert stored_items(page) == [_HIGH_KEY, _tuple(1), _posting(2, 3, 4)]


@pytest.mark.parametrize(
    ("info", "main_data", "data"),
    [
        pytest.param(btree.SPLIT_R, (0, 6, 2, 0), _HIGH_KEY, id="beyond the page"),
        pytest.param(btree.SPLIT_R, (0, 1, 1, 0), _HIGH_KEY, id="before its first item"),
        pytest.param(btree.SPLIT_L, (0, 3, 4, 0), _tuple(9) + _HIGH_KEY, id="new one on the right"),
        pytest.param(btree.SPLIT_L, (0, 3, 1, 0), _tuple(9) + _HIGH_KEY, id="new one too early"),
        pytest.param(btree.SPLIT_L, (0, 3, 2, 0), _HIGH_KEY, id="no new one"),
        pytest.param(btree.SPLIT_R, (0, 3, 2, 0), _HIGH_KEY * 2, id="data too long"),
        pytest.param(btree.SPLIT_R, (0, 3, 2, 0), _HIGH_KEY[:-1], id="data too short"),
        pytest.param(btree.SPLIT_L, (0, 4, 3, 1), _tuple(3) + _HIGH_KEY, id="not a list"),
        pytest.param(btree.SPLIT_R, (0, 3, 4, 1), _tuple(3) + _HIGH_KEY, id="list on the right"),
        pytest.param(btree.SPLIT_R, (0, 5, 4, 1), _tuple(3) + _HIGH_KEY, id="new one on the left"),
        pytest.param(btree.SPLIT_L, (0, 3, 2, 1), _tuple(3) + _HIGH_KEY, id="list is high key"),
    ],
)
def test_a_split_that_does_not_fit_its_page_is_refused(
    info: int, main_data: tuple[int, ...], data: bytes
) -> None:
    page = _page([_HIGH_KEY, _tuple(1), _posting(2, 4), _tuple(7)])
    with pytest.raises(CorruptWal):
        _apply(page, info, _SPLIT.pack(*main_data), _block(0, data), _block(1))


def test_a_split_without_its_right_page_is_refused() -> None:
    page = _page([_HIGH_KEY, _tuple(1), _tuple(2)])
    with pytest.raises(CorruptWal, match="no block 1"):
        _apply(page, btree.SPLIT_R, _SPLIT.pack(0, 3, 2, 0), _block(0, _HIGH_KEY))


def test_intervals_merge_and_the_rest_stays() -> None:
    page = _page([_HIGH_KEY, *map(_tuple, range(1, 8))])
    flags = Flag.LEAF | Flag.HAS_GARBAGE
    page[PAGE_BYTES - 4] = flags
    _apply(page, btree.DEDUP, _u16(2), _block(0, _u16(3, 2, 5, 3)))
    merged = [_tuple(1), _posting(2, 3), _posting(4, 5, 6), _tuple(7)]
    assert stored_items(page) == [_HIGH_KEY, *merged]
    assert opaque_of(page) == _LEAF


@pytest.mark.parametrize(
    "intervals", [(1, 2), (2, 1), (2, 4), (2, 2, 3, 2), (3, 2, 2, 2), (2, 2, 4)]
)
def test_intervals_follow_one_another_within_the_page(intervals: tuple[int, ...]) -> None:
    page = _page([_HIGH_KEY, *map(_tuple, range(1, 4))])
    with pytest.raises(CorruptWal):
        _apply(page, btree.DEDUP, _u16((len(intervals) + 1) // 2), _block(0, _u16(*intervals)))


@pytest.mark.parametrize("info", [btree.VACUUM, btree.DELETE])
def test_lists_are_shortened_before_items_go(info: int) -> None:
    """Marks that scans left on other items, without a record, stay."""
    page = _page([_HIGH_KEY, _tuple(1), _posting(2, 3, 4), _tuple(5), _tuple(6), _tuple(7)])
    set_item(page, 5, get_item(page, 5)._replace(flags=LP_DEAD))
    page[PAGE_BYTES - 4] |= Flag.HAS_GARBAGE
    counts = _u16(3, 1) if info == btree.VACUUM else struct.pack("<IHH?", 700, 3, 1, False)
    _apply(page, info, counts, _block(0, _u16(2, 4, 6, 3, 2, 0, 2)))
    assert stored_items(page) == [_HIGH_KEY, _tuple(3), _tuple(6)]
    assert get_item(page, 3) == Item(8176 - 48, LP_DEAD, 16)
    assert opaque_of(page) == _LEAF


@pytest.mark.parametrize(
    ("counts", "data"),
    [
        pytest.param((1, 0), (5,), id="no such item"),
        pytest.param((3, 0), (2, 3, 5), id="no such item among several"),
        pytest.param((0, 1), (2, 1, 0), id="not a list"),
        pytest.param((0, 1), (3, 1, 2), id="no such row"),
        pytest.param((0, 1), (3, 2, 0), id="data too short"),
    ],
)
def test_what_vacuum_removes_must_be_there(counts: tuple[int, ...], data: tuple[int, ...]) -> None:
    page = _page([_HIGH_KEY, _tuple(1), _posting(2, 4), _tuple(7)])
    with pytest.raises(CorruptWal):
        _apply(page, btree.VACUUM, _u16(*counts), _block(0, _u16(*data)))


def _half_dead(number: int) -> bytes:
    """xl_btree_mark_page_halfdead: of the parent's page, the rest does not matter."""
    return struct.pack("<H2xIIII", number, 10, 3, 5, 0xFFFFFFFF)


def test_the_parent_keeps_the_key_and_the_next_downlink() -> None:
    inner = Opaque(previous=0, next=0, level=1, flags=0)
    page = _page(
        [_downlink(20), _downlink(0x2001E, b"aaaaaaaa"), _downlink(40, b"bbbbbbbb")], inner
    )
    _apply(page, btree.MARK_PAGE_HALFDEAD, _half_dead(1), _block(1))
    assert stored_items(page) == [_downlink(0x2001E), _downlink(40, b"bbbbbbbb")]
    with pytest.raises(CorruptWal, match="no item 3"):
        _apply(page, btree.MARK_PAGE_HALFDEAD, _half_dead(2), _block(1))


def test_a_leaf_has_no_leaf_below() -> None:
    main_data = struct.pack("<III4xQIII", 3, 5, 0, 700, 0, 0, 0)
    with pytest.raises(CorruptWal, match="no leaf below"):
        _apply(bytearray(PAGE_BYTES), btree.UNLINK_PAGE, main_data, _block(3))


def test_only_block_0_is_a_metapage() -> None:
    metadata = struct.pack("<6I?3x", 4, 1, 0, 1, 0, 0, True)
    page = bytearray(PAGE_BYTES)
    _apply(page, btree.META_CLEANUP, b"", _block(0, metadata, at=0))
    assert opaque_of(page) == Opaque(0, 0, 0, Flag.META)
    with pytest.raises(CorruptWal, match="cannot be a metapage"):
        _apply(page, btree.META_CLEANUP, b"", _block(0, metadata, at=1))


@pytest.mark.parametrize(("info", "block_id"), [(0xD0, 0), (0xF0, 0), (0x00, 1), (0x90, 5)])
def test_a_block_no_such_record_has_is_refused(info: int, block_id: int) -> None:
    with pytest.raises(CorruptWal, match=f"has a block {block_id}"):
        _apply(_page([]), info, bytes(40), _block(block_id))
