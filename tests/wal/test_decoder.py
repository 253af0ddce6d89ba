"""Goal: whatever way the bytes arrive, and whatever became of them, no wrong record comes out.

Method: windows of a real log cut at random (hypothesis), with flipped bits, and ended at every
offset; logs built by hand for what the stock engine does not write on demand.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from boreal.errors import CorruptWal, IngestStopped, NotMaterializable
from boreal.types import PAGE_BYTES, WAL_SEGMENT_BYTES, Fork, Lsn, RelationFork
from boreal.wal import Rmgr, WalDecoder, WalRecord, XlogInfo, last_record_end, read_record
from boreal.wal.stream import RecordStream
from tests.support.exercised import ExercisedLog, exercised_log
from tests.support.wal_builder import WalBuilder, body

_WINDOW_PAGES = 20
_quietly = settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Window:
    """Some pages of the real log, busy with records of all sizes."""

    def __init__(self, log: ExercisedLog, start: Lsn) -> None:
        self.start = start
        self.data = log.bytes_at(start, _WINDOW_PAGES * PAGE_BYTES)
        self.records = list(WalDecoder(start).feed(self.data))
        self.record_bytes = list(self._record_bytes())

    def _record_bytes(self) -> Iterable[int]:
        """Offsets of bytes of complete records: no page headers, no alignment.

        Without the last two pages: a record whose length grew is found out on the next page.
        """
        for raw in RecordStream(self.start).feed(self.data):
            if raw.end > self.start + (_WINDOW_PAGES - 2) * PAGE_BYTES:
                return
            left, at = len(raw.raw), raw.start
            while left:
                take = min(left, PAGE_BYTES - at % PAGE_BYTES)
                yield from range(at - self.start, at - self.start + take)
                left -= take
                at = Lsn(at + take + 24)


@pytest.fixture(scope="module")
def window() -> Window:
    log = exercised_log()
    # Around the new timeline: after a checkpoint, so page images stand next to small records.
    found = Window(log, Lsn(log.switch - log.switch % PAGE_BYTES - 3 * PAGE_BYTES))
    lengths = [record.end - record.start for record in found.records]
    assert len(lengths) > 200
    assert sum(length > PAGE_BYTES // 2 for length in lengths) > 5
    return found


def _fed(start: Lsn, chunks: Iterable[bytes]) -> list[WalRecord]:
    decoder = WalDecoder(start)
    return [record for chunk in chunks for record in decoder.feed(chunk)]


# --- chunks --------------------------------------------------------------------------------------


@_quietly
@given(cuts=st.lists(st.integers(0, _WINDOW_PAGES * PAGE_BYTES), max_size=60))
def test_chunks_do_not_matter(window: Window, cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), len(window.data)]
    chunks = [window.data[start:end] for start, end in pairwise(bounds)]
    assert _fed(window.start, chunks) == window.records


def test_byte_by_byte(window: Window) -> None:
    data = window.data[: 3 * PAGE_BYTES]
    expected = list(WalDecoder(window.start).feed(data))
    assert _fed(window.start, (data[n : n + 1] for n in range(len(data)))) == expected


def test_the_position_is_the_end_of_the_last_record_handed_out(window: Window) -> None:
    decoder = WalDecoder(window.start)
    assert decoder.position == window.start
    for record in decoder.feed(window.data):
        assert decoder.position == record.end


def test_records_not_yet_taken_from_an_iterator_come_with_the_next(window: Window) -> None:
    decoder = WalDecoder(window.start)
    half = len(window.data) // 2
    first = next(decoder.feed(window.data[:half]))
    assert [first, *decoder.feed(window.data[half:])] == window.records


def test_decoding_may_begin_at_any_page_and_at_any_record(window: Window) -> None:
    for page in range(_WINDOW_PAGES):
        offset = page * PAGE_BYTES
        start = Lsn(window.start + offset)
        expected = [record for record in window.records if record.start >= start]
        assert list(WalDecoder(start).feed(window.data[offset:])) == expected
    for number, record in list(enumerate(window.records))[::9]:
        for start in (record.start, record.end):
            rest = window.records[number + (start == record.end) :]
            assert list(WalDecoder(start).feed(window.data[start - window.start :])) == rest


# --- damage --------------------------------------------------------------------------------------


def _flip(data: bytes, offset: int, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[offset] ^= 1 << bit
    return bytes(damaged)


def _until_error(decoder: WalDecoder, data: bytes) -> tuple[list[WalRecord], CorruptWal | None]:
    good: list[WalRecord] = []
    try:
        for record in decoder.feed(data):
            good.append(record)  # noqa: PERF402 - those before the error count
    except CorruptWal as error:
        return good, error
    return good, None


@_quietly
@given(data=st.data(), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_record_is_found(window: Window, data: st.DataObject, bit: int) -> None:
    offset = data.draw(st.sampled_from(window.record_bytes))
    decoder = WalDecoder(window.start)
    good, error = _until_error(decoder, _flip(window.data, offset, bit))
    assert error is not None
    # Nothing of the damaged record came out, and nothing before it was lost.
    assert good == [record for record in window.records if record.end <= window.start + offset]
    assert decoder.position == (good[-1].end if good else window.start)


@_quietly
@given(offset=st.integers(0, _WINDOW_PAGES * PAGE_BYTES - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_changes_no_record(window: Window, offset: int, bit: int) -> None:
    good, _ = _until_error(WalDecoder(window.start), _flip(window.data, offset, bit))
    assert good == window.records[: len(good)]


@pytest.mark.parametrize("rmgr", [77, 130])
def test_after_an_error_there_is_no_going_on(rmgr: int) -> None:
    log = WalBuilder()
    log.add(rmgr, 0x00, body(b"bad"))
    bad = bytes(log.data)
    log.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"good"))
    decoder = WalDecoder(log.start)
    for data in (bad, bytes(log.data)[len(bad) :]):
        with pytest.raises((CorruptWal, IngestStopped), match=str(rmgr)):
            list(decoder.feed(data))
    assert decoder.position == log.start


def test_another_systems_segment_is_refused() -> None:
    ours, theirs = WalBuilder(system=1), WalBuilder(Lsn(2 * WAL_SEGMENT_BYTES), system=2)
    ours.add(Rmgr.XLOG, XlogInfo.SWITCH, b"")
    ours.fill_segment()
    theirs.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"x"))
    with pytest.raises(CorruptWal, match="another system"):
        _fed(ours.start, (bytes(ours.data), bytes(theirs.data)))


def test_a_timeline_never_goes_back() -> None:
    log = WalBuilder()
    log.timeline = 3
    log.add(Rmgr.LOGICALMSG, 0, body(bytes(9000)))
    log.timeline = 2
    log.add(Rmgr.LOGICALMSG, 0, body(bytes(9000)))
    with pytest.raises(CorruptWal, match="wrong header"):
        _fed(log.start, [bytes(log.data)])


def test_a_wrong_backward_link_is_found() -> None:
    log = WalBuilder()
    log.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"1"))
    start, _ = log.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"2"))
    log.data[-len(log.record(0, 0x20, body(b"2"))) - 5 :] = b""
    log._prev = Lsn(start + 8)
    bad = log.record(Rmgr.XLOG, XlogInfo.NOOP, body(b"2"))
    with pytest.raises(CorruptWal, match="links back"):
        _fed(log.start, [bytes(log.data) + bad + bytes(8)])


def test_a_custom_resource_manager_stops_ingest_but_not_recovery() -> None:
    log = WalBuilder()
    log.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"1"))
    start, end = log.add(130, 0x00, body(b"custom"))
    with pytest.raises(IngestStopped, match="130") as error:
        _fed(log.start, [bytes(log.data)])
    assert error.value.details == {"lsn": start}
    assert last_record_end(bytes(log.data), log.start) == end


# --- the end of a log ----------------------------------------------------------------------------


def test_a_log_that_ends_anywhere_ends_at_its_last_whole_record(window: Window) -> None:
    ends = [record.end for record in window.records]
    at_ends = (end - window.start for end in ends)
    for length in (*range(2 * PAGE_BYTES, 5 * PAGE_BYTES, 13), *at_ends):
        expected = max((end for end in ends if end - window.start <= length), default=None)
        found = last_record_end(window.data[:length], window.start)
        assert found == expected, length


@_quietly
@given(
    length=st.integers(0, _WINDOW_PAGES * PAGE_BYTES),
    junk=st.one_of(st.binary(max_size=9000), st.just(bytes(3 * PAGE_BYTES))),
)
@example(length=0, junk=bytes(64))
def test_junk_after_a_torn_write_does_not_count(window: Window, length: int, junk: bytes) -> None:
    torn = last_record_end(window.data[:length], window.start)
    # Junk may happen to be the very bytes that were torn off, up to a record's end: zeros are.
    whole = last_record_end(window.data, window.start)
    found = last_record_end(window.data[:length] + junk, window.start)
    same = window.data[length : length + len(junk)] == junk
    assert found == torn or found in {record.end for record in window.records}
    assert found is None or whole is None or found <= whole or same


def test_an_empty_log_proves_nothing() -> None:
    assert last_record_end(b"", Lsn(WAL_SEGMENT_BYTES)) is None
    assert last_record_end(bytes(PAGE_BYTES), Lsn(WAL_SEGMENT_BYTES)) is None


def test_a_page_on_which_no_record_continues_proves_its_own_start() -> None:
    log = WalBuilder()
    log.fill_page(0)
    assert log.end % PAGE_BYTES == 0
    boundary = log.end
    log.add(Rmgr.LOGICALMSG, 0, body(b"next"))
    tail = bytes(log.data[boundary - log.start :])
    assert last_record_end(tail[:30], boundary) == boundary
    assert last_record_end(tail, boundary) == log.end


def test_only_a_page_start_will_do() -> None:
    with pytest.raises(ValueError, match="WAL page"):
        last_record_end(b"", Lsn(WAL_SEGMENT_BYTES + 8))


def test_a_segment_switch_is_complete_with_its_segment() -> None:
    log = WalBuilder()
    _, before = log.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"1"))
    switch, record_end = log.add(Rmgr.XLOG, XlogInfo.SWITCH, b"")
    log.fill_segment()
    boundary = log.end
    log.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"2"))
    data = bytes(log.data)
    assert last_record_end(data[: record_end - log.start], log.start) == before
    assert last_record_end(data[: boundary - log.start - 1], log.start) == before
    assert last_record_end(data[: boundary - log.start], log.start) == boundary
    decoder = WalDecoder(log.start)
    ends = [
        record.end
        for offset in range(0, len(data), 100_000)
        for record in decoder.feed(data[offset : offset + 100_000])
    ]
    assert ends == [before, boundary, log.end]
    assert read_record(_reader(log), switch, boundary).info == XlogInfo.SWITCH


# --- records that break off ----------------------------------------------------------------------

_OVERWRITE = struct.Struct("<Qq")


def test_an_abandoned_record_is_passed_over() -> None:
    log = WalBuilder()
    log.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"1"))
    gone = log.abandon(30_000)
    page = log.end - log.end % PAGE_BYTES
    log.add(Rmgr.XLOG, XlogInfo.OVERWRITE_CONTRECORD, body(_OVERWRITE.pack(gone, 0)))
    log.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"2"))
    kinds = [record.info for record in _fed(log.start, [bytes(log.data)])]
    assert kinds == [XlogInfo.NOOP, XlogInfo.OVERWRITE_CONTRECORD, XlogInfo.NOOP]
    # Also for who begins at that page, knowing nothing of the record.
    tail = bytes(log.data[page - log.start :])
    assert len(_fed(Lsn(page), [tail])) == 2
    assert last_record_end(tail[:24], Lsn(page)) is None


@pytest.mark.parametrize("confirmation", ["another record", "another position"])
def test_an_abandoned_record_must_be_confirmed(confirmation: str) -> None:
    log = WalBuilder()
    gone = log.abandon(30_000)
    if confirmation == "another record":
        log.add(Rmgr.XLOG, XlogInfo.NOOP, body(_OVERWRITE.pack(gone, 0)))
    else:
        log.add(Rmgr.XLOG, XlogInfo.OVERWRITE_CONTRECORD, body(_OVERWRITE.pack(gone + 8, 0)))
    with pytest.raises(CorruptWal, match="abandoned"):
        _fed(log.start, [bytes(log.data)])


# --- forms of records ----------------------------------------------------------------------------


@_quietly
@given(st.lists(st.one_of(st.integers(1, 300), st.integers(7000, 40_000)), max_size=40))
def test_records_of_any_size_come_back(sizes: list[int]) -> None:
    log = WalBuilder()
    expected = []
    for number, size in enumerate(sizes):
        main_data = bytes([number % 256]) * size
        start, end = log.add(Rmgr.LOGICALMSG, 0x10, body(main_data), xid=number)
        expected.append((start, end, number, main_data))
    found = _fed(log.start, [bytes(log.data)])
    assert [(r.start, r.end, r.xid, r.main_data) for r in found] == expected


@pytest.mark.parametrize("room", range(0, 64, 8))
def test_a_record_may_begin_in_the_last_bytes_of_a_page(room: int) -> None:
    log = WalBuilder()
    log.fill_page(room)
    start, end = log.add(Rmgr.LOGICALMSG, 0, body(b"across"))
    record = _fed(log.start, [bytes(log.data)])[-1]
    assert (record.start, record.end, record.main_data) == (start, end, b"across")
    assert start % PAGE_BYTES == (PAGE_BYTES - room if room else 24)


_LOCATOR = struct.pack("<III", 1663, 5, 16384)


def _decode_one(payload: bytes) -> WalRecord:
    log = WalBuilder()
    log.add(Rmgr.HEAP, 0x00, payload)
    (record,) = _fed(log.start, [bytes(log.data)])
    return record


def _block_header(block: int, flags: int, data: int, rest: bytes) -> bytes:
    return struct.pack("<BBH", block, flags, data) + rest


def test_block_references() -> None:
    hole = struct.pack("<HHB", PAGE_BYTES - 8000, 100, 0x01)
    headers = (
        _block_header(0, 0x20 | 0x40, 3, _LOCATOR + struct.pack("<I", 7))
        + _block_header(1, 0x80 | Fork.VM, 0, struct.pack("<I", 0))
        + _block_header(4, 0x80 | 0x10 | 0x20, 2, hole + struct.pack("<I", 9))
    )
    image = b"h" * 100 + b"t" * 92
    record = _decode_one(body(b"main", headers, b"abc" + image + b"xy"))
    first, second, third = record.blocks
    main = RelationFork(1663, 5, 16384, Fork.MAIN)
    assert (first.page, first.will_init, first.data, first.has_image) == (
        (main, 7),
        True,
        b"abc",
        False,
    )
    assert (second.page, second.will_init, second.has_data) == (
        (main._replace(fork=Fork.VM), 0),
        False,
        False,
    )
    # SAME_REL names the relation of the block before; its fork is its own.
    assert (third.id, third.page, third.data, third.apply_image) == (4, (main, 9), b"xy", False)
    assert third.restore_image() == b"h" * 100 + bytes(8000) + b"t" * 92
    assert record.main_data == b"main"
    assert record.block(4) is third
    assert record.block(2) is None


def test_origin_and_toplevel_transaction_are_passed_over() -> None:
    extra = b"\xfd" + struct.pack("<H", 1) + b"\xfc" + struct.pack("<I", 800)
    assert _decode_one(body(b"main", extra)).main_data == b"main"
    assert _decode_one(extra).main_data == b""


def test_a_compressed_image_is_refused_when_asked_for() -> None:
    compressed = struct.pack("<HHBH", 50, 100, 0x01 | 0x02 | 0x04, 4000)
    headers = _block_header(0, 0x10, 0, compressed + _LOCATOR + struct.pack("<I", 7))
    (block,) = _decode_one(body(b"", headers, bytes(50))).blocks
    assert block.apply_image
    with pytest.raises(NotMaterializable, match="compressed"):
        block.restore_image()


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(_block_header(0, 0x80, 0, bytes(4)), id="same relation as no block"),
        pytest.param(_block_header(0, 0x20, 0, _LOCATOR + bytes(4)), id="data of no length"),
        pytest.param(_block_header(0, 0x00, 2, _LOCATOR + bytes(6)), id="data not announced"),
        pytest.param(_block_header(0, 0x05, 0, _LOCATOR + bytes(4)), id="no such fork"),
        pytest.param(_block_header(0, 0x00, 0, _LOCATOR + bytes(4)) * 2, id="block twice"),
        pytest.param(_block_header(0, 0x00, 0, _LOCATOR[:8]), id="cut off in a header"),
        pytest.param(b"\x64" + bytes(30), id="unknown part"),
        pytest.param(b"\xff\x09" + bytes(8), id="main data too short"),
        pytest.param(b"\xff\x09" + bytes(10), id="main data too long"),
        pytest.param(
            _block_header(
                0, 0x10, 0, struct.pack("<HHB", 192, 8000, 0x01) + _LOCATOR + bytes(4 + 192)
            ),
            id="hole past the page",
        ),
        pytest.param(
            _block_header(
                0, 0x10, 0, struct.pack("<HHB", 192, 0, 0x00) + _LOCATOR + bytes(4 + 192)
            ),
            id="short image without a hole",
        ),
    ],
)
def test_a_record_that_contradicts_itself_is_corrupt(payload: bytes) -> None:
    with pytest.raises(CorruptWal):
        _decode_one(payload)


def test_an_unknown_builtin_resource_manager_is_corrupt() -> None:
    log = WalBuilder()
    log.add(77, 0x00, body(b"x"))
    with pytest.raises(CorruptWal, match="77"):
        _fed(log.start, [bytes(log.data)])


def test_reading_a_record_where_there_is_none() -> None:
    log = WalBuilder()
    start, _ = log.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"1"))
    _, end = log.add(Rmgr.XLOG, XlogInfo.NOOP, body(b"2"))
    with pytest.raises(CorruptWal, match="no record spans"):
        read_record(_reader(log), start, end)


def _reader(log: WalBuilder) -> _Read:
    return _Read(log)


class _Read:
    """The `read` of a log reader."""

    def __init__(self, log: WalBuilder) -> None:
        self._log = log

    def __call__(self, lsn: Lsn, length: int) -> bytes:
        return bytes(self._log.data[lsn - self._log.start :][:length])
