"""One walreceiver's connection to the feed."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import structlog

from boreal.errors import BorealError, MalformedRequest, OversizeRequest, Refused
from boreal.quorum import TimelineStart
from boreal.types import PAGE_BYTES, Lsn, Timeline, format_lsn, parse_lsn
from compute_node import wire

SERVER_VERSION = "16.14"
MAX_DATA_BYTES = 128 * 1024
"""What a stock walsender puts into one message at most (MAX_SEND_SIZE)."""
KEEPALIVE_S = 10.0
FIRST_ASK_S = 0.02
"""A standby reports when it has written, not when it has replayed; so it is asked, soon after it
was sent something, then at growing intervals until it has replayed all of it."""
LAST_ASK_S = 0.5
STARTUP_TIMEOUT_S = 10.0

_START = re.compile(
    r'START_REPLICATION(?: SLOT "?\w+"?)?(?: PHYSICAL)? ([0-9A-F]+/[0-9A-F]+)(?: TIMELINE (\d+))?',
    re.IGNORECASE,
)
_HISTORY = re.compile(r"TIMELINE_HISTORY (\d+)", re.IGNORECASE)

_log = structlog.get_logger(__name__)


class FeedSource(Protocol):
    """What a feed hands out. All of it may change while standbys are connected."""

    @property
    def system_identifier(self) -> int:
        """PostgreSQL's, as in pg_control."""
        ...

    @property
    def durable(self) -> Lsn:
        """The ceiling: nothing at or past it is handed out. Never shrinks."""
        ...

    def timelines(self) -> Sequence[TimelineStart]:
        """The volume's timelines, oldest first (Lineage.timelines())."""
        ...

    async def read(self, start: Lsn, end: Lsn) -> bytes:
        """Exactly the log bytes [start, end); a BorealError ends that connection."""
        ...

    async def wait_beyond(self, lsn: Lsn) -> None:
        """Return once `durable` > `lsn` or `timelines()` changed; may do so early."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StandbyProgress:
    """What a connected standby last reported."""

    application_name: str
    sent: Lsn
    written: Lsn
    flushed: Lsn
    applied: Lsn
    oldest_xmin: int
    """From hot_standby_feedback, as a 64-bit transaction id; 0 if not reported."""


# --- timelines, pure ---------------------------------------------------------------------------


def timeline_after(timelines: Sequence[TimelineStart], timeline: Timeline) -> TimelineStart | None:
    """Where `timeline` ends and what follows; None if it is the newest. Refused: no such one."""
    for known, following in zip(timelines, (*timelines[1:], None), strict=True):
        if known.timeline == timeline:
            return following
    raise Refused(f"the volume has no timeline {timeline}")


def timeline_history(timelines: Sequence[TimelineStart], timeline: Timeline) -> str:
    """The content of its history file: each ancestor, and where it was left (timeline.c)."""
    timeline_after(timelines, timeline)
    return "".join(
        f"{ancestor.timeline}\t{format_lsn(following.start)}\tboreal volume epoch\n"
        for ancestor, following in pairwise(timelines)
        if following.timeline <= timeline
    )


class _Asks:
    """How long to wait before a standby is asked how far it has replayed."""

    def __init__(self) -> None:
        self._wait_s = FIRST_ASK_S

    def begin(self) -> None:
        """It was sent something."""
        self._wait_s = FIRST_ASK_S

    def next_s(self) -> float:
        wait_s, self._wait_s = self._wait_s, min(2 * self._wait_s, LAST_ASK_S)
        return wait_s


class FeedSession:
    """From startup packet to disconnection.

    Invariant: what was sent of a timeline lies below the source's ceiling, and below the timeline's
    end as known when it was sent.
    """

    def __init__(
        self, source: FeedSource, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.progress: StandbyProgress | None = None
        """While streaming."""
        self._source = source
        self._reader = reader
        self._writer = writer
        self._application_name = ""

    async def run(self) -> None:
        """Serve until either side ends it."""
        try:
            async with asyncio.timeout(STARTUP_TIMEOUT_S):
                await self._start_up()
            while await self._command():
                pass
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError) as error:
            _log.info("feed connection ended", standby=self._application_name, why=repr(error))
        except asyncio.CancelledError:
            self._writer.transport.abort()  # nobody waits for a peer that doesn't read
            raise
        except BorealError as error:
            _log.warning("feed connection failed", code=error.code, why=error.message)
            self._writer.write(wire.error_response("FATAL", wire.CONNECTION_FAILURE, error.message))
        finally:
            self.progress = None
            self._writer.close()

    # --- startup and commands ------------------------------------------------------------------

    async def _start_up(self) -> None:
        while True:
            length = int.from_bytes(await self._reader.readexactly(4))
            if not 8 <= length <= wire.MAX_STARTUP_BYTES:
                raise OversizeRequest(
                    f"a startup packet of {length} bytes", limit_bytes=wire.MAX_STARTUP_BYTES
                )
            packet = await self._reader.readexactly(length - 4)
            code = int.from_bytes(packet[:4])
            if code not in {wire.SSL_REQUEST, wire.GSS_REQUEST}:
                break
            self._writer.write(b"N")
        parameters = wire.read_startup(packet[4:])
        if code >> 16 != wire.PROTOCOL_3 >> 16 or parameters.get("replication") != "true":
            raise MalformedRequest("this socket serves physical replication only")
        self._application_name = parameters.get("application_name", "")
        told = {
            "server_version": SERVER_VERSION,
            "server_encoding": "UTF8",
            "client_encoding": "UTF8",
            "integer_datetimes": "on",
            "standard_conforming_strings": "on",
        }
        self._writer.write(wire.greeting(told, process_id=os.getpid()))

    async def _message(self) -> tuple[int, memoryview]:
        header = await self._reader.readexactly(5)
        length = int.from_bytes(header[1:])
        wire.check_length(length)
        return header[0], memoryview(await self._reader.readexactly(length - 4))

    async def _command(self) -> bool:
        """Serve one command; False when the client took leave."""
        kind, body = await self._message()
        if kind == wire.TERMINATE:
            return False
        if kind != wire.QUERY:
            raise MalformedRequest(f"message type {chr(kind)!r} where a command was expected")
        command = wire.read_text(body).rstrip("; ")
        if command.upper() == "IDENTIFY_SYSTEM":
            self._answer(self._identify_system(), command)
        elif match := _HISTORY.fullmatch(command):
            self._answer(self._history(Timeline(int(match[1]))), "TIMELINE_HISTORY")
        elif match := _START.fullmatch(command):
            newest = self._source.timelines()[-1].timeline
            await self._stream(parse_lsn(match[1]), Timeline(int(match[2] or newest)))
        else:
            text = f"the feed does not know the command: {command[:100]}"
            self._writer.write(wire.error_response("ERROR", wire.FEATURE_NOT_SUPPORTED, text))
        self._writer.write(wire.ready_for_query())
        await self._writer.drain()
        return True

    def _answer(self, row: dict[str, str | None], tag: str) -> None:
        self._writer.write(wire.result_row(row) + wire.command_complete(tag))

    def _identify_system(self) -> dict[str, str | None]:
        return {
            "systemid": str(self._source.system_identifier),
            "timeline": str(self._source.timelines()[-1].timeline),
            "xlogpos": format_lsn(self._source.durable),
            "dbname": None,
        }

    def _history(self, timeline: Timeline) -> dict[str, str | None]:
        return {
            "filename": f"{timeline:08X}.history",
            "content": timeline_history(self._source.timelines(), timeline),
        }

    # --- streaming -----------------------------------------------------------------------------

    async def _stream(self, start: Lsn, timeline: Timeline) -> None:
        """The copy phase, then what follows the timeline if it ended.

        Two CommandCompletes: the walreceiver takes one for the row, one for the streaming.
        """
        following = timeline_after(self._source.timelines(), timeline)
        if following is not None and start > following.start:
            raise Refused(
                f"{format_lsn(start)} is not on timeline {timeline}, "
                f"which ended at {format_lsn(following.start)}"
            )
        self._writer.write(wire.copy_both())
        self.progress = StandbyProgress(
            application_name=self._application_name,
            sent=start,
            written=Lsn(0),
            flushed=Lsn(0),
            applied=Lsn(0),
            oldest_xmin=0,
        )
        sender = asyncio.ensure_future(self._send_wal(start, timeline))
        try:
            await self._converse(sender)
        finally:
            self.progress = None
            await _end(sender)
        if sender.cancelled():  # the client ended it
            self._writer.write(wire.message(wire.COPY_DONE))
        else:
            following = sender.result()
            row: dict[str, str | None] = {
                "next_tli": str(following.timeline),
                "next_tli_startpos": format_lsn(following.start),
            }
            self._answer(row, "SELECT")
        self._writer.write(wire.command_complete("START_STREAMING"))

    async def _converse(self, sender: asyncio.Future[TimelineStart]) -> None:
        """Take in statuses until the client's CopyDone; raise what the sender or the client met."""
        receiver = asyncio.ensure_future(self._receive())
        try:
            either: set[asyncio.Future[Any]] = {sender, receiver}
            await asyncio.wait(either, return_when="FIRST_COMPLETED")
            if sender.done():
                sender.result()
            await receiver
        finally:
            await _end(receiver)

    async def _send_wal(self, position: Lsn, timeline: Timeline) -> TimelineStart:
        """Send WAL as the ceiling rises, until the timeline ends; say what follows it."""
        source, asks = self._source, _Asks()
        while True:
            following = timeline_after(source.timelines(), timeline)
            if following is not None and position >= following.start:
                self._writer.write(wire.message(wire.COPY_DONE))
                return following
            ceiling = source.durable
            if following is not None:
                ceiling = min(ceiling, following.start)
            if position >= ceiling:
                await self._wait_beyond(position, asks)
                continue
            data = await source.read(position, _message_end(position, ceiling))
            self._writer.write(wire.xlog_data(position, ceiling, _now_us(), data))
            position = Lsn(position + len(data))
            asks.begin()
            if self.progress is not None:
                self.progress = replace(self.progress, sent=position)
            await self._writer.drain()

    async def _wait_beyond(self, position: Lsn, asks: _Asks) -> None:
        replayed = self.progress is None or self.progress.applied >= position
        try:
            async with asyncio.timeout(KEEPALIVE_S if replayed else asks.next_s()):
                await self._source.wait_beyond(position)
        except TimeoutError:
            self._writer.write(wire.keepalive(position, _now_us(), reply_requested=not replayed))

    async def _receive(self) -> None:
        while True:
            kind, body = await self._message()
            if kind == wire.COPY_DONE:
                return
            if kind == wire.TERMINATE:
                raise ConnectionResetError("the standby took leave")
            if kind == wire.COPY_DATA and len(body) > 0:
                self._take_report(body)

    def _take_report(self, body: memoryview) -> None:
        progress = self.progress
        if progress is None:  # what a standby still says after the timeline's end
            return
        if body[0] == wire.STANDBY_STATUS:
            status = wire.read_standby_status(body)
            self.progress = replace(
                progress, written=status.written, flushed=status.flushed, applied=status.applied
            )
            if status.reply_requested:
                self._writer.write(wire.keepalive(progress.sent, _now_us(), reply_requested=False))
        elif body[0] == wire.HOT_STANDBY_FEEDBACK:
            feedback = wire.read_hot_standby_feedback(body)
            self.progress = replace(progress, oldest_xmin=feedback.xmin_epoch << 32 | feedback.xmin)


def _message_end(position: Lsn, ceiling: Lsn) -> Lsn:
    """Where a message that begins at `position` ends: at the ceiling or at a page's end.

    A standby reads as soon as it has a message, and takes for granted that no message cuts a record
    within a page (XLogSendPhysical, walsender.c; XLogDecodeNextRecord, xlogreader.c).
    """
    end = position + MAX_DATA_BYTES
    return ceiling if end >= ceiling else Lsn(end - end % PAGE_BYTES)


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait for its end, whatever that is."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _now_us() -> int:
    return wire.postgres_time_us(time.time())
