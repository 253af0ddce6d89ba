"""Ways to get records out of the log: pushed along a stream, at random, by scanning a tail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import google_crc32c

from boreal.errors import CorruptWal, IngestStopped
from boreal.types import PAGE_BYTES, Lsn, format_lsn
from boreal.wal.record import INFO_MASK, RECORD_HEADER, WalRecord, parse_record
from boreal.wal.rmgr import Rmgr, XlogInfo
from boreal.wal.stream import RawRecord, RecordStream


class WalDecoder:
    """Turns the log's contiguous bytes, pushed in chunks of any size, into records.

    Invariant: `position` is the end of the last record handed out (at first: where it began), and
    every record that ends after it has yet to come.
    """

    def __init__(self, start: Lsn) -> None:
        """Begin at a record's start or end, or at a WAL page or segment, where the rest of a record
        that began earlier is passed over."""
        self._stream = RecordStream(start)
        self._position = start
        self._failure: CorruptWal | IngestStopped | None = None

    @property
    def position(self) -> Lsn:
        """The end of the last complete record."""
        return self._position

    def feed(self, data: bytes) -> Iterator[WalRecord]:
        """Take the next bytes; iterate to get the records they complete.

        The iterator raises, after the good records before it: CorruptWal (`lsn`) on a wrong CRC,
        page header, backward link or length; IngestStopped (`lsn`) on a record of a custom resource
        manager. It does not get past the error: every later call raises it again.
        """
        return self._decode(self._stream.feed(data))

    def _decode(self, raw_records: Iterator[RawRecord]) -> Iterator[WalRecord]:
        if self._failure is not None:
            raise self._failure
        try:
            for start, end, raw in raw_records:
                record = parse_record(raw, start, end)
                self._position = end
                yield record
        except (CorruptWal, IngestStopped) as error:
            self._failure = error
            raise


def read_record(read: Callable[[Lsn, int], bytes], start: Lsn, end: Lsn) -> WalRecord:
    """The record known to span [start, end). `read(lsn, length)` gives the log's bytes.

    Raises CorruptWal if there is no such record, and whatever `read` raises.
    """
    for record in WalDecoder(start).feed(read(start, end - start)):
        if (record.start, record.end) == (start, end):
            return record
        break
    raise CorruptWal(
        f"no record spans {format_lsn(start)} to {format_lsn(end)} in the log", lsn=start
    )


def record_at(read: Callable[[Lsn, int], bytes], start: Lsn, limit: Lsn) -> WalRecord:
    """The record that begins at `start`; the log is complete to `limit`, which lies past it.

    For small records, all but a few, one call of `read` and one look at the CRC. Raises CorruptWal
    if no record begins there or it does not end by `limit`, and whatever `read` raises.
    """
    page_end = start - start % PAGE_BYTES + PAGE_BYTES
    data = read(start, min(page_end, limit) - start)
    if len(data) >= RECORD_HEADER.size:
        length, _, _, info, rmgr_id, crc = RECORD_HEADER.unpack_from(data)
        end = start + ((length + 7) & ~7)
        switches = rmgr_id == Rmgr.XLOG and info & INFO_MASK == XlogInfo.SWITCH
        if RECORD_HEADER.size <= length <= len(data) and not switches:
            raw = data[:length]
            head = raw[: RECORD_HEADER.size - 4]
            if google_crc32c.extend(google_crc32c.value(raw[RECORD_HEADER.size :]), head) == crc:
                return parse_record(raw, start, Lsn(end))
    decoder, at = WalDecoder(start), start
    while data:
        for record in decoder.feed(data):
            if record.start == start:
                return record
            raise CorruptWal(f"no record begins at {format_lsn(start)}", lsn=start)
        at = Lsn(at + len(data))
        data = read(at, min(PAGE_BYTES, limit - at)) if at < limit else b""
    raise CorruptWal(
        f"the record at {format_lsn(start)} does not end by {format_lsn(limit)}", lsn=start
    )


def last_record_end(data: bytes, start: Lsn) -> Lsn | None:
    """The end of the last complete, valid record in the tail `data` of a log.

    `data` begins at the WAL page `start`; the rest of a record that began on an earlier page is
    passed over. The first byte that does not belong to a valid record ends the scan: a torn write,
    zeros, or the end of the data. An XLOG_SWITCH counts once its whole segment is there.

    If no complete record begins in `data`, the answer is `start` if the page shows it to be a
    record's end, else None: nothing is proven then, begin on an earlier page.
    """
    if start % PAGE_BYTES:
        raise ValueError(f"{format_lsn(start)} is not the start of a WAL page")
    stream = RecordStream(start)
    end: Lsn | None = None
    with suppress(CorruptWal):  # what the scan is there to find: the log is good up to here
        for record in stream.feed(data):
            end = record.end
    if end is None and stream.began_at_record_end:
        return start
    return end
