"""The agent's end of the page shim: pages for its PostgreSQL, over a unix socket.

What is said there is in `compute_node.page_protocol`.

Which version of a page. For a reader, whose `lsn` is its replay LSN, exactly that one: a page must
not come from the future. For a writer `lsn` is where it inserts, and storage may not have come so
far, nor need it: a block missing in its files was not changed by this writer since the *read point*
(what it changes it keeps, unless `compute_node.cache` evicts it, which moves the read point first),
so any later LSN gives the same page. We take the read point, which is durable. Except that the
writer may have cut the relation since, which the read point does not show; hence the reports of
cuts, each with an LSN at or past the end of the record that tells of it.

Why a page may be fetched before it is missed, and by another process. PostgreSQL misses a block
when it is in no buffer and reads as zeros in the file. What changes a page, be it a backend or
redo, reads it first or makes it anew, in both cases in a buffer, which is written to the file
before it is given up. So a block that is missed was changed by nobody here since the file was laid
out, or since the block was last cut off or evicted. All versions from that moment up to now are
then one and the same.

- A reader: let a page be fetched at the replay LSN X and used when PostgreSQL misses it at Y. If no
  loss was counted in between, redo touched it nowhere between X and Y (or between Y and X: requests
  may overtake one another), or it would be in the file. So it is the page as of Y too.
- A writer: the read point R of the fetch and that of the miss may differ, for the same reason
  without effect.

Losses are counted in `compute_node.losses`, and what was fetched before the count changed is not
used. A process reads the count before it reads where it stands, so a page as of before a cut never
passes for one fetched after it. For an eviction the read point moves first, then the count, then
the page goes: what is fetched under the new count has all that was evicted.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

import structlog

from boreal.engine import Account
from boreal.errors import BadUsage, BorealError, Internal, MalformedRequest, NotWriter, StaleEpoch
from boreal.histogram import Durations
from boreal.types import BlockNumber, Epoch, Lsn, PageKey, RelationFork, format_lsn
from compute_node.losses import Losses
from compute_node.page_protocol import (
    REQUEST_BYTES,
    Operation,
    Outcome,
    Run,
    ShimRequest,
    answer,
    answer_pages,
)
from compute_node.prefetch import MAX_FETCH, ReadAhead
from compute_node.shim import MAX_SOCKET_PATH_BYTES

MAX_UNDER_WAY = 64
"""Requests for pages under way to storage at a time; more wait their turn."""
ANSWER_WITHIN_S = 45.0
"""Bound on one answer, all waiting included. The shim itself gives up after 60 s."""
AHEAD_PAGES = 3 * MAX_FETCH
"""How far the agent fetches ahead of a sequential reader at most, beyond what that has asked for.

Enough for two nodes to be at work while PostgreSQL consumes a third run."""
STEADY_PAGES = 32
"""Who asks for so many at once is taken for one who goes on: a worker of a parallel scan reads as
many before it jumps, in a table of 300 MB."""

_BACKLOG = 1024
_EPOCH_REFRESHES = 3
_LSN_UNKNOWN = Lsn(2**64 - 1)

_log = structlog.get_logger(__name__)


class PageSource(Protocol):
    """Where pages come from: `compute_node.fleet.Fleet`."""

    async def get_pages(
        self, relation: RelationFork, first: BlockNumber, count: int, lsn: Lsn
    ) -> list[bytes | None]:
        """Consecutive pages as of `lsn`, which is durable; None for what the fork had not then."""

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

    def left(self, run: Run) -> int:
        """How many of the first pages of the run were not cut off."""
        cut = self._cuts.get(run.fork)
        return run.blocks if cut is None else min(max(cut[0] - run.first, 0), run.blocks)

    def forget(self, read_point: Lsn) -> None:
        """Storage, read at `read_point`, shows every cut up to it."""
        self._cuts = {fork: cut for fork, cut in self._cuts.items() if cut[1] > read_point}


class PagePath(Enum):
    """Where the pages of an answer came from."""

    AHEAD = "ahead"
    """They had been fetched ahead, or were being."""
    STORAGE = "storage"
    """A storage node was asked."""
    CUT = "cut"
    """They had been cut off: zeros, without asking anybody."""


@dataclass(slots=True, kw_only=True)
class PageCounters:
    """What the service did since it started."""

    requests: int = 0
    """For pages; each is answered with one or more."""
    pages: int = 0
    zeros: int = 0
    ahead: int = 0
    """Requests answered with what had been fetched ahead."""
    cuts: int = 0
    failures: int = 0
    busy_us: int = 0
    """Time spent on requests for pages, waiting included, summed."""
    slowest_us: int = 0
    took: Mapping[PagePath, Durations] = field(
        default_factory=lambda: {path: Durations() for path in PagePath}
    )
    """Time spent on each request for pages, by where they came from."""


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
        listener = _bind(socket, account)
        service = cls(source, Losses(socket, account), on_fenced)
        service._server = await asyncio.get_running_loop().create_unix_server(
            lambda: _Connection(service), sock=listener, backlog=_BACKLOG
        )
        return service

    def __init__(
        self,
        source: PageSource,
        losses: Losses,
        on_fenced: Callable[[StaleEpoch], None] | None = None,
    ) -> None:
        self._source = source
        self._on_fenced = on_fenced
        self._read_point: Lsn | None = None
        self._asked_at: Counter[Lsn] = Counter()
        self._cuts = Cuts()
        self._turns = asyncio.Semaphore(MAX_UNDER_WAY)
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self.losses = losses
        self._ahead = ReadAhead(self._storage, losses.count)
        self.counters = PageCounters()

    async def close(self) -> None:
        """Stop listening, drop the connections; what was asked meets EIO."""
        if self._server is not None:
            self._server.close()
        tasks = [task for connection in self._connections if (task := connection.drop())]
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._ahead.close()
        self.losses.close()

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
        """Read a writer's pages at a later durable LSN, so that storage may drop older versions.

        An LSN that is not later changes nothing: several have reasons to move it.
        """
        if self._read_point is None:
            raise Internal("only a writer has a read point")
        if read_point <= self._read_point:
            return
        self._read_point = read_point
        self._cuts.forget(read_point)

    @property
    def oldest_read(self) -> Lsn | None:
        """No page will be asked of storage below it again; None for a reader that asks for none."""
        asked = [lsn for lsn, count in self._asked_at.items() if count]
        if self._read_point is not None:
            asked.append(self._read_point)
        return min(asked, default=None)

    # --- requests --------------------------------------------------------------------------------

    def hint(self, request: ShimRequest) -> None:
        """PostgreSQL will miss this page soon. Raises nothing."""
        if self._cuts.left(Run(request.key.relation, request.key.block, 1)):
            self._ahead.hint(request.key, request.lsn, request.losses)

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
            return answer(Outcome.FAILED)

    async def _carry_out(self, request: ShimRequest) -> bytes:
        if self._read_point is None and not request.in_recovery:
            raise NotWriter("PostgreSQL is past recovery, but was not made the writer here")
        if request.operation is Operation.CUT:
            self._record_cut(request)
            return answer(Outcome.DONE)
        started_ns = time.perf_counter_ns()
        pages, path = await self._pages(request)
        took_us = (time.perf_counter_ns() - started_ns) // 1000
        counters = self.counters
        zeros = pages.count(None)
        counters.requests += 1
        counters.busy_us += took_us
        counters.slowest_us = max(counters.slowest_us, took_us)
        counters.took[path].observe(took_us / 1e6)
        counters.zeros += zeros
        counters.pages += len(pages) - zeros
        return answer_pages(pages)

    def _record_cut(self, request: ShimRequest) -> None:
        if self._read_point is None:
            return  # redo of a cut: storage shows it at the LSN that readers ask at
        # Local recovery of a writer replays cuts too, before it counts their records as replayed.
        lsn = _LSN_UNKNOWN if request.in_recovery else request.lsn
        self._cuts.record(request.key, lsn)
        self.counters.cuts += 1

    async def _pages(self, request: ShimRequest) -> tuple[list[bytes | None], PagePath]:
        """Pages from `request.key` on: as many as were asked for, or fewer, but one at least."""
        run = Run(*request.key, request.window)
        if not self._cuts.left(run):
            return [None] * run.blocks, PagePath.CUT
        if run.blocks > 1:  # a sequential reader: the next window while it consumes this one
            self._ahead.want(_ahead_of(run), request.lsn, request.losses)
        if pages := await self._ahead.take(run):
            self.counters.ahead += 1
            path = PagePath.AHEAD
        else:
            pages = await self._asked_for(run, request.lsn)
            path = PagePath.STORAGE
        left = self._cuts.left(run)  # now: it may have been cut while we waited
        if left < len(pages):
            pages = [page if position < left else None for position, page in enumerate(pages)]
        return pages, path

    async def _asked_for(self, run: Run, lsn: Lsn) -> list[bytes | None]:
        """The run, or at least its first page: what is wrong with another is not its fault."""
        try:
            async with self._turns:
                return await self._storage(run, lsn)
        except StaleEpoch:
            raise
        except BorealError:
            if run.blocks == 1:
                raise
        async with self._turns:
            return await self._storage(run._replace(blocks=1), lsn)

    # --- storage ---------------------------------------------------------------------------------

    async def _storage(self, run: Run, lsn: Lsn) -> list[bytes | None]:
        """Pages for a PostgreSQL that stands at `lsn`."""
        if self._read_point is not None:
            return await self._read_as_writer(run)
        if lsn == 0:
            raise MalformedRequest("a page was asked for before the replay LSN was known")
        refreshes = 0
        while True:
            try:
                # What was replayed is durable: readers are fed up to the VDL only.
                return await self._read(run, lsn)
            except StaleEpoch as error:
                refreshes += 1
                if refreshes > _EPOCH_REFRESHES:
                    raise
                self._source.raise_epoch(Epoch(error.details["promised_epoch"]))

    async def _read_as_writer(self, run: Run) -> list[bytes | None]:
        while True:
            read_point = self._read_point
            if read_point is None:
                raise Internal("a writer without a read point")
            try:
                return await self._read(run, read_point)
            except StaleEpoch as error:
                if self._on_fenced is not None:
                    self._on_fenced(error)
                raise
            except BorealError:
                if read_point == self._read_point:
                    raise  # else storage may have dropped that version: the new one will do

    async def _read(self, run: Run, lsn: Lsn) -> list[bytes | None]:
        self._asked_at[lsn] += 1
        try:
            return await self._source.get_pages(*run, lsn)
        finally:
            self._asked_at[lsn] -= 1
            if not self._asked_at[lsn]:
                del self._asked_at[lsn]

    # --- connections report themselves -----------------------------------------------------------

    def connected(self, connection: _Connection) -> None:
        """A PostgreSQL process has come."""
        self._connections.add(connection)

    def disconnected(self, connection: _Connection) -> None:
        """It has gone."""
        self._connections.discard(connection)


def _ahead_of(run: Run) -> Run:
    """What to fetch while PostgreSQL consumes the run."""
    first = run.first + run.blocks
    if run.blocks < STEADY_PAGES:
        return Run(run.fork, BlockNumber(first), 2 * run.blocks)
    end = first + AHEAD_PAGES
    return Run(run.fork, BlockNumber(first), end - end % MAX_FETCH - first)


class _Connection(asyncio.Protocol):
    """One PostgreSQL process. Holds one request; a peer that sends a second one is cut off."""

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
        buffer = self._buffer + data
        whole = len(buffer) - len(buffer) % REQUEST_BYTES
        self._buffer = buffer[whole:]
        try:
            for at in range(0, whole, REQUEST_BYTES):
                self._received(ShimRequest.unpack(buffer, at))
        except MalformedRequest as error:
            _log.warning("a page connection is dropped", why=error.message)
            self.drop()

    def _received(self, request: ShimRequest) -> None:
        if request.operation is Operation.PREFETCH:
            self._service.hint(request)
            return
        if self._task is not None:
            raise MalformedRequest("a second request came while one was under way")
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
