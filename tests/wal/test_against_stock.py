"""Goal: the decoder reads a real log exactly as the engine itself does.

Method: the stock engine writes a log with nearly every kind of record (tests/support/workload.py),
across segments, an early segment switch and a new timeline; pg_waldump's reading of it is compared
with ours record by record.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from boreal.pages import HEADER_BYTES, PageHeader
from boreal.types import PAGE_BYTES, WAL_SEGMENT_BYTES, Fork, RelationFork
from boreal.wal import (
    HEAP_OPERATION_MASK,
    DatabaseCopied,
    DatabaseCreated,
    DatabaseDropped,
    Effect,
    Heap2Info,
    HeapInfo,
    RelationCreated,
    RelationDropped,
    RelationTruncated,
    Rmgr,
    VisibilityCleared,
    WalRecord,
    XlogInfo,
    effects,
    last_record_end,
    read_record,
)
from boreal.wal.stream import RecordStream
from tests.support.exercised import ExercisedLog, exercised_log
from tests.support.waldump import DumpedBlock, DumpedImage, DumpedRecord


@pytest.fixture(scope="module")
def log() -> ExercisedLog:
    return exercised_log()


def test_every_record_is_the_one_pg_waldump_sees(log: ExercisedLog) -> None:
    assert len(log.dump) > 10_000
    for ours, theirs in zip(log.records, log.dump, strict=True):
        assert (ours.start, ours.prev, ours.rmgr, ours.xid, _blocks(ours)) == (
            theirs.start,
            theirs.prev,
            theirs.rmgr,
            theirs.xid,
            theirs.blocks,
        )


def test_raw_lengths_are_those_pg_waldump_sees(log: ExercisedLog) -> None:
    raw_records = RecordStream(log.start).feed(log.data[: log.end - log.start])
    for ours, theirs in zip(raw_records, log.dump, strict=True):
        assert (ours.start, len(ours.raw)) == (theirs.start, theirs.length)


def test_the_log_ends_where_the_engine_stopped(log: ExercisedLog) -> None:
    # The data goes on after the end with what the engine left in the segment file.
    assert last_record_end(log.data, log.start) == log.end
    assert log.dump[-1].description.startswith("CHECKPOINT_SHUTDOWN")
    assert log.records[-1].end == log.end


def test_records_follow_each_other_without_a_gap(log: ExercisedLog) -> None:
    for before, after in zip(log.records, log.records[1:], strict=False):
        # Only a page header may lie between.
        assert after.start - before.end in {0, 24, 40}
        assert after.prev == before.start


def test_a_segment_switch_ends_with_its_segment(log: ExercisedLog) -> None:
    switches = [
        record
        for record in log.records
        if (record.rmgr, record.info) == (Rmgr.XLOG, XlogInfo.SWITCH)
    ]
    assert len(switches) == 2
    assert all(record.end % WAL_SEGMENT_BYTES == 0 for record in switches)


def test_images_restore_to_pages_with_their_hole_in_free_space(log: ExercisedLog) -> None:
    holes = 0
    for record in log.records:
        for block in record.blocks:
            if block.image is None:
                continue
            page = block.restore_image()
            assert len(page) == PAGE_BYTES
            if block.hole_length:
                header = PageHeader.of(page)
                hole = (block.hole_offset, block.hole_offset + block.hole_length)
                assert (header.lower, header.upper) == hole
                assert header.lower >= HEADER_BYTES
                holes += 1
    assert holes > 1000


def test_a_record_can_be_read_by_itself(log: ExercisedLog) -> None:
    for record in log.records[:: len(log.records) // 500]:
        assert read_record(log.bytes_at, record.start, record.end) == record


def test_every_heap_operation_that_clears_visibility_is_seen_doing_so(log: ExercisedLog) -> None:
    operations = {
        (record.rmgr, record.info & HEAP_OPERATION_MASK)
        for record in log.records
        if any(isinstance(effect, VisibilityCleared) for effect in effects(record))
    }
    assert operations == {
        (Rmgr.HEAP, HeapInfo.INSERT),
        (Rmgr.HEAP, HeapInfo.DELETE),
        (Rmgr.HEAP, HeapInfo.UPDATE),
        (Rmgr.HEAP, HeapInfo.HOT_UPDATE),
        (Rmgr.HEAP, HeapInfo.LOCK),
        (Rmgr.HEAP2, Heap2Info.MULTI_INSERT),
    }


def test_effects_are_those_pg_waldump_describes(log: ExercisedLog) -> None:
    seen: set[type[Effect]] = set()
    for record, dumped in zip(log.records, log.dump, strict=True):
        found = effects(record)
        assert _plain(found) == _described(record, dumped), dumped
        seen |= {type(effect) for effect in found}
    assert seen == {
        VisibilityCleared,
        RelationCreated,
        RelationTruncated,
        RelationDropped,
        DatabaseCreated,
        DatabaseCopied,
        DatabaseDropped,
    }


# --- pg_waldump's words in our terms -------------------------------------------------------------


def _blocks(record: WalRecord) -> tuple[DumpedBlock, ...]:
    return tuple(
        DumpedBlock(
            id=block.id,
            page=block.page,
            image=DumpedImage(
                apply=block.apply_image,
                hole_offset=block.hole_offset,
                hole_length=block.hole_length,
            )
            if block.has_image
            else None,
        )
        for block in record.blocks
    )


def _plain(found: tuple[Effect, ...]) -> list[tuple[object, ...]]:
    """Effects as tuples with paths in them, as pg_waldump prints relations and databases."""
    plain: list[tuple[object, ...]] = []
    for effect in found:
        match effect:
            case VisibilityCleared(page=page, heap_block=block, bits=bits):
                plain.append(("clear", page, block, bits))
            case RelationCreated(relation=relation):
                plain.append(("create", _path(relation)))
            case RelationTruncated(relation=relation, blocks=blocks, forks=forks):
                plain.append(("truncate", _path(relation), blocks, len(forks)))
            case RelationDropped(tablespace=space, database=database, relation=number):
                relation = RelationFork(space, database, number, Fork.MAIN)
                plain.append(("drop", _path(relation)))
            case DatabaseCreated(database=database, tablespace=space):
                plain.append(("create database", f"{space}/{database}"))
            case DatabaseCopied():
                source = f"{effect.source_tablespace}/{effect.source_database}"
                plain.append(("copy database", source, f"{effect.tablespace}/{effect.database}"))
            case DatabaseDropped(database=database, tablespaces=spaces):
                plain.append(("drop database", [f"{space}/{database}" for space in spaces]))
    return plain


def _path(relation: RelationFork) -> str:
    name = f"{relation.relation}{relation.fork.suffix}"
    return f"global/{name}" if relation.database == 0 else f"base/{relation.database}/{name}"


def _described(record: WalRecord, dumped: DumpedRecord) -> list[tuple[object, ...]]:
    if record.rmgr in {Rmgr.HEAP, Rmgr.HEAP2}:
        return _described_clears(record, dumped)
    for (rmgr, pattern), read in _DESCRIPTIONS.items():
        if record.rmgr is rmgr and (found := re.match(pattern, dumped.description)):
            return read(found)
    return []


_DESCRIPTIONS: dict[tuple[Rmgr, str], Callable[[re.Match[str]], list[tuple[object, ...]]]] = {
    (Rmgr.SMGR, r"CREATE (\S+)"): lambda m: [("create", m[1])],
    (Rmgr.SMGR, r"TRUNCATE (\S+) to (\d+) blocks flags 7"): lambda m: [
        ("truncate", m[1], int(m[2]), 3)
    ],
    (Rmgr.XACT, r"(?:COMMIT|ABORT)(?:_PREPARED \d+:)? .*?; rels: ([^;]+)"): lambda m: [
        ("drop", path) for path in m[1].split()
    ],
    (Rmgr.DBASE, r"CREATE_WAL_LOG create dir (\S+)"): lambda m: [("create database", m[1])],
    (Rmgr.DBASE, r"CREATE_FILE_COPY copy dir (\S+) to (\S+)"): lambda m: [
        ("copy database", m[1], m[2])
    ],
    (Rmgr.DBASE, r"DROP dir (.+)"): lambda m: [("drop database", m[1].split())],
}


def _described_clears(record: WalRecord, dumped: DumpedRecord) -> list[tuple[object, ...]]:
    """By the flags it prints: 1 clears for the (old) block, 2 for an update's new one."""
    found = re.search(r", flags: 0x(\w+)", dumped.description)
    operation = record.info & HEAP_OPERATION_MASK
    if found is None or (record.rmgr, operation) == (Rmgr.HEAP2, Heap2Info.VISIBLE):
        return []
    flags = int(found[1], 16)
    blocks = [block.page for block in dumped.blocks]
    update = record.rmgr is Rmgr.HEAP and operation in {HeapInfo.UPDATE, HeapInfo.HOT_UPDATE}
    lock = "LOCK" in dumped.description
    cleared = []
    if flags & 1:
        cleared.append(blocks[-1])
    if update and flags & 2:
        cleared.append(blocks[0])
    return [
        ("clear", (page.relation._replace(fork=Fork.VM), 0), page.block, 2 if lock else 3)
        for page in cleared
    ]
