"""The writer's log for its readers, live: as soon as it is durable, from memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import structlog

from boreal.errors import (
    MalformedRequest,
    NotNow,
    NotWriter,
    StaleEpoch,
    UnknownVolume,
)
from boreal.rpc import compute_pb2
from boreal.types import Epoch, InstanceName, Lsn, VolumeId, format_lsn
from boreal.wal.boundaries import RecordEnds

MAX_PIECE_BYTES = 1024 * 1024
"""LogPiece.data, proto/compute.proto."""
BACKLOG_BYTES = 8 * 1024 * 1024
"""Who is further behind reads the rest from storage: that is what storage is there for."""
MAX_FOLLOWERS = 32
"""Two streams for each of the fifteen readers: one that is ending may be there too."""
HEARD_S = 30.0
"""So long counts what a reader said last. It still reads pages if only its agent was restarted."""
HEARTBEAT_S = 1.0
"""An idle writer says this often that it is there."""
PAUSE_S = 0.001
"""After a piece, for each follower. A piece costs about 0.15 ms of CPU on either side, whatever its
size; so what gets durable meanwhile goes with the next one. A lone commit waits for nothing."""
_FIRST_REPORT_S = 5.0

_log = structlog.get_logger(__name__)


class RetainedLog(Protocol):
    """The newest part of the log, as `LogWindow` has it."""

    start: Lsn
    end: Lsn

    def read(self, start: Lsn, end: Lsn) -> bytes:
        """The bytes [start, end); BelowLogStart: they were dropped."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowerStatus:
    """A reader as it was last heard of."""

    instance: InstanceName
    sent: Lsn
    replay: Lsn
    floor: Lsn
    """It asks storage for no page as of an older LSN; 0: it does not know yet."""
    oldest_xmin: int
    """As a 64-bit transaction id; 0: none."""
    lag_us: int
    """How long the oldest log it has received waits to be replayed."""


class _Heard(NamedTuple):
    """What a reader reported last, and when."""

    report: compute_pb2.FollowerReport
    at: float


class _Stream:
    """One follower's stream. Invariant: `told` is at most what the publisher knows as durable."""

    def __init__(self, first: compute_pb2.FollowerReport) -> None:
        self.instance = InstanceName(first.instance)
        self.report = first
        """The last one."""
        self.sent = Lsn(first.from_lsn)
        """It has the log up to here, or will read it from storage."""
        self.told = Lsn(0)
        """The durable end it knows of."""
        self.news = asyncio.Event()
        self.over = False


class Publisher:
    """Publishes one writer incarnation's log.

    It keeps nothing itself: what it sends it reads from the shipper's window. While nobody follows
    it does nothing but note the VDL. Nobody waits for a follower: one that is slow only gets fewer
    and larger pieces, and one that is `BACKLOG_BYTES` behind is sent on to storage.

    Invariant: the `durable_lsn` of every piece is a record's end, at or below the VDL. Records'
    ends at or below a VDL are in every later writer's log (boreal.quorum), so whatever a reader
    replays stays true.
    """

    def __init__(
        self,
        volume: VolumeId,
        epoch: Epoch,
        start: Lsn,
        log: RetainedLog,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`start` is where the epoch's log begins, a record's end that is durable.

        `log` is the shipper's window.
        """
        self._volume = volume
        self._epoch = epoch
        self._log = log
        self._clock = clock
        self._began_at = clock()
        self._vdl = start
        self._ends = RecordEnds(start)
        self._heard: dict[InstanceName, _Heard] = {}
        self._streams: dict[InstanceName, _Stream] = {}
        self._newest = compute_pb2.LogPiece()
        self._closed = False

    # --- the writer's side ---------------------------------------------------------------------

    def durable(self, vdl: Lsn) -> None:
        """The VDL advanced. On the commit path: it only wakes those who follow."""
        self._vdl = vdl
        for stream in self._streams.values():
            stream.news.set()

    @property
    def followers(self) -> tuple[FollowerStatus, ...]:
        """Those that follow now, by name."""
        return tuple(
            FollowerStatus(
                instance=name,
                sent=stream.sent,
                replay=Lsn(stream.report.replay_lsn),
                floor=Lsn(stream.report.floor_lsn),
                oldest_xmin=stream.report.oldest_xmin,
                lag_us=stream.report.lag_us,
            )
            for name, stream in sorted(self._streams.items())
        )

    def floor(self) -> Lsn | None:
        """No reader asks storage for a page as of an older LSN; None: there are no readers.

        A writer that has just begun does not know its readers yet and answers 0.
        """
        if self._clock() - self._began_at < HEARD_S:
            return Lsn(0)
        return min((Lsn(report.floor_lsn) for report in self._recent()), default=None)

    def oldest_xmin(self) -> int:
        """The oldest transaction that a reader's queries still see, as 64 bits; 0: none."""
        return min((r.oldest_xmin for r in self._recent() if r.oldest_xmin), default=0)

    def close(self) -> None:
        """End every stream, with NotWriter: the epoch's writer is one no more. Idempotent."""
        self._closed = True
        for stream in self._streams.values():
            stream.news.set()

    def _recent(self) -> list[compute_pb2.FollowerReport]:
        oldest = self._clock() - HEARD_S
        self._heard = {name: heard for name, heard in self._heard.items() if heard.at >= oldest}
        return [heard.report for heard in self._heard.values()]

    # --- a follower's side ---------------------------------------------------------------------

    async def follow(
        self, reports: AsyncIterator[compute_pb2.FollowerReport]
    ) -> AsyncIterator[compute_pb2.LogPiece]:
        """Serve one `Follow`. Ends when the reports do, or another stream of that reader begins.

        Raises StaleEpoch (`promised_epoch`: ours) to one who knows of an older writer, NotWriter to
        one who knows of a newer one or once this writer is closed.
        """
        stream = self._admit(await _first_of(reports))
        listening = asyncio.create_task(self._listen(stream, reports), name="follower reports")
        try:
            while not stream.over:
                self._check_open()
                stream.news.clear()
                piece = self._next_piece(stream)
                if piece is None:
                    piece = await self._wait(stream)
                if piece is None:
                    continue
                yield piece
                if stream.told >= self._ends.last:
                    await asyncio.sleep(PAUSE_S * len(self._streams))
        finally:
            listening.cancel()
            if self._streams.get(stream.instance) is stream:
                del self._streams[stream.instance]
            _log.info("no longer followed", by=stream.instance, sent=format_lsn(stream.sent))

    def _check_open(self) -> None:
        if self._closed:
            raise NotWriter(f"the writer of epoch {self._epoch} has ended")

    def _admit(self, first: compute_pb2.FollowerReport) -> _Stream:
        self._check_open()
        if first.volume.volume_id != self._volume:
            raise UnknownVolume(f"volume {first.volume.volume_id} is not written here")
        if first.volume.epoch < self._epoch:
            raise StaleEpoch(
                f"the writer of epoch {first.volume.epoch} was followed by epoch {self._epoch}",
                promised_epoch=self._epoch,
            )
        if first.volume.epoch > self._epoch:
            raise NotWriter(
                f"the writer of epoch {self._epoch} was superseded by {first.volume.epoch}"
            )
        if not first.instance or first.from_lsn > self._log.end:
            raise MalformedRequest(f"nobody follows from {format_lsn(first.from_lsn)} on here")
        if len(self._streams) >= MAX_FOLLOWERS:
            raise NotNow(f"{MAX_FOLLOWERS} readers follow already")
        stream = _Stream(first)
        former = self._streams.get(stream.instance)
        if former is not None:
            former.over = True
            former.news.set()
        self._streams[stream.instance] = stream
        self._hear(stream, first)
        _log.info("followed", by=stream.instance, start=format_lsn(stream.sent))
        return stream

    def _hear(self, stream: _Stream, report: compute_pb2.FollowerReport) -> None:
        stream.report = report
        self._heard[stream.instance] = _Heard(report, self._clock())

    async def _listen(
        self, stream: _Stream, reports: AsyncIterator[compute_pb2.FollowerReport]
    ) -> None:
        try:
            async with asyncio.timeout(HEARD_S) as patience:
                async for report in reports:
                    self._hear(stream, report)
                    patience.reschedule(asyncio.get_running_loop().time() + HEARD_S)
        except TimeoutError:
            _log.warning("a follower went silent", instance=stream.instance)
        finally:
            stream.over = True
            stream.news.set()

    async def _wait(self, stream: _Stream) -> compute_pb2.LogPiece | None:
        """Return when there may be news; with a sign of life if there are none for long."""
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                await stream.news.wait()
        except TimeoutError:
            return compute_pb2.LogPiece(start_lsn=stream.sent, durable_lsn=stream.told)
        return None

    def _next_piece(self, stream: _Stream) -> compute_pb2.LogPiece | None:
        durable = self._round()
        if durable <= stream.told:
            return None
        start = max(stream.sent, self._log.start)
        if durable - start > BACKLOG_BYTES:
            start = durable
        end = max(start, min(durable, Lsn(start + MAX_PIECE_BYTES)))
        # Its end is told with the last piece of a stretch: what is told is read at once.
        told = durable if end >= durable else stream.told
        stream.sent, stream.told = end, told
        return self._piece(start, end, told)

    def _piece(self, start: Lsn, end: Lsn, told: Lsn) -> compute_pb2.LogPiece:
        """A piece; the same object for all who stand at the same place."""
        newest = self._newest
        if end == start:
            return compute_pb2.LogPiece(start_lsn=start, durable_lsn=told)
        if (newest.start_lsn, newest.durable_lsn) != (start, told):
            newest = self._newest = compute_pb2.LogPiece(
                start_lsn=start, data=self._log.read(start, end), durable_lsn=told
            )
        return newest

    def _round(self) -> Lsn:
        """The last record's end that is durable, as far as memory tells."""
        for start in self._ends.looks(self._vdl):
            if start < self._log.start:
                break  # dropped: the next records will tell
            if self._ends.look(start, self._log.read(start, self._vdl)):
                break
        return self._ends.last


async def _first_of(
    reports: AsyncIterator[compute_pb2.FollowerReport],
) -> compute_pb2.FollowerReport:
    try:
        async with asyncio.timeout(_FIRST_REPORT_S):
            return await anext(reports)
    except (TimeoutError, StopAsyncIteration):
        raise MalformedRequest("whoever follows says first who it is") from None
