"""A stock PostgreSQL on sparse relation files, with the page shim, for tests.

`Original` is a stopped stock cluster whose relation files play the volume: `FileSource` gives pages
out of them. `shimmed_postgres` starts a copy of it without any page, as a standby, just as a
compute node is started, and an agent's page service beside it.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, LiteralString

import psycopg

from boreal.cluster import HOST
from boreal.engine import Engine
from boreal.errors import BorealError
from boreal.types import (
    PAGE_BYTES,
    RELATION_SEGMENT_BLOCKS,
    BlockNumber,
    Epoch,
    Fork,
    Lsn,
    PageKey,
    RelationFork,
)
from compute_node import shim
from compute_node.lease import Lease
from compute_node.page_service import PageService

_RELATION = re.compile(r"(base/\d+|global)/(\d+)(_vm|_init)?(\.\d+)?")
_START_LIMIT_S = 60.0
_SETTINGS = {
    "port": "5432",  # only names the socket file
    "fsync": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    # So small that nearly every page is evicted and read again.
    "shared_buffers": "1MB",
    "checkpoint_timeout": "1h",
    "max_prepared_transactions": "10",
    "wal_level": "replica",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """A stopped cluster in `data`; its account reaches what is put beside it in `home`."""

    engine: Engine
    home: Path
    data: Path

    def relation_files(self) -> Iterator[Path]:
        """The files the shim is about, relative to `data`: not unlogged relations' main forks."""
        for path in sorted(self.data.rglob("*")):
            relative = path.relative_to(self.data)
            if _RELATION.fullmatch(str(relative)) and not self._is_unlogged(relative):
                yield relative

    def _is_unlogged(self, relative: Path) -> bool:
        number = relative.name.partition(".")[0].partition("_")[0]
        has_init = (self.data / relative.parent / f"{number}_init").exists()
        return has_init and "_init" not in relative.name


@dataclass(slots=True, kw_only=True)
class FileSource:
    """A volume whose pages are those of the original's files, at any LSN."""

    original: Original
    asked: list[tuple[PageKey, Lsn]] = field(default_factory=list)
    """Every page of every call."""
    calls: int = 0
    failing: dict[int, BorealError] = field(default_factory=dict)
    """What pages of these relations fail with."""

    async def get_pages(
        self, relation: RelationFork, first: BlockNumber, count: int, lsn: Lsn
    ) -> list[bytes | None]:
        self.calls += 1
        keys = [PageKey(relation, BlockNumber(first + position)) for position in range(count)]
        self.asked += [(key, lsn) for key in keys]
        if relation.relation in self.failing:
            raise self.failing[relation.relation]
        return [self.page(key) for key in keys]

    def page(self, key: PageKey) -> bytes | None:
        content = _content(self.file_of(key))
        at = key.block % RELATION_SEGMENT_BLOCKS * PAGE_BYTES
        return content[at : at + PAGE_BYTES] or None

    def raise_epoch(self, epoch: Epoch) -> None:
        raise AssertionError("files have no epochs")

    def file_of(self, key: PageKey) -> Path:
        relation, segment = key.relation, key.block // RELATION_SEGMENT_BLOCKS
        folder = f"base/{relation.database}" if relation.database else "global"
        suffix = relation.fork.suffix + (f".{segment}" if segment else "")
        return self.original.data / folder / f"{relation.relation}{suffix}"


@cache
def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


class ShimmedPostgres:
    """A running one."""

    def __init__(
        self,
        original: Original,
        home: Path,
        source: FileSource,
        *,
        cache_limited: bool,
        tcp_port: int | None,
        tls: shim.ClientTls | None,
    ) -> None:
        self.port = tcp_port or int(_SETTINGS["port"])
        self._listen_addresses = HOST if tcp_port else ""
        self.data = home / "data"
        self.socket_directory = home
        self.page_socket = home / "pages"
        self.source = source
        self.pages: PageService | None = None
        self.lease: Lease | None = None
        self._engine = original.engine
        self._cache_limited = cache_limited
        self._tls = tls
        self._log = home / "postgres.log"
        self._process: subprocess.Popen[bytes] | None = None

    async def serve_pages(self) -> PageService:
        """Start the agent's side."""
        self.pages = await PageService.start(
            self.source, socket=self.page_socket, account=self._engine.account
        )
        return self.pages

    async def start(self, library: Path) -> None:
        settings = {
            **_SETTINGS,
            "listen_addresses": self._listen_addresses,
            "port": str(self.port),
            "unix_socket_directories": str(self.socket_directory),
        }
        with self._log.open("ab") as log:
            # Not through the event loop: uvloop cannot start a child as another account.
            self._process = subprocess.Popen(  # noqa: ASYNC220
                [
                    self._engine.tool("postgres"),
                    "-D",
                    self.data,
                    *(f"--{name}={value}" for name, value in settings.items()),
                ],
                env=self._engine.environment(
                    shim.environment(
                        library,
                        self.page_socket,
                        cache_limited=self._cache_limited,
                        tls=self._tls,
                    )
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                **self._engine.account.popen_arguments(),
            )
        async with asyncio.timeout(_START_LIMIT_S):
            while True:
                if self._process.poll() is not None:
                    raise RuntimeError(f"PostgreSQL did not start:\n{self.log()}")
                with suppress(psycopg.OperationalError):
                    await self.run("SELECT 1")
                    return
                await asyncio.sleep(0.02)

    @property
    def postmaster(self) -> int:
        """Its pid."""
        if self._process is None:
            raise RuntimeError("PostgreSQL is not running")
        return self._process.pid

    async def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)  # nothing in it is worth a checkpoint
            try:
                await asyncio.to_thread(self._process.wait, 30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
        if self.pages is not None:
            await self.pages.close()

    async def promote(self) -> None:
        if self.pages is None:
            raise RuntimeError("serve pages first")
        self.pages.become_writer(Lsn(1))
        await self.run("SELECT pg_promote(true, 60)")

    async def connect(self, database: str = "postgres") -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(
            host=str(self.socket_directory),
            port=self.port,
            user="postgres",
            dbname=database,
            autocommit=True,
            connect_timeout=10,
        )

    async def run(
        self, *statements: LiteralString, database: str = "postgres"
    ) -> list[tuple[Any, ...]]:
        """Run statements one by one in one session; return the rows of the last."""
        connection = await self.connect(database)
        try:
            for statement in statements:
                cursor = await connection.execute(statement)
            return await cursor.fetchall() if cursor.description is not None else []
        finally:
            await connection.close()

    async def file_of(self, table: str, database: str = "postgres") -> Path:
        connection = await self.connect(database)
        try:
            cursor = await connection.execute("SELECT pg_relation_filepath(%s)", (table,))
            row = await cursor.fetchone()
        finally:
            await connection.close()
        if row is None:
            raise LookupError(table)
        return self.data / str(row[0])

    def local_bytes(self, relative: Path) -> int:
        """How much of a file is really there."""
        return (self.data / relative).stat().st_blocks * 512

    def log(self) -> str:
        return self._log.read_text()[-4000:]


@asynccontextmanager
async def shimmed_postgres(
    original: Original,
    library: Path,
    name: str,
    *,
    cache_limited: bool = False,
    tcp_port: int | None = None,
    leased: bool = False,
    tls: shim.ClientTls | None = None,
) -> AsyncIterator[ShimmedPostgres]:
    """Run one, a standby, over `original` without a page of its own; stop and remove it after.

    It listens on the loopback interface too if a port is given; its clients there are held to the
    lease that `lease` tells of if `leased`, and may have TLS if `tls` is there.
    """
    home = original.home / name
    home.mkdir()
    original.engine.account.own(home)
    source = FileSource(original=original)
    server = ShimmedPostgres(
        original, home, source, cache_limited=cache_limited, tcp_port=tcp_port, tls=tls
    )
    if leased:
        server.lease = Lease(server.page_socket, original.engine.account)
    try:
        await asyncio.to_thread(_restore_without_pages, original, server.data)
        await server.serve_pages()
        await server.start(library)
        yield server
    finally:
        await server.stop()
        if server.lease is not None:
            server.lease.close()
        shutil.rmtree(home, ignore_errors=True)


def _restore_without_pages(original: Original, data: Path) -> None:
    account = original.engine.account
    sparse = set(original.relation_files())
    for path in (original.data, *sorted(original.data.rglob("*"))):
        relative = path.relative_to(original.data)
        copy = data / relative
        if path.is_dir():
            copy.mkdir()
            copy.chmod(0o700)
        elif relative in sparse:
            with copy.open("wb") as file:
                file.truncate(path.stat().st_size)
        elif relative.name != "postmaster.pid":
            shutil.copyfile(path, copy)
        else:
            continue
        account.own(copy)
    signal_file = data / "standby.signal"
    signal_file.touch()
    account.own(signal_file)


def page_key(path: Path, block: int, *, tablespace: int = 1663) -> PageKey:
    """The key of a page of a main fork in base/."""
    relation = RelationFork(tablespace, int(path.parent.name), int(path.name), Fork.MAIN)
    return PageKey(relation, block)  # type: ignore[arg-type]
