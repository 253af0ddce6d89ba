"""Goal: pages of B-trees come out as PostgreSQL has them, and no record changes a foreign page.

Method: PostgreSQL judges every record and every file (`oracle`) after SQL that reaches what the
general workload rarely or never does: each block of each kind of record, splits of a posting list
together with its page, splits that a crash left incomplete, sessions at once.
"""

from __future__ import annotations

import random
import signal
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import pytest

from boreal.errors import CorruptWal
from boreal.types import PAGE_BYTES, WAL_SEGMENT_BYTES, Lsn
from boreal.wal import BlockRef, Rmgr, WalDecoder, WalRecord, last_record_end
from storage_node.redo import Step, btree
from storage_node.redo.native import NativeRedo
from tests.storage_node.redo.oracle import oracle, run_script
from tests.storage_node.redo.workload_btree import THEMES
from tests.support.stock_postgres import StockPostgres

_BTREE_ONLY = {"wal_consistency_checking": "btree"}
_BLOCKS = {
    btree.INSERT_LEAF: (0,),
    btree.INSERT_UPPER: (0, 1),
    btree.INSERT_META: (0, 1, 2),
    btree.SPLIT_L: (0, 1, 2, 3),
    btree.SPLIT_R: (0, 1, 2, 3),
    btree.INSERT_POST: (0,),
    btree.DEDUP: (0,),
    btree.DELETE: (0,),
    btree.UNLINK_PAGE: (0, 1, 2, 3),
    # No block 1: a fast root is found when the page on the target's right is alone on its level.
    btree.UNLINK_PAGE_META: (0, 2, 3, 4),
    btree.NEWROOT: (0, 1, 2),
    btree.MARK_PAGE_HALFDEAD: (0, 1),
    btree.VACUUM: (0,),
    btree.META_CLEANUP: (0,),
}
"""The block ids PostgreSQL registers with each kind of record."""
_SPLIT = struct.Struct("<IHHH")
"""xl_btree_split: level, firstrightoff, newitemoff, postingoff."""


def test_every_block_of_every_kind_of_record() -> None:
    with oracle(_BTREE_ONLY) as run:
        for theme in THEMES:
            theme(run.server)
        _delete_subtrees(run.server)
        assert run.check() == []
        examples = {
            (record.info, block.id): (record, block)
            for record in _btree_records(run.server)
            for block in record.blocks
        }
    assert examples.keys() == {(info, block) for info in _BLOCKS for block in _BLOCKS[info]}
    _check_that_records_stay_off_foreign_pages(examples.values())


def _delete_subtrees(server: StockPostgres) -> None:
    """Of a tree of four levels most goes, so that inner pages go with their leaves; what is left
    is a fast root below the root. Then it grows again until that one splits."""
    run_script(
        server,
        """
        CREATE TABLE wide (id int, t text);
        ALTER TABLE wide ALTER t SET STORAGE PLAIN;
        CREATE INDEX wide_t ON wide (t);
        INSERT INTO wide SELECT i, lpad(i::text, 8, '0') || repeat('z', 1300)
            FROM generate_series(1, 700) i;
        DELETE FROM wide WHERE id BETWEEN 50 AND 600;
        VACUUM wide;
        DELETE FROM wide WHERE id < 698;
        VACUUM wide;
        SELECT txid_current(); SELECT txid_current();
        VACUUM wide;
        INSERT INTO wide SELECT i, lpad(i::text, 8, '0') || repeat('y', 1300)
            FROM generate_series(500, 800) i;
        """,
    )


def _check_that_records_stay_off_foreign_pages(
    examples: Iterable[tuple[WalRecord, BlockRef]],
) -> None:
    """Applied to a page that is all zeros, and to a heap's."""
    redo = NativeRedo()
    heap = bytearray(PAGE_BYTES)
    struct.pack_into("<HHHH", heap, 12, 24, PAGE_BYTES, PAGE_BYTES, PAGE_BYTES | 4)
    changes = 0
    for record, block in examples:
        if redo.step(record, block) is not Step.CHANGE:
            continue
        changes += 1
        for page in (bytearray(PAGE_BYTES), bytearray(heap)):
            with pytest.raises(CorruptWal) as refused:
                redo.apply(page, record, block)
            assert refused.value.details == {"lsn": record.start}
    assert changes > 15


class _Split(NamedTuple):
    """xl_btree_split."""

    level: int
    first_right: int
    new_number: int
    posting_offset: int

    @classmethod
    def of(cls, record: WalRecord) -> _Split | None:
        """None if the record is of another kind."""
        if record.info not in {btree.SPLIT_L, btree.SPLIT_R}:
            return None
        return cls(*_SPLIT.unpack(record.main_data))


def test_posting_lists_split_together_with_their_pages() -> None:
    """Rows of one key get new versions beside the old, which a snapshot keeps: within the lists."""
    with oracle(_BTREE_ONLY) as run:
        run_script(
            run.server,
            """
            CREATE TABLE post (k text, v int) WITH (fillfactor = 15);
            INSERT INTO post SELECT repeat('k', 20), i FROM generate_series(1, 12000) i;
            CREATE INDEX post_k ON post (k);
            CREATE INDEX post_v ON post (v);
            """,
        )
        with run.server.connect() as reader:
            reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            reader.execute("SELECT count(*) FROM post")
            run_script(
                run.server,
                """
                UPDATE post SET v = -v WHERE v * 7919 % 10007 < 5000;
                DO $$ BEGIN FOR i IN 1..12000 LOOP
                    UPDATE post SET v = v + 20000 WHERE v = 1 + i::bigint * 7919 % 12000;
                END LOOP; END $$;
                """,
            )
        assert run.check() == []
        splits = [(record.info, _Split.of(record)) for record in _btree_records(run.server)]
    # With SPLIT_R the list is the last item on the left, the new tuple the first on the right.
    with_list = {info for info, split in splits if split is not None and split.posting_offset}
    assert with_list == {btree.SPLIT_L, btree.SPLIT_R}


@pytest.mark.parametrize("which", ["leaf", "inner", "root"])
def test_a_split_that_a_crash_left_incomplete_is_finished(which: str) -> None:
    """The log ends with a split; what was to insert the new page's downlink is lost."""
    with oracle({**_BTREE_ONLY, "bgwriter_lru_maxpages": "0"}) as run:
        run_script(
            run.server,
            """
            CREATE TABLE wide (id int, t text);
            ALTER TABLE wide ALTER t SET STORAGE PLAIN;
            CREATE INDEX wide_t ON wide (t);
            INSERT INTO wide SELECT i, lpad(i::text, 8, '0') || repeat('z', 1300)
                FROM generate_series(1, 110) i;
            """,
        )
        run.server.stop(signal.SIGQUIT)
        split = _last_split(run.server, which)
        _cut_log(run.server, split.end)
        run.server.start()
        run_script(
            run.server,
            """
            INSERT INTO wide SELECT i, lpad(i::text, 8, '0') || repeat('y', 1300)
                FROM generate_series(1, 140) i;
            """,
        )
        assert run.check() == []
        later = [record for record in _btree_records(run.server) if record.start > split.start]
    child_id = {btree.INSERT_UPPER: 1, btree.NEWROOT: 1, btree.SPLIT_L: 3, btree.SPLIT_R: 3}
    finished = {
        record.info
        for record in later
        for block in record.blocks
        if block.page == split.blocks[0].page and block.id == child_id.get(record.info)
    }
    assert finished
    assert (btree.NEWROOT in finished) == (which == "root")


def _last_split(server: StockPostgres, which: str) -> WalRecord:
    """The last split of a leaf, an inner page, or an inner root."""
    records = _btree_records(server)
    for record, following in reversed(list(pairwise(records))):
        split = _Split.of(record)
        if split is None:
            continue
        is_root = following.info == btree.NEWROOT
        if which == ("root" if is_root else "inner" if split.level else "leaf"):
            return record
    raise AssertionError(f"no {which} was split")


def _cut_log(server: StockPostgres, end: Lsn) -> None:
    """Let the stopped server's log end there, as if no more had reached the disk."""
    for path in server.wal_directory.glob("[0-9A-F]" * 24):
        number = int(path.name[8:16], 16) << 8 | int(path.name[16:], 16)
        keep = min(max(0, end - number * WAL_SEGMENT_BYTES), WAL_SEGMENT_BYTES)
        with path.open("r+b") as file:
            file.seek(keep)
            file.write(bytes(WAL_SEGMENT_BYTES - keep))


def test_sessions_at_once() -> None:
    """Inserts, updates, deletions, scans that mark entries and a vacuum meet in few pages."""
    with oracle({**_BTREE_ONLY, "full_page_writes": "on"}) as run:
        run.server.run(
            "CREATE TABLE busy (k int, n int, v int)",
            "CREATE INDEX busy_k ON busy (k)",
            "CREATE INDEX busy_n ON busy (n, k) INCLUDE (v)",
        )
        for round_number in range(2):
            with ThreadPoolExecutor() as sessions:
                seeds = [round_number * 10 + number for number in range(4)]
                list(sessions.map(_work, [run.server] * len(seeds), seeds))
            assert run.check() == []


def _work(server: StockPostgres, seed: int) -> None:
    choose = random.Random(seed)
    with server.connect() as session:
        session.execute("SET enable_seqscan = off")
        session.execute("SET enable_bitmapscan = off")
        for _ in range(50):
            number = choose.randrange(100)
            what = choose.random()
            if what < 0.5:
                rows = "SELECT g %% 9, %s + g, g FROM generate_series(1, 60) g"
                session.execute(f"INSERT INTO busy {rows}", (number,))
            elif what < 0.7:
                session.execute("UPDATE busy SET n = n + 1 WHERE n = %s", (number,))
            elif what < 0.8:
                session.execute("DELETE FROM busy WHERE n BETWEEN %s AND %s", (number, number + 9))
            elif what < 0.95 or seed % 10:
                session.execute("SELECT count(v) FROM busy WHERE n > %s", (number,))
            else:
                session.execute("VACUUM busy")


def _btree_records(server: StockPostgres) -> list[WalRecord]:
    start, data = server.wal()
    end = last_record_end(data, start)
    assert end is not None
    records = WalDecoder(start).feed(data[: end - start])
    return [record for record in records if record.rmgr == Rmgr.BTREE]
