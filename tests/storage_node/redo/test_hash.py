"""Goal: pages of hash indexes come out as PostgreSQL has them, whatever its sessions do.

Method: hash records of sessions that work at once cannot carry after-images, so PostgreSQL's files
are compared with what redo made of its log, at many quiet moments (`oracle`): after SQL that makes
it write every kind of record, with images and without, and after sessions that work at once. What
takes an index of many gigabytes is reached by a smaller bitmap, what no SQL reaches by a record
made by hand.
"""

from __future__ import annotations

import random
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest

from boreal.errors import CorruptWal
from boreal.pages import PageKind, is_zero, mask_page
from boreal.types import PAGE_BYTES, BlockNumber, Fork, Lsn, PageKey, RelationFork
from boreal.wal import BlockRef, Rmgr, WalRecord
from storage_node.redo import Step, hash_meta, hash_page
from storage_node.redo.hash import apply, touches
from storage_node.redo.items import RedoMismatch
from storage_node.redo.native import NativeRedo
from tests.storage_node.redo.oracle import OracleRun, oracle
from tests.storage_node.redo.record_types import NAMES, RecordType
from tests.support.stock_postgres import StockPostgres

_SETTINGS = {"wal_consistency_checking": "", "shared_buffers": "64MB"}
_SPLIT_ALLOCATE_PAGE, _SPLIT_PAGE, _SPLIT_COMPLETE = 0x40, 0x50, 0x60
_MOVE_PAGE_CONTENTS, _SQUEEZE_PAGE, _DELETE = 0x70, 0x80, 0x90
_LOCKING = (_MOVE_PAGE_CONTENTS, _SQUEEZE_PAGE, _DELETE)


@pytest.mark.parametrize("full_page_writes", ["off", "on"])
def test_every_kind_of_record(full_page_writes: str) -> None:
    with oracle({**_SETTINGS, "full_page_writes": full_page_writes}) as run:
        _build_and_grow(run)
        _delete_and_vacuum(run)
        _vacuum_while_inserting(run)
        met = {kind.operation for kind in run.coverage.records if kind.rmgr == Rmgr.HASH}
        assert met == NAMES[Rmgr.HASH].keys()


def _build_and_grow(run: OracleRun) -> None:
    """Small buckets (fillfactor) make many of them, few keys long chains of overflow pages."""
    sql = run.server.run
    sql("CREATE TABLE grown (id int)", "CREATE INDEX ON grown USING hash (id) WITH (fillfactor=10)")
    assert run.check() == []
    sql("INSERT INTO grown SELECT generate_series(1, 1000)")
    assert run.check() == []
    sql(
        "CREATE TABLE full_one AS SELECT g AS id, g % 7 AS k FROM generate_series(1, 20000) g",
        "CREATE INDEX ON full_one USING hash (id) WITH (fillfactor=10)",
        "CREATE INDEX few_keys ON full_one USING hash (k)",
    )
    assert run.check() == []
    # More than 512 buckets, from where on a doubling has four phases.
    sql("INSERT INTO full_one SELECT g, 8 FROM generate_series(1, 2500) g")
    assert run.check() == []


def _delete_and_vacuum(run: OracleRun) -> None:
    sql = run.server.run
    sql("DELETE FROM grown WHERE id % 3 = 0", "VACUUM grown")
    assert run.check() == []
    sql("DELETE FROM full_one WHERE k = 3 OR (k <> 3 AND id % 10 < 6)", "VACUUM full_one")
    assert run.check() == []
    # Freed overflow pages are used again.
    sql("INSERT INTO full_one SELECT g, g % 3 FROM generate_series(1, 6000) g")
    sql("REINDEX INDEX few_keys")
    assert run.check() == []


def _vacuum_while_inserting(run: OracleRun) -> None:
    """A scan marks what it finds dead; an insert into a full page then clears it."""
    scan = "SELECT count(*) FROM stale WHERE id = 1"
    run.server.run(
        "CREATE TABLE stale (id int)",
        "CREATE INDEX ON stale USING hash (id)",
        "SET enable_seqscan = off",
        "SET enable_bitmapscan = off",
        "INSERT INTO stale SELECT 1 FROM generate_series(1, 1500)",
        "DELETE FROM stale",
        scan,
        "INSERT INTO stale SELECT 1 FROM generate_series(1, 900)",
        "DELETE FROM stale WHERE random() < 0.3",
        scan,
        "INSERT INTO stale SELECT 1 FROM generate_series(1, 900)",
    )
    assert run.check() == []


def test_each_record_of_a_lone_session() -> None:
    """Without concurrency after-images do no harm: they show what later records cover up."""
    with oracle({**_SETTINGS, "wal_consistency_checking": "hash"}) as run:
        run.server.run(
            "CREATE TABLE alone (id int)",
            "INSERT INTO alone VALUES (1)",
            "ANALYZE alone",  # else many buckets are made beforehand
            "CREATE INDEX ON alone USING hash (id) WITH (fillfactor = 10)",
            "INSERT INTO alone SELECT generate_series(1, 700)",
            "INSERT INTO alone SELECT g % 2 FROM generate_series(1, 1700) g",
            "DELETE FROM alone WHERE id < 30 AND random() < 0.8",
            "VACUUM alone",
        )
        assert run.check() == []
        for operation, blocks in ((_SPLIT_ALLOCATE_PAGE, 3), (_SPLIT_COMPLETE, 2)):
            kind = RecordType(Rmgr.HASH, operation)
            assert run.coverage.compared[kind] == blocks * run.coverage.records[kind] > 0
        for operation in _LOCKING:
            assert run.coverage.compared[RecordType(Rmgr.HASH, operation)] > 0


def test_sessions_at_once() -> None:
    """Vacuums, inserts and scans that mark dead entries meet in the same few buckets."""
    with oracle(_SETTINGS) as run:
        run.server.run("CREATE TABLE busy (id int)", "CREATE INDEX ON busy USING hash (id)")
        for round_number in range(2):
            with ThreadPoolExecutor() as sessions:
                seeds = [round_number * 10 + number for number in range(4)]
                list(sessions.map(_work, [run.server] * len(seeds), seeds))
            assert run.check() == []
        met = run.coverage.records
        for operation in (_MOVE_PAGE_CONTENTS, _SQUEEZE_PAGE, _SPLIT_PAGE, _DELETE):
            assert met[RecordType(Rmgr.HASH, operation)] > 0


def _work(server: StockPostgres, seed: int) -> None:
    choose = random.Random(seed)
    with server.connect() as session:
        session.execute("SET enable_seqscan = off")
        session.execute("SET enable_bitmapscan = off")
        for _ in range(50):
            number = choose.randrange(20)
            what = choose.random()
            if what < 0.6:
                rows = "SELECT g %% 4 + %s FROM generate_series(1, 120) g"
                session.execute(f"INSERT INTO busy {rows}", (number,))
            elif what < 0.8:
                session.execute("DELETE FROM busy WHERE id = %s", (number,))
            elif what < 0.9 or seed % 10:
                session.execute("SELECT count(*) FROM busy WHERE id = %s", (number,))
            else:
                session.execute("VACUUM busy")


def test_several_bitmaps() -> None:
    """A bitmap has room for 32,768 overflow pages. The meta page says so: here it says 32."""
    with oracle(_SETTINGS) as run:
        run.server.run("CREATE TABLE m (id int)", "CREATE INDEX m_hash ON m USING hash (id)")
        assert run.check() == []
        meta = PageKey(_relation(run.server, "m_hash"), BlockNumber(0))
        run.server.stop()
        page = bytearray(run.server.file_of(meta).read_bytes()[:PAGE_BYTES])
        assert struct.unpack_from("<HH", page, 44) == (4096, 15)
        struct.pack_into("<HH", page, 44, 4, 5)
        with run.server.file_of(meta).open("r+b") as file:
            file.write(page)
        run.pages.put(meta, page)
        run.server.start()
        run.server.run("INSERT INTO m SELECT g % 5 FROM generate_series(1, 36000) g")
        assert run.check() == []
        run.server.run("DELETE FROM m WHERE id = 1 OR random() < 0.5", "VACUUM m")
        assert run.check() == []
        run.server.run("INSERT INTO m SELECT g % 3 FROM generate_series(1, 9000) g")
        assert run.check() == []
        bitmaps = struct.unpack_from("<I", run.pages.get(meta) or b"", 68)[0]
        assert bitmaps > 2


def test_the_init_fork_of_an_unlogged_index() -> None:
    with oracle(_SETTINGS) as run:
        run.server.run(
            "CREATE UNLOGGED TABLE u (id int)",
            "INSERT INTO u SELECT generate_series(1, 2000)",
            "CREATE INDEX u_hash ON u USING hash (id)",
        )
        assert run.check() == []
        fork = _relation(run.server, "u_hash")._replace(fork=Fork.INIT)
        content = run.server.file_of(PageKey(fork, BlockNumber(0))).read_bytes()
        assert len(content) == 4 * PAGE_BYTES
        for block in range(4):
            ours = bytearray(run.pages.get(PageKey(fork, BlockNumber(block))) or b"")
            theirs = bytearray(content[block * PAGE_BYTES : (block + 1) * PAGE_BYTES])
            assert not is_zero(theirs)
            for page in (ours, theirs):
                mask_page(page, PageKind.HASH, block)
            assert ours == theirs


def _relation(server: StockPostgres, name: str) -> RelationFork:
    with server.connect() as connection:
        row = connection.execute(
            """SELECT pg_relation_filenode(%s)::int,
                 (SELECT oid::int FROM pg_database WHERE datname = current_database())""",
            (name,),
        ).fetchone()
    assert row is not None
    return RelationFork(1663, row[1], row[0], Fork.MAIN)


# --- records made by hand ------------------------------------------------------------------------


def _record(info: int, main_data: bytes = b"", *blocks: BlockRef) -> WalRecord:
    return WalRecord(Lsn(0x1000), Lsn(0x1100), 0, Rmgr.HASH, info, Lsn(0), main_data, blocks, 0)


def _block(number: int, data: bytes = b"") -> BlockRef:
    page = PageKey(RelationFork(1663, 5, 16384, Fork.MAIN), BlockNumber(number + 1))
    return BlockRef(number, page, False, data, None, False, False, 0, 0)


def test_a_page_behind_the_freed_one_is_linked_back() -> None:
    """VACUUM only ever frees a chain's last page; redo knows the other case too."""
    page = bytearray(PAGE_BYTES)
    hash_page.build(page, hash_page.OVERFLOW, previous=9, bucket=3)
    squeezed = struct.pack("<IIH??", 7, 11, 0, False, False)
    apply(page, _record(_SQUEEZE_PAGE, squeezed), _block(4))
    expected = bytearray(PAGE_BYTES)
    hash_page.build(expected, hash_page.OVERFLOW, previous=7, bucket=3)
    assert page == expected


@pytest.mark.parametrize("info", range(0, 0xD0, 0x10))
def test_three_kinds_only_lock_their_block_0(info: int) -> None:
    record = _record(info)
    assert touches(record, _block(0)) == (info not in _LOCKING)
    assert touches(record, _block(1))
    assert (NativeRedo().step(record, _block(0)) is Step.NOTHING) == (info in _LOCKING)


@pytest.mark.parametrize(
    ("info", "block_id"),
    [
        *((0x10, 1), (0x20, 0), (0x20, 1), (0x30, 1), (0x30, 2), (0x30, 4), (0x40, 0), (0x40, 2)),
        *((0x60, 0), (0x60, 1), (0x70, 1), (0x70, 2), (0x80, 1), (0x80, 3), (0x80, 4), (0x80, 5)),
        *((0x80, 6), (0x90, 1), (0xA0, 0), (0xB0, 0), (0xC0, 0), (0xC0, 1)),
    ],
)
def test_a_page_of_another_kind_is_refused(info: int, block_id: int) -> None:
    """A page never written, and a freed one."""
    main_data = bytes(8) if info in {0xB0, 0xC0} else b"\1" * 12
    blocks = [_block(number, bytes(4)) for number in range(7)]
    freed = bytearray(PAGE_BYTES)
    hash_page.build(freed, hash_page.UNUSED)
    for page in (bytearray(PAGE_BYTES), freed):
        with pytest.raises(CorruptWal, match="is called for"):
            NativeRedo().apply(page, _record(info, main_data, *blocks), blocks[block_id])


def test_a_split_page_without_its_image_is_refused() -> None:
    with pytest.raises(CorruptWal, match="lacks its image"):
        NativeRedo().apply(bytearray(PAGE_BYTES), _record(_SPLIT_PAGE), _block(0))


@pytest.mark.parametrize(
    ("wanted", "max_bucket", "low", "high", "phase"),
    [
        (0, 1, 1, 3, 1),
        (2.5, 1, 1, 3, 1),
        (3, 3, 3, 7, 2),
        (500, 511, 511, 1023, 9),
        # From here on a doubling comes in quarters.
        (513, 639, 511, 1023, 10),
        (640, 639, 511, 1023, 10),
        (1000, 1023, 1023, 2047, 13),
        (1025, 1279, 1023, 2047, 14),
        (1e12, 0x3FFFFFFF, 0x3FFFFFFF, 0x7FFFFFFF, 93),
    ],
)
def test_the_first_buckets(wanted: float, max_bucket: int, low: int, high: int, phase: int) -> None:
    page = bytearray(PAGE_BYTES)
    hash_meta.build(page, wanted * 10, 449, 10)
    assert struct.unpack_from("<IIII", page, 48) == (max_bucket, high, low, phase)
    spares = struct.unpack_from("<98I", page, 76)
    assert [number for number, count in enumerate(spares) if count] == [phase]


def test_tuples_must_be_as_many_as_told_and_whole() -> None:
    tuple_bytes = struct.pack("<HHHHI4x", 0, 1, 1, 16, 77)
    for count, data in (
        (2, struct.pack("<HH", 1, 2) + tuple_bytes),
        (1, struct.pack("<H", 1) + tuple_bytes * 2),
        (1, struct.pack("<H", 1) + tuple_bytes[:10]),
        (0, tuple_bytes),
    ):
        page = bytearray(PAGE_BYTES)
        hash_page.build(page, hash_page.BUCKET, previous=1, bucket=0)
        with pytest.raises((RedoMismatch, struct.error)):
            apply(
                page,
                _record(_MOVE_PAGE_CONTENTS, struct.pack("<H?", count, False)),
                _block(1, data),
            )


def test_a_bit_beyond_the_bitmap_is_refused() -> None:
    page = bytearray(PAGE_BYTES)
    hash_page.build_bitmap(page, 8)
    hash_page.free_bit(page, 63)
    with pytest.raises(RedoMismatch):
        hash_page.free_bit(page, 64)
