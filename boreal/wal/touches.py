"""Which pages the log's records change, read without taking each record apart.

Nearly every record of a busy database changes one or two pages of main forks and does nothing else.
All an index wants of such a *plain* record is where it starts and which pages it names. So those
are read straight out of the log's bytes, by one loop, into a dict; every other record is handed out
parsed, for its reader to judge. The two ways agree: a record is plain only if `effects` has nothing
to say of it and none of its blocks holds an image, is built anew or lies in another fork.

Nothing is checked less than elsewhere: the CRC, the backward link, the page headers, and that a
plain record's parts add up to its length.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import google_crc32c

from boreal.errors import CorruptWal, IngestStopped
from boreal.pages.visibility import ALL_FROZEN, VALID_BITS
from boreal.types import PAGE_BYTES, Lsn
from boreal.wal.record import RECORD_HEADER, WalRecord, parse_record
from boreal.wal.rmgr import XACT_HAS_INFO, Heap2Info, HeapInfo, Rmgr
from boreal.wal.stream import RawRecord, RecordStream

RAW_KEY: Final = struct.Struct("<IIII")
"""A page of a main fork as records name it: tablespace, database, relation, block."""

_HEADER = struct.Struct("<I4xQBB2xI")
"""XLogRecord without its transaction: length, prev, info, resource manager, CRC."""
_BLOCK = struct.Struct("<BBH16s")
"""A block header that names its relation: id, fork and flags, bytes of data, the page."""
_NEXT_BLOCK = struct.Struct("<BBH4s")
"""... of the same relation as the block before."""
_MAX_BLOCK_ID = 32
_HAS_DATA = 0x20
_NOT_PLAIN = 0xFF & ~_HAS_DATA
_SAME_RELATION = 0x80
_MAIN_DATA_SHORT = 255
_LEAST_BYTES = RECORD_HEADER.size + _BLOCK.size + 2
"""Of a record with a block."""

# What to do with a record, by resource manager and info.
_PARSE, _PASS, _BLOCKS, _UPDATE, _LOCK, _FLAGS = range(6)
"""Hand it out; it changes no page; note its blocks. The last three note them too, and a byte of the
main data tells of visibility bits cleared: an update's for both blocks; else for block 0 the byte
numbered `kind - _FLAGS`, or a lock's, which clears but one of the bits."""
_UPDATE_FLAGS_AT = 7
"""A lock's too."""
_CLEARED, _NEW_CLEARED = 0x01, 0x02
"""As in boreal.wal.effects; the second is an update's only."""


def _kinds() -> bytes:
    table = bytearray(256 << 4)

    def mark(rmgr: Rmgr, what: int, *infos: int) -> None:
        for info in infos or range(0, 256, 16):
            table[rmgr << 4 | info >> 4] = what

    # These register no block and have no effects, whatever their info.
    for rmgr in (Rmgr.CLOG, Rmgr.TBLSPC, Rmgr.MULTIXACT, Rmgr.RELMAP, Rmgr.STANDBY):
        mark(rmgr, _PASS)
    for rmgr in (Rmgr.COMMIT_TS, Rmgr.REPLORIGIN, Rmgr.LOGICALMSG):
        mark(rmgr, _PASS)
    # Without an xinfo word a transaction's end names no relations.
    mark(Rmgr.XACT, _PASS, *range(0, XACT_HAS_INFO, 16))
    mark(Rmgr.BTREE, _BLOCKS)
    mark(Rmgr.HEAP, _BLOCKS, HeapInfo.CONFIRM, HeapInfo.INPLACE)
    mark(Rmgr.HEAP, _FLAGS + 2, HeapInfo.INSERT)
    mark(Rmgr.HEAP, _FLAGS + 7, HeapInfo.DELETE)
    mark(Rmgr.HEAP, _LOCK, HeapInfo.LOCK)
    mark(Rmgr.HEAP, _UPDATE, HeapInfo.UPDATE, HeapInfo.HOT_UPDATE)
    mark(Rmgr.HEAP2, _BLOCKS, Heap2Info.PRUNE, Heap2Info.VACUUM, Heap2Info.FREEZE_PAGE)
    mark(Rmgr.HEAP2, _FLAGS, Heap2Info.MULTI_INSERT)
    mark(Rmgr.HEAP2, _LOCK, Heap2Info.LOCK_UPDATED)
    return bytes(table)


_KINDS: Final = _kinds()


class Touches(Protocol):
    """Where plain records are noted."""

    pages: dict[bytes, list[int]]
    """By `RAW_KEY`: the start of each record that changes the page, ascending."""
    hot: list[bytes]
    """Gets the key of a page each time it has `hot_mask + 1` more records."""
    hot_mask: int
    """A power of two less one."""

    def first(self, key: bytes, end: int) -> None:
        """`key` has just been added to `pages`, by the record that ends at `end`."""

    def cleared(self, key: bytes, start: int, bits: int) -> None:
        """The record at `start` clears these visibility bits of the heap page `key`."""


class TouchDecoder:
    """Follows the log: notes plain records in `into`, hands out the others.

    Invariant: `position` is the end of the last record noted or handed out; every record that ends
    after it has yet to come. `into` may be exchanged between two calls of `feed`.
    """

    def __init__(self, start: Lsn, into: Touches) -> None:
        """Begin at a record's start or end, or at a WAL page, as `WalDecoder` does."""
        self._stream = _TouchStream(start, into)
        self._failure: CorruptWal | IngestStopped | None = None

    @property
    def position(self) -> Lsn:
        """The end of the last record that was noted or handed out."""
        return self._stream.position

    def direct(self, into: Touches) -> None:
        """Note records there from now on."""
        self._stream.into = into

    def feed(self, data: bytes) -> Iterator[WalRecord]:
        """Take the next bytes; iterate to note the plain records and get the others, in order.

        Raises as `WalDecoder.feed` does, after what comes before the error.
        """
        if self._failure is not None:
            raise self._failure
        try:
            for start, end, raw in self._stream.feed(data):
                record = parse_record(raw, start, end)
                yield record
                self._stream.position = end
        except (CorruptWal, IngestStopped) as error:
            self._failure = error
            raise


class _TouchStream(RecordStream):
    """A RecordStream that keeps plain records to itself."""

    def __init__(self, start: Lsn, into: Touches) -> None:
        super().__init__(start)
        self.into = into
        self.position = start

    def _records_of_page(self) -> Iterator[RawRecord]:
        self._note_plain()
        if self._at % PAGE_BYTES == 0:
            return
        for record in super()._records_of_page():
            yield record
            self._note_plain()

    def _note_plain(self) -> None:  # noqa: C901, PLR0912, PLR0915 - one loop, for speed
        """Note records of this page up to the first that is not plain or not all here.

        It is left to the base class, which also raises what there is to raise.
        """
        if self._previous is None or self._abandoned is not None:
            return
        buffer, offset, previous = self._buffer, self._offset, int(self._previous)
        base = self._at - offset
        limit = min(len(buffer), offset + PAGE_BYTES - self._at % PAGE_BYTES)
        kinds, into = _KINDS, self.into
        pages, first, hot, hot_mask = into.pages, into.first, into.hot, into.hot_mask
        noted = pages.get
        read_header, read_block, read_next = (
            _HEADER.unpack_from,
            _BLOCK.unpack_from,
            _NEXT_BLOCK.unpack_from,
        )
        crc_of: Callable[[bytes], int] = google_crc32c.value
        crc_on: Callable[[int, bytes], int] = google_crc32c.extend
        last_header = limit - RECORD_HEADER.size
        while offset <= last_header:
            length, prev, info, rmgr, crc = read_header(buffer, offset)
            end = offset + ((length + 7) & ~7)
            kind = kinds[rmgr << 4 | info >> 4]
            if not kind or end > limit or prev != previous or length < 26:
                break
            raw_end = offset + length
            if crc_on(crc_of(buffer[offset + 24 : raw_end]), buffer[offset : offset + 20]) != crc:
                break
            other = None
            if kind != _PASS:
                if length < _LEAST_BYTES:
                    break
                block_id, flags, data_bytes, key = read_block(buffer, offset + 24)
                if block_id > _MAX_BLOCK_ID or flags & _NOT_PLAIN:
                    break
                at = offset + 44
                next_id = buffer[at]
                if next_id <= _MAX_BLOCK_ID and at + 22 <= raw_end:
                    flags = buffer[at + 1] & _NOT_PLAIN
                    if flags == _SAME_RELATION:
                        _, _, more_bytes, block = read_next(buffer, at)
                        other = key[:12] + block
                        at += 8
                    elif not flags:
                        _, _, more_bytes, other = read_block(buffer, at)
                        at += 20
                    else:
                        break
                    data_bytes += more_bytes
                    next_id = buffer[at]
                if next_id != _MAIN_DATA_SHORT:
                    break
                main_bytes = buffer[at + 1]
                if at + 2 + data_bytes + main_bytes != raw_end:
                    break
                if kind != _BLOCKS:
                    flags_at = kind - _FLAGS if kind >= _FLAGS else _UPDATE_FLAGS_AT
                    if main_bytes <= flags_at:
                        break
                    flags = buffer[raw_end - main_bytes + flags_at]
                    if flags & _CLEARED:
                        bits = VALID_BITS if kind != _LOCK else ALL_FROZEN
                        into.cleared(other or key, base + offset, bits)
                    if flags & _NEW_CLEARED and kind == _UPDATE:
                        into.cleared(key, base + offset, VALID_BITS)
            previous = base + offset
            offset = end
            if kind == _PASS:
                continue
            entries = noted(key)
            if entries is None:
                pages[key] = [previous]
                first(key, base + end)
            else:
                entries.append(previous)
                if not len(entries) & hot_mask:
                    hot.append(key)
            if other is not None:
                entries = noted(other)
                if entries is None:
                    pages[other] = [previous]
                    first(other, base + end)
                else:
                    entries.append(previous)
                    if not len(entries) & hot_mask:
                        hot.append(other)
        if offset != self._offset:
            self._offset = offset
            self._at = self.position = Lsn(base + offset)
            self._previous = Lsn(previous)
