"""Goal: a log in which the engine gave up a half-written record is read as the engine reads it.

Method: stop the stock engine at once, wipe the log from the second page of its last record on, as a
torn write leaves it, and let it recover. It notes the record as abandoned and goes on after it.
"""

from __future__ import annotations

import signal

from boreal.types import PAGE_BYTES, Lsn, wal_file_name, wal_segment_start
from boreal.wal import Rmgr, WalDecoder, WalRecord, XlogInfo, last_record_end
from tests.support.stock_postgres import StockPostgres, stock_postgres
from tests.support.waldump import waldump

_OVERWRITE = (Rmgr.XLOG, XlogInfo.OVERWRITE_CONTRECORD)


def test_recovery_after_a_record_torn_at_a_page() -> None:
    with stock_postgres() as server:
        server.run("SELECT pg_logical_emit_message(true, 'torn', repeat('x', 30000))")
        server.stop(signal.SIGQUIT)
        torn = _last_long_record(server)
        page = Lsn(torn.start - torn.start % PAGE_BYTES + PAGE_BYTES)
        _wipe(server, page)
        start, data = server.wal()
        end = last_record_end(data, start)
        assert end is not None
        assert torn.start - end in {0, 24, 40}  # at most a page header lies between

        server.start()
        server.run("SELECT pg_logical_emit_message(false, 'after', 'y')")
        server.stop()
        start, data = server.wal()
        end = last_record_end(data, start)
        assert end is not None
        records = list(WalDecoder(start).feed(data[: end - start]))
        dump = waldump(server, start, end, 1)
        assert [record.start for record in records] == [dumped.start for dumped in dump]
        assert any((record.rmgr, record.info) == _OVERWRITE for record in records)
        assert torn.start not in {record.start for record in records}


def _last_long_record(server: StockPostgres) -> WalRecord:
    start, data = server.wal()
    end = last_record_end(data, start)
    assert end is not None
    records = list(WalDecoder(start).feed(data[: end - start]))
    return next(
        record
        for record in reversed(records)
        if record.rmgr is Rmgr.LOGICALMSG and len(record.main_data) > 30_000
    )


def _wipe(server: StockPostgres, start: Lsn) -> None:
    """Zero the log from `start` to the end of its segment."""
    path = server.wal_directory / wal_file_name(1, start)
    offset = start - wal_segment_start(start)
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(offset)
        file.write(bytes(size - offset))
