"""Goal: each rule of HEAP's redo, and that a misfit of record and page is told.

Method: records and pages put together by hand, applied by `NativeRedo`.
"""

from __future__ import annotations

import struct

import pytest

from boreal.errors import CorruptWal
from boreal.pages import PageHeader
from boreal.types import PAGE_BYTES
from boreal.wal import HEAP_INIT_PAGE, Heap2Info, HeapInfo, Rmgr
from storage_node.redo.heap_tuple import HOT_UPDATED, KEYS_UPDATED
from storage_node.redo.items import all_items, item_bytes
from tests.storage_node.redo.heap_records import (
    ALL_VISIBLE,
    COMBO_CID,
    END,
    EXCLUSIVE,
    INVALID_XMAX,
    IS_MULTI,
    LOCK_ONLY,
    MOVED_OFF,
    VALUES,
    XID,
    apply,
    fields_of,
    flags_of,
    logged_tuple,
    make_block,
    make_page,
    make_tuple,
    prune_data,
)

# How a record tells of t_infomask (XLHL_*).
_TOLD_MULTI, _TOLD_LOCK_ONLY, _TOLD_EXCLUSIVE, _TOLD_KEYS_UPDATED = 0x01, 0x02, 0x04, 0x10

# --- INSERT --------------------------------------------------------------------------------------


def test_an_inserted_tuple_points_to_itself_and_is_of_the_first_command() -> None:
    page = make_page(make_tuple())
    block = make_block(block=0x12345, data=logged_tuple(b"values"))
    apply(page, Rmgr.HEAP, HeapInfo.INSERT, struct.pack("<HB", 2, 0), block)
    assert fields_of(page, 2) == {
        "xmin": XID,
        "xmax": 0,
        "cid": 0,
        "ctid": (0x12345, 2),
        "infomask2": 2,
        "infomask": 2,
        "values": b"values",
    }
    assert PageHeader.of(page).lsn == END


def test_the_first_tuple_of_a_page_comes_with_the_page() -> None:
    page = bytearray(b"\xff" * PAGE_BYTES)
    info = HeapInfo.INSERT | HEAP_INIT_PAGE
    block = make_block(data=logged_tuple(b"values"), init=True)
    apply(page, Rmgr.HEAP, info, struct.pack("<HB", 1, 0), block)
    assert PageHeader.of(page)[2:6] == (0, 28, PAGE_BYTES - 32, PAGE_BYTES)
    assert fields_of(page, 1)["values"] == b"values"


def test_an_insertion_takes_an_unused_line_pointer() -> None:
    page = make_page(make_tuple(), make_tuple(), make_tuple())
    unused = struct.pack("<H", 2)
    apply(page, Rmgr.HEAP2, Heap2Info.PRUNE, prune_data(0, 0), make_block(data=unused))
    block = make_block(data=logged_tuple(b"again"))
    apply(page, Rmgr.HEAP, HeapInfo.INSERT, struct.pack("<HB", 2, 0), block)
    assert len(all_items(page)) == 3
    assert fields_of(page, 2)["values"] == b"again"


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [(0x00, True, True), (0x01, True, False), (0x20, False, True), (0x00, False, False)],
)
def test_an_insertion_clears_or_sets_all_visible(flags: int, before: bool, after: bool) -> None:
    page = make_page(make_tuple(), all_visible=before)
    block = make_block(data=logged_tuple(b"v"))
    apply(page, Rmgr.HEAP, HeapInfo.INSERT, struct.pack("<HB", 2, flags), block)
    assert flags_of(page) == (ALL_VISIBLE if after else 0)


@pytest.mark.parametrize(
    ("number", "data"),
    [
        (0, logged_tuple(b"v")),  # no item has that number
        (1, logged_tuple(b"v")),  # in use
        (3, logged_tuple(b"v")),  # does not follow on the one there is
        (2, logged_tuple(bytes(PAGE_BYTES - 100))),  # does not fit
        (2, b"\0" * 4),  # not even a header
    ],
)
def test_an_insertion_that_does_not_fit_is_told(number: int, data: bytes) -> None:
    with pytest.raises(CorruptWal) as told:
        apply(
            make_page(make_tuple()),
            Rmgr.HEAP,
            HeapInfo.INSERT,
            struct.pack("<HB", number, 0),
            make_block(data=data),
        )
    assert told.value.details["lsn"] == 0x1000


# --- DELETE --------------------------------------------------------------------------------------


def _delete(page: bytearray, *, infobits: int = 0, flags: int = 0, xmax: int = 77) -> bytearray:
    main_data = struct.pack("<IHBB", xmax, 1, infobits, flags)
    return apply(page, Rmgr.HEAP, HeapInfo.DELETE, main_data, make_block())


def test_a_deleted_tuple_gets_the_xmax_the_record_tells_of() -> None:
    infomask = INVALID_XMAX | IS_MULTI | LOCK_ONLY | MOVED_OFF | COMBO_CID | 0x0103
    page = make_page(make_tuple(ctid=(9, 4), infomask=infomask, infomask2=HOT_UPDATED | 2))
    _delete(page, infobits=_TOLD_KEYS_UPDATED)
    assert fields_of(page, 1) == {
        "xmin": 10,
        "xmax": 77,
        "cid": 0,
        "ctid": (7, 1),
        "infomask2": KEYS_UPDATED | 2,
        "infomask": 0x0103,
        "values": VALUES,
    }


def test_a_speculative_insertion_taken_back_loses_its_xmin_instead() -> None:
    fields = fields_of(_delete(make_page(make_tuple(xmax=3)), flags=0x08), 1)
    assert (fields["xmin"], fields["xmax"]) == (0, 3)


def test_a_row_that_went_to_another_partition_says_so() -> None:
    assert fields_of(_delete(make_page(make_tuple()), flags=0x10), 1)["ctid"] == (
        0xFFFFFFFF,
        0xFFFD,
    )


def test_a_deletion_clears_all_visible_only_if_the_record_says_so() -> None:
    assert flags_of(_delete(make_page(make_tuple(), all_visible=True), flags=0x01)) == 0
    assert flags_of(_delete(make_page(make_tuple(), all_visible=True), flags=0x00)) == ALL_VISIBLE


@pytest.mark.parametrize(
    ("before", "after"),
    [(0, XID), (XID + 1, XID), (XID - 1, XID - 1), (0xFFFFFFF0, 0xFFFFFFF0), (2, 2)],
)
def test_the_oldest_deletion_is_kept_as_the_reason_to_prune(before: int, after: int) -> None:
    # Ids wrap around: 0xFFFFFFF0 comes before 1000. Those below 3 are before all others.
    page = make_page(make_tuple())
    struct.pack_into("<I", page, 20, before)
    assert PageHeader.of(_delete(page)).prune_xid == after


@pytest.mark.parametrize("page", [make_page(), bytearray(PAGE_BYTES), make_page(b"short")])
def test_a_deletion_of_what_is_no_tuple_is_told(page: bytearray) -> None:
    with pytest.raises(CorruptWal):
        _delete(page)


# --- UPDATE --------------------------------------------------------------------------------------


def _update(flags: int = 0, *, old: int = 1, new: int = 2, infobits: int = 0) -> bytes:
    return struct.pack("<IHBBIH", 77, old, infobits, flags, 88, new)


_PREFIX, _SUFFIX = 0x20, 0x40


@pytest.mark.parametrize(
    ("flags", "lengths", "logged", "values"),
    [
        (0, (), b"new", b"new"),
        (_PREFIX, (4,), b"new", VALUES[:4] + b"new"),
        (_SUFFIX, (5,), b"new", b"new" + VALUES[-5:]),
        (_PREFIX | _SUFFIX, (4, 5), b"new", VALUES[:4] + b"new" + VALUES[-5:]),
        (_PREFIX | _SUFFIX, (30, 10), b"", VALUES),
        (_PREFIX | _SUFFIX, (40, 40), b"", VALUES + VALUES),
    ],
)
@pytest.mark.parametrize("nulls", [b"\0", b"\x01" + bytes(8)])
def test_a_new_tuple_takes_its_beginning_and_end_from_the_old_one(
    flags: int, lengths: tuple[int, ...], logged: bytes, values: bytes, nulls: bytes
) -> None:
    page = make_page(make_tuple())
    data = struct.pack(f"<{len(lengths)}H", *lengths) + logged_tuple(logged, nulls=nulls)
    apply(page, Rmgr.HEAP, HeapInfo.HOT_UPDATE, _update(flags), make_block(data=data))
    assert fields_of(page, 2)["values"] == values
    assert item_bytes(page, 2)[23 : 23 + len(nulls)] == nulls


@pytest.mark.parametrize("info", [HeapInfo.UPDATE, HeapInfo.HOT_UPDATE])
def test_an_update_within_a_page_links_the_two_tuples(info: HeapInfo) -> None:
    page = make_page(make_tuple(infomask=INVALID_XMAX | COMBO_CID, infomask2=KEYS_UPDATED | 2))
    block = make_block(block=0x54321, data=logged_tuple(b"new"))
    apply(page, Rmgr.HEAP, info, _update(infobits=_TOLD_MULTI), block)
    old, new = fields_of(page, 1), fields_of(page, 2)
    assert (old["xmin"], old["xmax"], old["cid"], old["ctid"]) == (10, 77, 0, (0x54321, 2))
    assert (new["xmin"], new["xmax"], new["cid"], new["ctid"]) == (XID, 88, 0, (0x54321, 2))
    assert old["infomask"] == IS_MULTI
    assert old["infomask2"] == (HOT_UPDATED | 2 if info is HeapInfo.HOT_UPDATE else 2)
    assert PageHeader.of(page).prune_xid == XID


def test_an_update_across_pages_changes_each_page_its_own_way() -> None:
    blocks = (make_block(0, block=0x30004, data=logged_tuple(b"new")), make_block(1, block=3))
    main_data = _update(0x01 | 0x02, new=1)
    old = make_page(make_tuple(), all_visible=True)
    new = make_page(all_visible=True)
    apply(old, Rmgr.HEAP, HeapInfo.UPDATE, main_data, *blocks, to=1)
    apply(new, Rmgr.HEAP, HeapInfo.UPDATE, main_data, *blocks, to=0)
    assert len(all_items(old)) == len(all_items(new)) == 1
    assert fields_of(old, 1)["ctid"] == fields_of(new, 1)["ctid"] == (0x30004, 1)
    assert (fields_of(old, 1)["xmax"], fields_of(new, 1)["xmin"]) == (77, XID)
    assert flags_of(old) == flags_of(new) == 0
    assert (PageHeader.of(old).prune_xid, PageHeader.of(new).prune_xid) == (XID, 0)


def test_an_update_to_a_new_page_comes_with_the_page() -> None:
    blocks = (make_block(0, data=logged_tuple(b"new"), init=True), make_block(1, block=3))
    page = bytearray(b"\xff" * PAGE_BYTES)
    apply(page, Rmgr.HEAP, HeapInfo.UPDATE | HEAP_INIT_PAGE, _update(new=1), *blocks)
    assert fields_of(page, 1)["values"] == b"new"


def test_parts_of_a_tuple_on_another_page_cannot_be_had() -> None:
    data = struct.pack("<H", 4) + logged_tuple(b"new")
    with pytest.raises(CorruptWal, match="another page"):
        apply(
            make_page(make_tuple()),
            Rmgr.HEAP,
            HeapInfo.UPDATE,
            _update(_PREFIX),
            make_block(0, data=data),
            make_block(1, block=3),
        )


@pytest.mark.parametrize(
    ("flags", "data"),
    [
        (_PREFIX, struct.pack("<H", 41) + logged_tuple(b"")),  # longer than the old tuple's values
        (_SUFFIX, struct.pack("<H", 41) + logged_tuple(b"")),
        (_PREFIX, struct.pack("<H", 4) + logged_tuple(b"", nulls=bytes(9))[:-1]),  # nulls cut off
        (_PREFIX, struct.pack("<HHHB", 4, 2, 2, 22)),  # values begin inside the header
        (_PREFIX | _SUFFIX, b"\4\0"),
    ],
)
def test_parts_that_the_old_tuple_does_not_have_are_told(flags: int, data: bytes) -> None:
    with pytest.raises(CorruptWal):
        apply(
            make_page(make_tuple()),
            Rmgr.HEAP,
            HeapInfo.HOT_UPDATE,
            _update(flags),
            make_block(data=data),
        )


# --- LOCK, CONFIRM, INPLACE ----------------------------------------------------------------------


def _lock(page: bytearray, infobits: int, *, updated: bool = False) -> dict[str, object]:
    main_data = struct.pack("<IHBB", 77, 1, infobits, 0)
    if updated:
        apply(page, Rmgr.HEAP2, Heap2Info.LOCK_UPDATED, main_data, make_block())
    else:
        apply(page, Rmgr.HEAP, HeapInfo.LOCK, main_data, make_block())
    return fields_of(page, 1)


def test_a_lock_alone_ends_a_chain_that_an_aborted_update_left() -> None:
    left = make_tuple(ctid=(9, 4), infomask2=HOT_UPDATED | 2)
    for infobits in (_TOLD_LOCK_ONLY, _TOLD_EXCLUSIVE | _TOLD_LOCK_ONLY, _TOLD_EXCLUSIVE):
        fields = _lock(make_page(left), infobits)
        assert (fields["ctid"], fields["infomask2"]) == ((7, 1), 2)
        assert (fields["xmax"], fields["cid"]) == (77, 0)


def test_a_lock_beside_an_update_leaves_the_chain() -> None:
    left = make_tuple(ctid=(9, 4), infomask2=HOT_UPDATED | 2)
    fields = _lock(make_page(left), _TOLD_MULTI | _TOLD_EXCLUSIVE)
    assert (fields["ctid"], fields["infomask2"]) == ((9, 4), HOT_UPDATED | 2)
    assert fields["infomask"] == IS_MULTI | EXCLUSIVE


def test_a_lock_on_an_updated_version_leaves_chain_and_command() -> None:
    left = make_tuple(ctid=(9, 4), cid=5, infomask=INVALID_XMAX | COMBO_CID)
    fields = _lock(make_page(left), _TOLD_EXCLUSIVE | _TOLD_LOCK_ONLY, updated=True)
    assert (fields["ctid"], fields["cid"], fields["xmax"]) == ((9, 4), 5, 77)
    assert fields["infomask"] == COMBO_CID | EXCLUSIVE | LOCK_ONLY


def test_a_confirmed_tuple_points_to_itself() -> None:
    page = make_page(make_tuple(ctid=(0, 0xFFFE)))
    apply(page, Rmgr.HEAP, HeapInfo.CONFIRM, struct.pack("<H", 1), make_block(block=0x20003))
    assert fields_of(page, 1)["ctid"] == (0x20003, 1)


def test_an_inplace_update_replaces_values_of_the_same_length() -> None:
    page = make_page(make_tuple())
    changed = bytes(reversed(VALUES))
    apply(page, Rmgr.HEAP, HeapInfo.INPLACE, struct.pack("<H", 1), make_block(data=changed))
    assert item_bytes(page, 1) == make_tuple(changed)
    with pytest.raises(CorruptWal, match="40 bytes, not 39"):
        apply(page, Rmgr.HEAP, HeapInfo.INPLACE, struct.pack("<H", 1), make_block(data=changed[1:]))


def test_a_heap_truncation_names_no_page() -> None:
    with pytest.raises(CorruptWal):
        apply(make_page(make_tuple()), Rmgr.HEAP, HeapInfo.TRUNCATE, bytes(12), make_block())
