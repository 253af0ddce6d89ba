"""A bound on the pages kept in PGDATA: what is over it is taken out of the relation files again.

Eviction punches holes into files that PostgreSQL uses; a hole means "ask storage" to the page shim.
It must never take away a byte that the page from storage would not bring back. What may go are runs
of blocks of main forks of permanent relations. Not visibility maps, free space maps and init
forks; not unlogged relations, which storage does not have (they have an init fork), nor temporary
ones; no file of one block, for it may be a sequence, whose last values are not in the WAL; and not
what every session needs to begin, the catalogs as initdb made them. One round, on a writer:

1. The content of some runs is read; of each a digest is kept.
2. The transactions are noted that have an id, or hold a lock on a relation that is more than a
   reader's: whoever may have changed a page, vacuum and index builds included. Then we wait until
   each of them has ended.
3. S, a record's end, is the WAL insert position *then*. We wait until S is on a write quorum and in
   the page index of some storage nodes, and move the page service's read point to S.
4. The count of evictions grows (`compute_node.losses`), so that nothing fetched before is used now.
5. Each run is locked against PostgreSQL's writes, read again, and punched if its content is still
   the same.

Why nothing is lost. Call F the content of a block of such a run.

- *F is in the log below S.* PostgreSQL writes no page before the WAL of its changes is inserted.
  Where it does (index builds that log their pages at the end, CREATE DATABASE by copying files), it
  is inserted before their transaction ends, which was before S was taken. A flag set without moving
  the page's LSN (PD_ALL_VISIBLE) is logged while the page is locked, and so not written. What is
  not logged at all serves only the transaction or vacuum that made it (cmin and cmax, speculative
  tokens, btree cycle ids); those have ended. Hint bits and dead-item marks are lost, and are set
  again by whoever misses them, as on any standby.
- *What is newer than F is not lost.* It is in shared buffers, dirty, and will be written: a write
  between 1 and 5 changes the content, one during 5 waits for the lock, one after 5 fills the hole.
  Hence a block that is missed afterwards was not changed after F, and the page at any LSN from S on
  is F. Buffers that hold F clean may go on being read, changed, and written.
- *A read beside the punch* could find half of F. The shim makes reads again that overlap one: the
  count of evictions is odd meanwhile, and another afterwards.
- *A file that was dropped, truncated, or made again* since 1 has another inode or content. A cut
  between the look and the punch leaves nothing there to punch but zeros.
- *A checkpoint* only writes what is dirty; it needs no file to be complete.

On a reader there are no transactions, and pages are asked for at the replay LSN. A page may be
written while the record that changed it is still being replayed: so instead of 2 and 3 we wait
until replay has moved, or was seen waiting for more log. Then F is in the log below the replay LSN.
An instance that is being promoted evicts nothing.

The bound is soft: pages come between two rounds, dirty ones stay, and so do those which a running
transaction may have changed. What goes is chosen by a hand that sweeps over all files, not by use:
pages in use are in shared buffers.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import hashlib
import os
import struct
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import LiteralString, ParamSpec, TypeVar

import psycopg
import structlog

from boreal.errors import BorealError, NotNow, StaleEpoch
from boreal.types import PAGE_BYTES, Fork, Lsn, RelationFork
from compute_node.fleet import Fleet
from compute_node.life import Life, LifeState
from compute_node.losses import Losses
from compute_node.page_service import PageService
from compute_node.pgdata import RelationFile, relation_files, relation_path
from compute_node.postgres import Postgres, make_durable

_CHECK_S = 1.0
_FAILED_PAUSE_S = 5.0
_LOW_WATER = 0.95
"""Eviction goes on until so much of the bound is left."""
_RUN_BYTES = 16 * PAGE_BYTES
_ROUND_BYTES = 64 * 1024 * 1024
_FIRST_NORMAL_RELATION = 16384
"""FirstNormalObjectId (access/transam.h): catalogs as initdb made them have lower numbers."""
_SETTLE_WITHIN_S = 60.0
_FIRST_POLL_S = 0.01
_LAST_POLL_S = 0.5
_NODES_INDEXED = 3
"""So many nodes shall be able to serve the new read point before it is taken."""

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_F_OFD_SETLK = 37
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock, fcntl(2), on 64-bit Linux
_BLOCKS_BYTES = 512
"""What st_blocks counts in, whatever the file system (stat(2))."""

_CHANGING: LiteralString = """
    select virtualtransaction from pg_locks
    where (locktype = 'transactionid' and mode = 'ExclusiveLock'
           or locktype = 'relation' and mode <> 'AccessShareLock')
      and pid is not null"""
"""Transactions that may be changing pages. Prepared ones, of no process, change none any more."""
_REPLAY: LiteralString = """
    select pg_last_wal_replay_lsn() - '0/0', exists (
        select from pg_stat_activity where backend_type = 'startup' and wait_event in
            ('RecoveryWalStream', 'RecoveryWalAll', 'RecoveryRetrieveRetryInterval'))"""

_log = structlog.get_logger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

Connection = psycopg.AsyncConnection[tuple[object, ...]]
Settle = Callable[[], Awaitable[None]]
"""Returns once every page as it was in the files when it was called can be had from storage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A run of a file as it was."""

    file: RelationFile
    inode: int
    offset: int
    length: int
    digest: bytes


class RelationFiles:
    """The relation files of a data directory as a bounded cache. No method is for an event loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hand: tuple[str, int] = ("", 0)

    def local_bytes(self) -> int:
        """What all relation files take on disk. Files may come and go meanwhile."""
        total = 0
        for file in relation_files(self._path):
            try:
                total += (self._path / file.path).stat().st_blocks * _BLOCKS_BYTES
            except FileNotFoundError:
                continue
        return total

    def choose(self, wanted_bytes: int) -> list[_Candidate]:
        """Runs of at least that size in all, if there are so many; the next ones under the hand."""
        chosen: list[_Candidate] = []
        have = 0
        files = sorted(self._evictable(), key=lambda file: file.path)
        path, offset = self._hand
        ahead = [file for file in files if file.path >= path]
        for file in (*ahead, *(file for file in files if file.path < path)):
            start = offset if file.path == path else 0
            for candidate in self._runs(file, start, wanted_bytes - have):
                chosen.append(candidate)
                have += candidate.length
            if have >= wanted_bytes:
                last = chosen[-1]
                self._hand = (last.file.path, last.offset + last.length)
                return chosen
        self._hand = ("", 0)
        return chosen

    def punch(self, candidates: list[_Candidate]) -> int:
        """Take out what has not changed since it was chosen; return its bytes."""
        freed = 0
        for file in dict.fromkeys(candidate.file for candidate in candidates):
            mine = [candidate for candidate in candidates if candidate.file == file]
            if self._is_unlogged(file.fork):
                continue  # made unlogged by a transaction that has ended since
            try:
                descriptor = os.open(self._path / file.path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                inode = os.fstat(descriptor).st_ino
                freed += sum(_punch(descriptor, one) for one in mine if one.inode == inode)
            finally:
                os.close(descriptor)
        return freed

    def _evictable(self) -> Iterator[RelationFile]:
        for file in relation_files(self._path):
            fork = file.fork
            if (
                fork.fork is Fork.MAIN
                and fork.database != 0
                and fork.relation >= _FIRST_NORMAL_RELATION
                and not self._is_unlogged(fork)
            ):
                yield file

    def _is_unlogged(self, fork: RelationFork) -> bool:
        return (self._path / relation_path(fork._replace(fork=Fork.INIT), 0)).exists()

    def _runs(self, file: RelationFile, start: int, wanted_bytes: int) -> Iterator[_Candidate]:
        try:
            descriptor = os.open(self._path / file.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            status = os.fstat(descriptor)
            if status.st_size <= PAGE_BYTES and file.segment == 0:
                return
            for offset in _data_runs(descriptor, start):
                if wanted_bytes <= 0:
                    return
                content = os.pread(descriptor, _RUN_BYTES, offset)
                length = len(content) - len(content) % PAGE_BYTES
                if length:
                    wanted_bytes -= length
                    yield _Candidate(
                        file=file,
                        inode=status.st_ino,
                        offset=offset,
                        length=length,
                        digest=_digest(content[:length]),
                    )
        finally:
            os.close(descriptor)


def _data_runs(descriptor: int, start: int) -> Iterator[int]:
    """Where runs begin that are not wholly holes, from `start` on; aligned to their size."""
    while True:
        try:
            start = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole is left
            return
        start -= start % _RUN_BYTES
        yield start
        start += _RUN_BYTES


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _punch(descriptor: int, candidate: _Candidate) -> int:
    """Punch one run if it is as it was and nobody is writing to it; return the bytes punched."""
    offset, length = candidate.offset, candidate.length
    try:
        _lock(descriptor, fcntl.F_WRLCK, offset, length)
    except BlockingIOError:
        return 0  # being written
    try:
        if _digest(os.pread(descriptor, length, offset)) != candidate.digest:
            return 0
        how = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        if _libc.fallocate(descriptor, how, offset, length) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"no hole can be punched into {candidate.file.path}")
    finally:
        _lock(descriptor, fcntl.F_UNLCK, offset, length)
    return length


def _lock(descriptor: int, how: int, offset: int, length: int) -> None:
    """BlockingIOError if another has it."""
    fcntl.fcntl(descriptor, _F_OFD_SETLK, _FLOCK.pack(how, os.SEEK_SET, offset, length, 0))


class BoundedCache:
    """Keeps relation files within `limit_bytes`, as said above. One for each PostgreSQL."""

    def __init__(self, files: RelationFiles, losses: Losses, limit_bytes: int) -> None:
        self._files = files
        self._losses = losses
        self._limit_bytes = limit_bytes
        self.evicted_bytes = 0

    async def shrink(self, settle: Settle, may_evict: Callable[[], bool]) -> bool:
        """One round; whether another is due at once. Raises what `settle` does."""
        over = await _in_thread(self._files.local_bytes) - self._limit_bytes
        if over <= 0:
            return False
        wanted = min(over + int((1 - _LOW_WATER) * self._limit_bytes), _ROUND_BYTES)
        candidates = await _in_thread(self._files.choose, wanted)
        if not candidates:
            return False
        await settle()
        if not may_evict():
            return False
        with self._losses.evicting():
            freed = await _in_thread(self._files.punch, candidates)
        self.evicted_bytes += freed
        _log.debug("evicted", bytes=freed, over_bytes=over)
        return freed > 0 and over > freed


async def _in_thread(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run it in a thread, and when cancelled, only end with it."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise


# --- settling ------------------------------------------------------------------------------------


async def settle_writer(connection: Connection, fleet: Fleet, pages: PageService) -> None:
    """Steps 2 and 3. NotNow if transactions or storage nodes take too long."""
    waited_for = await _changing(connection)

    async def ended() -> bool:
        return not waited_for & await _changing(connection)

    await _poll(ended, "a transaction that may have changed the pages to evict goes on")
    settled = await make_durable(connection)

    async def indexed() -> bool:
        states = await fleet.index_states()
        return sum(state.indexed >= settled for state in states.values()) >= _NODES_INDEXED

    await _poll(indexed, "storage nodes have not indexed enough of the log")
    pages.advance_read_point(settled)


async def settle_reader(connection: Connection) -> None:
    """Wait until no record is being replayed any more that was when this was called."""
    first = await _replay(connection)

    async def moved() -> bool:
        lsn, waits = await _replay(connection)
        return waits or lsn > first[0]

    await _poll(moved, "replay stands still")


async def _changing(connection: Connection) -> set[str]:
    rows = await (await connection.execute(_CHANGING)).fetchall()
    return {str(name) for (name,) in rows}


async def _replay(connection: Connection) -> tuple[Lsn, bool]:
    row = await (await connection.execute(_REPLAY)).fetchone()
    if row is None or row[0] is None:
        return Lsn(0), False
    return Lsn(int(str(row[0]))), bool(row[1])


async def _poll(condition: Callable[[], Awaitable[bool]], otherwise: str) -> None:
    """Wait for the condition; NotNow, saying `otherwise`, if it does not come true in time."""
    pause_s = _FIRST_POLL_S
    try:
        async with asyncio.timeout(_SETTLE_WITHIN_S):
            while not await condition():
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LAST_POLL_S)
    except TimeoutError:
        raise NotNow(otherwise) from None


# --- a life's task -------------------------------------------------------------------------------


async def keep_within(
    cache: BoundedCache, postgres: Postgres, fleet: Fleet, pages: PageService, life: Life
) -> None:
    """Keep a cache within its bound while the instance reads or writes. Ends by being cancelled."""

    async def settle(state: LifeState) -> None:
        async with postgres.connect() as connection:
            if state is LifeState.WRITER:
                await settle_writer(connection, fleet, pages)
            else:
                await settle_reader(connection)

    def stays(state: LifeState) -> bool:
        return life.state is state

    while True:
        state = life.state
        again = False
        if state in {LifeState.READER, LifeState.WRITER}:
            try:
                again = await cache.shrink(partial(settle, state), partial(stays, state))
            except StaleEpoch:
                raise
            except (BorealError, psycopg.Error) as error:
                _log.warning("the cache stays above its bound", reason=str(error))
                await asyncio.sleep(_FAILED_PAUSE_S)
        if not again:
            await asyncio.sleep(_CHECK_S)
