"""Builds a log, page headers and all: for what the stock engine cannot be made to write."""

from __future__ import annotations

import struct

import google_crc32c

from boreal.types import PAGE_BYTES, WAL_SEGMENT_BYTES, Lsn

_HEADER = struct.Struct("<IIQBB2x")
_CRC = struct.Struct("<I")
_PAGE_HEADER = struct.Struct("<HHIQI4x")
_LONG_PART = struct.Struct("<QII")

CONTRECORD = 0x0001
LONG = 0x0002
OVERWRITE_CONTRECORD = 0x0008


def body(main_data: bytes, headers: bytes = b"", block_data: bytes = b"") -> bytes:
    """What follows a record's header: block headers, the main data's header, data."""
    if len(main_data) < 256:
        main_header = bytes((255, len(main_data)))
    else:
        main_header = b"\xfe" + _CRC.pack(len(main_data))
    return headers + (main_header if main_data else b"") + block_data + main_data


class WalBuilder:
    """A growing log that starts at `start`, a segment's first byte."""

    def __init__(self, start: int = WAL_SEGMENT_BYTES, system: int = 4711) -> None:
        self.start = Lsn(start)
        self.data = bytearray()
        self.timeline = 1
        self._system = system
        self._prev = Lsn(0)

    @property
    def end(self) -> Lsn:
        """Where the next record goes, but for a page header."""
        return Lsn(self.start + len(self.data))

    def add(self, rmgr: int, info: int, payload: bytes, *, xid: int = 0) -> tuple[Lsn, Lsn]:
        """Append a record whose bytes after the header are `payload`; return its start and end."""
        start = self._begin()
        self._append(self.record(rmgr, info, payload, xid=xid))
        self._align()
        self._prev = start
        return start, self.end

    def abandon(self, length: int) -> Lsn:
        """Append the part of a record of `length` bytes that fits on its page; return its start.

        The next record goes to the next page, which says that this one was given up.
        """
        start = self._begin()
        room = PAGE_BYTES - self.end % PAGE_BYTES
        self.data += self.record(21, 0, body(bytes(length)))[:room]
        self._page_header(0, OVERWRITE_CONTRECORD)
        return start

    def fill_segment(self) -> None:
        """Zeros up to the segment's end, as the engine leaves them after XLOG_SWITCH."""
        self.data += bytes(-self.end % WAL_SEGMENT_BYTES)

    def fill_page(self, room: int) -> None:
        """Add a record that leaves `room` bytes (a multiple of 8) on its page."""
        self._begin()
        free = PAGE_BYTES - self.end % PAGE_BYTES
        length = free - room
        if length < 64:
            length += PAGE_BYTES - _PAGE_HEADER.size
        main_data = length - _HEADER.size - _CRC.size - (5 if length > 281 else 2)
        self.add(21, 0, body(bytes(main_data)))

    def record(self, rmgr: int, info: int, payload: bytes, *, xid: int = 0) -> bytes:
        """A record's bytes, linked to the last one added."""
        length = _HEADER.size + _CRC.size + len(payload)
        header = _HEADER.pack(length, xid, self._prev, info, rmgr)
        crc = google_crc32c.extend(google_crc32c.value(payload), header)
        return header + _CRC.pack(crc) + payload

    def _begin(self) -> Lsn:
        if self.end % PAGE_BYTES == 0:
            self._page_header(0, 0)
        return self.end

    def _append(self, record: bytes) -> None:
        rest = memoryview(record)  # else a long record would be copied once for each of its pages
        while rest:
            if self.end % PAGE_BYTES == 0:
                self._page_header(len(rest), CONTRECORD)
            room = PAGE_BYTES - self.end % PAGE_BYTES
            self.data += rest[:room]
            rest = rest[room:]

    def _align(self) -> None:
        self.data += bytes(-len(self.data) % 8)

    def _page_header(self, remaining: int, flags: int) -> None:
        address = self.end
        first = address % WAL_SEGMENT_BYTES == 0
        flags |= LONG if first else 0
        self.data += _PAGE_HEADER.pack(0xD113, flags, self.timeline, address, remaining)
        if first:
            self.data += _LONG_PART.pack(self._system, WAL_SEGMENT_BYTES, PAGE_BYTES)
