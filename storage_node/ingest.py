"""Follows a volume's log and notes it in the index's open layer: one task for each volume.

Only complete records that end at or below both the SCL and the VDL are indexed. No lineage that a
segment may ever adopt parts below such a record's end, so nothing in the index is ever taken back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

import lmdb
import structlog

from boreal.errors import BeyondLog, BorealError, IngestStopped, NotIndexedYet, UnknownVolume
from boreal.types import Lsn, VolumeId, format_lsn
from boreal.wal.touches import TouchDecoder
from storage_node.index import PageIndex
from storage_node.record_indexer import index_record
from storage_node.redo import Redo
from storage_node.shared_state import SharedState

SLICE_S = 0.005
"""How long a batch may hold up the page reads that share the loop."""
READ_BYTES = 256 * 1024
CHUNK_BYTES = 32 * 1024
"""What is decoded between two looks at the clock: about a millisecond's work."""
_RETRY_S = 1.0
_CUT_PAUSE_S = 0.01

_log = structlog.get_logger(__name__)


class Log(Protocol):
    """The volume's log: storage_node.log.LogReader."""

    def read(self, start: Lsn, end: Lsn) -> bytes:
        """The verified bytes [start, end). CorruptWal or BeyondLog."""


class Ingest:
    """Brings one index forward, in slices, whenever it is woken.

    Invariant: every record that ends at or below `reached` is in the index. `reached` may lie
    inside a record, as the VDL may; the index itself always ends at a record's end.

    Memory is bounded: when the open layer is full while the one before it is still being sealed,
    it waits for that (and the log process slows the writer down when the lag gets long).

    It stops for good at a record it must not pass: `failure` says which, everything below it stays
    readable, and the next start of the process tries again.
    """

    def __init__(
        self,
        *,
        volume: VolumeId,
        index: PageIndex,
        log: Log,
        shared: SharedState,
        redo: Redo,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._volume = volume
        self._index = index
        self._log = log
        self._shared = shared
        self._clock = clock
        self._redo = redo
        self.on_work: Callable[[], None] = lambda: None
        """Called when a layer was frozen, to be sealed by somebody else, or pages got hot."""
        self._awake = asyncio.Event()
        self._waiters: list[tuple[Lsn, asyncio.Future[None]]] = []
        self._failure: IngestStopped | None = None
        self._told = Lsn(0)
        self._generation = shared.generation
        self._decoder = TouchDecoder(index.indexed, index.layer)
        self._covered = index.indexed

    @property
    def reached(self) -> Lsn:
        """Pages can be had as of any LSN up to here."""
        return max(self._index.indexed, self._covered)

    @property
    def failure(self) -> IngestStopped | None:
        """Why it stopped; None in health."""
        return self._failure

    def wake(self) -> None:
        """There may be something to do. Cheap; call it as often as you like."""
        self._awake.set()

    def told_durable(self, lsn: Lsn) -> None:
        """A reader knows that the log is durable up to `lsn`."""
        self._told = max(self._told, lsn)

    async def wait_for(self, lsn: Lsn, timeout_s: float) -> None:
        """Return once `lsn` is reached. NotIndexedYet: not in time; IngestStopped: never."""
        if lsn <= self.reached:
            return
        if self._failure is not None:
            raise IngestStopped(self._failure.message, **self._failure.details)
        self.wake()
        waiter = (lsn, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter[1]
        except TimeoutError:
            raise NotIndexedYet(
                f"the index of {self._volume} is at {format_lsn(self.reached)}, not yet at "
                f"{format_lsn(lsn)}",
                indexed_lsn=self.reached,
            ) from None
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    async def run(self) -> None:
        """Follow the log until cancelled, or until it must not go on."""
        self._shared.failure = ""
        self._restart()
        self._publish()
        while self._failure is None:
            self._awake.clear()
            try:
                await self._catch_up()
            except (lmdb.Error, OSError) as error:
                self._index.layer.cut_back()
                _log.error("index cannot be read", volume=self._volume, error=str(error))
                self._shared.failure = f"the index cannot be read: {error}"
                self._restart()
                await asyncio.sleep(_RETRY_S)
                self._shared.failure = ""
                continue
            except Exception as error:  # noqa: BLE001 - a bug stops this index, not the whole node
                self._index.layer.cut_back()
                _log.error("index stopped by a bug", volume=self._volume, exc_info=error)
                self._stop(f"{type(error).__name__}: {error}", self._index.indexed)
                self._publish()
            await self._awake.wait()

    def abandon(self) -> None:
        """The volume is closed: those who wait need wait no longer."""
        for _, waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(UnknownVolume(f"{self._volume} was closed"))
        self._waiters.clear()

    def _restart(self) -> None:
        """Forget all bytes read but not indexed."""
        self._generation = self._shared.generation
        self._decoder = TouchDecoder(self._index.indexed, self._index.layer)
        self._covered = self._index.indexed

    async def _catch_up(self) -> None:
        """Index all there is now."""
        while self._failure is None:
            if self._shared.generation != self._generation:
                self._restart()
            scl = self._shared.scl
            if scl < self._index.indexed != self._index.imported_lsn:
                self._stop(
                    f"the log ends at {format_lsn(scl)}, below what is already indexed",
                    self._index.indexed,
                )
                break
            durable = max(self._shared.vdl, self._told)
            step = min(READ_BYTES, self._index.layer_bytes)
            bound = min(scl, durable, self._covered + step)
            if bound <= self._covered or not self._has_room():
                return
            try:
                data = self._log.read(self._covered, Lsn(bound))
            except BeyondLog:
                # The log is being cut; where it ends now is published in a moment.
                await asyncio.sleep(_CUT_PAUSE_S)
                continue
            except BorealError as error:
                self._stop(error.message, Lsn(error.details.get("lsn", self._covered)))
                break
            if self._shared.generation != self._generation:
                continue  # what was read may be what has just been discarded
            if await self._note(data):
                self._covered = Lsn(bound)
                self._publish()
                await asyncio.sleep(0)
        self._publish()

    def _has_room(self) -> bool:
        """Whether the open layer takes more; a full one is frozen if it can be."""
        if not self._index.layer.full:
            return True
        if self._index.frozen is not None:
            return False  # whoever seals it wakes us
        self._index.freeze()
        self._decoder.direct(self._index.layer)
        self.on_work()
        return True

    async def _note(self, data: bytes) -> bool:
        """Note the records that `data` completes, in slices; False if it must not go on."""
        until = self._clock() + SLICE_S
        try:
            for at in range(0, len(data), CHUNK_BYTES):
                for record in self._decoder.feed(data[at : at + CHUNK_BYTES]):
                    index_record(self._index.layer, record, self._redo)
                    # The decoder's position is still at the record's start.
                    if self._clock() >= until:
                        self._index.layer.end = record.end
                        self._publish()
                        await asyncio.sleep(0)
                        until = self._clock() + SLICE_S
                self._index.layer.end = self._decoder.position
                if self._clock() >= until:
                    self._publish()
                    await asyncio.sleep(0)
                    until = self._clock() + SLICE_S
        except BorealError as error:
            self._index.layer.end = self._decoder.position
            self._index.layer.cut_back()
            self._stop(error.message, Lsn(error.details.get("lsn", self._index.indexed)))
            return False
        return True

    def _stop(self, why: str, lsn: Lsn) -> None:
        self._failure = IngestStopped(
            f"the index of {self._volume} stopped at {format_lsn(lsn)}: {why}", lsn=lsn
        )
        _log.error("index stopped", volume=self._volume, lsn=format_lsn(lsn), why=why)

    def _publish(self) -> None:
        """Tell the log process, those who wait, and the work in the background."""
        if self._index.layer.hot:
            self.on_work()
        self._shared.indexed = self._index.indexed
        failure = self._failure
        if failure is not None:
            self._shared.failure = failure.message
        pending = []
        for lsn, waiter in self._waiters:
            if waiter.done():
                continue
            if lsn <= self.reached:
                waiter.set_result(None)
            elif failure is not None:
                waiter.set_exception(IngestStopped(failure.message, **failure.details))
            else:
                pending.append((lsn, waiter))
        self._waiters = pending
