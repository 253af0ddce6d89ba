"""Goal: effects the workload does not bring about, and main data that is not what it should be.

Method: records put together by hand. (test_against_stock.py compares those of a real log.)
"""

from __future__ import annotations

import struct

import pytest

from boreal.errors import CorruptWal
from boreal.pages.visibility import ALL_FROZEN, HEAP_BLOCKS_PER_PAGE, VALID_BITS
from boreal.types import BlockNumber, Fork, Lsn, PageKey, RelationFork
from boreal.wal import (
    BlockRef,
    DatabaseDropped,
    DbaseInfo,
    Heap2Info,
    HeapInfo,
    RelationDropped,
    RelationTruncated,
    Rmgr,
    SmgrInfo,
    VisibilityCleared,
    WalRecord,
    XactInfo,
    effects,
)

_HEAP = RelationFork(1663, 5, 16384, Fork.MAIN)
_MAP = _HEAP._replace(fork=Fork.VM)


def _record(rmgr: Rmgr, info: int, main_data: bytes, *heap_blocks: int) -> WalRecord:
    blocks = tuple(
        BlockRef(number, PageKey(_HEAP, BlockNumber(block)), False, b"", None, False, False, 0, 0)
        for number, block in enumerate(heap_blocks)
    )
    return WalRecord(Lsn(1000), Lsn(1100), 7, rmgr, info, Lsn(900), main_data, blocks, 0)


def _cleared(heap_block: int, bits: int) -> VisibilityCleared:
    page = PageKey(_MAP, BlockNumber(heap_block // HEAP_BLOCKS_PER_PAGE))
    return VisibilityCleared(page=page, heap_block=BlockNumber(heap_block), bits=bits)


def _update(flags: int) -> bytes:
    return struct.pack("<IHBBIH", 700, 1, 0, flags, 0, 2)


@pytest.mark.parametrize("info", [HeapInfo.UPDATE, HeapInfo.HOT_UPDATE, HeapInfo.UPDATE | 0x80])
def test_an_update_clears_for_the_old_block_and_the_new(info: int) -> None:
    # Block 0 has the new tuple, block 1 the old.
    both = _record(Rmgr.HEAP, info, _update(0x03), 40_000, 12)
    assert effects(both) == (_cleared(12, VALID_BITS), _cleared(40_000, VALID_BITS))
    assert effects(both)[1] == VisibilityCleared(
        page=PageKey(_MAP, BlockNumber(1)), heap_block=BlockNumber(40_000), bits=3
    )
    one_page = _record(Rmgr.HEAP, info, _update(0x01), 12)
    assert effects(one_page) == (_cleared(12, VALID_BITS),)
    assert effects(_record(Rmgr.HEAP, info, _update(0x7C), 40_000, 12)) == ()


@pytest.mark.parametrize(
    ("rmgr", "info"), [(Rmgr.HEAP, HeapInfo.LOCK), (Rmgr.HEAP2, Heap2Info.LOCK_UPDATED)]
)
def test_a_lock_clears_all_frozen_only(rmgr: Rmgr, info: int) -> None:
    main_data = struct.pack("<IHBB", 700, 1, 0, 1)
    assert effects(_record(rmgr, info, main_data, 5)) == (_cleared(5, ALL_FROZEN),)
    assert effects(_record(rmgr, info, main_data[:-1] + b"\0", 5)) == ()


def test_an_inserts_other_flags_clear_nothing() -> None:
    for flags in (0x02, 0x04, 0x08, 0x10, 0x20):
        assert effects(_record(Rmgr.HEAP, HeapInfo.INSERT, struct.pack("<HB", 1, flags), 5)) == ()
        multi = struct.pack("<BxH", flags, 1)
        assert effects(_record(Rmgr.HEAP2, Heap2Info.MULTI_INSERT, multi, 5)) == ()


def test_a_truncation_names_the_forks_it_cuts() -> None:
    main_data = struct.pack("<IIIIi", 10, *_HEAP[:3], 0x1 | 0x4)
    (effect,) = effects(_record(Rmgr.SMGR, SmgrInfo.TRUNCATE, main_data))
    assert effect == RelationTruncated(
        relation=_HEAP, blocks=BlockNumber(10), forks=frozenset({Fork.MAIN, Fork.FSM})
    )


def test_drops_lie_behind_the_database_and_the_subtransactions() -> None:
    dropped = struct.pack("<i6I", 2, 1663, 5, 16384, 1664, 0, 16385)
    parts = {0x1: struct.pack("<II", 5, 1663), 0x2: struct.pack("<i3I", 3, 8, 9, 10)}
    for present in range(4):
        before = b"".join(part for flag, part in parts.items() if present & flag)
        main_data = struct.pack("<qI", 0, present | 0x4 | 0x8) + before + dropped + b"invalidations"
        for info in (0x00, 0x20, 0x30, 0x40):
            assert effects(_record(Rmgr.XACT, info | 0x80, main_data)) == (
                RelationDropped(tablespace=1663, database=5, relation=16384),
                RelationDropped(tablespace=1664, database=0, relation=16385),
            )
        # A PREPARE lists them, but drops nothing.
        assert effects(_record(Rmgr.XACT, XactInfo.PREPARE | 0x80, main_data)) == ()


def test_a_commit_without_extra_information_drops_nothing() -> None:
    assert effects(_record(Rmgr.XACT, XactInfo.COMMIT, bytes(8))) == ()


def test_a_dropped_database_may_span_tablespaces() -> None:
    main_data = struct.pack("<IiII", 16384, 2, 1663, 20000)
    assert effects(_record(Rmgr.DBASE, DbaseInfo.DROP, main_data)) == (
        DatabaseDropped(database=16384, tablespaces=(1663, 20000)),
    )


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(_record(Rmgr.HEAP, HeapInfo.INSERT, b"\1"), id="insert too short"),
        pytest.param(_record(Rmgr.HEAP, HeapInfo.INSERT, b"\1\0\1"), id="insert without a block"),
        pytest.param(_record(Rmgr.SMGR, SmgrInfo.CREATE, bytes(8)), id="create too short"),
        pytest.param(
            _record(Rmgr.SMGR, SmgrInfo.CREATE, struct.pack("<IIIi", 1, 2, 3, 9)), id="fork"
        ),
        pytest.param(_record(Rmgr.SMGR, 0x70, bytes(20)), id="unknown storage record"),
        pytest.param(_record(Rmgr.DBASE, 0x70, bytes(20)), id="unknown database record"),
        pytest.param(
            _record(Rmgr.DBASE, DbaseInfo.DROP, struct.pack("<Ii", 1, -1)), id="negative count"
        ),
        pytest.param(
            _record(Rmgr.DBASE, DbaseInfo.DROP, struct.pack("<Ii", 1, 5)), id="count too large"
        ),
        pytest.param(
            _record(Rmgr.XACT, 0x80, struct.pack("<qIi", 0, 0x4, 2_000_000_000)), id="huge count"
        ),
    ],
)
def test_main_data_not_of_its_kind_is_corrupt(record: WalRecord) -> None:
    with pytest.raises(CorruptWal):
        effects(record)
