"""A reader's side of the writer's live log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import structlog

from boreal.errors import BorealError, CorruptWal, StaleEpoch, UnknownOutcome
from boreal.rpc import compute_pb2, compute_pb2_grpc
from boreal.rpc.edge import calling, open_channel, volume_ref
from boreal.types import Epoch, InstanceName, Lsn, VolumeId, format_lsn
from compute_node.log_source import LogSource

REPORT_S = 0.2
_REPORT_AT_LEAST_S = 1.0
"""Also when nothing changed."""
SILENCE_S = 3.0
"""A writer without news says once a second that it is there (`compute_node.publisher`)."""
_FIRST_BACKOFF_S = 0.05
_LAST_BACKOFF_S = 0.5
_LINEAGE_S = 0.5

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a reader stands, as it tells the writer."""

    replay: Lsn
    floor: Lsn
    """It asks storage for no page as of an older LSN."""
    oldest_xmin: int
    """The oldest transaction its queries still see, as 64 bits; 0: none."""
    lag_us: int
    """How long the oldest log it has received waits to be replayed."""


class Follower:
    """Keeps a LogSource supplied with the writer's live log, and the writer told of this reader.

    Invariant: pieces go to the source only while its lineage is that of the writer followed.
    """

    def __init__(
        self,
        instance: InstanceName,
        volume: VolumeId,
        source: LogSource,
        progress: Callable[[], Progress],
        *,
        silence_s: float = SILENCE_S,
    ) -> None:
        """`progress` tells where the reader stands. A writer silent for `silence_s` is lost."""
        self._instance = instance
        self._volume = volume
        self._source = source
        self._progress = progress
        self._silence_s = silence_s
        self._address: str | None = None
        self._moved = asyncio.Event()

    def writer_at(self, address: str | None) -> None:
        """Follow the writer whose agent listens at HOST:PORT; None: there is none."""
        if address != self._address:
            _log.info("writer to follow", was=self._address, now=address)
            self._address = address
            self._moved.set()

    async def run(self) -> NoReturn:
        """Follow until cancelled. Raises CorruptWal if what the writer sends contradicts itself."""
        while True:
            self._moved.clear()
            tasks: list[asyncio.Task[Any]] = [asyncio.create_task(self._moved.wait())]
            if self._address is not None:
                tasks.append(asyncio.create_task(self._keep_following(self._address)))
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_following(self, address: str) -> NoReturn:
        backoff_s = _FIRST_BACKOFF_S
        async with open_channel(address) as channel:
            stub = compute_pb2_grpc.ComputeStub(channel)
            while True:
                received = self._source.received
                try:
                    await self._stream(stub, address)
                except CorruptWal:
                    raise
                except StaleEpoch as error:
                    _log.info("the writer is newer than our log", why=error.message)
                    await self._find_lineage(Epoch(error.details.get("promised_epoch", 0)))
                    continue
                except BorealError as error:
                    _log.info("the writer's log ended", writer=address, why=str(error))
                if self._source.received > received:
                    backoff_s = _FIRST_BACKOFF_S
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)

    async def _find_lineage(self, epoch: Epoch) -> None:
        await self._source.new_lineage()
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINEAGE_S):
                await self._source.later_than(Epoch(epoch - 1))

    async def _stream(self, stub: compute_pb2_grpc.ComputeAsyncStub, address: str) -> None:
        """One stream, from its beginning to its end; why it ended is raised if it is an error."""
        source, loop = self._source, asyncio.get_running_loop()
        epoch = source.epoch
        with calling(address, "Follow"):
            call = stub.Follow(self._reports(epoch))
            try:
                async with asyncio.timeout(self._silence_s) as patience:
                    async for piece in call:
                        if source.epoch != epoch:
                            return  # the next one begins with the lineage as it is now
                        patience.reschedule(loop.time() + self._silence_s)
                        source.followed(True)
                        source.live(Lsn(piece.start_lsn), piece.data, Lsn(piece.durable_lsn))
            except TimeoutError:
                raise UnknownOutcome(f"{address} was silent for {self._silence_s} s") from None
            finally:
                call.cancel()
                source.followed(False)

    async def _reports(self, epoch: Epoch) -> AsyncIterator[compute_pb2.FollowerReport]:
        """Where this reader stands: at once, and whenever that has changed."""
        progress = self._progress()
        first = self._report(progress)
        first.volume.CopyFrom(volume_ref(self._volume, epoch))
        first.from_lsn = self._source.live_end
        _log.info("following", epoch=epoch, start=format_lsn(first.from_lsn))
        yield first
        unchanged_s = 0.0
        while True:
            await asyncio.sleep(REPORT_S)
            unchanged_s += REPORT_S
            now = self._progress()
            if now != progress or unchanged_s >= _REPORT_AT_LEAST_S:
                progress, unchanged_s = now, 0.0
                yield self._report(now)

    def _report(self, progress: Progress) -> compute_pb2.FollowerReport:
        return compute_pb2.FollowerReport(
            instance=self._instance,
            replay_lsn=progress.replay,
            floor_lsn=progress.floor,
            oldest_xmin=progress.oldest_xmin,
            lag_us=progress.lag_us,
        )
