"""Garbage collection of the log: whole segment files that nobody needs any more are deleted."""

from __future__ import annotations

import asyncio

import structlog

from boreal.errors import BorealError
from boreal.types import VolumeId, format_lsn
from storage_node.disk import sync_directory
from storage_node.segment import Segment
from storage_node.volumes import Volumes

INTERVAL_SECONDS = 0.5
_PAUSE_SECONDS = 0.05
"""Between two files: freeing their room is work for the disk that appends are synced to."""

_log = structlog.get_logger(__name__)


class LogTrimmer:
    """Keeps every volume's floor up to date and its log no longer than it has to be.

    What is decided and made durable takes one small write, on the loop, every so many megabytes of
    log; the files are deleted by a worker thread, one by one, so that no append waits for that.
    """

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            for volume, segment in self._volumes:
                if not segment.closed:
                    await self._trim(volume, segment)
            await asyncio.sleep(INTERVAL_SECONDS)

    async def _trim(self, volume: VolumeId, segment: Segment) -> None:
        before = segment.state.start
        try:
            segment.raise_floor()
            files = segment.trim()
            if not files:
                return
            _log.info(
                "log dropped",
                volume=volume,
                start=format_lsn(segment.state.start),
                size_bytes=segment.state.start - before,
            )
            for file in files:
                # It may be gone already, with its volume.
                await asyncio.to_thread(file.unlink, missing_ok=True)
                await asyncio.sleep(_PAUSE_SECONDS)
            if not segment.closed:
                await asyncio.to_thread(sync_directory, segment.layout.log)
        except (BorealError, OSError) as error:
            # What could not be deleted is deleted at the next open.
            _log.error("the log cannot be trimmed", volume=volume, exc_info=error)
