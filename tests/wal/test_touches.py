"""Goal: reading which pages a log changes the quick way tells the same as taking records apart.

Method: a real log with nearly every kind of record is read both ways, in chunks of many sizes; then
logs with damage in a record that would be noted.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest

from boreal.errors import CorruptWal
from boreal.pages.visibility import VALID_BITS
from boreal.types import Fork, Lsn
from boreal.wal import HeapInfo, Rmgr, VisibilityCleared, WalDecoder, WalRecord, effects
from boreal.wal.touches import RAW_KEY, TouchDecoder
from tests.support.exercised import ExercisedLog, exercised_log
from tests.support.wal_builder import WalBuilder, body


class Noted:
    """What was noted, one (page, start) at a time."""

    def __init__(self) -> None:
        self.pages: dict[bytes, list[int]] = {}
        self.hot: list[bytes] = []
        self.hot_mask = 31
        self.ends: dict[bytes, int] = {}
        self.clears: list[tuple[bytes, int, int]] = []

    def first(self, key: bytes, end: int) -> None:
        assert key not in self.ends
        self.ends[key] = end

    def cleared(self, key: bytes, start: int, bits: int) -> None:
        self.clears.append((key, start, bits))


@pytest.fixture(scope="module")
def log() -> ExercisedLog:
    return exercised_log()


def _blocks(records: list[WalRecord]) -> Iterator[tuple[bytes, WalRecord]]:
    for record in records:
        for block in record.blocks:
            fork = block.page.relation
            yield RAW_KEY.pack(*fork[:3], block.page.block), record


def _read(data: bytes, start: Lsn, *, chunk: int) -> tuple[Noted, list[WalRecord]]:
    noted = Noted()
    decoder = TouchDecoder(start, noted)
    parsed: list[WalRecord] = []
    for at in range(0, len(data), chunk):
        for record in decoder.feed(data[at : at + chunk]):
            assert decoder.position <= record.start
            parsed.append(record)
            # Everything before the record is noted, nothing of what follows it.
            if noted.pages and len(parsed) % 100 == 0:
                assert max(entries[-1] for entries in noted.pages.values()) < record.start
    return noted, parsed


@pytest.mark.parametrize("chunk", [1000, 32_768])
def test_both_ways_agree(log: ExercisedLog, chunk: int) -> None:
    data = log.data[: log.end - log.start]
    noted, parsed = _read(data, log.start, chunk=chunk)
    starts = {record.start for record in parsed}
    plain = [record for record in log.records if record.start not in starts]
    assert len(plain) > 5_000
    expected: dict[bytes, list[int]] = {}
    ends: dict[bytes, int] = {}
    clears = []
    for key, record in _blocks(plain):
        expected.setdefault(key, []).append(record.start)
        ends.setdefault(key, record.end)
    for record in plain:
        for block in record.blocks:
            assert block.page.relation.fork is Fork.MAIN
            assert not block.has_image
            assert not block.will_init
        for effect in effects(record):
            assert isinstance(effect, VisibilityCleared)
            heap = effect.page.relation
            key = RAW_KEY.pack(*heap[:3], effect.heap_block)
            clears.append((key, record.start, effect.bits))
    assert noted.pages == expected
    assert noted.ends == ends
    assert noted.clears == clears
    for key, entries in noted.pages.items():
        assert noted.hot.count(key) == len(entries) // 32
    assert len(clears) > 10


def test_its_position_is_the_last_records_end(log: ExercisedLog) -> None:
    ends = [record.end for record in log.records]
    chance = random.Random(1)
    decoder = TouchDecoder(log.start, Noted())
    at, number = 0, 0
    while at < 2_000_000:
        step = chance.randrange(1, 20_000)
        for _ in decoder.feed(log.data[at : at + step]):
            pass
        at += step
        while number < len(ends) and ends[number] <= log.start + at:
            number += 1
        assert decoder.position in {ends[number - 1], ends[number - 2]}


def _insert(block: int, flags: int = 0) -> tuple[bytes, bytes]:
    """Main data and block headers of a heap insertion without data."""
    return struct.pack("<HB", 1, flags), struct.pack("<BBHIIII", 0, 0, 0, 1663, 5, 9, block)


def _small_log() -> WalBuilder:
    wal = WalBuilder()
    for number in range(300):
        wal.add(Rmgr.HEAP, HeapInfo.INSERT, body(*_insert(number % 7)))
    return wal


def test_a_flipped_bit_anywhere_is_found_where_the_decoder_finds_it() -> None:
    wal = _small_log()
    chance = random.Random(2)
    for _ in range(200):
        damaged = bytearray(wal.data)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        outcomes = []
        for decoder in (WalDecoder(wal.start), TouchDecoder(wal.start, Noted())):
            lsn = -1
            try:
                for _record in decoder.feed(bytes(damaged)):
                    pass
            except CorruptWal as error:
                lsn = error.details["lsn"]
            outcomes.append((lsn, decoder.position))
        assert outcomes[0] == outcomes[1]


def test_it_does_not_get_past_an_error() -> None:
    wal = _small_log()
    wal.data[4000] ^= 1
    noted = Noted()
    decoder = TouchDecoder(wal.start, noted)
    for _ in range(2):
        with pytest.raises(CorruptWal):
            list(decoder.feed(bytes(wal.data)))
    assert decoder.position <= wal.start + 4000


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_an_insertion_clears_by_its_first_flag_only(flags: int) -> None:
    wal = WalBuilder()
    wal.add(Rmgr.XLOG, 0x20, body(bytes(8)))  # the first record is always parsed
    start, _ = wal.add(Rmgr.HEAP, HeapInfo.INSERT, body(*_insert(4, flags)))
    noted, parsed = _read(bytes(wal.data), wal.start, chunk=8192)
    assert len(parsed) == 1
    cleared = [(RAW_KEY.pack(1663, 5, 9, 4), int(start), VALID_BITS)]
    assert noted.clears == (cleared if flags & 1 else [])
