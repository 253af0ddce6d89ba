"""What pg_waldump says of a log, parsed: the reading of it that the engine itself has."""

from __future__ import annotations

import re
from dataclasses import dataclass

from boreal.types import BlockNumber, Fork, Lsn, PageKey, RelationFork, format_lsn, parse_lsn
from boreal.wal import Rmgr
from tests.support.stock_postgres import StockPostgres

_RECORD = re.compile(
    r"rmgr: (\w+) +len \(rec/tot\): +\d+/ *(\d+), tx: +(\d+), "
    r"lsn: (\w+/\w+), prev (\w+/\w+), desc: (.*)"
)
_BLOCK = re.compile(r"\tblkref #(\d+): rel (\d+)/(\d+)/(\d+) fork (\w+) blk (\d+)(.*)")
_IMAGE = re.compile(r" \(FPW( for WAL verification)?\); hole: offset: (\d+), length: (\d+)")

# rmgrlist.h: the names pg_waldump prints, in order.
_RMGRS = (
    *("XLOG", "Transaction", "Storage", "CLOG", "Database", "Tablespace", "MultiXact", "RelMap"),
    *("Standby", "Heap2", "Heap", "Btree", "Hash", "Gin", "Gist", "Sequence", "SPGist", "BRIN"),
    *("CommitTs", "ReplicationOrigin", "Generic", "LogicalMessage"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpedImage:
    """A full-page image."""

    apply: bool
    hole_offset: int
    hole_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpedBlock:
    """A block reference."""

    id: int
    page: PageKey
    image: DumpedImage | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpedRecord:
    """A record: a line of pg_waldump, and the indented lines below it."""

    rmgr: Rmgr
    length: int
    xid: int
    start: Lsn
    prev: Lsn
    description: str
    blocks: tuple[DumpedBlock, ...]


def waldump(server: StockPostgres, start: Lsn, end: Lsn, timeline: int) -> list[DumpedRecord]:
    """The records that start in [start, end)."""
    output = server.engine.run(
        "pg_waldump",
        "--bkp-details",
        f"--path={server.wal_directory}",
        f"--start={format_lsn(start)}",
        f"--end={format_lsn(end)}",
        f"--timeline={timeline}",
    )
    records: list[DumpedRecord] = []
    blocks: list[DumpedBlock] = []
    # Backwards, so that a record's blocks are known when its own line comes.
    for line in reversed(output.splitlines()):
        if block := _BLOCK.fullmatch(line):
            blocks.insert(0, _block(block))
        elif record := _RECORD.fullmatch(line):
            records.append(_record(record, tuple(blocks)))
            blocks.clear()
    return records[::-1]


def _record(match: re.Match[str], blocks: tuple[DumpedBlock, ...]) -> DumpedRecord:
    rmgr, length, xid, start, prev, description = match.groups()
    return DumpedRecord(
        rmgr=Rmgr(_RMGRS.index(rmgr)),
        length=int(length),
        xid=int(xid),
        start=parse_lsn(start),
        prev=parse_lsn(prev),
        description=description,
        blocks=blocks,
    )


def _block(match: re.Match[str]) -> DumpedBlock:
    number, tablespace, database, relation, fork, block, rest = match.groups()
    key = RelationFork(int(tablespace), int(database), int(relation), Fork[fork.upper()])
    image = None
    if found := _IMAGE.fullmatch(rest):
        verification, offset, length = found.groups()
        image = DumpedImage(
            apply=verification is None, hole_offset=int(offset), hole_length=int(length)
        )
    elif rest:
        raise ValueError(f"not understood: {match.string!r}")
    return DumpedBlock(id=int(number), page=PageKey(key, BlockNumber(int(block))), image=image)
