"""Heap pages and records put together by hand, for tests of single rules of redo."""

from __future__ import annotations

import struct

from boreal.pages import PageHeader
from boreal.types import PAGE_BYTES, BlockNumber, Fork, Lsn, PageKey, RelationFork
from boreal.wal import BlockRef, Rmgr, WalRecord
from storage_node.redo.heap_tuple import FIXED_PART
from storage_node.redo.items import add_item, init_page, item_bytes
from storage_node.redo.native import NativeRedo

RELATION = RelationFork(1663, 5, 16384, Fork.MAIN)
XID = 1000
END = Lsn(0x2000)
ALL_VISIBLE = 0x04

# t_infomask
COMBO_CID = 0x0020
EXCLUSIVE = 0x0040
LOCK_ONLY = 0x0080
FROZEN_XMIN = 0x0300
INVALID_XMAX = 0x0800
IS_MULTI = 0x1000
MOVED_OFF = 0x4000

VALUES = bytes(range(100, 140))


def make_block(
    number: int = 0, *, block: int = 7, data: bytes = b"", init: bool = False
) -> BlockRef:
    return BlockRef(
        number, PageKey(RELATION, BlockNumber(block)), init, data, None, False, False, 0, 0
    )


def make_record(rmgr: Rmgr, info: int, main_data: bytes, *blocks: BlockRef) -> WalRecord:
    return WalRecord(Lsn(0x1000), END, XID, rmgr, info, Lsn(0), main_data, blocks, 0)


def apply(
    page: bytearray, rmgr: Rmgr, info: int, main_data: bytes, *blocks: BlockRef, to: int = 0
) -> bytearray:
    """Apply a record to its block number `to`."""
    record = make_record(rmgr, info, main_data, *blocks)
    NativeRedo().apply(page, record, record.blocks[to])
    return page


def make_tuple(
    values: bytes = VALUES,
    *,
    xmin: int = 10,
    xmax: int = 0,
    cid: int = 5,
    ctid: tuple[int, int] = (7, 1),
    infomask2: int = 2,
    infomask: int = INVALID_XMAX,
    nulls: bytes = b"\0",
) -> bytes:
    block, number = ctid
    fixed = FIXED_PART.pack(
        xmin, xmax, cid, block >> 16, block & 0xFFFF, number, infomask2, infomask
    )
    return fixed + bytes((23 + len(nulls),)) + nulls + values


def logged_tuple(
    values: bytes, *, nulls: bytes = b"\0", infomask2: int = 2, infomask: int = 2
) -> bytes:
    """A tuple as INSERT and UPDATE log it."""
    return struct.pack("<HHB", infomask2, infomask, 23 + len(nulls)) + nulls + values


def make_page(*tuples: bytes, all_visible: bool = False) -> bytearray:
    page = bytearray(PAGE_BYTES)
    init_page(page, 0)
    for stored in tuples:
        add_item(page, stored, 0, heap=True)
    page[10] |= ALL_VISIBLE if all_visible else 0
    return page


def fields_of(page: bytearray, number: int) -> dict[str, object]:
    stored = item_bytes(page, number)
    xmin, xmax, cid, high, low, offset, infomask2, infomask = FIXED_PART.unpack_from(stored)
    return {
        "xmin": xmin,
        "xmax": xmax,
        "cid": cid,
        "ctid": (high << 16 | low, offset),
        "infomask2": infomask2,
        "infomask": infomask,
        "values": stored[stored[22] :],
    }


def flags_of(page: bytearray) -> int:
    return PageHeader.of(page).flags


def prune_data(redirected: int, dead: int) -> bytes:
    return struct.pack("<IHHB", 0, redirected, dead, 0)
