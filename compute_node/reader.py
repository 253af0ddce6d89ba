"""What an instance does as a reader: it follows the writer, and takes clients once it caught up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NoReturn

import structlog

from boreal.errors import Internal
from boreal.types import Epoch, Lsn, format_lsn
from compute_node.draining import rehearse
from compute_node.follower import Follower, Progress
from compute_node.parts import Parts
from compute_node.replay import ReplayLag

_LOOK_S = 0.02

_log = structlog.get_logger(__name__)


class Reader:
    """The reader's duties, from the start of its PostgreSQL until a promotion.

    It takes clients from when it has replayed all that was durable when it joined: nobody reads
    from it what was long past when he connected.
    """

    def __init__(self, parts: Parts, on_admitted: Callable[[], None]) -> None:
        """`on_admitted` is called when clients are let in."""
        self._parts = parts
        self._on_admitted = on_admitted
        self._lag = ReplayLag()
        self._consistent = asyncio.Event()
        self._follower = Follower(
            parts.config.name, parts.fleet.volume, parts.source, self._progress
        )
        self._epoch = parts.fleet.epoch
        self.takes_clients = False

    @property
    def replayed(self) -> Lsn:
        """How far PostgreSQL has replayed, as it said last."""
        return self._lag.replayed

    @property
    def lag_us(self) -> int:
        """How long the oldest log that was given to PostgreSQL waits to be replayed."""
        return self._lag.lag_us(time.monotonic())

    @property
    def follows(self) -> bool:
        """Whether it gets the log live from the writer."""
        return self._parts.source.is_followed

    def writer_at(self, address: str | None) -> None:
        """Where the writer's agent listens, as far as the control plane knows."""
        self._follower.writer_at(address)

    def consistent(self) -> None:
        """PostgreSQL can be read from now on."""
        self._consistent.set()

    async def follow(self, epoch: Epoch) -> None:
        """The writer of `epoch` has the volume: go on with its log."""
        if epoch > self._epoch:
            self._epoch = epoch
            self._parts.fleet.raise_epoch(epoch)
            await self._parts.source.new_lineage()

    async def run(self) -> NoReturn:
        """Do all of it until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follower.run(), name="follower")
            group.create_task(self._parts.source.poll(), name="poll")
            group.create_task(self._watch_replay(), name="replay")
            group.create_task(self._admit(), name="admit")
        raise Internal("a reader's duties ended for no reason")

    async def _watch_replay(self) -> NoReturn:
        """Note what PostgreSQL was given and what it has replayed: it tells as soon as it idles."""
        while True:
            self._lag.given(self._parts.source.durable, time.monotonic())
            self._take_reports()
            await asyncio.sleep(_LOOK_S)

    def _take_reports(self) -> None:
        for standby in self._parts.feed.standbys:
            self._lag.replay(standby.applied)

    async def _admit(self) -> None:
        source = self._parts.source
        await self._consistent.wait()
        joined = await source.first_told()
        while self._lag.replayed < joined:
            await asyncio.sleep(_LOOK_S)
        await rehearse(self._parts.postgres)
        self._parts.postgres.admit_clients()
        self.takes_clients = True
        _log.info("a reader takes clients", caught_up_with=format_lsn(joined))
        self._on_admitted()

    def _progress(self) -> Progress:
        self._take_reports()
        replayed = self._lag.replayed
        asked = self._parts.pages.oldest_read
        # Before its first report PostgreSQL is somewhere past where it began to replay.
        floor = max(replayed, self._parts.restored_redo)
        return Progress(
            replay=replayed,
            floor=floor if asked is None else min(floor, asked),
            oldest_xmin=max((s.oldest_xmin for s in self._parts.feed.standbys), default=0),
            lag_us=self.lag_us,
        )
