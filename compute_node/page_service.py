"""The agent's end of the page shim: pages for its PostgreSQL, over a unix socket.

The protocol. Each PostgreSQL process has a connection of its own and one request under way on it.
Both messages are C structs of the machine's byte order (`boreal_shim.c` has the same two):

    request, 32 bytes   magic u32 · operation u8 · fork u8 · in_recovery u8 · 0 u8
                        · tablespace u32 · database u32 · relation u32 · block u32 · lsn u64
    answer, 8 bytes     magic u32 · outcome u32; with PAGE, the 8192 bytes of the page follow

GET_PAGE is answered with PAGE, ZEROS (the fork has no such block) or FAILED; CUT (the fork loses
every block from `block` on) with DONE or FAILED. FAILED becomes EIO; our log says why.

Which version of a page. For a reader, whose `lsn` is its replay LSN, exactly that one: a page must
not come from the future. For a writer `lsn` is where it inserts, and storage may not have come so
far, nor need it: a block missing in its files was not changed by this writer (what it changes it
never drops), so any LSN from the start of its epoch on gives the same page. We take the *read
point*, which is durable. Except that the writer may have cut the relation since, which the read
point does not show; hence the reports of cuts, each with an LSN at or past the end of the record
that tells of it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, Protocol

import structlog

from boreal.engine import Account
from boreal.errors import BadUsage, BorealError, Internal, MalformedRequest, NotWriter, StaleEpoch
from boreal.types import (
    PAGE_BYTES,
    BlockNumber,
    Epoch,
    Fork,
    Lsn,
    PageKey,
    RelationFork,
    format_lsn,
)
from compute_node.shim import MAX_SOCKET_PATH_BYTES

MAX_UNDER_WAY = 64
"""Pages asked of storage at a time; more requests wait their turn."""
ANSWER_WITHIN_S = 45.0
"""Bound on one answer, all waiting included. The shim itself gives up after 60 s."""

_MAGIC = 0x31534742
_REQUEST = struct.Struct("=IBBBxIIIIQ")
_ANSWER = struct.Struct("=II")
_BACKLOG = 1024
_EPOCH_REFRESHES = 3
_LSN_UNKNOWN = Lsn(2**64 - 1)

_log = structlog.get_logger(__name__)


class Operation(IntEnum):
    """What a PostgreSQL process asks for."""

    GET_PAGE = 1
    CUT = 2


class Outcome(IntEnum):
    """What it is answered."""

    FAILED = 0
    PAGE = 1
    ZEROS = 2
    DONE = 3


class ShimRequest(NamedTuple):
    """One request of the shim. `lsn` is the replay LSN in recovery, the insert LSN past it."""

    operation: Operation
    key: PageKey
    in_recovery: bool
    lsn: Lsn

    def pack(self) -> bytes:
        """As it travels."""
        relation, block = self.key
        tablespace, database, number, fork = relation
        return _REQUEST.pack(
            _MAGIC,
            self.operation,
            fork,
            self.in_recovery,
            tablespace,
            database,
            number,
            block,
            self.lsn,
        )

    @classmethod
    def unpack(cls, data: bytes) -> ShimRequest:
        """Read one; MalformedRequest if it is none."""
        magic, operation, fork, in_recovery, tablespace, database, relation, block, lsn = (
            _REQUEST.unpack(data)
        )
        if magic != _MAGIC:
            raise MalformedRequest("the peer does not speak the page shim's protocol")
        try:
            key = PageKey(RelationFork(tablespace, database, relation, Fork(fork)), block)
            return cls(Operation(operation), key, bool(in_recovery), Lsn(lsn))
        except ValueError as error:
            raise MalformedRequest(f"not a request of the page shim: {error}") from error


class PageSource(Protocol):
    """Where pages come from: `compute_node.fleet.Fleet`."""

    async def get_page(self, key: PageKey, lsn: Lsn) -> bytes | None:
        """One page as of `lsn`, which is durable; None if the fork had no such block then."""

    def raise_epoch(self, epoch: Epoch) -> None:
        """Act under `epoch` from now on, if it is newer."""


class Cuts:
    """What this writer cut off its relations since the read point.

    Of each fork the lowest cut is kept, until the read point has passed the latest: a missing block
    at or past it was not written since (it would be here), so it is zeros.
    """

    def __init__(self) -> None:
        self._cuts: dict[RelationFork, tuple[BlockNumber, Lsn]] = {}

    def __len__(self) -> int:
        return len(self._cuts)

    def record(self, first: PageKey, lsn: Lsn) -> None:
        """The fork loses every block from `first` on; the WAL up to `lsn` says so."""
        block, latest = self._cuts.get(first.relation, (first.block, lsn))
        self._cuts[first.relation] = (min(block, first.block), max(latest, lsn))

    def hide(self, key: PageKey) -> bool:
        """Whether the page was cut off."""
        cut = self._cuts.get(key.relation)
        return cut is not None and key.block >= cut[0]

    def forget(self, read_point: Lsn) -> None:
        """Storage, read at `read_point`, shows every cut up to it."""
        self._cuts = {fork: cut for fork, cut in self._cuts.items() if cut[1] > read_point}


@dataclass(slots=True, kw_only=True)
class PageCounters:
    """What the service did since it started."""

    pages: int = 0
    zeros: int = 0
    cuts: int = 0
    failures: int = 0
    busy_us: int = 0
    """Time spent on pages and zeros, waiting included, summed over the requests."""
    slowest_us: int = 0


class PageService:
    """Answers the shim of one PostgreSQL.

    Serves a reader until `become_writer`, to be called once all is replayed and *before* the
    promotion: a request made past recovery fails until then. A reader that meets a newer epoch
    takes it over and asks again; a writer that does has been superseded, and `on_fenced` is told.
    """

    @classmethod
    async def start(
        cls,
        source: PageSource,
        *,
        socket: Path,
        account: Account,
        on_fenced: Callable[[StaleEpoch], None] | None = None,
    ) -> PageService:
        """Listen on `socket` for processes of `account`; replace what a predecessor left there."""
        service = cls(source, on_fenced)
        service._server = await asyncio.get_running_loop().create_unix_server(
            lambda: _Connection(service), sock=_bind(socket, account), backlog=_BACKLOG
        )
        return service

    def __init__(
        self, source: PageSource, on_fenced: Callable[[StaleEpoch], None] | None = None
    ) -> None:
        self._source = source
        self._on_fenced = on_fenced
        self._read_point: Lsn | None = None
        self._cuts = Cuts()
        self._turns = asyncio.Semaphore(MAX_UNDER_WAY)
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self.counters = PageCounters()

    async def close(self) -> None:
        """Stop listening, drop the connections; what was asked meets EIO."""
        if self._server is not None:
            self._server.close()
        tasks = [task for connection in self._connections if (task := connection.drop())]
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def read_point(self) -> Lsn | None:
        """Where a writer's pages are read at; None before `become_writer`."""
        return self._read_point

    def become_writer(self, read_point: Lsn) -> None:
        """From now on serve a writer whose WAL starts at or before `read_point`, durable."""
        if self._read_point is not None:
            raise Internal(f"already the writer, reading at {format_lsn(self._read_point)}")
        self._read_point = read_point
        _log.info("pages are served to a writer", read_point=format_lsn(read_point))

    def advance_read_point(self, read_point: Lsn) -> None:
        """Read a writer's pages at a later durable LSN, so that storage may drop older versions."""
        if self._read_point is None or read_point < self._read_point:
            raise Internal(f"the read point cannot become {format_lsn(read_point)}")
        self._read_point = read_point
        self._cuts.forget(read_point)

    async def answer(self, request: ShimRequest) -> bytes:
        """The answer as it travels. Raises nothing: FAILED says it, the log says why."""
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                return await self._carry_out(request)
        except Exception as error:  # noqa: BLE001 - the edge: PostgreSQL waits for an answer
            expected = isinstance(error, (BorealError, TimeoutError))
            self.counters.failures += 1
            _log.error(
                "a request of PostgreSQL failed",
                operation=request.operation.name,
                page=str(request.key),
                lsn=format_lsn(request.lsn),
                in_recovery=request.in_recovery,
                error=type(error).__name__,
                why=str(error) or f"no answer within {ANSWER_WITHIN_S:g} s",
                exc_info=None if expected else error,
            )
            return _head(Outcome.FAILED)

    async def _carry_out(self, request: ShimRequest) -> bytes:
        if request.operation is Operation.CUT:
            self._record_cut(request)
            return _head(Outcome.DONE)
        started_ns = time.perf_counter_ns()
        page = await self._page(request)
        took_us = (time.perf_counter_ns() - started_ns) // 1000
        counters = self.counters
        counters.busy_us += took_us
        counters.slowest_us = max(counters.slowest_us, took_us)
        if page is None:
            counters.zeros += 1
            return _head(Outcome.ZEROS)
        if len(page) != PAGE_BYTES:
            raise Internal(f"a page of {len(page)} bytes came for {request.key}")
        counters.pages += 1
        return _PAGE_HEAD + page

    def _record_cut(self, request: ShimRequest) -> None:
        if self._writers_read_point(request) is None:
            return  # redo of a cut: storage shows it at the LSN that readers ask at
        # Local recovery of a writer replays cuts too, before it counts their records as replayed.
        lsn = _LSN_UNKNOWN if request.in_recovery else request.lsn
        self._cuts.record(request.key, lsn)
        self.counters.cuts += 1

    async def _page(self, request: ShimRequest) -> bytes | None:
        read_point = self._writers_read_point(request)
        if read_point is None:
            return await self._readers_page(request.key, request.lsn)
        return await self._writers_page(request.key, read_point)

    def _writers_read_point(self, request: ShimRequest) -> Lsn | None:
        """None for a reader."""
        if self._read_point is None and not request.in_recovery:
            raise NotWriter("PostgreSQL is past recovery, but was not made the writer here")
        return self._read_point

    async def _readers_page(self, key: PageKey, lsn: Lsn) -> bytes | None:
        if lsn == 0:
            raise MalformedRequest("a page was asked for before the replay LSN was known")
        refreshes = 0
        async with self._turns:
            while True:
                try:
                    # What was replayed is durable: readers are fed up to the VDL only.
                    return await self._source.get_page(key, lsn)
                except StaleEpoch as error:
                    refreshes += 1
                    if refreshes > _EPOCH_REFRESHES:
                        raise
                    self._source.raise_epoch(Epoch(error.details["promised_epoch"]))

    async def _writers_page(self, key: PageKey, read_point: Lsn) -> bytes | None:
        if self._cuts.hide(key):
            return None
        try:
            async with self._turns:
                return await self._source.get_page(key, read_point)
        except StaleEpoch as error:
            if self._on_fenced is not None:
                self._on_fenced(error)
            raise

    # --- connections report themselves -----------------------------------------------------------

    def connected(self, connection: _Connection) -> None:
        """A PostgreSQL process has come."""
        self._connections.add(connection)

    def disconnected(self, connection: _Connection) -> None:
        """It has gone."""
        self._connections.discard(connection)


class _Connection(asyncio.Protocol):
    """One PostgreSQL process. Holds at most one request; a peer that sends more is cut off."""

    def __init__(self, service: PageService) -> None:
        self._service = service
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream's is a Transport
        self._service.connected(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._service.disconnected(self)
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) < _REQUEST.size:
            return
        try:
            if self._task is not None or len(self._buffer) > _REQUEST.size:
                raise MalformedRequest("a second request came while one was under way")
            request = ShimRequest.unpack(self._buffer)
        except MalformedRequest as error:
            _log.warning("a page connection is dropped", why=error.message)
            self.drop()
            return
        self._buffer = b""
        self._task = asyncio.get_running_loop().create_task(self._respond(request))

    async def _respond(self, request: ShimRequest) -> None:
        answer = await self._service.answer(request)
        self._task = None  # before the answer goes out: the next request may follow at once
        if self._transport is not None:
            self._transport.write(answer)

    def drop(self) -> asyncio.Task[None] | None:
        """Close the connection and return what was under way for it, now cancelled."""
        if self._transport is not None:
            self._transport.abort()
        if self._task is not None:
            self._task.cancel()
        return self._task


def _bind(path: Path, account: Account) -> socket.socket:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise BadUsage(
            f"{path} is too long for a unix socket ({MAX_SOCKET_PATH_BYTES} bytes at most); choose "
            "a data directory with a shorter path"
        )
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    # Whoever may connect reads the whole database: PostgreSQL's account alone.
    path.chmod(0o600)
    account.own(path)
    return listener


def _head(outcome: Outcome) -> bytes:
    return _ANSWER.pack(_MAGIC, outcome)


_PAGE_HEAD = _head(Outcome.PAGE)
