"""Goal: each rule of HEAP2's and SEQ's redo, and that a misfit of record and page is told.

Method: records and pages put together by hand, applied by `NativeRedo`; then, where PostgreSQL
writes a record only if several sessions meet, PostgreSQL as the judge (`oracle`). The large
workload under the same judge is test_oracle.py's.
"""

from __future__ import annotations

import struct

import pytest

from boreal.errors import CorruptWal
from boreal.pages import PageHeader, is_zero, visibility
from boreal.types import PAGE_BYTES, BlockNumber, Fork, PageKey
from boreal.wal import HEAP_INIT_PAGE, Heap2Info, Rmgr, WalRecord
from storage_node.redo import heap2
from storage_node.redo.items import (
    LP_DEAD,
    LP_NORMAL,
    LP_REDIRECT,
    LP_UNUSED,
    all_items,
    get_item,
    item_bytes,
)
from storage_node.redo.native import NativeRedo
from tests.storage_node.redo.heap_records import (
    ALL_VISIBLE,
    END,
    FROZEN_XMIN,
    INVALID_XMAX,
    IS_MULTI,
    RELATION,
    XID,
    apply,
    fields_of,
    flags_of,
    logged_tuple,
    make_block,
    make_page,
    make_record,
    make_tuple,
    prune_data,
)
from tests.storage_node.redo.oracle import oracle

# --- PRUNE, VACUUM -------------------------------------------------------------------------------


def test_pruning_redirects_frees_and_closes_the_gaps() -> None:
    page = make_page(*(make_tuple(bytes((number,)) * 9) for number in range(1, 7)))
    numbers = struct.pack("<5H", 1, 3, 2, 4, 6)  # 1 leads to 3; 2 is dead; 4 and 6 are unused
    apply(page, Rmgr.HEAP2, Heap2Info.PRUNE, prune_data(1, 1), make_block(data=numbers))
    items = all_items(page)
    assert [item.flags for item in items] == [
        LP_REDIRECT,
        LP_DEAD,
        LP_NORMAL,
        LP_UNUSED,
        LP_NORMAL,
    ]
    assert items[0].offset == 3
    # Kept tuples lie against the page's end, by number; 33 bytes take 40.
    assert [items[index].offset for index in (2, 4)] == [PAGE_BYTES - 40, PAGE_BYTES - 80]
    assert (fields_of(page, 3)["values"], fields_of(page, 5)["values"]) == (b"\3" * 9, b"\5" * 9)
    header = PageHeader.of(page)
    assert (header.lower, header.upper, header.flags) == (24 + 4 * 5, PAGE_BYTES - 80, 0x01)


@pytest.mark.parametrize(
    ("main_data", "numbers"),
    [
        (prune_data(1, 0), (1,)),
        (prune_data(0, 2), (1,)),
        (prune_data(0, 1), (3,)),
        (prune_data(0, 0), (0,)),
    ],
)
def test_pruning_of_items_that_are_not_there_is_told(
    main_data: bytes, numbers: tuple[int, ...]
) -> None:
    data = struct.pack(f"<{len(numbers)}H", *numbers)
    with pytest.raises(CorruptWal):
        apply(
            make_page(make_tuple(), make_tuple()),
            Rmgr.HEAP2,
            Heap2Info.PRUNE,
            main_data,
            make_block(data=data),
        )


def test_vacuum_moves_nothing_and_drops_unused_line_pointers_at_the_end() -> None:
    page = make_page(make_tuple(), make_tuple(), make_tuple(), make_tuple())
    dead = struct.pack("<3H", 1, 3, 4)
    apply(page, Rmgr.HEAP2, Heap2Info.PRUNE, prune_data(0, 3), make_block(data=dead))
    kept = get_item(page, 2)
    apply(page, Rmgr.HEAP2, Heap2Info.VACUUM, struct.pack("<H", 3), make_block(data=dead))
    assert [item.flags for item in all_items(page)] == [LP_UNUSED, LP_NORMAL]
    assert get_item(page, 2) == kept
    assert flags_of(page) == 0x01  # there are unused line pointers


def test_vacuum_keeps_one_line_pointer() -> None:
    page = make_page(make_tuple(), make_tuple())
    both = struct.pack("<2H", 1, 2)
    apply(page, Rmgr.HEAP2, Heap2Info.PRUNE, prune_data(0, 2), make_block(data=both))
    apply(page, Rmgr.HEAP2, Heap2Info.VACUUM, struct.pack("<H", 2), make_block(data=both))
    assert [item.flags for item in all_items(page)] == [LP_UNUSED]
    header = PageHeader.of(page)
    assert (header.upper, header.flags) == (PAGE_BYTES, 0x01)


# --- FREEZE_PAGE ---------------------------------------------------------------------------------


def _plan(xmax: int, infomask2: int, infomask: int, xvac: int, tuples: int) -> bytes:
    return struct.pack("<IHHBxH", xmax, infomask2, infomask, xvac, tuples)


def _freeze(page: bytearray, plans: list[bytes], *numbers: int) -> bytearray:
    data = b"".join(plans) + struct.pack(f"<{len(numbers)}H", *numbers)
    main_data = struct.pack("<IHB", 0, len(plans), 0)
    return apply(page, Rmgr.HEAP2, Heap2Info.FREEZE_PAGE, main_data, make_block(data=data))


def test_each_freeze_plan_is_for_the_next_tuples_of_the_list() -> None:
    page = make_page(*(make_tuple(xmax=3, cid=9) for _ in range(4)))
    plans = [
        _plan(0, 2, FROZEN_XMIN | INVALID_XMAX, 0, 2),
        _plan(6, 3, FROZEN_XMIN | IS_MULTI, 0, 1),
    ]
    _freeze(page, plans, 4, 1, 2)
    masks = [(fields_of(page, n)["xmax"], fields_of(page, n)["infomask"]) for n in range(1, 5)]
    frozen = (0, FROZEN_XMIN | INVALID_XMAX)
    assert masks == [frozen, (6, FROZEN_XMIN | IS_MULTI), (3, INVALID_XMAX), frozen]
    assert [fields_of(page, n)["cid"] for n in range(1, 5)] == [9, 9, 9, 9]


@pytest.mark.parametrize(("xvac", "became"), [(0x02, 2), (0x04, 0), (0x00, 9)])
def test_an_old_xvac_is_frozen_or_removed(xvac: int, became: int) -> None:
    page = _freeze(make_page(make_tuple(cid=9)), [_plan(0, 2, FROZEN_XMIN, xvac, 1)], 1)
    assert fields_of(page, 1)["cid"] == became


@pytest.mark.parametrize(("tuples", "numbers"), [(2, (1,)), (1, (2,)), (1, ())])
def test_a_freeze_plan_for_tuples_that_are_not_there_is_told(
    tuples: int, numbers: tuple[int, ...]
) -> None:
    with pytest.raises(CorruptWal):
        _freeze(make_page(make_tuple()), [_plan(0, 2, FROZEN_XMIN, 0, tuples)], *numbers)


# --- VISIBLE -------------------------------------------------------------------------------------

_HEAP_BLOCK = visibility.HEAP_BLOCKS_PER_PAGE + 5


def _visible(bits: int, *, map_block: int = 1) -> WalRecord:
    map_fork = RELATION._replace(fork=Fork.VM)
    map_page = make_block()._replace(page=PageKey(map_fork, BlockNumber(map_block)))
    heap_page = make_block(1, block=_HEAP_BLOCK)
    catalog_relation = 0x04
    main_data = struct.pack("<IB", 0, bits | catalog_relation)
    return make_record(Rmgr.HEAP2, Heap2Info.VISIBLE, main_data, map_page, heap_page)


def test_visible_sets_bits_on_a_map_page_never_written_before() -> None:
    page = bytearray(PAGE_BYTES)
    record = _visible(visibility.ALL_VISIBLE)
    NativeRedo().apply(page, record, record.blocks[0])
    assert PageHeader.of(page) == (END, 0, 0, 24, PAGE_BYTES, PAGE_BYTES, PAGE_BYTES | 4, 0)
    assert page[24:] == bytes((0, visibility.ALL_VISIBLE << 2)) + bytes(PAGE_BYTES - 26)
    record = _visible(visibility.VALID_BITS)
    NativeRedo().apply(page, record, record.blocks[0])
    assert page[25] == visibility.VALID_BITS << 2


def test_visible_tells_when_the_map_had_the_bits_already() -> None:
    page = bytearray(PAGE_BYTES)
    record = _visible(visibility.VALID_BITS)
    assert heap2.apply(page, record, record.blocks[0])
    assert heap2.apply(page, record, record.blocks[0]) is False


def test_visible_leaves_the_heap_pages_lsn() -> None:
    page = make_page(make_tuple())
    record = _visible(visibility.VALID_BITS)
    NativeRedo().apply(page, record, record.blocks[1])
    assert (PageHeader.of(page).lsn, flags_of(page)) == (0, ALL_VISIBLE)


def test_visible_of_a_heap_page_never_written_is_told() -> None:
    page = bytearray(PAGE_BYTES)
    record = _visible(visibility.VALID_BITS)
    with pytest.raises(CorruptWal):
        NativeRedo().apply(page, record, record.blocks[1])
    assert is_zero(page)


def test_visible_of_another_map_page_is_told() -> None:
    record = _visible(visibility.VALID_BITS, map_block=0)
    with pytest.raises(CorruptWal):
        NativeRedo().apply(bytearray(PAGE_BYTES), record, record.blocks[0])


# --- MULTI_INSERT --------------------------------------------------------------------------------


def _multi_data(*values: bytes) -> bytes:
    """Each tuple begins at an even byte; its length counts what follows its header."""
    data = b""
    for value in values:
        logged = logged_tuple(value)
        data += bytes(len(data) % 2) + struct.pack("<H", len(logged) - 5) + logged
    return data


def test_many_tuples_at_the_numbers_told() -> None:
    page = make_page(make_tuple(), all_visible=True)
    main_data = struct.pack("<BxH2H", 0x01, 2, 2, 3)
    data = _multi_data(b"odd", b"even")
    apply(page, Rmgr.HEAP2, Heap2Info.MULTI_INSERT, main_data, make_block(data=data))
    assert [fields_of(page, number)["values"] for number in (2, 3)] == [b"odd", b"even"]
    assert fields_of(page, 3)["ctid"] == (7, 3)
    assert (fields_of(page, 3)["xmin"], flags_of(page)) == (XID, 0)


def test_many_tuples_on_a_new_page_go_by_their_order() -> None:
    page = bytearray(b"\xff" * PAGE_BYTES)
    info = Heap2Info.MULTI_INSERT | HEAP_INIT_PAGE
    block = make_block(data=_multi_data(b"a", b"bb", b"ccc"), init=True)
    apply(page, Rmgr.HEAP2, info, struct.pack("<BxH", 0x20, 3), block)
    assert [fields_of(page, number)["values"] for number in (1, 2, 3)] == [b"a", b"bb", b"ccc"]
    assert flags_of(page) == ALL_VISIBLE


@pytest.mark.parametrize("data", [_multi_data(b"a", b"b", b"c"), _multi_data(b"a"), b""])
def test_more_or_fewer_tuples_than_told_are_told(data: bytes) -> None:
    with pytest.raises(CorruptWal):
        apply(
            make_page(),
            Rmgr.HEAP2,
            Heap2Info.MULTI_INSERT,
            struct.pack("<BxH2H", 0, 2, 1, 2),
            make_block(data=data),
        )


# --- SEQ -----------------------------------------------------------------------------------------


def test_a_sequences_page_is_built_whole() -> None:
    page = bytearray(b"\xff" * PAGE_BYTES)
    row = make_tuple(bytes(17))
    apply(page, Rmgr.SEQ, 0, bytes(12) + row, make_block(init=True))
    assert item_bytes(page, 1) == row
    assert PageHeader.of(page).special == PAGE_BYTES - 8
    assert page[-8:] == struct.pack("<II", 0x1717, 0)
    with pytest.raises(CorruptWal):
        apply(page, Rmgr.SEQ, 0x10, bytes(12) + row, make_block(init=True))


# --- PostgreSQL as the judge ---------------------------------------------------------------------


def test_freezing_beside_sessions_that_still_hold_locks() -> None:
    """Multixacts lose the members that are done, or are replaced by the one that is not."""
    with oracle() as run:
        run.server.run(
            "CREATE TABLE held (id int, n int, t text)",
            "INSERT INTO held SELECT g, 0, 'abcdefgh' FROM generate_series(1, 90) g",
            # What changes comes first in the row, so only its end is taken from the old one.
            "UPDATE held SET id = id + 1000 WHERE id <= 20",
            "UPDATE held SET n = NULL WHERE id <= 30",
            "VACUUM held",
        )
        with (
            run.server.connect() as one,
            run.server.connect() as two,
            run.server.connect() as three,
        ):
            for session, lock in (
                (one, "SELECT FROM held FOR KEY SHARE"),
                (two, "SELECT FROM held WHERE id > 40 FOR KEY SHARE"),
                (three, "SELECT FROM held WHERE id > 70 FOR SHARE"),
            ):
                session.execute("BEGIN")
                session.execute(lock)
            run.server.run("UPDATE held SET n = 3 WHERE id IN (45, 55)")
            one.execute("COMMIT")
            run.server.run("VACUUM (FREEZE) held")
        run.server.run("DELETE FROM held WHERE id = 60", "VACUUM (FREEZE) held")
        assert run.check() == []
