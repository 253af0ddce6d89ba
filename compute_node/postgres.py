"""Running one PostgreSQL: its configuration, its process, and the agent's own SQL on it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import psycopg
import structlog

from boreal.engine import Engine
from boreal.errors import ProcessFailed
from boreal.types import Lsn, parse_lsn, record_end_before
from compute_node import shim
from compute_node.config import ADMIN, DATABASE, MASTER, SHIPPER_NAME, ComputeConfig

_log = structlog.get_logger(__name__)

AFTER_IMAGES = "gin,spgist"
"""Resource managers whose records carry an image of each page after the change, which storage takes
for the page. For all others it has PostgreSQL's redo (storage_node/redo)."""

_READY_TIMEOUT_S = 120
_READY_POLL_S = 0.01
_STATUS_LINE = 7
_IPC_RMID = 0
_STOP_TIMEOUT_S = 60


def _settings(config: ComputeConfig) -> dict[str, str]:
    return {
        "listen_addresses": config.host,
        "port": str(config.postgres_port),
        "unix_socket_directories": str(config.run_dir),
        "unix_socket_permissions": "0700",
        # The log leaves through the agent, the only synchronous standby: PostgreSQL's own queue of
        # commits waiting for it is the asynchronous group commit.
        "wal_level": "replica",
        "max_wal_senders": "10",
        "max_replication_slots": "10",
        "synchronous_standby_names": SHIPPER_NAME,
        "wal_sender_timeout": "0",
        "hot_standby": "on",
        "primary_conninfo": (
            f"host={config.feed_dir} port={config.postgres_port} user={ADMIN} "
            "application_name=boreal_reader"
        ),
        "wal_receiver_timeout": "0",
        "wal_retrieve_retry_interval": "100ms",
        "recovery_target_timeline": "latest",
        # Hints of what will be read soon let the page service fetch it in time: those of bitmap
        # scans, and of redo, which looks ahead in the WAL it has received.
        "effective_io_concurrency": "32",
        "maintenance_io_concurrency": "64",
        "recovery_prefetch": "try",
        "wal_decode_buffer_size": "4MB",
        # Local files are a cache: durability and page checksums are the storage nodes' work.
        "fsync": "off",
        "full_page_writes": "off",
        # A backend that was killed may leave half a page in a local file, and nothing here would
        # mend it: after a crash everything is rebuilt from storage.
        "restart_after_crash": "off",
        "wal_log_hints": "off",
        "wal_consistency_checking": AFTER_IMAGES,
        # Bundles take the checkpoints that bound recovery; these would only repeat the work.
        "checkpoint_timeout": "30min",
        "max_wal_size": "4GB",
        # In PGDATA, which is made anew at every start: a PostgreSQL that was killed would leave
        # its segments in /dev/shm for ever.
        "dynamic_shared_memory_type": "mmap",
        "logging_collector": "off",
        "log_line_prefix": "%m [%p] %b ",
        "cluster_name": config.name,
        **dict(config.settings),
    }


def _hba(*, clients: bool) -> str:
    """Who may connect. The agent by its OS account alone; clients only once this is the writer."""
    return "\n".join(
        [
            f"local all {ADMIN} peer map=agent",
            f"local replication {ADMIN} peer map=agent",
            f"host all {ADMIN} all reject",
            "local all all scram-sha-256" if clients else "local all all reject",
            "host all all all scram-sha-256" if clients else "host all all all reject",
            "",
        ]
    )


def write_configuration(config: ComputeConfig, engine: Engine) -> None:
    """Write PGDATA's configuration files, clients kept out."""
    quoted = {name: value.replace("'", "''") for name, value in _settings(config).items()}
    lines = "".join(f"{name} = '{value}'\n" for name, value in quoted.items())
    agent = psutil.Process().username()
    _write(config.pgdata / "postgresql.conf", lines, engine)
    _write(config.pgdata / "postgresql.auto.conf", "", engine)
    _write(config.pgdata / "pg_hba.conf", _hba(clients=False), engine)
    _write(config.pgdata / "pg_ident.conf", f"agent {agent} {ADMIN}\n", engine)


def _write(path: Path, text: str, engine: Engine) -> None:
    path.write_text(text)
    path.chmod(0o600)
    engine.account.own(path)


def prepare_directories(config: ComputeConfig, engine: Engine) -> None:
    """Make the directories PostgreSQL's account must get into, empty."""
    shutil.rmtree(config.pgdata, ignore_errors=True)
    shutil.rmtree(config.run_dir, ignore_errors=True)
    for path in (config.pgdata, config.run_dir, config.feed_dir):
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
        engine.account.own(path)


async def end_leftover(config: ComputeConfig) -> None:
    """End a PostgreSQL that a killed agent left behind in our PGDATA, and what it held.

    The kernel tells it to quit when its agent dies (the shim asks for that); this waits for it to
    be gone, so that nobody writes into the directory about to be rebuilt.
    """
    try:
        lines = (config.pgdata / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return
    with contextlib.suppress(psutil.NoSuchProcess, ValueError, IndexError):
        postmaster = psutil.Process(int(lines[0]))
        if postmaster.name() == "postgres" and str(config.pgdata) in postmaster.cmdline():
            family = [postmaster, *postmaster.children(recursive=True)]
            _log.warning("ending the PostgreSQL a former agent left behind", pid=postmaster.pid)
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            await asyncio.to_thread(psutil.wait_procs, family, timeout=10)
    _remove_shared_memory(lines[0])


def _remove_shared_memory(postmaster_pid: str) -> None:
    """Remove the System V segment of a postmaster that was killed.

    PostgreSQL would find it again by its data directory's inode, and that is new at every start
    here. Columns of /proc/sysvipc/shm, see proc(5): key shmid perms size cpid lpid nattch ...
    """
    for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]:
        words = line.split()
        identifier, creator, attached = words[1], words[4], words[6]
        if creator == postmaster_pid.strip() and attached == "0":
            ctypes.CDLL(None, use_errno=True).shmctl(int(identifier), _IPC_RMID, None)


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
        if process is None or self._exited.is_set():
            return
        process.send_signal(how)
        try:
            await asyncio.wait_for(self.exited(), _STOP_TIMEOUT_S)
        except TimeoutError:
            _log.warning("PostgreSQL did not stop in time; killing it", pid=process.pid)
            process.kill()
            await self.exited()

    @contextlib.asynccontextmanager
    async def connect(
        self, database: str = DATABASE
    ) -> AsyncIterator[psycopg.AsyncConnection[tuple[object, ...]]]:
        """A superuser connection in autocommit mode, over the unix socket."""
        connection = await psycopg.AsyncConnection.connect(
            host=str(self._config.run_dir),
            port=self._config.postgres_port,
            user=ADMIN,
            dbname=database,
            autocommit=True,
            application_name="boreal_agent",
            connect_timeout=10,
        )
        try:
            yield connection
        finally:
            await connection.close()

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
        """End recovery; returns when PostgreSQL accepts writes."""
        async with self.connect() as connection:
            await connection.execute("select pg_promote(true, 600)")

    async def admit_clients(self) -> None:
        """Let clients in: this is the writer now."""
        _write(self._config.pgdata / "pg_hba.conf", _hba(clients=True), self._engine)
        async with self.connect() as connection:
            await connection.execute("select pg_reload_conf()")


async def query_lsn(connection: psycopg.AsyncConnection[tuple[object, ...]], query: str) -> Lsn:
    """Run a query whose one value is an LSN; 0 where PostgreSQL has none."""
    row = await (await connection.execute(query.encode())).fetchone()
    return parse_lsn(str(row[0])) if row and row[0] is not None else Lsn(0)


async def make_durable(connection: psycopg.AsyncConnection[tuple[object, ...]]) -> Lsn:
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
