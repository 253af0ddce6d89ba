"""A segment's promises on disk: they hold over any stop, and a full disk acknowledges nothing."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from google_crc32c import value

from boreal.errors import (
    CorruptData,
    DiskFull,
    LineageNotAdopted,
    MalformedRequest,
    OversizeRequest,
    StaleEpoch,
    UnknownVolume,
    VolumeMismatch,
)
from boreal.quorum import Lineage
from boreal.types import PAGE_BYTES, WAL_SEGMENT_BYTES, Epoch, Lsn, NodeName, VolumeId
from storage_node.config import StorageConfig
from storage_node.segment import Segment, VolumeFacts, read_state
from storage_node.shared_state import SharedState
from storage_node.volumes import Volumes
from tests.storage_node.segment_kit import change, log_file, new_segment, reopened

START = Lsn(7 * WAL_SEGMENT_BYTES)
FACTS = VolumeFacts(system_identifier=42, start=START)


@pytest.fixture
def segment(tmp_path: Path) -> Segment:
    return new_segment(tmp_path, START)


def put(segment: Segment, data: bytes, epoch: int = 1) -> None:
    segment.stage(epoch, segment.state.scl, data, 0)
    segment.flush()


def test_a_promise_survives_a_kill(segment: Segment) -> None:
    segment.fence(Epoch(5))
    again = reopened(segment)
    assert again.state.promised == 5
    with pytest.raises(StaleEpoch) as caught:
        again.fence(Epoch(4))
    assert caught.value.details == {"promised_epoch": 5}
    with pytest.raises(StaleEpoch):
        again.stage(1, START, b"x", 0)
    with pytest.raises(LineageNotAdopted):
        again.stage(5, START, b"x", 0)


def test_an_adopted_lineage_survives_with_its_cut(segment: Segment) -> None:
    put(segment, bytes(1000))
    lineage = Lineage.of([(1, START), (5, START + 600)])
    with pytest.raises(MalformedRequest):
        segment.adopt(Epoch(6), lineage)
    segment.adopt(Epoch(5), lineage)
    put(segment, b"n" * 10, epoch=5)
    again = reopened(segment)
    assert again.state.lineage == lineage
    assert again.state.scl == START + 610
    assert again.reader.read(START, again.state.scl) == bytes(600) + b"n" * 10


def test_the_vdl_is_told_to_the_page_process(segment: Segment) -> None:
    segment.stage(1, START, bytes(100), START + 40)
    segment.flush()
    shared = SharedState(segment.layout.shared)
    assert (shared.start, shared.scl, shared.vdl) == (START, START + 100, START + 40)
    assert shared.promised == 1
    segment.stage(1, START + 100, b"", START + 100)
    segment.flush()
    assert shared.vdl == START + 100
    assert not segment.behind
    segment.stage(1, START + 100, b"", START + 300)
    segment.flush()
    assert shared.vdl == START + 100
    assert segment.behind
    shared.close()


def test_the_page_process_can_tell_why_it_stopped(segment: Segment) -> None:
    shared = SharedState(segment.layout.shared)
    assert segment.failure == ""
    shared.failure = "met a record it must not pass " + "é" * 1000
    assert segment.failure.startswith("met a record")
    shared.failure = ""
    assert segment.failure == ""
    shared.close()


def test_a_damaged_state_is_not_believed(segment: Segment) -> None:
    data = segment.layout.state.read_bytes()
    change(segment.layout.state, len(data) - 5, bytes([data[-5] ^ 1]))
    with pytest.raises(CorruptData):
        reopened(segment)


def test_an_append_has_a_limit(segment: Segment) -> None:
    with pytest.raises(OversizeRequest):
        segment.stage(1, START, bytes(1024 * 1024 + 1), 0)


@contextmanager
def files_limited_to(size_bytes: int) -> Iterator[None]:
    """No file may grow past it: what a full disk is to an append."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_without_room_nothing_is_acknowledged_and_with_room_it_goes_on(segment: Segment) -> None:
    with files_limited_to(1 << 20), pytest.raises(DiskFull):
        put(segment, bytes(100))
    assert segment.state.scl == START
    last = WAL_SEGMENT_BYTES - 10
    for at in range(0, last, 1 << 20):
        put(segment, bytes(min(1 << 20, last - at)))
    with files_limited_to(WAL_SEGMENT_BYTES - 1):
        segment.stage(1, segment.state.scl, b"a" * 5, 0)  # this one has room
        with pytest.raises(DiskFull):
            segment.stage(1, START + last + 5, b"b" * 5 + bytes(100), 0)
        assert segment.flush() == START + last + 5
    assert reopened(segment).state.scl == START + last + 5
    put(segment, b"b" * 5 + bytes(100))
    end = Lsn(START + WAL_SEGMENT_BYTES + 100)
    assert segment.reader.read(Lsn(START + last), end) == b"a" * 5 + b"b" * 5 + bytes(100)
    assert reopened(segment).state.scl == end


def written_by(epoch: int, start: int, end: int) -> bytes:
    """Bytes that tell writers apart, zero where a WAL page header lies; no record can be found."""
    return bytes(
        0 if lsn % PAGE_BYTES < 24 else epoch * 37 + lsn % 11 & 255 for lsn in range(start, end)
    )


def test_zeros_written_ahead_are_no_log(segment: Segment) -> None:
    """Small appends over several stretches of zeros, a large one, and a cut among them."""

    def put_bytes(size_bytes: int, epoch: int) -> bytes:
        at = segment.state.scl
        data = written_by(epoch, at, at + size_bytes)
        put(segment, data, epoch)
        return data

    expected = b"".join(put_bytes(size, 1) for size in [5_000] * 60 + [200_000] + [7_001] * 30)
    assert log_file(segment, START).read_bytes() == expected.ljust(WAL_SEGMENT_BYTES, b"\0")
    assert segment.state.scl == reopened(segment).state.scl == START + len(expected)

    kept = len(expected) - 150_000
    segment.fence(Epoch(2))
    segment.adopt(Epoch(2), segment.state.lineage.extended(Epoch(2), Lsn(START + kept)))
    expected = expected[:kept] + put_bytes(5_000, 2)
    assert log_file(segment, START).read_bytes() == expected.ljust(WAL_SEGMENT_BYTES, b"\0")
    assert reopened(segment).state.scl == START + len(expected)


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_appends_kills_and_new_writers(segment: Segment, seed: int) -> None:
    """Against a model: a byte string, the part of it that was acknowledged, and the lineage."""
    choose = random.Random(seed)
    model = bytearray(WAL_SEGMENT_BYTES - 60_000)
    for at in range(0, len(model), 1 << 20):
        put(segment, bytes(min(1 << 20, len(model) - at)))
    lineage = segment.state.lineage
    for _ in range(40):
        end, epoch = START + len(model), lineage.last.epoch
        step = choose.choice(("append", "append", "append", "unacknowledged", "kill", "writer"))
        size = choose.choice((1, 100, 5_000, 30_000))
        if step == "append":
            model += written_by(epoch, end, end + size)
            put(segment, written_by(epoch, end, end + size), epoch)
        elif step == "unacknowledged":
            segment.stage(epoch, end, written_by(epoch, end, end + size), 0)
            segment = reopened(segment)
        elif step == "kill":
            segment = reopened(segment)
        else:
            cut = Lsn(max(lineage.last.start, end - choose.choice((0, 3, 8_192, 40_000))))
            lineage = lineage.extended(Epoch(epoch + 1), cut)
            segment.fence(lineage.last.epoch)
            segment.adopt(lineage.last.epoch, lineage)
            del model[cut - START :]
        assert segment.state.scl == START + len(model)
        assert segment.state.lineage == lineage
        tail = Lsn(START + WAL_SEGMENT_BYTES - 120_000)
        kept = segment.reader.read(tail, segment.state.scl)
        assert kept == bytes(model[tail - START :])


@pytest.fixture
def config(tmp_path: Path) -> StorageConfig:
    return StorageConfig(
        name=NodeName("sn-1"),
        zone="a",
        data_dir=tmp_path,
        host="127.0.0.1",
        control="127.0.0.1:1",
        log_port=1,
        frames_port=2,
        pages_port=3,
        page_frames_port=4,
    )


def test_volumes_are_made_once_found_again_and_dropped(config: StorageConfig) -> None:
    volumes = Volumes(config)
    volume = VolumeId("v-1")
    made = volumes.create(volume, Epoch(1), FACTS)
    assert volumes.create(volume, Epoch(1), FACTS) is made
    with pytest.raises(VolumeMismatch):
        volumes.create(volume, Epoch(1), VolumeFacts(system_identifier=43, start=START))
    made.fence(Epoch(3))
    volumes.close()

    volumes = Volumes(config)
    assert volumes.find("v-1").state.promised == 3
    with pytest.raises(StaleEpoch):
        volumes.drop(volume, Epoch(2))
    assert volumes.drop(volume, Epoch(3)) is not None
    assert volumes.drop(volume, Epoch(3)) is None
    with pytest.raises(UnknownVolume):
        volumes.find("v-1")
    assert not list(Volumes(config))
    assert not list(config.volumes_dir.iterdir())


@pytest.mark.parametrize("missing", ["vdl", "lineage", "system_identifier"])
def test_a_state_of_another_version_is_read_or_refused(segment: Segment, missing: str) -> None:
    fields = json.loads(segment.layout.state.read_bytes()[9:])

    def write(content: dict[str, object]) -> None:
        body = json.dumps(content).encode()
        segment.layout.state.write_bytes(b"%08x %s\n" % (value(body), body))

    write({**fields, "materialize": False})
    assert read_state(segment.layout.state).kept_from == START
    del fields[missing]
    write(fields)
    with pytest.raises(CorruptData, match=missing):
        read_state(segment.layout.state)


@pytest.mark.parametrize("name", ["", "..", "a/b", ".new-x", "x" * 64, "a\0b"])
def test_a_volume_id_is_a_plain_name(config: StorageConfig, name: str) -> None:
    with pytest.raises(MalformedRequest):
        Volumes(config).create(VolumeId(name), Epoch(1), FACTS)


def test_one_broken_volume_does_not_hide_the_others(config: StorageConfig) -> None:
    volumes = Volumes(config)
    for name in ("good", "bad"):
        volumes.create(VolumeId(name), Epoch(1), FACTS)
    volumes.close()
    config.volume(VolumeId("bad")).state.write_bytes(b"garbage")
    volumes = Volumes(config)
    assert volumes.find("good").state.scl == START
    with pytest.raises(CorruptData):
        volumes.find("bad")


@pytest.mark.parametrize("start", [0, 1, WAL_SEGMENT_BYTES + 8192])
def test_a_log_starts_at_a_wal_segment(config: StorageConfig, start: int) -> None:
    facts = VolumeFacts(system_identifier=1, start=Lsn(start))
    with pytest.raises(MalformedRequest):
        Volumes(config).create(VolumeId("v"), Epoch(1), facts)


# --- silence -----------------------------------------------------------------------------------


def test_silence_counts_from_the_last_word_of_a_writer(tmp_path: Path) -> None:
    now = [100.0]
    layout = new_segment(tmp_path, START).layout
    segment = Segment(layout, clock=lambda: now[0])
    now[0] = 103.0
    assert segment.writer_silent_s == 3.0  # before, it may have been heard by another process
    segment.heard_writer(with_data=False, pgmrpl=0)
    now[0] = 104.5
    assert segment.writer_silent_s == 1.5
    segment.fence(Epoch(5))
    with pytest.raises(StaleEpoch):
        segment.stage(1, START, b"", 0)
    assert segment.writer_silent_s == 1.5
