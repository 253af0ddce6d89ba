"""The writer's bundles: what a new compute node starts from, so that it has little to replay."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NoReturn

import psycopg
import structlog

from boreal.errors import BorealError, Internal, NotNow, StaleEpoch
from boreal.types import Lsn, Timeline, format_lsn
from compute_node import bundle
from compute_node.fleet import BundlePut
from compute_node.parts import Parts
from compute_node.shipper import Shipper

_CHECK_S = 1.0
_WAL_BYTES = 64 * 1024 * 1024
"""A bundle is taken after so much WAL: it bounds what a new compute node has to replay."""
_AGE_S = 30.0
_LEAST_BYTES = 64 * 1024
"""... or after so long, if there was so much: a bundle's own checkpoint is not worth another."""

_log = structlog.get_logger(__name__)


class Bundling:
    """Takes bundles of one writer, one at a time."""

    def __init__(
        self,
        parts: Parts,
        shipper: Shipper,
        timeline: Timeline,
        on_stored: Callable[[Lsn], None],
    ) -> None:
        """`on_stored` is told the redo LSN of each bundle that is on a write quorum."""
        self._parts = parts
        self._shipper = shipper
        self._timeline = timeline
        self._on_stored = on_stored
        self._one_at_a_time = asyncio.Lock()
        self.end = parts.restored_end
        """Of the newest bundle known here."""

    async def keep(self) -> NoReturn:
        """Take one now and then, until cancelled. Raises StaleEpoch once superseded."""
        last_end, last_at = self.end, 0.0
        clock = asyncio.get_running_loop().time
        while True:
            written = self._shipper.vdl - last_end
            aged = clock() - last_at >= _AGE_S
            if written >= _WAL_BYTES or (aged and written >= _LEAST_BYTES):
                try:
                    await self.take()
                except StaleEpoch:
                    raise
                except (BorealError, psycopg.Error) as error:
                    _log.warning("no bundle this time", reason=str(error))
                last_end, last_at = self._shipper.vdl, clock()
            await asyncio.sleep(_CHECK_S)

    async def take(self) -> BundlePut:
        """Take one bundle and store it on a write quorum."""
        async with self._one_at_a_time:
            taken = await self._collect()
            put = await taken.store(self._parts.fleet)
            self.end = taken.end
            self._on_stored(taken.redo)
            _log.info(
                "bundle stored",
                redo=format_lsn(taken.redo),
                end=format_lsn(taken.end),
                bytes_sent=put.bytes_sent,
                files_sent=put.files_sent,
            )
            return put

    async def _collect(self) -> bundle.Bundle:
        pgdata = self._parts.config.pgdata
        async with self._parts.postgres.connect() as connection:
            taken = await bundle.take(connection, pgdata, self._timeline)
        if await asyncio.to_thread(
            bundle.would_wait, pgdata, taken.redo, taken.end, self._timeline
        ):
            raise NotNow(
                "a transaction has more than 64 subtransactions open; a compute node restored "
                "from this moment could not serve until it ends"
            )
        if taken.end > self._shipper.vdl:
            raise Internal(
                f"a bundle up to {format_lsn(taken.end)} was to be stored, but the log is only "
                f"durable up to {format_lsn(self._shipper.vdl)}"
            )
        return taken
