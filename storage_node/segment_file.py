"""One 16 MiB segment file of the log, and the checksums that prove it.

The file is PostgreSQL's own WAL segment, byte for byte. Beside it lies a *sidecar*,
`<segment>.crc`, mapped into memory: one CRC-32C for each full 8 KiB page, and one *tail word* that
says how far the file is filled and the CRC-32C of the last, partial page. The tail word is a single
aligned 8-byte store, so whoever maps the sidecar sees a fill and the checksum that belongs to it.

The order that makes the sidecar a proof: bytes are written and synced first, the tail word moves
after. A process that is killed leaves exactly what it acknowledged. The sidecar itself is synced
only when the segment is full, so after a power failure it may lag behind the bytes, but never lead
them; what lies beyond it is then proven by the WAL's own record checksums (storage_node.tail).
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from google_crc32c import extend, value

from boreal.errors import CorruptData
from boreal.types import PAGE_BYTES, WAL_SEGMENT_BYTES, Lsn, Timeline, format_lsn, wal_file_name
from storage_node.disk import sync_directory

SEGMENT_PAGES = WAL_SEGMENT_BYTES // PAGE_BYTES
ZEROS_AHEAD_BYTES = 128 * 1024
"""Blocks that were only reserved cost the file system a change of metadata when they are first
written, and a sync twice the time. So zeros go before, and of the syncs of small appends but one in
dozens finds such blocks. (PostgreSQL fills a whole segment first, see `wal_init_zero`; 16 MiB at
once, on six nodes, would hold up commits.)"""

_MAGIC = int.from_bytes(b"BOREALC1", "little")
_HEADER_BYTES = 64
_SIDECAR_BYTES = _HEADER_BYTES + 4 * SEGMENT_PAGES
_MAGIC_WORD, _START_WORD, _TAIL_WORD = range(3)


class Tail(NamedTuple):
    """How far a segment file is filled, and the CRC-32C of its last, partial page (0: none)."""

    filled_bytes: int
    crc: int


def segment_suffix(start: Lsn) -> str:
    """The part of a segment file's name that its timeline does not change."""
    return wal_file_name(0, start)[8:]


def sidecar_path(directory: Path, start: Lsn) -> Path:
    """Where the checksums of the segment at `start` are; they survive a change of timeline."""
    return directory / f"{segment_suffix(start)}.crc"


def page_is_sound(page: bytes, number: int, crcs: Sequence[int], tail: Tail) -> bool:
    """Whether page `number` is what its sidecar says; bytes past the tail don't count."""
    filled = tail.filled_bytes - number * PAGE_BYTES
    if filled >= PAGE_BYTES:
        return int(value(page)) == crcs[number]
    return filled <= 0 or int(value(page[:filled])) == tail.crc


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    written = os.pwrite(descriptor, data, offset)
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], offset + written)


class Sidecar:
    """The mapped checksums of one segment file."""

    def __init__(self, path: Path, start: Lsn, *, writable: bool) -> None:
        """Map an existing file; CorruptData if it is not the sidecar of the segment at `start`."""
        descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size != _SIDECAR_BYTES:
                raise CorruptData(f"{path} has not the size of a checksum file")
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self._map = mmap.mmap(descriptor, _SIDECAR_BYTES, access=access)
        finally:
            os.close(descriptor)
        self._bytes = memoryview(self._map)
        self._words = self._bytes[:_HEADER_BYTES].cast("Q")
        self.crcs = self._bytes[_HEADER_BYTES:].cast("I")
        """Of each page; meaningful where the tail says the page is full."""
        if self._words[_MAGIC_WORD] != _MAGIC or self._words[_START_WORD] != start:
            self.close()
            raise CorruptData(f"{path} does not hold the checksums of {format_lsn(start)}")

    @classmethod
    def create(cls, directory: Path, start: Lsn) -> Self:
        """Make the sidecar of an empty segment."""
        path = sidecar_path(directory, start)
        scratch = path.with_suffix(".crc.new")
        header = struct.pack("=QQ", _MAGIC, start)
        with scratch.open("wb") as file:
            file.write(header.ljust(_SIDECAR_BYTES, b"\0"))
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        return cls(path, start, writable=True)

    @property
    def tail(self) -> Tail:
        """The current tail, both halves of one moment. Nonsense if the file is damaged."""
        word = self._words[_TAIL_WORD]
        return Tail(word >> 32, word & 0xFFFFFFFF)

    @tail.setter
    def tail(self, tail: Tail) -> None:
        self._words[_TAIL_WORD] = tail.filled_bytes << 32 | tail.crc

    def sync(self) -> None:
        """Make it durable."""
        self._map.flush()

    def close(self) -> None:
        """Unmap."""
        for view in (self.crcs, self._words, self._bytes):
            view.release()
        self._map.close()


class SegmentFile:
    """A segment file being written, by the one owner of the log.

    Invariant: `sidecar.tail.filled_bytes <= filled_bytes <= _written_bytes`: the first counts what
    is durable, the bytes past the last are zeros, written as such up to `_zeroed_bytes`.
    """

    def __init__(self, path: Path, start: Lsn, sidecar: Sidecar) -> None:
        self.path = path
        self.start = start
        self.sidecar = sidecar
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.filled_bytes, self._crc = sidecar.tail
        self._written_bytes = self._zeroed_bytes = self.filled_bytes

    @classmethod
    def create(cls, directory: Path, timeline: Timeline, start: Lsn) -> Self:
        """Make an empty segment, its room reserved: appending to it changes no file metadata.

        OSError if there is no room; then nothing of it is left but a checksum file.
        """
        path = directory / wal_file_name(timeline, start)
        scratch = path.with_suffix(".new")
        sidecar = Sidecar.create(directory, start)
        try:
            descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, WAL_SEGMENT_BYTES)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            scratch.replace(path)
            sync_directory(directory)
        except OSError:
            scratch.unlink(missing_ok=True)
            sidecar.close()
            raise
        return cls(path, start, sidecar)

    @classmethod
    def open(cls, path: Path, start: Lsn) -> Self:
        """Open an existing file. A missing or foreign sidecar becomes one that proves nothing."""
        try:
            sidecar = Sidecar(sidecar_path(path.parent, start), start, writable=True)
        except (FileNotFoundError, CorruptData):
            sidecar = Sidecar.create(path.parent, start)
        if sidecar.tail.filled_bytes > WAL_SEGMENT_BYTES:
            sidecar.tail = Tail(0, 0)
        file = cls(path, start, sidecar)
        if os.fstat(file._descriptor).st_size < WAL_SEGMENT_BYTES:
            os.posix_fallocate(file._descriptor, 0, WAL_SEGMENT_BYTES)
        return file

    @property
    def end(self) -> Lsn:
        """Where the next byte goes."""
        return Lsn(self.start + self.filled_bytes)

    def read_all(self) -> bytes:
        """The whole file, unverified."""
        data = os.pread(self._descriptor, WAL_SEGMENT_BYTES, 0)
        return data.ljust(WAL_SEGMENT_BYTES, b"\0")

    def write(self, data: bytes) -> None:
        """Append bytes that fit. They count once `sync` and then `publish` have returned.

        OSError: nothing was appended.
        """
        # Said first: what a write that fails half-way left behind must be known too.
        end = self.filled_bytes + len(data)
        self._written_bytes = max(self._written_bytes, end)
        _write_all(self._descriptor, data, self.filled_bytes)
        if end > self._zeroed_bytes and len(data) < ZEROS_AHEAD_BYTES:
            ahead = -end % ZEROS_AHEAD_BYTES
            with suppress(OSError):  # it reads as zeros in any case
                os.pwrite(self._descriptor, bytes(ahead), end)
            self._zeroed_bytes = end + ahead
        self._absorb(data)

    def _absorb(self, data: bytes) -> None:
        """Take bytes that are in the file into the checksums."""
        filled, crc, offset = self.filled_bytes, self._crc, 0
        if filled % PAGE_BYTES + len(data) < PAGE_BYTES:  # as most commits do
            self.filled_bytes, self._crc = filled + len(data), extend(crc, data)
            return
        while offset < len(data):
            piece = data[offset : offset + PAGE_BYTES - filled % PAGE_BYTES]
            crc = extend(crc, piece)
            offset += len(piece)
            filled += len(piece)
            if filled % PAGE_BYTES == 0:
                # Not looked at by anyone before the tail says that this page is full.
                self.sidecar.crcs[filled // PAGE_BYTES - 1] = crc
                crc = 0
        self.filled_bytes, self._crc = filled, crc

    def sync(self) -> None:
        """Make the written bytes durable."""
        os.fdatasync(self._descriptor)

    def publish(self) -> None:
        """Count the synced bytes as held. OSError: they are not."""
        sidecar, filled_bytes = self.sidecar, self.filled_bytes
        if filled_bytes < WAL_SEGMENT_BYTES:
            sidecar.tail = Tail(filled_bytes, self._crc)
            return
        before = sidecar.tail
        sidecar.tail = Tail(filled_bytes, self._crc)
        try:
            sidecar.sync()
        except OSError:
            sidecar.tail = before
            raise

    def mark(self) -> Tail:
        """Where writing stands, for `reset`."""
        return Tail(self.filled_bytes, self._crc)

    def reset(self, mark: Tail) -> None:
        """Forget what was written since `mark`; the next bytes overwrite it."""
        self.filled_bytes, self._crc = mark

    def settle(self, data: bytes, sound_bytes: int, filled_bytes: int) -> None:
        """Make the file and its sidecar say `filled_bytes`, now that it is known. Durable.

        `data` is the whole file. Checksums of the pages below `sound_bytes` stay as they are, those
        of the others are made from `data`; every byte past `filled_bytes` becomes zero.
        """
        self._written_bytes = len(data.rstrip(b"\0"))
        filled_bytes = max(0, min(filled_bytes, WAL_SEGMENT_BYTES))
        first = max(0, min(sound_bytes, filled_bytes - filled_bytes % PAGE_BYTES))
        known = filled_bytes == self.filled_bytes and sound_bytes >= first
        if known and self._written_bytes <= filled_bytes:
            return
        self.filled_bytes, self._crc = first, 0
        self._absorb(data[first:filled_bytes])
        self.sidecar.tail = self.mark()
        self._zero_rest()

    def cut(self, filled_bytes: int) -> None:
        """Discard everything from `filled_bytes` on. Durable; does nothing if there is nothing."""
        if self._written_bytes <= filled_bytes:
            return
        number, kept_bytes = divmod(filled_bytes, PAGE_BYTES)
        page = os.pread(self._descriptor, PAGE_BYTES, number * PAGE_BYTES)
        crc = value(page[:kept_bytes])
        if kept_bytes and not page_is_sound(page, number, self.sidecar.crcs, self.sidecar.tail):
            crc ^= 0xFFFFFFFF  # a page that was damaged before must not look sound after
        self.filled_bytes, self._crc = filled_bytes, crc
        self.sidecar.tail = Tail(self.filled_bytes, self._crc)
        self._zero_rest()

    def _zero_rest(self) -> None:
        zeros = bytes(max(0, self._written_bytes - self.filled_bytes))
        _write_all(self._descriptor, zeros, self.filled_bytes)
        os.fdatasync(self._descriptor)
        self.sidecar.sync()
        self._written_bytes = self.filled_bytes

    def remove(self) -> None:
        """Close it and delete it with its checksums. The directory is not synced yet."""
        self.close()
        self.path.unlink()
        sidecar_path(self.path.parent, self.start).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file and unmap its checksums."""
        os.close(self._descriptor)
        self.sidecar.close()
