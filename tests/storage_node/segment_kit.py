"""A segment on a directory of its own, and a log the engine wrote to put into it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from boreal.quorum import Lineage
from boreal.types import WAL_SEGMENT_BYTES, Epoch, Lsn, wal_segment_start
from storage_node.config import VolumeLayout
from storage_node.segment import Segment, VolumeFacts
from tests.support.exercised import exercised_log


@dataclass(frozen=True, kw_only=True)
class Wal:
    """Whole segments and the beginning of another, with a change of timeline in it."""

    start: Lsn
    switch: Lsn
    end: Lsn
    data: bytes
    record_ends: tuple[Lsn, ...]

    def at(self, start: int, end: int) -> bytes:
        return self.data[start - self.start : end - self.start]

    @property
    def first(self) -> Lineage:
        """The history before the change of timeline."""
        return Lineage.of([(1, self.start)])

    @property
    def second(self) -> Lineage:
        return Lineage.of([(1, self.start), (2, self.switch)])


@cache
def engine_wal() -> Wal:
    """The end of the exercised log: two segments of the first timeline, then the switch."""
    log = exercised_log()
    start = Lsn(wal_segment_start(log.switch) - 2 * WAL_SEGMENT_BYTES)
    return Wal(
        start=start,
        switch=log.switch,
        end=log.end,
        data=log.bytes_at(start, log.end - start),
        record_ends=tuple(record.end for record in log.records if record.start >= start),
    )


def new_segment(home: Path, start: Lsn) -> Segment:
    """An empty segment of epoch 1."""
    return Segment.create(
        VolumeLayout(root=home / "vol-1"),
        Epoch(1),
        VolumeFacts(system_identifier=42, start=start),
    )


def append(segment: Segment, wal: Wal, end: int, *, epoch: int = 1, step: int = 1 << 20) -> None:
    """Append the log up to `end` in pieces of `step`, each made durable."""
    while (at := segment.state.scl) < end:
        segment.stage(epoch, at, wal.at(at, min(end, at + step)), at)
        segment.flush()


def reopened(segment: Segment) -> Segment:
    """What a new process finds after a kill -9: nothing was closed, nothing flushed."""
    return Segment(segment.layout)


def log_file(segment: Segment, lsn: int) -> Path:
    """The file that holds an LSN."""
    number = lsn // WAL_SEGMENT_BYTES
    (path,) = segment.layout.log.glob(f"????????{number >> 8:08X}{number & 255:08X}")
    return path


def sidecar_file(segment: Segment, lsn: int) -> Path:
    number = lsn // WAL_SEGMENT_BYTES
    return segment.layout.log / f"{number >> 8:08X}{number & 255:08X}.crc"


def change(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
