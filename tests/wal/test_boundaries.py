"""Goal: an LSN is only ever rounded to a record's end: the last one, wherever one is in reach.

Method: against WalDecoder, over windows of a real log at every LSN and along random advances
(hypothesis), and over logs built by hand: switches, records of many pages and segments, records
given up, at every split of a header.
"""

from __future__ import annotations

from bisect import bisect_right

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from boreal.errors import CorruptWal
from boreal.types import PAGE_BYTES, WAL_SEGMENT_BYTES, Lsn
from boreal.wal import Rmgr, WalDecoder, XlogInfo
from boreal.wal.boundaries import RecordEnds
from boreal.wal.stream import RecordStream
from tests.support.exercised import exercised_log
from tests.support.wal_builder import WalBuilder, body

_PAGES = 40
_quietly = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Log:
    """Some log that begins at a record's end, and where its records end."""

    def __init__(self, start: Lsn, data: bytes) -> None:
        self.start, self.data = start, data
        self.ends = [start, *(raw.end for raw in RecordStream(start).feed(data))]
        self.read_bytes = 0

    @property
    def limit(self) -> Lsn:
        return Lsn(self.start + len(self.data))

    def read(self, start: Lsn, end: Lsn) -> bytes:
        assert self.start <= start < end <= self.limit
        self.read_bytes += end - start
        return self.data[start - self.start : end - self.start]

    def end_before(self, lsn: int) -> Lsn:
        return self.ends[bisect_right(self.ends, lsn) - 1]


@pytest.fixture(scope="module")
def real() -> Log:
    """Around a new timeline: page images next to small records; then one of 100 kB."""
    log = exercised_log()
    begin = log.switch - log.switch % PAGE_BYTES - 10 * PAGE_BYTES
    decoder = WalDecoder(Lsn(begin))
    data = log.bytes_at(begin, min(_PAGES * PAGE_BYTES, log.end - begin))
    first = next(decoder.feed(data)).end
    return Log(first, data[first - begin :])


def test_every_lsn_is_rounded_to_the_end_before_it(real: Log) -> None:
    for lsn in range(real.start, real.limit, 8):
        assert RecordEnds(real.start).at_most(Lsn(lsn), real.read) == real.end_before(lsn)


@_quietly
@given(steps=st.lists(st.integers(0, 5 * PAGE_BYTES), max_size=60))
def test_as_the_log_grows(real: Log, steps: list[int]) -> None:
    ends, lsn = RecordEnds(real.start), int(real.start)
    for step in steps:
        lsn = min(lsn + step, real.limit)
        assert ends.at_most(Lsn(lsn), real.read) == real.end_before(lsn)


def test_an_lsn_below_one_that_was_rounded_changes_nothing(real: Log) -> None:
    ends = RecordEnds(real.start)
    last = ends.at_most(real.limit, real.read)
    assert ends.at_most(real.start, real.read) == last == real.ends[-1]


def test_only_the_last_page_is_looked_at(real: Log) -> None:
    real.read_bytes = 0
    end = real.ends[len(real.ends) // 3]
    assert RecordEnds(real.start).at_most(end, real.read) == end
    assert real.read_bytes <= PAGE_BYTES


# --- built by hand -----------------------------------------------------------------------------


def _check_at_once(log: WalBuilder) -> Log:
    """At each LSN, from the beginning and from each of the last ends."""
    known = Log(log.start, bytes(log.data))
    for limit in range(known.start, known.limit + 1, 8):
        expected = known.end_before(limit)
        for start in {known.start, *known.ends[-4:]}:
            if start <= limit:
                assert RecordEnds(start).at_most(Lsn(limit), known.read) == expected
    return known


def _check_everywhere(log: WalBuilder) -> None:
    known = _check_at_once(log)
    ends = RecordEnds(known.start)
    for limit in range(known.start, known.limit + 1, 8):
        assert ends.at_most(Lsn(limit), known.read) == known.end_before(limit)


@pytest.mark.parametrize("room", range(0, 64, 8))
def test_a_record_begins_near_the_end_of_a_page(room: int) -> None:
    log = WalBuilder()
    log.fill_page(room)
    log.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"next"))
    log.add(Rmgr.LOGICALMSG, 0, body(bytes(3 * PAGE_BYTES)))
    log.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"last"))
    _check_everywhere(log)


@pytest.mark.parametrize("room", range(0, 64, 8))
def test_a_switch_counts_with_its_whole_segment(room: int) -> None:
    log = WalBuilder()
    log.fill_page(room)
    log.add(Rmgr.XLOG, XlogInfo.SWITCH, b"")
    log.fill_segment()
    log.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"next"))
    known = Log(log.start, bytes(log.data))
    limits = [
        *range(log.start, log.start + 2 * PAGE_BYTES, 8),
        *range(log.start + WAL_SEGMENT_BYTES - 64, known.limit + 1, 8),
    ]
    ends = RecordEnds(log.start)
    for limit in map(Lsn, limits):
        assert ends.at_most(limit, known.read) == known.end_before(limit)
        if not 0 < limit % WAL_SEGMENT_BYTES < 40:  # else only a whole segment before would tell
            assert RecordEnds(log.start).at_most(limit, known.read) == known.end_before(limit)


@pytest.mark.parametrize("length", [100, 1000, 40_000])
def test_a_record_that_was_given_up_has_no_end(length: int) -> None:
    log = WalBuilder()
    log.fill_page(48)
    abandoned = log.abandon(length)
    log.add(Rmgr.XLOG, XlogInfo.OVERWRITE_CONTRECORD, body(abandoned.to_bytes(8, "little")))
    log.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"next"))
    known = _check_at_once(log)
    # Who saw its beginning waits for its end, and passes over what would have been before that.
    ends = RecordEnds(known.start)
    for limit in range(known.start, known.limit + 1, 8):
        assert ends.at_most(Lsn(limit), known.read) in known.ends
    log.add(Rmgr.LOGICALMSG, 0, body(bytes(length)))
    known = Log(log.start, bytes(log.data))
    assert ends.at_most(known.limit, known.read) == known.limit


@pytest.mark.parametrize(
    "length", [8152 - 29, 8152 - 28, 8152, 20_000, 700_000, WAL_SEGMENT_BYTES + 100_000]
)
def test_a_long_record_is_passed_without_looking_into_it(length: int) -> None:
    log = WalBuilder()
    log.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"first"))
    _, before = log.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"before"))
    _, after = log.add(Rmgr.LOGICALMSG, 0, body(bytes(length)))
    known = Log(log.start, bytes(log.data))
    ends = RecordEnds(log.start)
    assert ends.at_most(before, known.read) == before
    assert ends.at_most(Lsn((before + after) // 2), known.read) == before
    known.read_bytes = 0
    for limit in range(after - 80, after, 8):
        assert ends.at_most(Lsn(limit), known.read) == before
    assert known.read_bytes == 0
    assert ends.at_most(after, known.read) == after
    assert known.read_bytes <= PAGE_BYTES


def test_what_fills_more_than_a_segment_leaves_an_earlier_end() -> None:
    log = WalBuilder()
    for _ in range(3):
        log.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"small"))
    log.add(Rmgr.LOGICALMSG, 0, body(bytes(2 * WAL_SEGMENT_BYTES)))
    known = Log(log.start, bytes(log.data))
    within = Lsn(log.start + WAL_SEGMENT_BYTES + 50 * PAGE_BYTES)
    assert RecordEnds(log.start).at_most(within, known.read) == log.start
    assert RecordEnds(log.start).at_most(known.limit, known.read) == known.limit


@_quietly
@given(
    lengths=st.lists(st.one_of(st.integers(1, 300), st.integers(7000, 30_000)), min_size=1),
    data=st.data(),
)
def test_any_lengths_and_any_advances(lengths: list[int], data: st.DataObject) -> None:
    log = WalBuilder(WAL_SEGMENT_BYTES)
    for length in lengths:
        log.add(Rmgr.LOGICALMSG, 0, body(bytes(length)))
    known = Log(log.start, bytes(log.data))
    limits = sorted(data.draw(st.lists(st.integers(log.start, known.limit), max_size=40)))
    ends = RecordEnds(log.start)
    for limit in limits:
        assert ends.at_most(Lsn(limit), known.read) == known.end_before(limit)


# --- what is no log ----------------------------------------------------------------------------


def test_bytes_that_are_no_log_are_refused() -> None:
    log = WalBuilder()
    for _ in range(1000):
        log.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"x" * 20))
    good = bytes(log.data)
    for damage in (b"\0" * 8, b"\xff" * 8):
        for lsn in (PAGE_BYTES, 2 * PAGE_BYTES + 24):
            bad = Log(log.start, good)
            bad.data = good[:lsn] + damage + good[lsn + 8 :]
            ends = RecordEnds(log.start)
            for limit in range(log.start, log.start + lsn, 512):
                assert ends.at_most(Lsn(limit), bad.read) in bad.ends
            with pytest.raises(CorruptWal):
                ends.at_most(Lsn(log.start + lsn + 512), bad.read)
