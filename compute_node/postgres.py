"""Running one PostgreSQL: its process, and the agent's own SQL on it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NoReturn
from weakref import WeakSet

import psycopg
import structlog

from boreal.engine import Engine
from boreal.errors import ProcessFailed
from boreal.types import Lsn, parse_lsn, record_end_before
from compute_node import shim
from compute_node.config import ADMIN, DATABASE, MASTER, ComputeConfig
from compute_node.configuration import write_access
from compute_node.leftover import end_leftover

_log = structlog.get_logger(__name__)

_READY_TIMEOUT_S = 120
_READY_POLL_S = 0.01
_STATUS_LINE = 7
_PROMOTE_WITHIN_S = 600
_PROMOTE_POLL_S = 0.002
_STOP_TIMEOUT_S = 60
_QUIT_TIMEOUT_S = 2
"""An immediate shutdown takes milliseconds, unless processes are frozen."""
_ANSWER_EVERY_S = 1.0
_ANSWER_WITHIN_S = 5.0

_SESSION_OPTIONS = " ".join(
    f"-c {setting}"
    for setting in (
        "synchronous_commit=on",
        "default_transaction_read_only=off",
        "statement_timeout=0",
        "lock_timeout=0",
        "idle_session_timeout=0",
    )
)
"""The owner of a database may have set them otherwise for all its sessions."""

Connection = psycopg.AsyncConnection[tuple[object, ...]]


class Postgres:
    """One run of PostgreSQL in a prepared PGDATA.

    Started by `start`, ended by `stop` or by itself; `exited` waits for either.
    """

    def __init__(self, config: ComputeConfig, engine: Engine, library: Path) -> None:
        self._config = config
        self._engine = engine
        self._shim = library
        self._process: subprocess.Popen[bytes] | None = None
        self._exited = asyncio.Event()
        self._kept: Connection | None = None
        self._opening = asyncio.Lock()
        self._connections: WeakSet[Connection] = WeakSet()

    @property
    def pid(self) -> int:
        """The postmaster's pid; 0 before start."""
        return self._process.pid if self._process else 0

    def start(self) -> None:
        """Start the postmaster. It reads pages through the shim from its first instruction."""
        environment = self._engine.environment(
            shim.environment(
                self._shim,
                self._config.page_socket,
                cache_limited=self._config.cache_bytes > 0,
                handover=self._config.handover_socket,
                tls=self._config.client_tls,
            )
        )
        # Not through the event loop: uvloop cannot start a child as another account.
        self._process = subprocess.Popen(
            [str(self._engine.tool("postgres")), "-D", str(self._config.pgdata)],
            env=environment,
            cwd=self._config.pgdata,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **self._engine.account.popen_arguments(),
        )
        descriptor = os.pidfd_open(self._process.pid)
        asyncio.get_running_loop().add_reader(descriptor, self._on_exit, descriptor)

    def _on_exit(self, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
        if self._process is not None:
            self._process.wait()  # reaps it: a zombie's lock files count as a living postmaster's
        self._exited.set()

    async def exited(self) -> int:
        """Wait for the postmaster to end; return its exit code."""
        if self._process is None:
            raise ProcessFailed("PostgreSQL was not started")
        await self._exited.wait()
        return self._process.wait()

    async def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it: SIGINT is PostgreSQL's fast shutdown, SIGQUIT its immediate one."""
        process = self._process
        if process is not None and not self._exited.is_set():
            await self._end(process, how)
        # Backends too, for one that is frozen would not end, nor would our session with it.
        await end_leftover(self._config.pgdata)
        for connection in list(self._connections):
            async with connection.lock:  # libpq frees at once what somebody else's query still uses
                await connection.close()

    async def _end(self, process: subprocess.Popen[bytes], how: signal.Signals) -> None:
        process.send_signal(how)
        patience_s = _QUIT_TIMEOUT_S if how is signal.SIGQUIT else _STOP_TIMEOUT_S
        try:
            await asyncio.wait_for(self.exited(), patience_s)
        except TimeoutError:
            _log.warning("PostgreSQL did not stop in time; killing it", pid=process.pid)
            process.kill()
            await self.exited()

    @contextlib.asynccontextmanager
    async def connect(self, database: str = DATABASE) -> AsyncIterator[Connection]:
        """A superuser connection in autocommit mode, over the unix socket."""
        connection = await self._connect(database)
        try:
            yield connection
        finally:
            await connection.close()

    async def session(self) -> Connection:
        """A connection that is kept: what is needed in a hurry is asked by it.

        Not to be closed, nor its transactions left open. What a connection needs to begin is then
        in memory already: on a new node the first one has to fetch the catalogs' pages.
        """
        async with self._opening:
            if self._kept is None or self._kept.closed:
                self._kept = await self._connect(DATABASE)
            return self._kept

    async def _connect(self, database: str) -> Connection:
        connection = await psycopg.AsyncConnection.connect(
            host=str(self._config.run_dir),
            port=self._config.postgres_port,
            user=ADMIN,
            dbname=database,
            autocommit=True,
            application_name="boreal_agent",
            connect_timeout=10,
            options=_SESSION_OPTIONS,
        )
        self._connections.add(connection)
        return connection

    async def watch_answers(self) -> NoReturn:
        """Ask it something again and again; ProcessFailed once there is no answer for long.

        Frozen or stuck as a whole, it would not end, and would serve nobody.
        """
        connection: Connection | None = None
        while True:
            asked = asyncio.create_task(self._answer(connection))
            try:
                done, _ = await asyncio.wait({asked}, timeout=_ANSWER_WITHIN_S)
            finally:
                # Not waited for: a query that gets no answer is long in being cancelled.
                asked.cancel()
                asked.add_done_callback(_forget)
            if not done:
                raise ProcessFailed(f"PostgreSQL gives no answer within {_ANSWER_WITHIN_S:g} s")
            try:
                connection = asked.result()
            except psycopg.Error as error:  # it ends, which others notice, or ended this session
                _log.info("PostgreSQL refused an answer", reason=str(error).strip())
                connection = None
            await asyncio.sleep(_ANSWER_EVERY_S)

    async def _answer(self, connection: Connection | None) -> Connection:
        connection = connection or await self._connect(DATABASE)
        await connection.execute("select 1")
        return connection

    async def wait_ready(self) -> None:
        """Wait until it takes connections (a hot standby: until it is consistent)."""
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while not self._ready():
            if self._exited.is_set():
                raise ProcessFailed("PostgreSQL ended while starting; its log says why")
            if time.monotonic() > deadline:
                raise ProcessFailed(
                    f"PostgreSQL takes no connections {_READY_TIMEOUT_S} s after its start"
                )
            await asyncio.sleep(_READY_POLL_S)

    def _ready(self) -> bool:
        """Whether its pid file says so; asking by connecting would fill its log with refusals."""
        try:
            lines = (self._config.pgdata / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > _STATUS_LINE and lines[_STATUS_LINE].strip() == "ready"

    async def promote(self) -> None:
        """End recovery; returns when PostgreSQL accepts writes.

        As pg_ctl does it: pg_promote() looks only every 100 ms whether it is done.
        """
        if self._process is None:
            raise ProcessFailed("PostgreSQL was not started")
        signal_file = self._config.pgdata / "promote"
        signal_file.touch(mode=0o600)
        self._engine.account.own(signal_file)
        self._process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + _PROMOTE_WITHIN_S
        while await _in_recovery(await self.session()):
            if time.monotonic() > deadline:
                raise ProcessFailed(f"PostgreSQL is not promoted after {_PROMOTE_WITHIN_S} s")
            await asyncio.sleep(_PROMOTE_POLL_S)

    def admit_clients(self) -> None:
        """Let clients in from now on."""
        write_access(self._config, self._engine, clients=True)
        if self._process is not None:
            self._process.send_signal(signal.SIGHUP)


def _forget(task: asyncio.Task[Connection]) -> None:
    """Whatever became of it, nobody asks any more."""
    if not task.cancelled():
        task.exception()


async def _in_recovery(connection: Connection) -> bool:
    row = await (await connection.execute("select pg_is_in_recovery()")).fetchone()
    return row is None or bool(row[0])


async def query_lsn(connection: Connection, query: str) -> Lsn:
    """Run a query whose one value is an LSN; 0 where PostgreSQL has none."""
    row = await (await connection.execute(query.encode())).fetchone()
    return parse_lsn(str(row[0])) if row and row[0] is not None else Lsn(0)


async def make_durable(connection: Connection) -> Lsn:
    """Return a record's end, once everything up to it is on a write quorum."""
    end = record_end_before(await query_lsn(connection, "select pg_current_wal_insert_lsn()"))
    # A commit that is written after `end` and waits for the quorum. Without WAL before its commit
    # record it would not wait (RecordTransactionCommit, access/transam/xact.c); hence the message.
    await connection.execute("select pg_logical_emit_message(true, 'boreal', 'durable')")
    return end


def create_roles_sql(password: str) -> str:
    """The statements that give a fresh cluster its master user. One statement a line."""
    literal = "'" + password.replace("'", "''") + "'"
    return "\n".join(
        [
            f"create role {MASTER} login createdb createrole password {literal};",
            f"grant pg_monitor, pg_signal_backend, pg_checkpoint to {MASTER};",
            f"alter database {DATABASE} owner to {MASTER};",
            "",
        ]
    )
