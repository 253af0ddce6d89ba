"""A volume's log on disk: written by one owner (`VolumeLog`), read by anyone (`LogReader`).

The log is a directory of WAL segment files (storage_node.segment_file) that PostgreSQL's own tools
read. A file's name carries the newest timeline that begins before the segment's end, as
PostgreSQL's do: there a new timeline's first file starts as a copy of the old one's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import structlog

from boreal.errors import BelowLogStart, BeyondLog, CorruptData, CorruptWal
from boreal.quorum import TimelineStart
from boreal.types import PAGE_BYTES, WAL_SEGMENT_BYTES, Lsn, Timeline, format_lsn, wal_segment_start
from boreal.wal import last_record_end
from storage_node.config import VolumeLayout
from storage_node.disk import sync_directory
from storage_node.segment_file import (
    SEGMENT_PAGES,
    SegmentFile,
    Sidecar,
    page_is_sound,
    segment_suffix,
    sidecar_path,
)
from storage_node.shared_state import SharedState
from storage_node.tail import SegmentImage, prove_tail

_WAL_FILE = re.compile(r"[0-9A-F]{24}")
_SIDECAR = re.compile(r"[0-9A-F]{16}\.crc")
_SEGMENTS_PER_ID = 0x1_0000_0000 // WAL_SEGMENT_BYTES
_CACHED_PAGES = 1024
_OPEN_SEGMENTS = 16
_BULK_PAGES = 8
"""Longer reads go past the cache: they are of log that is read once."""
_READ_ATTEMPTS = 3

_log = structlog.get_logger(__name__)


def timeline_of(timelines: Sequence[TimelineStart], start: Lsn) -> Timeline:
    """The timeline that names the segment file which begins at `start`."""
    end = start + WAL_SEGMENT_BYTES
    return max(timeline for timeline, begins in timelines if begins < end or timeline == 1)


def find_segments(directory: Path) -> dict[Lsn, Path]:
    """The segment files in a log directory by their first byte, ascending."""
    found = {}
    for path in directory.iterdir():
        if _WAL_FILE.fullmatch(path.name):
            found[_start_of(path.name[8:])] = path
    return dict(sorted(found.items()))


def _start_of(suffix: str) -> Lsn:
    """Where the segment begins that segment_suffix names so."""
    number = int(suffix[:8], 16) * _SEGMENTS_PER_ID + int(suffix[8:16], 16)
    return Lsn(number * WAL_SEGMENT_BYTES)


def _remove_below(directory: Path, start: Lsn) -> None:
    """Finish what a crash left of `VolumeLog.forget_below`."""
    found = [path for at, path in find_segments(directory).items() if at < start]
    found += [
        path
        for path in directory.iterdir()
        if _SIDECAR.fullmatch(path.name) and _start_of(path.name) < start
    ]
    for path in found:
        path.unlink()
    if found:
        sync_directory(directory)
        _log.info("log removed that was dropped before", files=len(found), start=format_lsn(start))


class VolumeLog:
    """The log's one writer. Synchronous: a call returns when the disk has answered.

    Invariant: `end` is the first byte that is not durable, `written >= end` the first one not
    written; in the files there are zeros past whatever was ever written.
    """

    def __init__(self, directory: Path, start: Lsn, timelines: Sequence[TimelineStart]) -> None:
        """Open the log of [start, ...); what cannot be proven at its end is cut off.

        `start` is a WAL segment's. Files below it are removed.
        """
        self._directory = directory
        self._timelines = tuple(timelines)
        _remove_below(directory, start)
        self._paths = find_segments(directory)
        self._files: dict[Lsn, SegmentFile] = {}
        """Open for writing: what was written since the last sync, and the file it ended in."""
        self.damaged: tuple[Lsn, ...] = ()
        """Pages found damaged at open."""
        self.end = self.written = start
        if self._paths:
            self._judge_tail()
        self.rename(timelines)

    def write(self, data: bytes) -> None:
        """Append bytes; durable after `sync`. OSError, e.g. without room: nothing was appended."""
        begin = wal_segment_start(self.written)
        end = self.written + len(data)
        file = self._files.get(begin)
        if file is None or end - begin > WAL_SEGMENT_BYTES:
            self._write_across(begin, Lsn(end), data)
        else:
            file.write(data)
        self.written = Lsn(end)

    def _write_across(self, begin: Lsn, end: Lsn, data: bytes) -> None:
        """Write bytes that need files which are not open, or more than one."""
        # Room first: a write that can be refused is refused before any of it is done.
        files = [self._writable(Lsn(at)) for at in range(begin, end, WAL_SEGMENT_BYTES)]
        marks = [file.mark() for file in files]
        offset = 0
        try:
            for file in files:
                piece = data[offset : offset + WAL_SEGMENT_BYTES - file.filled_bytes]
                file.write(piece)
                offset += len(piece)
        except OSError:
            for file, mark in zip(files, marks, strict=True):
                file.reset(mark)
            raise

    def sync(self) -> None:
        """Make everything written durable. OSError: none of it is, and all of it is forgotten."""
        if self.written == self.end:
            return
        several = len(self._files) > 1
        files = [self._files[at] for at in sorted(self._files)] if several else self._files.values()
        try:
            for file in files:
                file.sync()
            for file in files:
                file.publish()
        except OSError:
            for file in files:
                file.reset(file.sidecar.tail)
            self.written = self.end
            raise
        self.end = self.written
        if several:
            self._close_full()

    def _close_full(self) -> None:
        for start in sorted(self._files)[:-1]:
            self._files.pop(start).close()

    def cut(self, end: Lsn) -> None:
        """Discard every byte from `end` on, also those written and never synced. Durable."""
        removed = [at for at in self._paths if at >= end]
        for start in sorted(removed, reverse=True):
            self._writable(start).remove()
            del self._files[start], self._paths[start]
        if removed:
            sync_directory(self._directory)
        last = wal_segment_start(end)
        if last in self._paths:
            self._writable(last).cut(end - last)
        self.end = self.written = end

    def forget_below(self, start: Lsn) -> list[Path]:
        """Let go of the segments that end at or below `start`; return their files.

        The caller deletes those, in its own time; the next open does it if that was interrupted.
        """
        files = []
        for at in [at for at in self._paths if at < start]:
            files += [self._paths.pop(at), sidecar_path(self._directory, at)]
            if at in self._files:
                self._files.pop(at).close()
        return files

    def rename(self, timelines: Sequence[TimelineStart]) -> None:
        """Name the files by this history. Heals at the next open if interrupted."""
        self._timelines = tuple(timelines)
        before = dict(self._paths)
        for start, path in before.items():
            name = f"{timeline_of(timelines, start):08X}{segment_suffix(start)}"
            if name == path.name:
                continue
            self._paths[start] = path.rename(path.with_name(name))
            if start in self._files:
                self._files[start].path = self._paths[start]
        if before != self._paths:
            sync_directory(self._directory)

    def close(self) -> None:
        """Make the checksums durable too, and close the files."""
        for file in self._files.values():
            file.sidecar.sync()
            file.close()
        self._files.clear()

    def _writable(self, start: Lsn) -> SegmentFile:
        file = self._files.get(start)
        if file is None:
            path = self._paths.get(start)
            if path is None:
                file = SegmentFile.create(
                    self._directory, timeline_of(self._timelines, start), start
                )
                self._paths[start] = file.path
            else:
                file = SegmentFile.open(path, start)
            self._files[start] = file
        return file

    def _judge_tail(self) -> None:
        last = max(self._paths)
        judged = [at for at in (Lsn(last - WAL_SEGMENT_BYTES), last) if at in self._paths]
        images = [_image(self._writable(at)) for at in judged]
        proven = prove_tail(images, last_record_end)
        for image in images:
            if image.start < proven.end:
                self._files[image.start].settle(
                    image.data, proven.sound - image.start, proven.end - image.start
                )
        self.cut(proven.end)
        self.damaged = proven.damaged
        if proven.torn or proven.damaged:
            _log.error(
                "the log did not match its checksums",
                directory=str(self._directory),
                kept_up_to=format_lsn(proven.end),
                torn=proven.torn,
                damaged=[format_lsn(lsn) for lsn in proven.damaged],
            )


def _image(file: SegmentFile) -> SegmentImage:
    return SegmentImage(
        start=file.start,
        data=file.read_all(),
        crcs=file.sidecar.crcs,
        tail=file.sidecar.tail,
    )


class _ReadSegment:
    """A segment file open for reading, with its checksums."""

    def __init__(self, path: Path, start: Lsn) -> None:
        self.start = start
        self.sidecar = Sidecar(sidecar_path(path.parent, start), start, writable=False)
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self.sidecar.close()
            raise

    def pages(self, first: int, count: int) -> list[bytes]:
        """Verified pages, the last one as far as it is filled. CorruptWal names the bad one."""
        # The tail before the bytes: what it counts does not change any more, short of a cut.
        tail = self.sidecar.tail
        data = os.pread(self.descriptor, count * PAGE_BYTES, first * PAGE_BYTES)
        pages = []
        for number in range(first, first + count):
            at = (number - first) * PAGE_BYTES
            filled = tail.filled_bytes - number * PAGE_BYTES
            page = data[at : at + min(PAGE_BYTES, max(filled, 0))]
            if filled <= 0 or not page_is_sound(page, number, self.sidecar.crcs, tail):
                lsn = self.start + number * PAGE_BYTES
                raise CorruptWal(
                    f"the log page at {format_lsn(lsn)} does not match its checksum; it is not "
                    "served. Read it from another storage node",
                    lsn=lsn,
                )
            pages.append(page)
        return pages

    def close(self) -> None:
        os.close(self.descriptor)
        self.sidecar.close()


class LogReader:
    """Reads a volume's log, every byte checked, in any process. One thread at a time.

    What it returns was in the log, whole, at one moment between call and return. It keeps the most
    recent pages and a few open files, so that small reads are cheap.
    """

    def __init__(self, volume_dir: Path) -> None:
        """`volume_dir` is `<data-dir>/volumes/<volume id>`."""
        layout = VolumeLayout(root=volume_dir)
        self._directory = layout.log
        self._shared = SharedState(layout.shared)
        self._generation = self._shared.generation
        self._start = self._shared.start
        self._segments: dict[Lsn, _ReadSegment] = {}
        self._pages: dict[int, bytes] = {}
        """Full pages, by number since LSN 0: they only change when the log is cut."""

    def read(self, start: Lsn, end: Lsn) -> bytes:
        """The bytes [start, end).

        BelowLogStart or BeyondLog outside the log (BeyondLog also while it is being cut: ask
        again); CorruptWal if they don't match their checksums, then they are never returned.
        """
        shared = self._shared
        page = self._pages.get(start // PAGE_BYTES)
        if page is not None:
            # As most records are read: out of a page that was checked before. The generation last:
            # if no cut has been completed by then, what `scl` said of these bytes was true.
            skip = start % PAGE_BYTES
            stop = skip + end - start
            if (
                skip < stop <= PAGE_BYTES
                and end <= shared.scl
                and start >= self._start == shared.start
                and shared.generation == self._generation
            ):
                return page[skip:stop]
        for _ in range(_READ_ATTEMPTS):
            generation = self._shared.generation
            self.release_dropped()
            self._check_bounds(start, end)
            if generation != self._generation:
                self._forget(generation)
            try:
                data = self._read(start, end)
            except CorruptData:
                self._check_bounds(start, end)  # it may have been dropped meanwhile
                if generation % 2 == 0 and generation == self._shared.generation:
                    raise
                continue
            if generation == self._shared.generation:
                return data
        raise BeyondLog("the log is being cut; ask again", scl=self._shared.scl)

    def release_dropped(self) -> None:
        """Close the files of log that is dropped: until then they take up room on the disk."""
        start = self._shared.start
        if start != self._start:
            self._start = start
            for at in [at for at in self._segments if at < start]:
                self._segments.pop(at).close()

    def close(self) -> None:
        """Close the files."""
        self._forget(self._generation)
        self._shared.close()

    def _check_bounds(self, start: Lsn, end: Lsn) -> None:
        if start < self._shared.start:
            raise BelowLogStart(
                f"the log begins at {format_lsn(self._shared.start)}, not at {format_lsn(start)}",
                start_lsn=self._shared.start,
            )
        if end > self._shared.scl:
            raise BeyondLog(
                f"the log is complete to {format_lsn(self._shared.scl)}, not to {format_lsn(end)}",
                scl=self._shared.scl,
            )

    def _forget(self, generation: int) -> None:
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()
        self._pages.clear()
        self._generation = generation

    def _read(self, start: Lsn, end: Lsn) -> bytes:
        if start >= end:
            return b""
        first, last = start // PAGE_BYTES, (end - 1) // PAGE_BYTES
        if last - first < _BULK_PAGES:
            pages = [self._page(number) for number in range(first, last + 1)]
        else:
            pages = self._bulk(first, last)
        skip = start - first * PAGE_BYTES
        data = (
            pages[0][skip : skip + end - start]
            if len(pages) == 1
            else b"".join(pages)[skip : skip + end - start]
        )
        if len(data) != end - start:
            raise CorruptWal(f"the checksums count less of the log than {format_lsn(end)}", lsn=end)
        return data

    def _page(self, number: int) -> bytes:
        page = self._pages.get(number)
        if page is None:
            segment = self._segment(number * PAGE_BYTES)
            (page,) = segment.pages(number % SEGMENT_PAGES, 1)
            if len(page) == PAGE_BYTES:
                while len(self._pages) >= _CACHED_PAGES:
                    del self._pages[next(iter(self._pages))]
                self._pages[number] = page
        return page

    def _bulk(self, first: int, last: int) -> list[bytes]:
        pages: list[bytes] = []
        while first <= last:
            segment = self._segment(first * PAGE_BYTES)
            count = min(last + 1 - first, SEGMENT_PAGES - first % SEGMENT_PAGES)
            pages += segment.pages(first % SEGMENT_PAGES, count)
            first += count
        return pages

    def _segment(self, lsn: int) -> _ReadSegment:
        start = wal_segment_start(lsn)
        segment = self._segments.get(start)
        if segment is None:
            path = find_segments(self._directory).get(start)
            if path is None:
                raise CorruptWal(f"the log file of {format_lsn(start)} is missing", lsn=start)
            while len(self._segments) >= _OPEN_SEGMENTS:
                self._segments.pop(next(iter(self._segments))).close()
            try:
                segment = self._segments[start] = _ReadSegment(path, start)
            except (CorruptData, FileNotFoundError) as error:
                raise CorruptWal(
                    f"the log at {format_lsn(start)} lacks its checksums: {error}", lsn=start
                ) from error
        return segment
