"""Goal: for every block of every record, redo knows what to do, or says that it must not go on.

Method: records put together by hand, for what no healthy writer logs. (What healthy ones log is
test_oracle.py's.)
"""

from __future__ import annotations

import struct

import pytest

from boreal.errors import CorruptWal, IngestStopped
from boreal.pages import page_lsn
from boreal.types import PAGE_BYTES, BlockNumber, Fork, Lsn, PageKey, RelationFork
from boreal.wal import BlockRef, HeapInfo, Rmgr, WalRecord, XlogInfo
from storage_node.redo import Step
from storage_node.redo.items import init_page
from storage_node.redo.native import NativeRedo

_PAGE = PageKey(RelationFork(1663, 5, 16384, Fork.MAIN), BlockNumber(3))
_BLOCK = BlockRef(0, _PAGE, False, b"", None, False, False, 0, 0)
_START, _END = Lsn(0x1000), Lsn(0x1100)
_IMAGE = b"\1" * PAGE_BYTES


def _record(rmgr: Rmgr, info: int, block: BlockRef, main_data: bytes = b"") -> WalRecord:
    return WalRecord(_START, _END, 700, rmgr, info, Lsn(0x900), main_data, (block,), 0)


def _step(rmgr: Rmgr, info: int, block: BlockRef) -> Step:
    return NativeRedo().step(_record(rmgr, info, block), block)


@pytest.mark.parametrize("rmgr", [Rmgr.HEAP, Rmgr.BTREE, Rmgr.GIN, Rmgr.XLOG])
def test_an_image_to_apply_is_a_base(rmgr: Rmgr) -> None:
    block = _BLOCK._replace(image=_IMAGE, apply_image=True)
    assert _step(rmgr, XlogInfo.FPI, block) is Step.BASE
    assert _step(rmgr, XlogInfo.FPI, block._replace(compressed=True)) is Step.UNKNOWN
    page = bytearray(PAGE_BYTES)
    NativeRedo().apply(page, _record(rmgr, XlogInfo.FPI, block), block)
    assert page_lsn(page) == _END
    assert page[8:] == _IMAGE[8:]


def test_an_empty_page_is_never_stamped() -> None:
    block = _BLOCK._replace(image=bytes(PAGE_BYTES), apply_image=True)
    page = bytearray(_IMAGE)
    NativeRedo().apply(page, _record(Rmgr.XLOG, XlogInfo.FPI, block), block)
    assert page == bytes(PAGE_BYTES)


def test_an_after_image_counts_for_gin_and_spgist_alone() -> None:
    block = _BLOCK._replace(image=_IMAGE)
    assert _step(Rmgr.HEAP, HeapInfo.INSERT, block) is Step.CHANGE
    for rmgr in (Rmgr.GIN, Rmgr.SPGIST):
        assert _step(rmgr, 0x10, block) is Step.BASE
        with pytest.raises(IngestStopped) as stopped:
            _step(rmgr, 0x10, _BLOCK)
        assert stopped.value.details == {"lsn": _START}


def test_a_page_built_anew_is_a_base() -> None:
    assert _step(Rmgr.HEAP, HeapInfo.INSERT | 0x80, _BLOCK._replace(will_init=True)) is Step.BASE


def test_a_hint_without_its_image_is_nothing() -> None:
    assert _step(Rmgr.XLOG, XlogInfo.FPI_FOR_HINT, _BLOCK) is Step.NOTHING


@pytest.mark.parametrize(
    ("rmgr", "info"), [(Rmgr.XLOG, XlogInfo.FPI), (Rmgr.XACT, 0x00), (Rmgr.DBASE, 0x10)]
)
def test_a_record_that_should_not_name_a_page_stops_the_index(rmgr: Rmgr, info: int) -> None:
    with pytest.raises(IngestStopped) as stopped:
        _step(rmgr, info, _BLOCK)
    assert stopped.value.details == {"lsn": _START}
    with pytest.raises(CorruptWal):
        NativeRedo().apply(bytearray(PAGE_BYTES), _record(rmgr, info, _BLOCK), _BLOCK)


def test_a_misfit_names_the_record_and_the_page() -> None:
    page = bytearray(PAGE_BYTES)
    init_page(page, 0)
    delete = _record(Rmgr.HEAP, HeapInfo.DELETE, _BLOCK, struct.pack("<IHBB", 700, 9, 0, 0))
    with pytest.raises(CorruptWal) as caught:
        NativeRedo().apply(page, delete, _BLOCK)
    assert caught.value.details == {"lsn": _START}
    for part in ("HEAP", "0x10", "0/1000", "block 0", "1663/5/16384:3"):
        assert part in str(caught.value)


@pytest.mark.parametrize("rmgr", sorted({*Rmgr} - {Rmgr.GIN, Rmgr.SPGIST, Rmgr.GENERIC}))
def test_a_record_cut_short_is_a_misfit(rmgr: Rmgr) -> None:
    """Whatever its kind. (GENERIC has all in its block, and may be without.)"""
    page = bytearray(PAGE_BYTES)
    init_page(page, 16)
    for info in range(0, 0x100, 0x10):
        record = _record(rmgr, info, _BLOCK, b"\1")
        with pytest.raises(CorruptWal):
            NativeRedo().apply(bytearray(page), record, _BLOCK)
