"""Goal: pages that extensions log come out as PostgreSQL has them.

Method: pgvector's indexes, each record compared with the after-image it carries, and all pages with
PostgreSQL's files (`oracle`). Patches that no writer makes are made by hand.
"""

from __future__ import annotations

import struct

import pytest

from boreal.errors import CorruptWal
from boreal.types import PAGE_BYTES, BlockNumber, Fork, Lsn, PageKey, RelationFork
from boreal.wal import BlockRef, Rmgr, WalRecord
from storage_node.redo.items import init_page
from storage_node.redo.native import NativeRedo
from tests.storage_node.redo.oracle import oracle
from tests.storage_node.redo.record_types import RecordType

_GENERIC = RecordType(Rmgr.GENERIC, 0)
_PAGE = PageKey(RelationFork(1663, 5, 16384, Fork.MAIN), BlockNumber(1))


def test_pgvector() -> None:
    rows = """INSERT INTO v (e) SELECT ARRAY[g % 7, g % 11, g % 13, g]::vector
              FROM generate_series(1, 200) g"""
    with oracle({"wal_consistency_checking": "generic"}) as run:
        sql = run.server.run
        sql(
            "CREATE EXTENSION vector",
            "CREATE TABLE v (id serial, e vector(4))",
            "CREATE INDEX ON v USING hnsw (e vector_l2_ops)",
            rows,
        )
        assert run.check() == []
        sql("CREATE INDEX ON v USING ivfflat (e vector_l2_ops) WITH (lists = 10)", rows)
        assert run.check() == []
        sql("DELETE FROM v WHERE id % 3 = 0", "VACUUM v", rows)
        assert run.check() == []
        assert run.coverage.compared[_GENERIC] > 500


def _apply(page: bytearray, data: bytes) -> None:
    block = BlockRef(0, _PAGE, False, data, None, False, False, 0, 0)
    record = WalRecord(Lsn(0x1000), Lsn(0x1100), 0, Rmgr.GENERIC, 0, Lsn(0), b"", (block,), 0)
    NativeRedo().apply(page, record, block)


def _patch(offset: int, data: bytes) -> bytes:
    return struct.pack("<HH", offset, len(data)) + data


def test_patches_then_the_hole() -> None:
    """The free space is that of the page as patched: what it gains is zeroed."""
    page = bytearray(PAGE_BYTES)
    init_page(page, 8)
    page[24:8184] = b"j" * 8160
    _apply(page, _patch(12, struct.pack("<HH", 28, 8176)) + _patch(24, b"abcd"))
    assert page[24:28] == b"abcd"
    assert page[28:8176] == bytes(8148)
    assert page[8176:8184] == b"j" * 8


@pytest.mark.parametrize(
    "data",
    [
        _patch(8190, b"abc"),
        _patch(100, b"abc")[:-1],
        b"\x00\x01\x02",
        _patch(12, struct.pack("<HH", 500, 400)),
        _patch(14, struct.pack("<H", 9000)),
    ],
)
def test_what_does_not_fit_is_refused(data: bytes) -> None:
    page = bytearray(PAGE_BYTES)
    init_page(page, 8)
    with pytest.raises(CorruptWal):
        _apply(page, data)
