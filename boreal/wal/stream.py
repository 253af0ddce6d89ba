"""From the log's bytes to the bytes of its records: pages, continuations, CRCs, the backward link.

The layout is that of access/xlog_internal.h; what is refused is what PostgreSQL's own reader
refuses (access/transam/xlogreader.c).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import google_crc32c

from boreal.errors import CorruptWal
from boreal.types import PAGE_BYTES, WAL_SEGMENT_BYTES, Lsn, format_lsn
from boreal.wal.record import INFO_MASK, RECORD_HEADER
from boreal.wal.rmgr import Rmgr, XlogInfo

MAX_RECORD_BYTES = 1020 * 1024 * 1024
"""XLogRecordMaxSize."""

_PAGE_MAGIC = 0xD113
_SHORT_HEADER = struct.Struct("<HHIQI4x")
_LONG_HEADER = struct.Struct("<HHIQI4xQII")
_FIRST_IS_CONTRECORD = 0x0001
_LONG = 0x0002
_FIRST_IS_OVERWRITE_CONTRECORD = 0x0008
_ALL_FLAGS = 0x000F

_LENGTH = struct.Struct("<I")
_CRC_OFFSET = RECORD_HEADER.size - 4
_OVERWRITTEN = struct.Struct("<26xQ")
"""xl_overwrite_contrecord.overwritten_lsn, behind the record's header and its short data header."""


class RawRecord(NamedTuple):
    """The bytes of one verified record, without the page headers inside [start, end)."""

    start: Lsn
    end: Lsn
    raw: bytes


class RecordStream:
    """Cuts a contiguous byte stream into records. Bytes come in chunks of any size.

    Invariant: every record handed out has a right CRC and links back to the one before it, and
    everything between the two was accounted for (page headers, alignment, the rest of a segment
    after XLOG_SWITCH, a record that PostgreSQL declared abandoned).

    Holds less than a page of undecoded bytes besides the record it is putting together.
    """

    def __init__(self, start: Lsn) -> None:
        """Begin at a record, or at any WAL page: the rest of an earlier record is passed over."""
        self._start = start
        self._began_at_record_end = False
        self._at = start
        """LSN of the next byte to look at, `_buffer[_offset]`."""
        self._buffer = b""
        self._offset = 0
        self._begun: Lsn | None = None
        """Where the record started that is being continued; None while passing one over."""
        self._fragments = bytearray()
        self._missing = 0
        """Bytes of it still to come."""
        self._switch: RawRecord | None = None
        """An XLOG_SWITCH whose segment has not ended yet."""
        self._abandoned: Lsn | None = None
        """A record that breaks off; the next one must confirm it."""
        self._previous: Lsn | None = None
        self._timeline = 0
        self._system_identifier: int | None = None

    @property
    def began_at_record_end(self) -> bool:
        """Whether the header of the page at the start showed that a record ends there."""
        return self._began_at_record_end

    def feed(self, data: bytes) -> Iterator[RawRecord]:
        """Take the stream's next bytes; the iterator gives the records they complete.

        CorruptWal where PostgreSQL would stop reading. Exhaust the iterator, or let it go: the next
        call's continues where it stood.
        """
        rest = self._buffer[self._offset :]
        self._buffer = rest + data if rest else data
        self._offset = 0
        return self._records()

    def _records(self) -> Iterator[RawRecord]:
        while True:
            if self._switch is not None:
                if not self._skip_to(self._switch.end):
                    return
                record, self._switch = self._switch, None
                yield record
            if self._at % PAGE_BYTES == 0 and not self._enter_page():
                return
            if self._missing:
                if not self._take_fragment():
                    return
                if not self._missing and self._begun is not None:
                    whole = self._complete(self._begun, bytes(self._fragments))
                    if whole is not None:
                        yield whole
                continue
            yield from self._records_of_page()
            if self._switch is None and not self._missing and self._at % PAGE_BYTES:
                return

    def _records_of_page(self) -> Iterator[RawRecord]:
        """The records that lie on this page: to its end, or as far as the bytes go."""
        buffer, offset = self._buffer, self._offset
        available = len(buffer)
        page_end = offset + PAGE_BYTES - self._at % PAGE_BYTES
        while offset < page_end and available - offset >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, offset)
            if not RECORD_HEADER.size <= length <= MAX_RECORD_BYTES:
                raise self._corrupt(f"has a length of {length} bytes", self._at)
            end = offset + ((length + 7) & ~7)
            if end > page_end:
                self._begin_crossing(length)
                return
            if end > available:
                return
            start = self._at
            self._at = Lsn(start + end - offset)
            self._offset = end
            record = self._complete(start, buffer[offset : offset + length])
            if record is None:
                return
            yield record
            offset = self._offset  # a subclass may have gone further meanwhile

    def _begin_crossing(self, length: int) -> None:
        self._begun = self._at
        self._fragments = bytearray()
        self._missing = length

    def _take_fragment(self) -> bool:
        """Take this page's part of the record under way; False if not all of it is here yet."""
        room = PAGE_BYTES - self._at % PAGE_BYTES
        length = min(self._missing, room)
        occupied = (length + 7) & ~7
        end = self._offset + occupied
        if end > len(self._buffer):
            return False
        if self._begun is not None:
            self._fragments += memoryview(self._buffer)[self._offset : self._offset + length]
        self._missing -= length
        self._offset = end
        self._at = Lsn(self._at + occupied)
        return True

    def _skip_to(self, end: Lsn) -> bool:
        """Pass over padding; False if it has not all come yet."""
        step = min(end - self._at, len(self._buffer) - self._offset)
        self._offset += step
        self._at = Lsn(self._at + step)
        return self._at == end

    def _complete(self, start: Lsn, raw: bytes) -> RawRecord | None:
        """Verify a whole record; None if it is an XLOG_SWITCH whose segment goes on."""
        _, _, prev, info, rmgr_id, crc = RECORD_HEADER.unpack_from(raw)
        if google_crc32c.extend(google_crc32c.value(raw[24:]), raw[:_CRC_OFFSET]) != crc:
            raise self._corrupt("has a wrong CRC", start)
        if prev != self._previous and (self._previous is not None or prev >= start):
            raise self._corrupt(f"links back to {format_lsn(prev)}", start)
        kind = info & INFO_MASK
        if self._abandoned is not None:
            self._check_overwrite(start, raw, (rmgr_id, kind))
        self._previous = start
        if rmgr_id == Rmgr.XLOG and kind == XlogInfo.SWITCH:
            end = Lsn(-(-self._at // WAL_SEGMENT_BYTES) * WAL_SEGMENT_BYTES)
            self._switch = RawRecord(start, end, raw)
            return None
        return RawRecord(start, self._at, raw)

    def _check_overwrite(self, start: Lsn, raw: bytes, kind: tuple[int, int]) -> None:
        """The first record after an abandoned one names it (VerifyOverwriteContrecord)."""
        if (
            kind != (Rmgr.XLOG, XlogInfo.OVERWRITE_CONTRECORD)
            or len(raw) < _OVERWRITTEN.size
            or _OVERWRITTEN.unpack_from(raw)[0] != self._abandoned
        ):
            raise self._corrupt("does not confirm the abandoned record before it", start)
        self._abandoned = None

    def _enter_page(self) -> bool:
        """Check and pass a page header; False if it has not all come yet."""
        first_of_segment = self._at % WAL_SEGMENT_BYTES == 0
        layout = _LONG_HEADER if first_of_segment else _SHORT_HEADER
        if len(self._buffer) - self._offset < layout.size:
            return False
        magic, flags, timeline, address, remaining, *long = layout.unpack_from(
            self._buffer, self._offset
        )
        if (
            magic != _PAGE_MAGIC
            or flags & ~_ALL_FLAGS
            or (flags & _LONG != 0) != first_of_segment
            or address != self._at
            or timeline < self._timeline
        ):
            raise self._corrupt_page("has a wrong header")
        if long:
            self._check_long_header(*long)
        self._timeline = timeline
        self._continue_onto_page(flags, remaining)
        self._offset += layout.size
        self._at = Lsn(self._at + layout.size)
        return True

    def _check_long_header(self, system: int, segment_bytes: int, page_bytes: int) -> None:
        if (segment_bytes, page_bytes) != (WAL_SEGMENT_BYTES, PAGE_BYTES):
            raise self._corrupt_page(f"tells of {segment_bytes}-byte segments")
        if self._system_identifier not in {None, system}:
            raise self._corrupt_page(f"belongs to another system, {system}")
        self._system_identifier = system

    def _continue_onto_page(self, flags: int, remaining: int) -> None:
        """Reconcile what the page continues with what the page before left unfinished."""
        continues = flags & _FIRST_IS_CONTRECORD != 0
        if continues != (remaining != 0):
            raise self._corrupt_page("contradicts itself about a continued record")
        overwrites = flags & _FIRST_IS_OVERWRITE_CONTRECORD != 0
        if self._at == self._start:
            self._began_at_record_end = not continues and not overwrites
            self._missing = remaining
        elif self._missing and overwrites and not continues:
            self._abandoned = self._begun
            self._begun = None
            self._missing = 0
        elif remaining != self._missing:
            raise self._corrupt_page(
                f"continues a record by {remaining} bytes where {self._missing} are due"
            )

    def _corrupt(self, what: str, start: Lsn) -> CorruptWal:
        return CorruptWal(f"the record at {format_lsn(start)} {what}", lsn=start)

    def _corrupt_page(self, what: str) -> CorruptWal:
        return CorruptWal(f"the log page at {format_lsn(self._at)} {what}", lsn=self._at)
