"""The offline check of a log: every page, every record, and whose they are."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from boreal.errors import CorruptData, CorruptWal, IngestStopped
from boreal.quorum import Lineage, TimelineStart
from boreal.types import PAGE_BYTES, WAL_SEGMENT_BYTES, Lsn, Timeline, format_lsn
from boreal.wal import WalDecoder
from storage_node.check_report import Report
from storage_node.log import find_segments
from storage_node.segment_file import Sidecar, Tail, page_is_sound, sidecar_path

_CHUNK_PAGES = 64
_JUDGED_AT_START = 2
"""Of the last segments the checksums are made anew from the records at every start of the node."""
_PAGE_START = struct.Struct("<HHIQ")
"""xlp_magic, xlp_info, xlp_tli, xlp_pageaddr (access/xlog_internal.h)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedLog:
    """What there is of a log."""

    start: Lsn
    end: Lsn
    """The first byte that no checksum counts."""
    records: array[int]
    """Where each whole record begins, ascending."""
    whole: bool
    """Whether `records` are all there are: no damage interrupted the decoding."""


def check_log(
    directory: Path, start: Lsn, vdl: Lsn, lineage: Lineage, report: Report
) -> CheckedLog:
    """Check the log kept from `start` on, which the writers of `lineage` wrote, durable to `vdl`.

    Each page against its checksum, its place and its timeline; the records from `start` to the end
    without a break, each with its CRC and its link to the one before. After a damage the records
    are taken up again at the next page that is sound.
    """
    segments = {at: path for at, path in find_segments(directory).items() if at >= start}
    if not segments and vdl <= start:
        return CheckedLog(start=start, end=start, records=array("Q"), whole=True)
    last = max(segments, default=start)
    records = _Records(start, report)
    end = start
    for at in range(start, last + 1, WAL_SEGMENT_BYTES):
        path = segments.get(Lsn(at))
        if path is None:
            report.damage(
                f"the log file of {format_lsn(at)} is missing", _take_from_peer(Lsn(at), "file")
            )
            records.interrupt(Lsn(at + WAL_SEGMENT_BYTES))
            continue
        segment = _Segment(path, Lsn(at), lineage.timelines(), report)
        healed = at > last - _JUDGED_AT_START * WAL_SEGMENT_BYTES
        filled = segment.check(records, healed=healed)
        if filled:
            if end < at:
                report.damage(
                    f"the log ends at {format_lsn(end)} and goes on at {format_lsn(at)}",
                    _take_from_peer(Lsn(at - WAL_SEGMENT_BYTES), "file and its .crc"),
                )
                records.interrupt(Lsn(at))
            end = Lsn(at + filled)
    return CheckedLog(start=start, end=end, records=records.starts, whole=not records.interrupted)


def _take_from_peer(segment: Lsn, what: str) -> str:
    return (
        f"copy the {what} of segment {format_lsn(segment)} from log/ of the same volume of a "
        "stopped peer: the log is the same, byte for byte. Until then the peers serve it"
    )


class _Segment:
    """One segment file."""

    def __init__(
        self, path: Path, start: Lsn, timelines: Sequence[TimelineStart], report: Report
    ) -> None:
        self._path = path
        self._start = start
        self._timelines = timelines
        self._report = report

    def check(self, records: _Records, *, healed: bool) -> int:
        """Check it and hand its bytes to `records`; how far the file is filled."""
        try:
            sidecar = Sidecar(
                sidecar_path(self._path.parent, self._start), self._start, writable=False
            )
        except (FileNotFoundError, CorruptData) as error:
            remedy = "start the node: it proves the end of its log by the records themselves"
            self._report.damage(
                f"{self._path.name} has no checksums: {error}",
                remedy if healed else _take_from_peer(self._start, ".crc file"),
            )
            records.interrupt(Lsn(self._start + WAL_SEGMENT_BYTES))
            return WAL_SEGMENT_BYTES
        try:
            return self._check_pages(sidecar.crcs, sidecar.tail, records)
        finally:
            sidecar.close()

    def _check_pages(self, crcs: Sequence[int], tail: Tail, records: _Records) -> int:
        filled = min(tail.filled_bytes, WAL_SEGMENT_BYTES)
        with self._path.open("rb") as file:
            for first in range(0, filled, _CHUNK_PAGES * PAGE_BYTES):
                chunk = file.read(min(_CHUNK_PAGES * PAGE_BYTES, filled - first))
                self._check_chunk(chunk, first, crcs, tail, records)
                self._report.count("log pages", -(-len(chunk) // PAGE_BYTES), size_bytes=len(chunk))
                missing = min(_CHUNK_PAGES * PAGE_BYTES, filled - first) - len(chunk)
                if missing:
                    self._report.damage(
                        f"{self._path.name} ends {missing} bytes before what was acknowledged",
                        _take_from_peer(self._start, "file"),
                    )
                    records.interrupt(Lsn(self._start + WAL_SEGMENT_BYTES))
                    break
        return filled

    def _check_chunk(
        self, chunk: bytes, first: int, crcs: Sequence[int], tail: Tail, records: _Records
    ) -> None:
        sound_from = 0
        for offset in range(0, len(chunk), PAGE_BYTES):
            page = chunk[offset : offset + PAGE_BYTES]
            lsn = Lsn(self._start + first + offset)
            what = self._page_damage(page, lsn, crcs, tail)
            if what:
                self._report.damage(
                    f"the log page at {format_lsn(lsn)} ({self._path.name}) {what}",
                    _take_from_peer(self._start, "file and its .crc"),
                )
                records.feed(chunk[sound_from:offset])
                records.interrupt(Lsn(lsn + PAGE_BYTES))
                sound_from = offset + PAGE_BYTES
        records.feed(chunk[sound_from:])

    def _page_damage(self, page: bytes, lsn: Lsn, crcs: Sequence[int], tail: Tail) -> str:
        """What is wrong with a page; empty if nothing is."""
        number = (lsn - self._start) // PAGE_BYTES
        if not page_is_sound(page, number, crcs, tail):
            return "does not match its checksum"
        if len(page) < _PAGE_START.size:
            return ""
        magic, _, timeline, address = _PAGE_START.unpack_from(page)
        if not magic and not address:
            return ""  # PostgreSQL leaves zeros behind an XLOG_SWITCH
        if address != lsn:
            return f"says that it is that of {format_lsn(address)}"
        if timeline != self._timeline_at(lsn):
            return f"is of timeline {timeline}; by the lineage it is of {self._timeline_at(lsn)}"
        return ""

    def _timeline_at(self, lsn: Lsn) -> Timeline:
        return max(t.timeline for t in self._timelines if t.start <= lsn or t.timeline == 1)


class _Records:
    """Decodes what is sound of the log; after an interruption it begins anew."""

    def __init__(self, start: Lsn, report: Report) -> None:
        self._report = report
        self._next = start
        self._decoder: WalDecoder | None = WalDecoder(start)
        self.starts = array("Q")
        self.interrupted = False

    def interrupt(self, at: Lsn) -> None:
        """The next bytes to come are those from the page `at` on."""
        self._next = at
        self._decoder = WalDecoder(at)
        self.interrupted = True

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        self._next = Lsn(self._next + len(data))
        if self._decoder is None:
            # Behind a record that is wrong: any page will do to begin at.
            self._decoder = WalDecoder(Lsn(self._next - len(data)))
        try:
            before = len(self.starts)
            self.starts.extend(record.start for record in self._decoder.feed(data))
            self._report.count("records", len(self.starts) - before)
        except (CorruptWal, IngestStopped) as error:
            self._report.damage(
                f"the log does not decode, though its pages match their checksums: {error.message}",
                "run `boreal verify` on the running cluster and compare with a peer's log by "
                "pg_waldump: if the peers hold the same bytes, PostgreSQL wrote them so",
            )
            self._decoder = None
            self.interrupted = True
