"""A throwaway stock PostgreSQL: the oracle of tests that must agree with the engine.

It listens on a unix socket only, runs as the unprivileged account Boreal would use, keeps all it
has in a directory of its own under the system's temporary directory (pytest's is closed to that
account), and is stopped and removed whatever happens.
"""

from __future__ import annotations

import atexit
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, LiteralString

import psycopg

from boreal.engine import Engine, find_engine
from boreal.types import WAL_SEGMENT_BYTES, Lsn, PageKey, parse_lsn
from boreal.waiting import wait_until

_START_LIMIT_S = 60.0
_STOP_LIMIT_S = 60.0
_PORT = "5432"  # only names the socket file

_DEFAULTS: Mapping[str, str] = MappingProxyType(
    {
        "listen_addresses": "",
        "port": _PORT,
        "fsync": "off",
        "autovacuum": "off",
        "shared_buffers": "32MB",
        "max_prepared_transactions": "10",
        "max_wal_size": "4GB",
        "wal_keep_size": "4GB",
        "checkpoint_timeout": "1h",
    }
)


@cache
def _initialized(engine: Engine) -> Path:
    """A data directory as initdb leaves it; initdb takes long, so it runs once.

    All clusters of a test run have the same system identifier, therefore.
    """
    directory = Path(tempfile.mkdtemp(prefix="boreal-initdb-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    engine.account.own(directory)
    data = directory / "data"
    engine.run("initdb", "--auth=trust", "--username=postgres", "--no-sync", f"--pgdata={data}")
    return data


class StockPostgres:
    """One cluster. Made by `stock_postgres`; `stop` and `start` may be called in between."""

    def __init__(
        self,
        engine: Engine,
        home: Path,
        settings: Mapping[str, str],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.engine = engine
        self._environment = environment
        self.data = home / "data"
        self.socket_directory = home
        self._log = home / "postgres.log"
        self._settings = {**_DEFAULTS, "unix_socket_directories": str(home), **settings}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The postmaster's."""
        if self._process is None:
            raise RuntimeError("PostgreSQL is not running")
        return self._process.pid

    def create(self) -> None:
        """Make a fresh cluster: a copy of one that initdb made."""
        copy = ("cp", "--archive", _initialized(self.engine), self.data)
        subprocess.run(copy, check=True, timeout=_START_LIMIT_S)

    def start(self, settings: Mapping[str, str] | None = None) -> None:
        """Start it, with these settings on top of the others, and wait until it takes writes."""
        merged = {**self._settings, **(settings or {})}
        options = [f"--{name}={value}" for name, value in merged.items()]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self.engine.tool("postgres"), "-D", self.data, *options],
                env=self.engine.environment(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                **self.engine.account.popen_arguments(),
            )
        wait_until(
            lambda: self._died() or self._accepts_writes(),
            timeout_s=_START_LIMIT_S,
            otherwise=self._not_started,
        )
        if self._died():
            raise self._not_started()

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it, if it runs: SIGINT is `pg_ctl stop -m fast`, SIGQUIT `-m immediate`."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(how)
        try:
            process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGQUIT)
            process.wait(_STOP_LIMIT_S)

    def connect(self, database: str = "postgres") -> psycopg.Connection[tuple[Any, ...]]:
        """Open a session in autocommit mode, as the superuser."""
        return psycopg.connect(
            host=str(self.socket_directory),
            port=int(self._settings["port"]),
            user="postgres",
            dbname=database,
            autocommit=True,
            connect_timeout=10,
        )

    def run(self, *statements: LiteralString, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run statements one by one in one session; return the rows of the last that has any."""
        rows: list[tuple[Any, ...]] = []
        with self.connect(database) as connection:
            for statement in statements:
                cursor = connection.execute(statement)
                if cursor.description is not None:
                    rows = cursor.fetchall()
        return rows

    def wal(self) -> tuple[Lsn, bytes]:
        """The WAL on disk: its first byte's LSN, and every whole segment file, newest timeline."""
        by_segment: dict[int, Path] = {}
        for path in sorted(self.wal_directory.glob("[0-9A-F]" * 24)):
            per_id = 0x1_0000_0000 // WAL_SEGMENT_BYTES
            number = int(path.name[8:16], 16) * per_id + int(path.name[16:24], 16)
            by_segment[number] = path  # sorted by timeline first: the newest wins
        first = min(by_segment)
        data = b"".join(by_segment[number].read_bytes() for number in sorted(by_segment))
        return Lsn(first * WAL_SEGMENT_BYTES), data

    def open_timeline(self) -> Lsn:
        """Recover the stopped cluster onto a new timeline, as a promotion does; return its start.

        Leaves it running.
        """
        signal_file = self.data / "recovery.signal"
        signal_file.touch()
        self.engine.account.own(signal_file)
        self.start({"restore_command": "false"})
        history = max(self.wal_directory.glob("*.history")).read_text()
        _timeline, lsn, *_reason = history.splitlines()[-1].split("\t")
        return parse_lsn(lsn)

    @property
    def wal_directory(self) -> Path:
        """Where the segment files are."""
        return self.data / "pg_wal"

    def file_of(self, page: PageKey) -> Path:
        """The file that holds the page's relation fork (its first segment)."""
        relation = page.relation
        name = f"{relation.relation}{relation.fork.suffix}"
        if relation.database == 0:
            return self.data / "global" / name
        return self.data / "base" / str(relation.database) / name

    def _died(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def _not_started(self) -> RuntimeError:
        return RuntimeError(f"PostgreSQL did not start:\n{self._log.read_text()[-4000:]}")

    def _accepts_writes(self) -> bool:
        try:
            with self.connect() as connection:
                row = connection.execute("SELECT pg_is_in_recovery()").fetchone()
        except psycopg.OperationalError:
            return False
        return row == (False,)


@contextmanager
def stock_postgres(settings: Mapping[str, str] | None = None) -> Iterator[StockPostgres]:
    """Run a fresh cluster with these settings on top of the defaults; stop and remove it after."""
    home = Path(tempfile.mkdtemp(prefix="boreal-pg-"))
    try:
        home.chmod(0o755)
        engine = find_engine(home / "engine")
        engine.account.own(home)
        server = StockPostgres(engine, home, settings or {})
        try:
            server.create()
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(home, ignore_errors=True)
