"""The client side of PostgreSQL's streaming replication: how the agent gets the WAL it ships.

It sits on the way of every commit, hence a Protocol and a plain callback instead of streams and
tasks. Source: PostgreSQL documentation, "Streaming Replication Protocol"; src/backend/replication/
walsender.c for the end of a timeline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from boreal.errors import BorealError, EngineError, Internal, MalformedRequest, Unreachable
from boreal.types import Lsn, Timeline, format_lsn, parse_lsn
from compute_node import wire

WalCallback = Callable[[Lsn, bytes], None]
"""Called with (start LSN, bytes), contiguous from call to call. Must not block. A BorealError it
raises ends the stream and comes out of `stream()`."""

_STATUS_INTERVAL_S = 10.0
"""A status at least this often, so that `wal_sender_timeout` (60 s by default) never strikes while
reading is paused or there is nothing to report."""
_CLOSE_TIMEOUT_S = 1.0
_MAX_PENDING_MESSAGES = 1024
"""Outside of a copy every command is answered by a handful of messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemIdentity:
    """The answer to IDENTIFY_SYSTEM."""

    system_identifier: int
    timeline: Timeline
    flushed: Lsn
    """End of what the server has on disk (a standby: of what it has received)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineEnd:
    """The timeline that was streamed ended at `switch`; the history goes on in `next_timeline`."""

    next_timeline: Timeline
    switch: Lsn


class WalStream:
    """One replication connection to PostgreSQL over its unix socket. One command at a time."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    @classmethod
    async def connect(
        cls,
        *,
        socket_dir: Path,
        port: int,
        user: str,
        application_name: str = "boreal",
        deadline_s: float = 5.0,
    ) -> WalStream:
        """Connect and authenticate. Raises Unreachable, or EngineError if PostgreSQL refuses."""
        path = socket_dir / f".s.PGSQL.{port}"
        connection = _Connection(peer=f"PostgreSQL at {path}")
        try:
            async with asyncio.timeout(deadline_s):
                loop = asyncio.get_running_loop()
                await loop.create_unix_connection(lambda: connection, str(path))
                await connection.greet(user, application_name)
        except (OSError, TimeoutError) as error:
            raise Unreachable(f"PostgreSQL at {path} cannot be reached: {error!r}") from error
        return cls(connection)

    async def identify_system(self) -> SystemIdentity:
        """Who is there, on which timeline, up to where."""
        identifier, timeline, flushed, *_ = await self._one_row("IDENTIFY_SYSTEM")
        return SystemIdentity(
            system_identifier=int(identifier),
            timeline=Timeline(int(timeline)),
            flushed=parse_lsn(flushed),
        )

    async def ensure_slot(self, slot: str) -> None:
        """Make the physical slot, reserving WAL from now on; fine if it exists."""
        try:
            await self._one_row(f'CREATE_REPLICATION_SLOT "{slot}" PHYSICAL (RESERVE_WAL)')
        except EngineError as error:
            if error.sqlstate != wire.DUPLICATE_OBJECT:
                raise

    async def stream(
        self, *, slot: str, start: Lsn, timeline: Timeline, on_wal: WalCallback | None
    ) -> TimelineEnd:
        """START_REPLICATION; deliver WAL to `on_wal` (None: to nobody) until the timeline ends.

        After it returned, call it again with the next timeline: a standby that is promoted ends the
        old timeline this way. Take no WAL from a timeline that is about to end: a standby passes on
        what it received, also the beginning of a record that its promotion cuts off.

        Raises Unreachable when the connection ends (as it does when PostgreSQL stops), EngineError
        when it refuses. An exception, a cancellation too, closes the connection.
        """
        connection = self._connection
        connection.expect_wal(start, on_wal)
        try:
            rows = await connection.execute(
                f'START_REPLICATION SLOT "{slot}" PHYSICAL {format_lsn(start)} TIMELINE {timeline}'
            )
        except BaseException:
            connection.abort()
            raise
        match rows:
            case [(str(next_timeline), str(switch), *_)]:
                return TimelineEnd(
                    next_timeline=Timeline(int(next_timeline)), switch=parse_lsn(switch)
                )
        raise Unreachable("PostgreSQL ended the stream: it is shutting down")

    def send_status(self, durable: Lsn) -> None:
        """Report `durable` (the VDL) as written, flushed and applied. Callable before streaming.

        One LSN, not three: with a higher write LSN, a session with synchronous_commit=remote_write
        would be acknowledged before the quorum has its commit.
        """
        self._connection.send_status(durable)

    def send_feedback(self, oldest_xmin: int) -> None:
        """Report the oldest transaction that queries elsewhere still see (hot_standby_feedback).

        As a 64-bit id; 0: none. The slot keeps what vacuum would take from them until told another.
        Callable before streaming; the same again is not sent.
        """
        self._connection.send_feedback(oldest_xmin)

    def pause_reading(self) -> None:
        """Stop taking WAL from the socket (back-pressure); PostgreSQL keeps it, by the slot."""
        self._connection.pause_reading()

    def resume_reading(self) -> None:
        """Undo `pause_reading`."""
        self._connection.resume_reading()

    async def close(self) -> None:
        """End the connection. Idempotent."""
        await self._connection.close()

    async def _one_row(self, command: str) -> list[str]:
        match await self._connection.execute(command):
            case [row]:
                return [value or "" for value in row]
            case rows:
                raise MalformedRequest(f"{command} was answered with {len(rows)} rows, not one")


_Row = tuple[str | None, ...]


class _Connection(asyncio.Protocol):
    """The connection: WAL goes to the callback at once, all other messages to whoever awaits them.

    Invariant: while a copy is on, `_position` is the LSN after the last byte given to the callback.
    """

    _transport: asyncio.Transport

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._reader = wire.MessageReader()
        self._messages: asyncio.Queue[tuple[int, memoryview] | BorealError] = asyncio.Queue(
            _MAX_PENDING_MESSAGES
        )
        self._closed = asyncio.Event()
        self._ended: BorealError | None = None
        self._on_wal: WalCallback | None = None
        self._copying = False
        self._position = Lsn(0)
        self._durable = Lsn(0)
        self._oldest_xmin = self._told_xmin = 0
        self._timer: asyncio.TimerHandle | None = None

    # --- asyncio.Protocol ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._receive(data)
        except BorealError as error:
            self._end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(Unreachable(f"{self._peer} closed the connection" + (f": {exc}" if exc else "")))
        self._closed.set()

    def _receive(self, data: bytes) -> None:
        # Neighbouring messages become one call: what came in one read goes out in one batch.
        start, pieces = self._position, list[memoryview]()
        for kind, body in self._reader.feed(data):
            if kind != wire.COPY_DATA:
                self._control(kind, body)
            elif body[0] == wire.XLOG_DATA:
                pieces.append(self._accept(wire.read_xlog_data(body)))
            elif body[0] == wire.KEEPALIVE and wire.read_keepalive(body).reply_requested:
                self.send_status(self._durable)
        if pieces and self._on_wal is not None:
            self._on_wal(start, bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces))

    def _control(self, kind: int, body: memoryview) -> None:
        if self._messages.full():
            raise MalformedRequest(f"{self._peer} sends messages that nobody asked for")
        self._messages.put_nowait((kind, body))
        # Noted here, not by the task that reads the queue: it may come to it much later.
        if kind == wire.COPY_BOTH:
            self._copying = True
            self._tick()
        elif kind in {wire.COPY_DONE, wire.ERROR_RESPONSE}:
            self._stop_copying()

    def _accept(self, wal: wire.XLogData) -> memoryview:
        if wal.start != self._position:
            raise Internal(
                f"{self._peer} sent WAL at {format_lsn(wal.start)}; "
                f"{format_lsn(self._position)} comes next"
            )
        self._position = Lsn(wal.start + len(wal.data))
        return wal.data

    def _end(self, error: BorealError) -> None:
        """Note why the connection is over; the first reason counts."""
        if self._ended is None:
            self._ended = error
            self._stop_copying()
            if not self._messages.full():  # else the reader sees `_ended` after what is queued
                self._messages.put_nowait(error)
            self._transport.abort()

    # --- commands ------------------------------------------------------------------------------

    async def _next(self) -> tuple[int, memoryview]:
        """The next message that is not WAL; raises what ended the connection."""
        while True:
            if self._ended is not None and self._messages.empty():
                raise self._ended
            item = await self._messages.get()
            if isinstance(item, BorealError):
                raise item
            if item[0] not in {wire.NOTICE_RESPONSE, wire.PARAMETER_STATUS}:
                return item

    async def greet(self, user: str, application_name: str) -> None:
        """Start up as a physical walsender's client."""
        try:
            await self._greet(user, application_name)
        except BaseException:
            self.abort()
            raise

    async def _greet(self, user: str, application_name: str) -> None:
        parameters = {"user": user, "replication": "true", "application_name": application_name}
        self._transport.write(wire.startup(parameters))
        while True:
            kind, body = await self._next()
            if kind == wire.ERROR_RESPONSE:
                raise wire.read_error(body)
            if kind == wire.AUTHENTICATION and not wire.authentication_done(body):
                raise EngineError(
                    f"{self._peer} wants a password of {user}; pg_hba.conf must let the agent's "
                    "account in by peer",
                    sqlstate="28000",
                )
            if kind == wire.READY_FOR_QUERY:
                return

    async def execute(self, command: str) -> list[_Row]:
        """Run a command, through its copy phase if it has one; the rows it returned."""
        self._transport.write(wire.query(command))
        rows: list[_Row] = []
        refusal: EngineError | None = None
        while True:
            try:
                kind, body = await self._next()
            except BorealError as ended:
                raise refusal or ended from None
            match kind:
                case wire.DATA_ROW:
                    rows.append(wire.read_data_row(body))
                case wire.COPY_DONE:
                    self._transport.write(wire.message(wire.COPY_DONE))
                case wire.ERROR_RESPONSE:
                    refusal = wire.read_error(body)
                case wire.READY_FOR_QUERY:
                    if refusal is not None:
                        raise refusal
                    return rows

    # --- streaming -----------------------------------------------------------------------------

    def expect_wal(self, start: Lsn, on_wal: WalCallback | None) -> None:
        """WAL that arrives, beginning at `start`, goes to `on_wal`, if any."""
        self._on_wal, self._position = on_wal, start

    def send_status(self, durable: Lsn) -> None:
        """Remember `durable`, and report it if a copy is on."""
        self._durable = durable
        if self._copying:
            now_us = wire.postgres_time_us(time.time())
            self._transport.write(wire.standby_status(durable, now_us))

    def send_feedback(self, oldest_xmin: int) -> None:
        """Remember `oldest_xmin`, and report it if a copy is on and it is another than before."""
        self._oldest_xmin = oldest_xmin
        if self._copying and oldest_xmin != self._told_xmin:
            self._told_xmin = oldest_xmin
            now_us = wire.postgres_time_us(time.time())
            self._transport.write(wire.hot_standby_feedback(oldest_xmin, now_us))

    def _tick(self) -> None:
        self.send_status(self._durable)
        self.send_feedback(self._oldest_xmin)
        self._timer = asyncio.get_running_loop().call_later(_STATUS_INTERVAL_S, self._tick)

    def _stop_copying(self) -> None:
        self._copying = False
        if self._timer is not None:
            self._timer.cancel()

    def pause_reading(self) -> None:
        """Leave what comes in the socket."""
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        if not self._transport.is_closing():
            self._transport.resume_reading()

    # --- the end -------------------------------------------------------------------------------

    def abort(self) -> None:
        """Drop the connection now."""
        self._end(Unreachable(f"the connection to {self._peer} was dropped"))

    async def close(self) -> None:
        """Take leave and wait, for a moment, until the connection is gone."""
        if self._ended is None:
            self._stop_copying()
            self._transport.write(wire.message(wire.TERMINATE))
            self._transport.close()
        try:
            await asyncio.wait_for(self._closed.wait(), _CLOSE_TIMEOUT_S)
        except TimeoutError:
            self._transport.abort()
