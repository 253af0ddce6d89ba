"""The log on disk: the engine's bytes, proven after every stop; damage told and not served.

The log is one a stock PostgreSQL wrote. A kill -9 is a second opening of files nobody closed; a
power failure is an older sidecar put back; damage is written into the files.
"""

from __future__ import annotations

import bisect
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from boreal.engine import Account, find_engine
from boreal.errors import BelowLogStart, BeyondLog, CorruptWal, LogGap, MalformedRequest
from boreal.types import PAGE_BYTES, WAL_SEGMENT_BYTES, Lsn, format_lsn
from storage_node.log import LogReader
from storage_node.segment import Segment, check_wal_pages
from tests.storage_node.segment_kit import (
    Wal,
    append,
    change,
    engine_wal,
    log_file,
    new_segment,
    reopened,
    sidecar_file,
)


@pytest.fixture(scope="module")
def wal() -> Wal:
    return engine_wal()


@pytest.fixture
def segment(tmp_path: Path, wal: Wal) -> Segment:
    return new_segment(tmp_path, wal.start)


def last_proven(wal: Wal, sound: int) -> int:
    """Where a log ends whose bytes from `sound` on, a page start, must be proven by records."""
    ends = wal.record_ends
    return max(sound, ends[bisect.bisect_right(ends, sound) - 1])


def assert_serves(segment: Segment, wal: Wal, end: int) -> None:
    """It holds the log up to `end`, and zeros follow."""
    assert segment.state.scl == end
    assert segment.reader.read(wal.start, Lsn(end)) == wal.at(wal.start, end)
    if end % WAL_SEGMENT_BYTES:
        rest = log_file(segment, end).read_bytes()[end % WAL_SEGMENT_BYTES :]
        assert not rest.strip(b"\0")


def test_chunks_of_any_size_make_files_the_engine_reads(
    segment: Segment, wal: Wal, tmp_path: Path
) -> None:
    sizes = random.Random(1)
    for epoch, end in ((1, wal.switch), (2, wal.end)):
        while (at := segment.state.scl) < end:
            size = sizes.choice((1, 8, 700, 8192, 8193, 300_000, 1 << 20))
            segment.stage(epoch, at, wal.at(at, min(end, at + size)), at)
            segment.flush()
        segment.adopt(wal.second.last.epoch, wal.second)
    assert_serves(segment, wal, wal.end)

    engine = replace(find_engine(tmp_path / "engine"), account=Account.current())
    boundary = wal.switch - wal.switch % WAL_SEGMENT_BYTES
    lines = 0
    for timeline, start, stop in ((1, wal.start, boundary), (2, boundary, wal.end)):
        output = engine.run(
            "pg_waldump",
            f"--path={segment.layout.log}",
            f"--timeline={timeline}",
            f"--start={format_lsn(start)}",
            f"--end={format_lsn(stop)}",
        )
        lines += sum(line.startswith("rmgr: ") for line in output.splitlines())
    assert lines in (len(wal.record_ends), len(wal.record_ends) - 1)  # one may cross the boundary


def test_names_follow_the_timeline(segment: Segment, wal: Wal) -> None:
    append(segment, wal, wal.switch)
    assert {path.name[:8] for path in segment.layout.log.glob("?" * 24)} == {"00000001"}
    segment.adopt(wal.second.last.epoch, wal.second)
    append(segment, wal, wal.end, epoch=2)
    assert log_file(segment, wal.switch).name.startswith("00000002")
    assert log_file(segment, wal.start).name.startswith("00000001")
    log_file(segment, wal.switch).rename(  # a crash between the state and the names
        segment.layout.log / log_file(segment, wal.switch).name.replace("00000002", "00000001", 1)
    )
    again = reopened(segment)
    assert log_file(again, wal.switch).name.startswith("00000002")
    assert_serves(again, wal, wal.end)


def test_a_kill_leaves_exactly_what_was_acknowledged(segment: Segment, wal: Wal) -> None:
    for end in (wal.start + 5, wal.start + 70_001, wal.start + WAL_SEGMENT_BYTES, wal.switch - 3):
        append(segment, wal, end)
        segment = reopened(segment)
        assert_serves(segment, wal, Lsn(end))


def test_bytes_that_were_written_and_never_acknowledged_harm_nothing(
    segment: Segment, wal: Wal
) -> None:
    end = Lsn(wal.start + 3 * PAGE_BYTES + 100)
    append(segment, wal, end)
    segment.stage(1, end, wal.at(end, end + 50_000), 0)
    again = reopened(segment)  # killed between the write and the acknowledgement
    assert_serves(again, wal, last_proven(wal, again.state.scl))
    assert again.state.scl >= end

    segment.adopt(wal.second.last.epoch, wal.first.extended(wal.second.last.epoch, end))
    assert_serves(reopened(segment), wal, end)


@pytest.mark.parametrize("synced", [40_000, WAL_SEGMENT_BYTES + 123])
def test_after_a_power_failure_records_prove_what_the_sidecar_does_not_know(
    segment: Segment, wal: Wal, synced: int
) -> None:
    append(segment, wal, wal.start + synced)
    sidecar = sidecar_file(segment, segment.state.scl)
    shutil.copy(sidecar, sidecar.with_suffix(".old"))
    end = wal.start + synced + 1_000_003
    append(segment, wal, end)
    shutil.move(sidecar.with_suffix(".old"), sidecar)
    again = reopened(segment)
    assert end - 200_000 < again.state.scl <= end
    assert again.state.scl in wal.record_ends
    assert_serves(again, wal, again.state.scl)


def test_a_missing_sidecar_is_made_again_from_the_records(segment: Segment, wal: Wal) -> None:
    end = Lsn(wal.start + WAL_SEGMENT_BYTES + 500_000)
    append(segment, wal, end)
    sidecar_file(segment, end).unlink()
    again = reopened(segment)
    assert again.state.scl in wal.record_ends
    assert_serves(again, wal, again.state.scl)


def _truncate(path: Path, kept: int) -> None:
    with path.open("r+b") as file:
        file.truncate(kept)


_TEARS: dict[str, Callable[[Path, int], None]] = {
    "short": _truncate,
    "zeros": lambda path, kept: change(path, kept, bytes(WAL_SEGMENT_BYTES - kept)),
    "garbage": lambda path, kept: change(path, kept, random.Random(2).randbytes(60_000)),
}


@pytest.mark.parametrize("tear", _TEARS.values(), ids=_TEARS.keys())
@pytest.mark.parametrize("lost", [1, 30_000])
def test_a_torn_tail_is_cut_at_the_last_byte_that_is_proven(
    segment: Segment, wal: Wal, tear: Callable[[Path, int], None], lost: int
) -> None:
    end = wal.start + WAL_SEGMENT_BYTES + 300_007
    append(segment, wal, end)
    kept = end - lost
    tear(log_file(segment, kept), kept % WAL_SEGMENT_BYTES)
    again = reopened(segment)
    # Zeros that were cut off may have been zeros: then a little more than `kept` is proven.
    assert last_proven(wal, kept - kept % PAGE_BYTES) <= again.state.scl <= end
    assert_serves(again, wal, again.state.scl)
    append(again, wal, wal.switch)
    assert_serves(again, wal, wal.switch)


@pytest.mark.parametrize("back", [1, 2])
def test_a_flipped_bit_is_told_and_never_served(segment: Segment, wal: Wal, back: int) -> None:
    """In the last file, where it is found at open, and in one that is only read when asked for."""
    end = wal.start + 2 * WAL_SEGMENT_BYTES + 200_000
    append(segment, wal, end)
    lsn = end - 100_000 - (back - 1) * 2 * WAL_SEGMENT_BYTES
    path, offset = log_file(segment, lsn), lsn % WAL_SEGMENT_BYTES
    change(path, offset, bytes([path.read_bytes()[offset] ^ 0x10]))
    again = reopened(segment)
    assert again.state.scl == end
    assert bool(again.failure) == (back == 1)
    page = Lsn(lsn - lsn % PAGE_BYTES)
    for start, stop in ((page, page + 1), (page - 80_000, page + 50_000)):
        with pytest.raises(CorruptWal) as caught:
            again.reader.read(Lsn(start), Lsn(stop))
        assert caught.value.details["lsn"] == page
    assert again.reader.read(wal.start, page) == wal.at(wal.start, page)
    after = Lsn(page + PAGE_BYTES)
    append(again, wal, wal.switch)
    assert again.reader.read(after, wal.switch) == wal.at(after, wal.switch)


def test_a_cut_through_a_damaged_page_does_not_make_it_sound(segment: Segment, wal: Wal) -> None:
    append(segment, wal, wal.start + 100_000)
    change(log_file(segment, wal.start), 50_001, b"\xff")
    cut = Lsn(wal.start + 50_100)
    segment.adopt(wal.second.last.epoch, wal.first.extended(wal.second.last.epoch, cut))
    with pytest.raises(CorruptWal):
        segment.reader.read(Lsn(cut - 10), cut)


@pytest.mark.parametrize("kept", [100_000, WAL_SEGMENT_BYTES, WAL_SEGMENT_BYTES + 9_000])
def test_a_cut_leaves_zeros_and_other_readers_notice(segment: Segment, wal: Wal, kept: int) -> None:
    append(segment, wal, wal.switch)
    reader = LogReader(segment.layout.root)
    cut = Lsn(wal.start + kept)
    assert reader.read(Lsn(cut - 10), Lsn(cut + 10)) == wal.at(cut - 10, cut + 10)
    before = segment.shared.generation
    segment.adopt(wal.second.last.epoch, wal.first.extended(wal.second.last.epoch, cut))
    assert segment.shared.generation > before
    with pytest.raises(BeyondLog):
        reader.read(Lsn(cut - 10), Lsn(cut + 10))
    assert_serves(segment, wal, cut)
    assert_serves(reopened(segment), wal, cut)

    other = bytes(5) + b"other writer"
    segment.stage(2, cut, other[: PAGE_BYTES - cut % PAGE_BYTES], 0) if cut % PAGE_BYTES else None
    segment.flush()
    end = segment.state.scl
    assert reader.read(cut, end) == other[: end - cut]
    reader.close()


def test_reads_stay_within_the_log(segment: Segment, wal: Wal) -> None:
    append(segment, wal, wal.start + 20_000)
    with pytest.raises(BelowLogStart):
        segment.reader.read(Lsn(wal.start - 1), wal.start)
    with pytest.raises(BeyondLog):
        segment.reader.read(wal.start, Lsn(wal.start + 20_001))
    ranges = random.Random(3)
    append(segment, wal, wal.switch)
    for _ in range(300):
        start = ranges.randrange(wal.start, wal.switch)
        end = min(wal.switch, start + ranges.choice((1, 40, 9_000, 200_000)))
        assert segment.reader.read(Lsn(start), Lsn(end)) == wal.at(start, end)


def test_bytes_that_are_not_wal_are_refused(segment: Segment, wal: Wal) -> None:
    append(segment, wal, wal.start + 5_000)
    at = segment.state.scl
    with pytest.raises(MalformedRequest):
        segment.stage(1, at, wal.at(at + PAGE_BYTES, at + 3 * PAGE_BYTES), 0)
    with pytest.raises(MalformedRequest):
        segment.stage(1, at, random.Random(4).randbytes(20_000), 0)
    with pytest.raises(LogGap):
        segment.stage(1, at + 1, b"x", 0)
    segment.flush()
    append(segment, wal, wal.start + 30_000)
    assert_serves(segment, wal, wal.start + 30_000)
    check_wal_pages(Lsn(wal.start + PAGE_BYTES), bytes(3 * PAGE_BYTES))  # behind an XLOG_SWITCH
