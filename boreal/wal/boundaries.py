"""Where records end, without reading the records.

Whoever hands the log on must not hand out the beginning of a record alone: recovery may cut it off.
So a durable LSN is rounded down to a record's end. Most of the log need not be looked at for that:
each page's header says how much of an earlier record it continues, so the last page is enough
unless no record ends there. Nothing is verified beyond the page headers: PostgreSQL and the storage
nodes check each record themselves.

The layout is that of access/xlog_internal.h; the arithmetic of continued records is xlog.c's
(XLogRecPtrToBytePos, XLogBytePosToEndRecPtr).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from boreal.errors import CorruptWal
from boreal.types import PAGE_BYTES, WAL_SEGMENT_BYTES, Lsn, format_lsn
from boreal.wal.record import INFO_MASK, RECORD_HEADER
from boreal.wal.rmgr import Rmgr, XlogInfo
from boreal.wal.stream import MAX_RECORD_BYTES

_PAGE = struct.Struct("<HHIQI")
"""XLogPageHeader: magic, flags, timeline, address, bytes of an earlier record that continue."""
_MAGIC = 0xD113
_SHORT_BYTES = 24
_LONG_BYTES = 40
_OVERWRITES = 0x0008
"""XLP_FIRST_IS_OVERWRITE_CONTRECORD: the record under way was given up."""
_LENGTH = struct.Struct("<I")
_KIND = struct.Struct("<BB")
_KIND_OFFSET = 16
"""xl_info and xl_rmid."""
_LEAST_BYTES = RECORD_HEADER.size
"""An XLOG_SWITCH has no more; every other record has some data."""

_PAGE_ROOM = PAGE_BYTES - _SHORT_BYTES
_SEGMENT_ROOM = WAL_SEGMENT_BYTES // PAGE_BYTES * _PAGE_ROOM - (_LONG_BYTES - _SHORT_BYTES)

_REACHES = (PAGE_BYTES, 8 * PAGE_BYTES, 128 * PAGE_BYTES, WAL_SEGMENT_BYTES)
"""How far back is looked, one after the other. If a whole segment is one record, no end is found in
it, and an earlier one is as good."""


class RecordEnds:
    """The last record's end at or below an LSN, as the log grows.

    Invariant: `last` is a record's end and never shrinks. An LSN may be rounded to an earlier
    record's end than the last one (where a segment holds none, or once a record was given up: no
    compute node does that, see StartupXLOG), never to what is none.
    """

    def __init__(self, start: Lsn) -> None:
        """`start` is a record's end."""
        self.last = start
        """The highest one known. Read only."""
        self._due = start
        """No record ends between the highest one that was seen and here."""

    def at_most(self, limit: Lsn, read: Callable[[Lsn, Lsn], bytes]) -> Lsn:
        """`last`, once the log up to `limit` was taken into account.

        `read(start, end)` gives the log's bytes. Raises CorruptWal if they are no log, and whatever
        `read` raises.
        """
        for start in self.looks(limit):
            if self.look(start, read(start, limit)):
                break
        return self.last

    def looks(self, limit: Lsn) -> Iterator[Lsn]:
        """From where on the log up to `limit` is wanted, further back each time.

        For those who cannot read at once: give the bytes to `look`, until it returns True.
        """
        if limit <= self.last or limit < self._due:
            return
        last_page_end = -(-limit // PAGE_BYTES) * PAGE_BYTES
        for reach in _REACHES:
            start = max(self.last, Lsn(last_page_end - reach))
            yield start
            if start == self.last:
                return

    def look(self, start: Lsn, data: bytes) -> bool:
        """Take the log from `start` on into account; False if no record's end is in it."""
        scan = _Scan(start, data)
        scan.run(begins_at_end=start == self.last)
        self._due = max(self._due, scan.at)
        if scan.end is None:
            return False
        self.last = max(self.last, scan.end)
        return True


class _Scan:
    """One look at a stretch of the log, record by record.

    Invariant: `end` is the last record's end up to `at`. `at` is where the next record begins, or
    such an end; once it is past the data, no record ends between the data's end and there.
    """

    def __init__(self, start: Lsn, data: bytes) -> None:
        self.end: Lsn | None = None
        self.at = start
        self._start = start
        self._data = data
        self._limit = start + len(data)

    def run(self, *, begins_at_end: bool) -> None:
        """Go as far as the data goes. It begins at a record's end, or at any page."""
        if begins_at_end:
            self.end = self._start
        try:
            if begins_at_end or self._begin_at_page():
                while self.at <= self._limit:
                    self._pass_records()
        except CorruptWal:
            if self.end is not None:
                raise
            self.at = self._start  # in the padding after a switch, for example

    def _begin_at_page(self) -> bool:
        """Find where the page's first record begins; False if its header is not all here."""
        header = self._header(self._start)
        if header is None:
            return False
        flags, remaining = header
        if remaining:
            self._continue(self._start, remaining, switches=False)
            if remaining < _LEAST_BYTES:
                self.end = None  # the record may be a switch: the next one shows that it is none
        else:
            self.at = Lsn(self._start + _header_bytes(self._start))
            self.end = None if flags & _OVERWRITES else self._start
        return True

    def _pass_records(self) -> None:
        """Pass the records that lie on this page, and the one that goes on on the next."""
        data, offset = self._data, self.at - self._start
        if self.at % PAGE_BYTES == 0:
            header = self._header(self.at)
            if header is not None and header[1]:
                raise _corrupt(self.at, "continues a record where none was under way")
            offset += _header_bytes(self.at)
        first = offset
        page_end = offset + PAGE_BYTES - (self._start + offset) % PAGE_BYTES
        size = min(page_end, len(data))
        length = end = 0
        while size - offset >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, offset)
            end = offset + ((length + 7) & ~7)
            if end > size or length <= _LEAST_BYTES:
                break
            offset = end
        if offset > first:
            self.end = Lsn(self._start + offset)
        self.at = Lsn(self._start + offset)
        if offset == page_end:
            return
        if size - offset < _LENGTH.size:
            self.at = Lsn(self.at + _LEAST_BYTES)  # a record is no shorter
        elif not _LEAST_BYTES <= length <= MAX_RECORD_BYTES:
            raise _corrupt(self.at, f"has a record of {length} bytes")
        else:
            self._pass_record(offset, length, page_end)

    def _pass_record(self, offset: int, length: int, page_end: int) -> None:
        """Pass a record that is not all here, goes on on the next page, or may be a switch."""
        room = page_end - offset
        kind_at = offset + _KIND_OFFSET
        if room <= _KIND_OFFSET:
            kind_at += _header_bytes(self._start + page_end)
        switches = length == _LEAST_BYTES and self._is_switch(kind_at)
        if length > room:
            self._continue(Lsn(self._start + page_end), length - room, switches=switches)
        else:
            self._finish(Lsn(self._start + offset + ((length + 7) & ~7)), switches=switches)

    def _is_switch(self, kind_at: int) -> bool:
        if kind_at + _KIND.size > len(self._data):
            return False  # nor is its end here
        info, rmgr = _KIND.unpack_from(self._data, kind_at)
        return bool(rmgr == Rmgr.XLOG and info & INFO_MASK == XlogInfo.SWITCH)

    def _continue(self, page: Lsn, missing: int, *, switches: bool) -> None:
        """Follow a record of which `missing` bytes are on `page` and those after it."""
        while (header := self._header(page)) is not None:
            flags, remaining = header
            header_bytes = _header_bytes(page)
            if flags & _OVERWRITES:
                self.at = Lsn(page + header_bytes)
                return
            if remaining != missing:
                raise _corrupt(page, f"continues {remaining} bytes where {missing} are due")
            if missing <= PAGE_BYTES - header_bytes:
                break
            missing -= PAGE_BYTES - header_bytes
            page = Lsn(page + PAGE_BYTES)
        self._finish(_end_of_continued(page, missing), switches=switches)

    def _finish(self, end: Lsn, *, switches: bool) -> None:
        if switches:
            end = Lsn(-(-end // WAL_SEGMENT_BYTES) * WAL_SEGMENT_BYTES)
        self.at = end
        if end <= self._limit:
            self.end = end

    def _header(self, page: Lsn) -> tuple[int, int] | None:
        """Flags, and how many bytes of an earlier record go on; None: it is not all here."""
        offset = page - self._start
        if len(self._data) - offset < _header_bytes(page):
            return None
        magic, flags, _, address, remaining = _PAGE.unpack_from(self._data, offset)
        if magic != _MAGIC or address != page:
            raise _corrupt(page, "is not one")
        return flags, remaining


def _header_bytes(page: int) -> int:
    return _SHORT_BYTES if page % WAL_SEGMENT_BYTES else _LONG_BYTES


def _end_of_continued(page: Lsn, missing: int) -> Lsn:
    """Where a record ends of which `missing` bytes are on `page` and those after it."""
    segment, offset = divmod(page, WAL_SEGMENT_BYTES)
    room = (missing + 7) & ~7
    if offset:
        room += offset // PAGE_BYTES * _PAGE_ROOM - (_LONG_BYTES - _SHORT_BYTES)
    segments, room = divmod(room, _SEGMENT_ROOM)
    end = (segment + segments) * WAL_SEGMENT_BYTES
    if not room:
        return Lsn(end)
    room += _LONG_BYTES - _SHORT_BYTES
    pages, rest = divmod(room, _PAGE_ROOM)
    return Lsn(end + pages * PAGE_BYTES + (rest + _SHORT_BYTES if rest else 0))


def _corrupt(lsn: Lsn, what: str) -> CorruptWal:
    return CorruptWal(f"the log page at {format_lsn(lsn)} {what}", lsn=lsn)
