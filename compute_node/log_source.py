"""What the feed may hand to PostgreSQL: the volume's log up to what is known to be durable.

The newest part comes from the writer, live (`compute_node.follower`); what is not in memory is read
from storage, and without a writer to follow storage is asked how far the log goes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, NoReturn

import structlog

from boreal.errors import BorealError, Internal, QuorumUnavailable, StaleEpoch
from boreal.quorum import TimelineStart
from boreal.types import Epoch, Lsn, NodeName, format_lsn
from boreal.wal.boundaries import RecordEnds
from compute_node.fleet import Fleet
from compute_node.log_view import Held, LogView, view_log
from compute_node.shipping.window import LogWindow

__all__ = ["Held", "LogSource", "LogView", "view_log"]

LIVE_BYTES = 16 * 1024 * 1024
"""What is kept of the log that came live: a walreceiver begins at a segment's start."""
READ_AHEAD_BYTES = 1024 * 1024
"""Read from storage at once: a standby that catches up reads on."""
_POLL_S = 0.3
_SOON_S = 0.1
"""While a newer writer is known of whose lineage is not there yet."""
_POSITIONS_S = 0.3
"""Who answers later is not waited for: three of six tell."""
_RETRY_S = 0.2
_READ_ATTEMPTS = 50

_log = structlog.get_logger(__name__)


class _Stretch(NamedTuple):
    """Some of the log, read from storage."""

    start: Lsn
    data: bytes

    def has(self, start: Lsn, end: Lsn) -> bool:
        return self.start <= start and end <= self.start + len(self.data)


class LogSource:
    """A FeedSource over the storage fleet and the writer's live log.

    Invariant: `durable` is a record's end, never shrinks, and every byte below it is on a write
    quorum and belongs to the view's lineage. (A VDL may lie inside a record that recovery cuts
    off; PostgreSQL, given its beginning, would not end its timeline at the cut.) No lineage that
    follows parts below it.
    """

    def __init__(self, fleet: Fleet, view: LogView, *, durable: Lsn) -> None:
        self._fleet = fleet
        self._view = view
        self._durable = durable
        self._live = LogWindow(durable, LIVE_BYTES)
        self._read = _Stretch(durable, b"")
        self._changed = asyncio.Event()
        self._told = asyncio.Event()
        self._look_now = asyncio.Event()
        self._looked_upto = durable
        self._reading = False
        """Whether this is a reader's: `poll` runs."""
        self.is_followed = False
        """Whether a writer hands on its log. To read; `followed` tells."""

    # --- for the feed --------------------------------------------------------------------------

    @property
    def system_identifier(self) -> int:
        """PostgreSQL's identifier of the volume."""
        return self._view.system_identifier

    @property
    def durable(self) -> Lsn:
        """Nothing at or past it is handed out."""
        return self._durable

    def timelines(self) -> Sequence[TimelineStart]:
        """The timelines that hold at least one durable byte.

        A writer's timeline exists for its readers once something it wrote is durable. Told of it
        any earlier, a standby would count it as used, and number its own promotion one too high.
        """
        return [t for t in self._view.lineage.timelines() if t.start < self._durable]

    async def read(self, start: Lsn, end: Lsn) -> bytes:
        """The log's bytes [start, end), from memory or from any node that has them."""
        live = self._live
        if not live.start < end <= live.end:
            return await self._stored(start, end)
        tail = live.read(max(start, live.start), end)
        head = await self._stored(start, live.start) if start < live.start else b""
        return head + tail

    async def wait_beyond(self, lsn: Lsn) -> None:
        """Return once `durable` is past `lsn`, or the lineage changed."""
        lineage = self._view.lineage
        while self._durable <= lsn and self._view.lineage == lineage:
            await self._changed.wait()

    # --- for a reader --------------------------------------------------------------------------

    @property
    def epoch(self) -> Epoch:
        """The epoch of the writer whose log this is."""
        return self._view.epoch

    @property
    def live_end(self) -> Lsn:
        """One past the newest byte that came live."""
        return self._live.end

    @property
    def received(self) -> Lsn:
        """How far the log is known to be durable."""
        return self._durable

    async def first_told(self) -> Lsn:
        """How far the log was durable when the writer, or storage, first told us."""
        await self._told.wait()
        return self._durable

    def live(self, start: Lsn, data: bytes, durable: Lsn) -> None:
        """Take a piece from the writer of `epoch`: its log from `start` on.

        `durable` is a record's end on a write quorum. CorruptWal: other bytes were here already.
        """
        if data:
            if not self._live.start <= start <= self._live.end:
                self._live = LogWindow(start, LIVE_BYTES)
            self._live.push(start, data)
            self._live.raise_floor(self._live.end)
        self._grow(durable)

    def followed(self, now: bool) -> None:
        """Whether the writer is being followed; storage is asked only while it is not."""
        self.is_followed = now
        if not now:
            self._look_now.set()

    async def new_lineage(self) -> None:
        """There is a newer writer: look for its lineage at once, and until it is there."""
        self._look_now.set()

    async def later_than(self, epoch: Epoch) -> None:
        """Return once the log is that of a writer after `epoch`."""
        while self.epoch <= epoch:
            await self._changed.wait()

    async def poll(self) -> NoReturn:
        """Look after the log as a reader does, until cancelled.

        It acts under the newest epoch it hears of; so be sure that it has ended before the fleet
        is made to act for a writer.
        """
        self._reading = True
        try:
            while True:
                awaited = self._fleet.epoch > self.epoch
                if awaited or not self.is_followed or self._look_now.is_set():
                    self._look_now.clear()
                    await self._look()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_SOON_S if awaited else _POLL_S):
                        await self._look_now.wait()
        finally:
            self._reading = False

    # --- for a reader that is made the writer --------------------------------------------------

    async def extend(self, durable: Lsn) -> None:
        """Recovery made the log durable up to `durable`, a record's end."""
        view = await self._ask()
        while view is None:
            await asyncio.sleep(_RETRY_S)
            view = await self._ask()
        self._take(view)
        self._grow(durable)

    # --- how -----------------------------------------------------------------------------------

    def _grow(self, durable: Lsn) -> None:
        self._told.set()
        if durable > self._durable:
            self._durable = durable
            self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _ask(self) -> LogView | None:
        """Ask the nodes where they stand; None: too few answer."""
        try:
            return view_log(await self._fleet.positions(within_s=_POSITIONS_S))
        except StaleEpoch as error:
            if not self._reading:
                raise
            self._fleet.raise_epoch(Epoch(error.details["promised_epoch"]))
            self._look_now.set()
        except QuorumUnavailable as error:
            _log.info("where the log ends is not to be had", reason=error.message)
        return None

    def _take(self, view: LogView) -> None:
        former, self._view = self._view.lineage, view
        parting = view.lineage.parts_from(former)
        if parting is None:
            return
        if parting < self._durable:
            raise Internal(
                f"the log of epoch {view.epoch} parts at {format_lsn(parting)} from what was "
                f"handed out up to {format_lsn(self._durable)}"
            )
        _log.info("the log has a new writer", epoch=view.epoch, start=format_lsn(parting))
        self._fleet.follow_lineage(view.epoch)
        self._notify()

    async def _look(self) -> None:
        """Find out how far the log goes."""
        view = await self._ask()
        if view is None:
            return
        self._take(view)
        if view.durable <= max(self._durable, self._looked_upto):
            self._grow(self._durable)
            return
        holders = [name for name, held in view.holders.items() if held.scl >= view.durable]
        if not holders:
            return
        end = await self._last_end(view.durable, holders[0])
        again = await self._ask()
        if again is None:
            return
        self._take(again)
        # That node followed one lineage all the while: what was read is of that lineage.
        if again.lineage == view.lineage and holders[0] in again.holders and end is not None:
            self._looked_upto = view.durable
            self._grow(end)

    async def _last_end(self, limit: Lsn, node: NodeName) -> Lsn | None:
        """The last record's end at or below `limit`; None: the node did not tell."""
        ends = RecordEnds(self._durable)
        for start in ends.looks(limit):
            try:
                data = await self._fleet.read_log(start, limit, node=node)
            except BorealError as error:
                _log.info("log not to be had from this node", node=node, reason=error.message)
                return None
            if ends.look(start, data):
                break
        return ends.last

    async def _stored(self, start: Lsn, end: Lsn) -> bytes:
        stretch = self._read
        if not stretch.has(start, end):
            stretch = self._read = await self._fetch(start, end)
        return stretch.data[start - stretch.start : end - stretch.start]

    async def _fetch(self, start: Lsn, end: Lsn) -> _Stretch:
        """[start, end) from storage, and some of what follows it if that is not here already."""
        upto = max(end, min(self._durable, Lsn(start + READ_AHEAD_BYTES)))
        if end <= self._live.start < upto:
            upto = self._live.start
        for attempt in range(_READ_ATTEMPTS):
            for name, held in self._view.holders.items():
                if not held.start <= start < end <= held.scl:
                    continue
                try:
                    data = await self._fleet.read_log(start, min(upto, held.scl), node=name)
                    return _Stretch(start, data)
                except StaleEpoch:
                    if not self._reading:
                        raise
                    self._look_now.set()
                    break
                except BorealError as error:
                    _log.info("log not to be had from this node", node=name, reason=error.message)
            if attempt:
                await asyncio.sleep(_RETRY_S)
            view = await self._ask()
            if view is not None:
                self._take(view)
        raise QuorumUnavailable(f"no storage node gives the log up to {format_lsn(end)}")
