"""Goal: pages of BRIN indexes come out as PostgreSQL has them.

Method: SQL that makes it write every kind of record, each compared with the after-image it carries,
and all pages with PostgreSQL's files (`oracle`).
"""

from __future__ import annotations

import struct

import pytest

from boreal.errors import CorruptWal
from boreal.types import PAGE_BYTES, BlockNumber, Fork, Lsn, PageKey, RelationFork
from boreal.wal import BlockRef, Rmgr, WalRecord
from storage_node.redo.native import NativeRedo
from tests.storage_node.redo.oracle import oracle
from tests.storage_node.redo.record_types import NAMES, RecordType

_INSERT, _UPDATE = RecordType(Rmgr.BRIN, 0x10), RecordType(Rmgr.BRIN, 0x20)
_REVMAP_EXTEND = RecordType(Rmgr.BRIN, 0x40)


def test_every_kind_of_record() -> None:
    with oracle({"wal_consistency_checking": "brin"}) as run:
        sql = run.server.run
        sql(
            "CREATE TABLE t (id int, f text) WITH (fillfactor = 10)",
            "CREATE INDEX t_id ON t USING brin (id) WITH (pages_per_range = 1)",
            "CREATE INDEX t_text ON t USING brin (f) WITH (pages_per_range = 1)",
            """CREATE INDEX t_multi ON t USING brin
                 (id int4_minmax_multi_ops (values_per_range = 16)) WITH (pages_per_range = 2)""",
            """CREATE INDEX t_bloom ON t USING brin (f text_bloom_ops (n_distinct_per_range = 20))
                 WITH (pages_per_range = 4)""",
            "INSERT INTO t SELECT g, repeat('x', 1 + g % 30) FROM generate_series(1, 1500) g",
        )
        assert run.check() == []
        for index in ("t_id", "t_text", "t_multi", "t_bloom"):
            with run.server.connect() as connection:
                connection.execute("SELECT brin_summarize_new_values(%s)", (index,))
        assert run.check() == []
        # The map outgrows its page (1,360 ranges), and takes over pages that summaries are on.
        sql(
            """INSERT INTO t SELECT g, repeat(chr(65 + g % 26), 1 + g % 200)
               FROM generate_series(1, 9000) g""",
            "VACUUM t",
        )
        assert run.check() == []
        # Longer summaries do not always fit where they are.
        sql(
            "UPDATE t SET id = id + 5, f = f || repeat('z', 500) WHERE id % 50 = 0",
            "SELECT brin_desummarize_range('t_id', g) FROM generate_series(0, 90, 3) g",
            "SELECT brin_desummarize_range('t_text', g) FROM generate_series(0, 90, 2) g",
        )
        assert run.check() == []
        sql("VACUUM t", "INSERT INTO t SELECT g, md5(g::text) FROM generate_series(1, 300) g")
        sql("CREATE INDEX t_late ON t USING brin (id, f) WITH (pages_per_range = 1)")
        assert run.check() == []
        coverage = run.coverage
    met = {kind.operation for kind in coverage.records if kind.rmgr == Rmgr.BRIN}
    assert met == NAMES[Rmgr.BRIN].keys()
    assert coverage.with_init[_INSERT] > 0
    assert 0 < coverage.with_init[_UPDATE] < coverage.records[_UPDATE]
    indexes = 5
    assert coverage.records[_REVMAP_EXTEND] > indexes
    assert coverage.compared[_UPDATE] == 3 * coverage.records[_UPDATE]


_RELATION = RelationFork(1663, 5, 16384, Fork.MAIN)
_INSERTED = struct.pack("<IIH", 40, 4, 1)


@pytest.mark.parametrize(
    ("info", "block_id", "main_data"),
    [
        (0x10, 0, _INSERTED),
        (0x10, 1, _INSERTED),
        (0x20, 2, struct.pack("<Hxx", 1) + _INSERTED),
        (0x30, 0, struct.pack("<H", 1)),
        (0x40, 0, struct.pack("<I", 2)),
        (0x50, 0, struct.pack("<IIH", 4, 40, 1)),
        (0x50, 1, struct.pack("<IIH", 4, 40, 1)),
        (0x60, 0, b""),
        (0x10, 2, _INSERTED),
        (0x10, 1, b""),
    ],
)
def test_a_record_that_does_not_fit_is_refused(info: int, block_id: int, main_data: bytes) -> None:
    """Here: to a page that is all zeros; of a kind that does not exist; cut short."""
    pages = (PageKey(_RELATION, BlockNumber(number)) for number in range(3))
    blocks = tuple(
        BlockRef(number, page, False, bytes(16), None, False, False, 0, 0)
        for number, page in enumerate(pages)
    )
    record = WalRecord(Lsn(0x1000), Lsn(0x1100), 0, Rmgr.BRIN, info, Lsn(0), main_data, blocks, 0)
    with pytest.raises(CorruptWal):
        NativeRedo().apply(bytearray(PAGE_BYTES), record, blocks[block_id])
