"""How a reader becomes the writer. As short as it can be made: every client waits for its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from boreal.errors import StaleEpoch
from boreal.quorum import RecoveryPlan
from boreal.types import Epoch, format_lsn
from compute_node.life import LifeState
from compute_node.orders import Orders
from compute_node.parts import Parts
from compute_node.postgres import query_lsn
from compute_node.recovery import recover
from compute_node.writer import Writer, connect_stream

_REPLAY_POLL_S = 0.005

_log = structlog.get_logger(__name__)

Spawn = Callable[[Coroutine[Any, Any, Any], str], asyncio.Task[Any]]


class FormerLease:
    """Until when the writer before us may still serve reads to its clients."""

    def __init__(self, orders: Orders, clock: Callable[[], float] = time.monotonic) -> None:
        self._orders = orders
        self._clock = clock
        self._until: float | None = None

    def fenced(self, until: float) -> None:
        """A write quorum refuses it; it may hold its lease until then, on our clock."""
        self._until = until

    async def ended(self) -> None:
        """Return once it has run out, or nothing of that writer runs any more."""
        while self._until is not None and self._clock() < self._until:
            order = self._orders.current
            if order is not None and order.former_gone:
                return
            try:
                async with asyncio.timeout(self._until - self._clock()):
                    await self._orders.other_than(order)
            except TimeoutError:
                return


class _Watch:
    """How long each part of a promotion took."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self.took_ms: dict[str, int] = {}

    def lap(self, what: str) -> None:
        now = time.monotonic()
        self.took_ms[f"{what}_ms"] = round((now - self._last) * 1000)
        self.took_ms["total_ms"] = round((now - self._began) * 1000)
        self._last = now


async def promote(parts: Parts, epoch: Epoch, orders: Orders, spawn: Spawn) -> Writer:
    """Take the volume over under `epoch`; return the writer, which serves by then.

    `spawn` runs what goes on for as long as the instance is the writer. Raises StaleEpoch if a
    newer epoch took the volume meanwhile.
    """
    watch, former = _Watch(), FormerLease(orders)
    parts.fleet.raise_epoch(epoch)
    if parts.fleet.epoch > epoch:  # readers learn of newer epochs from storage
        raise StaleEpoch(
            f"epoch {epoch} was superseded before it began", promised_epoch=parts.fleet.epoch
        )
    connecting = spawn(connect_stream(parts.config), "connect")
    plan = await recover(parts.fleet, epoch, on_fenced=former.fenced)
    watch.lap("recovery")
    await _replay(parts, plan)
    watch.lap("replay")
    writer = Writer(parts, plan, await connecting)
    spawn(writer.run(), "writer")
    parts.pages.become_writer(plan.end)
    watch.lap("stream")
    await parts.postgres.promote()
    watch.lap("promotion")
    await former.ended()
    watch.lap("former_lease")
    writer.serve()
    parts.postgres.admit_clients()
    parts.life.become(LifeState.WRITER, f"promoted at {format_lsn(plan.end)}")
    _log.info("promoted", epoch=epoch, end=format_lsn(plan.end), **watch.took_ms)
    return writer


async def _replay(parts: Parts, plan: RecoveryPlan) -> None:
    """Have PostgreSQL replay all there is."""
    parts.fleet.follow_lineage(plan.lineage.last.epoch)
    await parts.source.extend(plan.end)
    session = await parts.postgres.session()
    while await query_lsn(session, "select pg_last_wal_replay_lsn()") < plan.end:
        await asyncio.sleep(_REPLAY_POLL_S)
