"""Where the log ends: what of its last segment files can be proven after a stop of any kind.

Pure. Three witnesses: the sidecar's page checksums (never ahead of the synced bytes, so after a
kill they say exactly what was acknowledged), the checksums of the WAL records themselves (which
speak for bytes a stale sidecar does not know of, after a power failure), and order: appends go to
the end, so what a stop tore is at the end, and a page that does not match *before* one that does
was damaged.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from boreal.types import PAGE_BYTES, Lsn
from storage_node.segment_file import SEGMENT_PAGES, Tail, page_is_sound

_PAGE_HEADER = struct.Struct("<HHIQI")
_LONG_HEADER_BYTES = 40
_FIRST_IS_CONTRECORD = 0x0001

LastRecordEnd = Callable[[bytes, Lsn], Lsn | None]
"""boreal.wal.last_record_end"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentImage:
    """One segment file as it lies on disk."""

    start: Lsn
    data: bytes
    """All 16 MiB."""
    crcs: Sequence[int]
    tail: Tail


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvenTail:
    """What is to be kept of the last segment files."""

    end: Lsn
    """The log ends here: the SCL."""
    sound: Lsn
    """A page start: the checksums below it stay, those from it on are to be made from the bytes."""
    torn: bool
    """Bytes that a sidecar counted could not be proven and are given up."""
    damaged: tuple[Lsn, ...]
    """Pages below `end` that do not match their checksums and never will be served."""


def prove_tail(images: Sequence[SegmentImage], last_record_end: LastRecordEnd) -> ProvenTail:
    """Judge the last segment files, one or more, contiguous, oldest first."""
    origin = images[0].start
    verdicts = _verdicts(images)
    sound_pages = len(verdicts)
    while sound_pages and not verdicts[sound_pages - 1]:
        sound_pages -= 1
    torn = sound_pages < len(verdicts)
    damaged = [number for number, sound in enumerate(verdicts[:sound_pages]) if not sound]
    end = origin + sound_pages * PAGE_BYTES if torn else _counted_end(images)
    sound_page = (end - origin) // PAGE_BYTES

    data = b"".join(image.data for image in images)
    if len(data.rstrip(b"\0")) > end - origin:
        anchor = _page_with_record_start(data, sound_page, set(damaged))
        if anchor is not None:
            start = anchor * PAGE_BYTES
            end = max(end, last_record_end(data[start:], Lsn(origin + start)) or end)
    return ProvenTail(
        end=Lsn(end),
        sound=Lsn(origin + sound_page * PAGE_BYTES),
        torn=torn,
        damaged=tuple(Lsn(origin + number * PAGE_BYTES) for number in damaged),
    )


def _verdicts(images: Sequence[SegmentImage]) -> list[bool]:
    """For each page, up to the last one any sidecar counts: does it match its checksum?"""
    counted = max((n for n, image in enumerate(images) if image.tail.filled_bytes), default=-1)
    verdicts: list[bool] = []
    for n, image in enumerate(images[: counted + 1]):
        # A segment is only begun when the one before is full: there, uncounted pages are damage.
        pages = SEGMENT_PAGES if n < counted else -(-image.tail.filled_bytes // PAGE_BYTES)
        for number in range(pages):
            at = number * PAGE_BYTES
            whole = n == counted or at + PAGE_BYTES <= image.tail.filled_bytes
            page = image.data[at : at + PAGE_BYTES]
            verdicts.append(whole and page_is_sound(page, number, image.crcs, image.tail))
    return verdicts


def _counted_end(images: Sequence[SegmentImage]) -> int:
    """Where the sidecars say the log ends."""
    return max(
        (image.start + image.tail.filled_bytes for image in images if image.tail.filled_bytes),
        default=images[0].start,
    )


def _page_with_record_start(data: bytes, page: int, damaged: set[int]) -> int | None:
    """The nearest page at or before `page` from which records can be followed.

    A record may only be believed if its beginning is looked at too: `page` itself will do only if
    it begins with a record; a page before it is sound and will do if some record begins in it.
    None if the record that runs into `page` began before `data`, or in a damaged page.
    """
    for number in range(page, -1, -1):
        if number in damaged:
            return None
        magic, info, _, _, remaining = _PAGE_HEADER.unpack_from(data, number * PAGE_BYTES)
        continued = info & _FIRST_IS_CONTRECORD
        if magic and (
            not continued or (number < page and remaining < PAGE_BYTES - _LONG_HEADER_BYTES)
        ):
            return number
    return None
