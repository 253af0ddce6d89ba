"""One segment (replica) of one volume: the pure rules of boreal.quorum over the log on disk.

The one owner of everything in the volume's directory but the pages. Synchronous: the log process
does nothing else but make bytes durable, and a disk that answers in 70 µs is not worth a thread.
"""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

from google_crc32c import value

from boreal.errors import (
    CorruptData,
    DiskFull,
    LogGap,
    MalformedRequest,
    OversizeRequest,
)
from boreal.frames import MAX_APPEND_BYTES
from boreal.histogram import Durations
from boreal.quorum import Accepted, Lineage, SegmentState
from boreal.types import (
    PAGE_BYTES,
    WAL_SEGMENT_BYTES,
    Epoch,
    Lsn,
    format_lsn,
    wal_segment_start,
)
from storage_node.bundles import BundleStore
from storage_node.config import VolumeLayout
from storage_node.disk import disk_error, sync_directory, telling_disk_full, write_durably
from storage_node.log import LogReader, VolumeLog
from storage_node.pressure import Pressure
from storage_node.shared_state import SharedState

_WAL_PAGE_START = struct.Struct("<HHIQ")
"""xlp_magic, xlp_info, xlp_tli, xlp_pageaddr (access/xlog_internal.h)."""
_WAL_PAGE_MAGIC = 0xD113
_MAX_START = 1 << 62
"""No PostgreSQL comes near it, and every position of such a log fits in a signed word."""


def check_wal_pages(at: Lsn, data: bytes) -> None:
    """Raise MalformedRequest unless every WAL page that begins in `data` says it belongs there.

    All-zero headers are right too: PostgreSQL leaves them behind an XLOG_SWITCH
    (CopyXLogRecordToWAL, access/transam/xlog.c).
    """
    first = -at % PAGE_BYTES
    for offset in range(first, len(data) - _WAL_PAGE_START.size + 1, PAGE_BYTES):
        magic, _, _, address = _WAL_PAGE_START.unpack_from(data, offset)
        if magic == _WAL_PAGE_MAGIC and address == at + offset:
            continue
        if magic or address:
            raise MalformedRequest(
                f"the bytes for {format_lsn(at + offset)} are not that WAL page: it has magic "
                f"{magic:#06x} and says it is {format_lsn(address)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeFacts:
    """What is settled about a volume at its creation."""

    system_identifier: int
    start: Lsn
    """Where its log began. What is kept of it may begin later: SegmentState.start."""


class StoredState(NamedTuple):
    """What the state file says. Where the log ends, the log itself says."""

    facts: VolumeFacts
    promised: Epoch
    lineage: Lineage
    kept_from: Lsn
    vdl: Lsn


def _encode_state(facts: VolumeFacts, state: SegmentState) -> bytes:
    body = json.dumps(
        {
            "system_identifier": facts.system_identifier,
            "start": facts.start,
            "kept_from": state.start,
            "promised": state.promised,
            "lineage": state.lineage.entries,
            "vdl": state.vdl,
        }
    ).encode()
    return b"%08x %s\n" % (value(body), body)


def read_state(path: Path) -> StoredState:
    """What a state file says. CorruptData if it cannot be trusted or understood, OSError."""
    crc, _, body = path.read_bytes().rstrip(b"\n").partition(b" ")
    if crc != b"%08x" % value(body):
        raise CorruptData(f"{path} does not match its checksum; rebuild this segment from a peer")
    try:
        fields = json.loads(body)
        return StoredState(
            facts=VolumeFacts(
                system_identifier=fields["system_identifier"], start=Lsn(fields["start"])
            ),
            promised=Epoch(fields["promised"]),
            lineage=Lineage.of(fields["lineage"]),
            kept_from=Lsn(fields["kept_from"]),
            vdl=Lsn(fields["vdl"]),
        )
    except (ValueError, LookupError, TypeError) as error:
        raise CorruptData(f"{path} is whole, but makes no sense here: {error!r}") from error


class Segment:
    """The durable shell around a SegmentState.

    Invariant: what `state` says is durable, except its `vdl`, which is a hint that costs nothing to
    lose; `state.scl` is the log's end; `shared` says the same to the page process.
    """

    def __init__(
        self, layout: VolumeLayout, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Open what is on disk. CorruptData if its state cannot be trusted."""
        self._clock = clock
        # What was heard before this process began is not known: it may have been a moment ago.
        self._heard_at = clock()
        self.layout = layout
        stored = read_state(layout.state)
        self.facts, lineage = stored.facts, stored.lineage
        self._log = VolumeLog(layout.log, stored.kept_from, lineage.timelines())
        self.state = SegmentState(
            promised=stored.promised,
            lineage=lineage,
            start=stored.kept_from,
            scl=self._log.end,
            vdl=min(stored.vdl, self._log.end),
        )
        self._staged = self.state
        """The state once what is written is durable."""
        self.known_end = max(self._log.end, lineage.last.start)
        """The furthest the volume's log is known to reach, by all that was heard of it."""
        self._stranded_below = Lsn(0)
        self.appends = 0
        """How many of the writer's appends with data were taken; only ever grows."""
        self.appended_bytes = 0
        """Of log that became durable here, be it the writer's or a peer's; only ever grows."""
        self.dropped_bytes = 0
        """Of log that nobody needed any more; only ever grows."""
        self.syncs = Durations(first=5)
        """What the disk took to make log durable."""
        self.closed = False
        try:
            self.shared = SharedState(layout.shared)
        except (FileNotFoundError, CorruptData):
            self.shared = SharedState.create(layout.shared)
        # What log may be dropped is to be said anew: the file may be older than what it tells of.
        self.shared.pgmrpl = self.shared.floor = self.shared.retired = Lsn(0)
        self.shared.generation = (self.shared.generation | 1) + 1
        self._publish()
        self.reader = LogReader(layout.root)
        self.bundles = BundleStore(layout.bundles)

    @classmethod
    def create(cls, layout: VolumeLayout, epoch: Epoch, facts: VolumeFacts) -> Self:
        """Make the empty segment of a new volume. Durable; a crash leaves all of it or nothing."""
        if not 0 < facts.start < _MAX_START or facts.start % WAL_SEGMENT_BYTES:
            raise MalformedRequest(
                f"a log starts at a WAL segment boundary, not at {format_lsn(facts.start)}"
            )
        state = SegmentState.created(epoch, facts.start)
        scratch = VolumeLayout(root=layout.root.with_name(f".new-{layout.root.name}"))
        with telling_disk_full():
            shutil.rmtree(scratch.root, ignore_errors=True)
            scratch.log.mkdir(parents=True)
            BundleStore.create(scratch.bundles)
        write_durably(scratch.state, _encode_state(facts, state))
        scratch.root.rename(layout.root)
        sync_directory(layout.root.parent)
        return cls(layout)

    # --- the calls of the contract -------------------------------------------------------------

    def check_epoch(self, epoch: int) -> None:
        """Raise StaleEpoch for a caller that was superseded."""
        self.state.check_epoch(Epoch(epoch))

    def fence(self, epoch: Epoch) -> None:
        """Promise `epoch`; durable on return."""
        fenced = self.state.fence(epoch)
        if fenced != self.state:
            self._make_durable(fenced)

    def adopt(self, epoch: Epoch, lineage: Lineage) -> None:
        """Take a lineage, discarding what parts from it; durable on return."""
        if lineage.last.epoch != epoch:
            raise MalformedRequest(
                f"the lineage ends with epoch {lineage.last.epoch}; the caller has epoch {epoch}"
            )
        adopted = self.state.adopt(epoch, lineage)
        if (adopted.promised, adopted.lineage) == (self.state.promised, self.state.lineage):
            return
        # The log first: were the state durable before it, a crash in between would present another
        # writer's bytes under this lineage. An odd generation keeps readers out meanwhile.
        self.shared.scl = adopted.scl
        self.shared.generation |= 1
        try:
            self._log.cut(adopted.scl)
            self.state = self._staged = replace(self.state, scl=adopted.scl, vdl=adopted.vdl)
            self._make_durable(adopted)
            self._log.rename(lineage.timelines())
        finally:
            self.shared.generation += 1
        self.known_end = max(adopted.scl, lineage.last.start)

    def stage(self, epoch: int, at: int, data: bytes, vdl: int) -> None:
        """Take an append; it counts once `flush` has returned. See SegmentState.append for errors.

        Besides: OversizeRequest, MalformedRequest for bytes that are not WAL, DiskFull.
        """
        if len(data) > MAX_APPEND_BYTES:
            raise OversizeRequest(
                f"an append of {len(data)} bytes; the limit is {MAX_APPEND_BYTES}",
                limit_bytes=MAX_APPEND_BYTES,
            )
        accepted = self._accept(Epoch(epoch), Lsn(at), len(data), Lsn(vdl))
        fresh = data[accepted.skip :] if accepted.skip else data
        if fresh:
            check_wal_pages(accepted.at, fresh)
            try:
                self._log.write(fresh)
            except OSError as error:
                raise disk_error(error) from error
        self._staged = accepted.state

    def flush(self) -> Lsn:
        """Make what is staged durable; return the SCL. DiskFull or OSError: none of it counts."""
        began, before = self._clock(), self.state.scl
        try:
            self._log.sync()
        except OSError as error:
            self._staged = self.state
            raise disk_error(error) from error
        state = self.state = self._staged
        if state.scl > before:
            self.appended_bytes += state.scl - before
            self.syncs.observe(self._clock() - began)
        self.shared.scl, self.shared.vdl = state.scl, state.vdl
        return state.scl

    def fill(self, lineage: Lineage, at: Lsn, data: bytes, vdl: Lsn) -> Lsn:
        """Append bytes of a peer that follows `lineage`; durable on return. See catch_up_from."""
        self.state.catch_up_from(lineage)
        self.stage(lineage.last.epoch, at, data, vdl)
        return self.flush()

    @property
    def writer_silent_s(self) -> float:
        """How long ago, at the least, something was last taken from a writer (quorum.lease)."""
        return self._clock() - self._heard_at

    def heard_writer(self, *, with_data: bool, pgmrpl: int) -> None:
        """Note that an append of the writer's was taken, and pass its PGMRPL on (0: unknown)."""
        self._heard_at = self._clock()
        self.appends += with_data
        if pgmrpl > self.shared.pgmrpl:
            self.shared.pgmrpl = Lsn(pgmrpl)

    # --- what is kept of the log ---------------------------------------------------------------

    def raise_floor(self) -> None:
        """Tell the page process below what nobody will ask for anything here (SharedState.floor).

        The writer speaks for all instances and nodes; the oldest bundle kept here must have what it
        is replayed from.
        """
        floor = min(self.shared.pgmrpl, self.bundles.oldest_redo, self.state.vdl)
        self.shared.floor = max(self.shared.floor, floor)

    def trim(self) -> list[Path]:
        """Drop the whole segments of the log that nobody needs; return their files, to be deleted.

        That the log begins later is durable on return, and readers are told; a segment that a kept
        bundle is replayed from stays whole, for PostgreSQL asks for WAL from a segment's start.
        """
        start = wal_segment_start(min(self.shared.floor, self.shared.retired, self.state.vdl))
        if start <= self.state.start:
            return []
        self.dropped_bytes += start - self.state.start
        self._make_durable(self.state.trim(start))
        self.reader.release_dropped()
        return self._log.forget_below(start)

    @property
    def index_lag_bytes(self) -> int:
        """Log that is here and not yet in the page index."""
        return max(0, self.state.scl - max(self.shared.indexed, self.state.start))

    def ack_delay_s(self, pressure: Pressure, append_bytes: int) -> float:
        """How long the ack of so many bytes is to be held back now."""
        if not append_bytes:
            return 0.0
        lag_bytes = self.index_lag_bytes
        # An index that stopped for good does not come nearer for being waited for.
        if lag_bytes <= pressure.soft_bytes or self.shared.failure:
            return 0.0
        return pressure.delay_s(lag_bytes, append_bytes)

    # --- its own matters -----------------------------------------------------------------------

    @property
    def behind(self) -> bool:
        """Whether the volume's log is known to go on past this segment's SCL."""
        return self.known_end > self.state.scl

    @property
    def failure(self) -> str:
        """What an operator should know; empty in health."""
        gap = self._stranded_below
        if gap > self.state.scl:
            return (
                f"the log from {format_lsn(self.state.scl)} to {format_lsn(gap)} is kept by no "
                "storage node that answers; start those that are away"
            )
        damaged = self._log.damaged
        if damaged:
            pages = ", ".join(format_lsn(lsn) for lsn in damaged[:8])
            return f"{len(damaged)} damaged log pages, not served: {pages}"
        return self.shared.failure

    def nothing_further(self) -> None:
        """The peers were asked, and none of them has more."""
        self.known_end = max(self.state.scl, self.state.lineage.last.start)

    def stranded(self, start: Lsn) -> None:
        """The peers were asked, and those that have more keep it from `start` on only."""
        self._stranded_below = start
        self.nothing_further()

    def close(self, *, dropped: bool = False) -> None:
        """Close everything. `dropped`: tell the page process to do so too."""
        if not dropped:
            with suppress(DiskFull):  # only the VDL is news, and that is a hint
                self._make_durable(self.state)
        self.closed = True
        self.shared.dropped = dropped
        self.reader.close()
        self._log.close()
        self.shared.close()

    def _accept(self, epoch: Epoch, at: Lsn, length: int, vdl: Lsn) -> Accepted:
        try:
            accepted = self._staged.append(epoch, at, length, vdl)
        except LogGap:
            self.known_end = max(self.known_end, Lsn(at + length))
            raise
        self.known_end = max(self.known_end, vdl)
        return accepted

    def _make_durable(self, state: SegmentState) -> None:
        write_durably(self.layout.state, _encode_state(self.facts, state))
        self.state = self._staged = state
        self._publish()

    def _publish(self) -> None:
        shared, state = self.shared, self.state
        shared.start = state.start
        shared.promised = state.promised
        shared.scl = state.scl
        shared.vdl = state.vdl
        shared.lineage_epoch = state.lineage.last.epoch
