"""One stock PostgreSQL server: the block the stock systems are built of."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, LiteralString

import psycopg

from bench.load import Target
from boreal.engine import Engine
from boreal.errors import ProcessFailed
from boreal.waiting import wait_until

SETTINGS: Mapping[str, str] = {
    "shared_buffers": "128MB",  # PostgreSQL's default, which Boreal leaves as it is
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "wal_level": "replica",
    "max_connections": "200",
    "max_wal_senders": "20",  # a base backup takes two, and six are taken at a time
    "max_replication_slots": "10",
    "wal_keep_size": "1GB",  # six checkpoints at once, one for each base backup
    # No checkpoint falls into a run: stock PostgreSQL then writes no full-page image at all, the
    # most favourable case for it. (Boreal never needs one.)
    "checkpoint_timeout": "1d",
    "max_wal_size": "64GB",
    "listen_addresses": "127.0.0.1",
}

START_S = 60.0
"""How long a server may take until it serves, on a loaded machine."""
_STATEMENT_MS = 60_000


class PostgresServer:
    """A data directory, which is the caller's to remove, and the postmaster that runs on it."""

    def __init__(self, engine: Engine, directory: Path, *, port: int, password: str) -> None:
        self._engine = engine
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.data = directory / "data"
        self.target = Target(
            host="127.0.0.1",
            port=port,
            user="postgres",
            password=password,
            database="postgres",
        )
        directory.mkdir(mode=0o700)
        engine.account.own(directory)

    @property
    def pid(self) -> int | None:
        """The postmaster's."""
        return self._process.pid if self._process else None

    def create(self) -> None:
        """Make an empty database cluster."""
        password_file = self._directory / "password"
        password_file.touch(mode=0o600)
        password_file.write_text(self.target.password)
        self._engine.account.own(password_file)
        self._engine.run(
            "initdb",
            f"--pgdata={self.data}",
            "--username=postgres",
            f"--pwfile={password_file}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--no-instructions",
            "--no-sync",  # set-up only: what is measured comes later, with fsync
        )

    def copy_from(self, primary: PostgresServer, name: str) -> None:
        """Make the data directory of a streaming standby of that name, and its slot."""
        self._engine.run(
            "pg_basebackup",
            f"--pgdata={self.data}",
            "--checkpoint=fast",
            "--no-sync",
            "--create-slot",
            f"--slot={name}",
            "--write-recovery-conf",
            f"--dbname=application_name={name}",
            env=primary.target.environment(),
        )

    def start(self) -> None:
        """Start and wait until it serves SQL. ProcessFailed with the log's end if it does not."""
        settings = {
            **SETTINGS,
            "port": str(self.target.port),
            "unix_socket_directories": str(self._directory),
        }
        command = [str(self._engine.tool("postgres")), "-D", str(self.data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        log = self._directory / "log"
        with log.open("ab") as output:
            # A session of its own: Ctrl-C on the terminal is for the bench, which then stops us.
            self._process = subprocess.Popen(
                command,
                env=self._engine.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                start_new_session=True,
                **self._engine.account.popen_arguments(),
            )
        wait_until(
            lambda: self._ended() or self._serves(),
            timeout_s=START_S,
            otherwise=lambda: ProcessFailed(f"PostgreSQL does not serve SQL: {_end(log)}"),
        )
        if self._ended():
            raise ProcessFailed(f"PostgreSQL ended at its start: {_end(log)}")

    def _ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def _serves(self) -> bool:
        try:
            self.query("SELECT 1")
        except ProcessFailed:
            return False
        return True

    def query(self, sql: LiteralString) -> list[tuple[Any, ...]]:
        """Run one statement on a connection of its own."""
        return query(self.target, sql)

    def stop(self) -> None:
        """End it at once, children too: nobody needs the data any more."""
        if self._process is None:
            return
        for number in (signal.SIGQUIT, signal.SIGKILL):
            if self._process.poll() is None:
                self._process.send_signal(number)
            try:
                self._process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                continue
            break
        self._process = None


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-800:].strip()


def query(target: Target, sql: LiteralString) -> list[tuple[Any, ...]]:
    """Run one statement, outside a transaction, on a connection of its own."""
    options = f"-c statement_timeout={_STATEMENT_MS}"
    try:
        with psycopg.connect(
            target.dsn, autocommit=True, connect_timeout=5, options=options
        ) as connection:
            cursor = connection.execute(sql)
            return cursor.fetchall() if cursor.description else []
    except psycopg.Error as error:
        raise ProcessFailed(f"{sql!r} failed: {error}") from error
