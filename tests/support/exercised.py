"""A log the engine wrote, made once for all tests that read one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

from boreal.types import PAGE_BYTES, Lsn, RelationFork
from boreal.wal import WalDecoder, WalRecord, last_record_end
from tests.support.stock_postgres import StockPostgres, stock_postgres
from tests.support.waldump import DumpedRecord, waldump
from tests.support.workload import exercise

CHECKED = "checked"
"""The database whose every record carries after-images (wal_consistency_checking = all)."""


@dataclass(frozen=True, kw_only=True)
class ExercisedLog:
    """A whole log, from the first record of initdb to a clean shutdown on a second timeline."""

    start: Lsn
    data: bytes
    """Whole segments; what follows `end` is what the engine left there."""
    end: Lsn
    switch: Lsn
    """Where timeline 2 begins."""
    dump: tuple[DumpedRecord, ...]
    checked_database: int
    files: dict[str, bytes]
    """The checked database's relation files at `end`, by name."""

    @cached_property
    def records(self) -> list[WalRecord]:
        """All of it, decoded."""
        return list(WalDecoder(self.start).feed(self.data[: self.end - self.start]))

    def bytes_at(self, lsn: int, length: int) -> bytes:
        """What a log reader would return."""
        return self.data[lsn - self.start : lsn - self.start + length]

    def page(self, relation: RelationFork, block: int) -> bytes | None:
        """A page of the checked database as left on disk; None if its file ends before it."""
        file = self.files.get(f"{relation.relation}{relation.fork.suffix}", b"")
        return file[block * PAGE_BYTES : (block + 1) * PAGE_BYTES] or None


@cache
def exercised_log() -> ExercisedLog:
    """Run the workload plainly, then with after-images, then go on on a new timeline; stop."""
    with stock_postgres() as server:
        exercise(server, "postgres")
        server.run(
            f"CREATE DATABASE {CHECKED}",
            f"ALTER DATABASE {CHECKED} SET wal_consistency_checking = 'all'",
        )
        exercise(server, CHECKED)
        server.stop()
        switch = server.open_timeline()
        server.run(
            "CREATE TABLE afterwards (id int)",
            "INSERT INTO afterwards SELECT generate_series(1, 400)",
            "CREATE INDEX ON afterwards (id)",
            "SELECT pg_logical_emit_message(false, 'long', repeat('x', 100000))",
        )
        rows = server.run(f"SELECT oid::int FROM pg_database WHERE datname = '{CHECKED}'")
        server.stop()
        return _collect(server, switch, int(rows[0][0]))


def _collect(server: StockPostgres, switch: Lsn, database: int) -> ExercisedLog:
    start, data = server.wal()
    end = last_record_end(data, start)
    if end is None:
        raise ValueError("the log has no record")
    dump = (*waldump(server, start, switch, 1), *waldump(server, switch, end, 2))
    folder = server.data / "base" / str(database)
    return ExercisedLog(
        start=start,
        data=data,
        end=end,
        switch=switch,
        dump=dump,
        checked_database=database,
        files={path.name: path.read_bytes() for path in folder.iterdir()},
    )
