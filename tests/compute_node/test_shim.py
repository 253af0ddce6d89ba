"""The page shim: stock PostgreSQL on relation files without pages must answer like the original.

Goal: whatever PostgreSQL reads of a relation file, and by whichever call, is what the volume holds;
what the volume cannot give is an error, never zeros; and nothing newer is ever overwritten.

Method: a stock cluster of many kinds of relation is stopped and plays the volume. Copies of it
whose relation files are empty of pages run under the real shim against the real page service. What
stock PostgreSQL never does (odd offsets, a hostile agent) is driven through a small program that
looks like PostgreSQL to the shim.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, LiteralString

import psutil
import psycopg
import pytest

from boreal.engine import Account
from boreal.errors import BadUsage, NotMaterializable, ProcessFailed
from boreal.types import PAGE_BYTES
from boreal.waiting import wait_until
from compute_node import shim
from compute_node.losses import Losses
from compute_node.page_protocol import (
    REQUEST_BYTES,
    Operation,
    Outcome,
    ShimRequest,
    answer,
    answer_pages,
)
from tests.compute_node.shimmed import Original, page_key, shimmed_postgres
from tests.support.stock_postgres import stock_postgres

_CONTENT: tuple[LiteralString, ...] = (
    """CREATE TABLE items (id int PRIMARY KEY, name text, tags int[], spot point, area box)
         WITH (fillfactor = 80)""",
    """INSERT INTO items SELECT g, md5(g::text), ARRAY[g % 50, g % 7], point(g % 97, g % 89),
         box(point(g % 97, g % 89), point(g % 97 + 1, g % 89 + 2))
       FROM generate_series(1, 6000) g""",
    "CREATE INDEX items_name ON items (name)",
    "CREATE INDEX items_hash ON items USING hash (name)",
    "CREATE INDEX items_tags ON items USING gin (tags)",
    "CREATE INDEX items_area ON items USING gist (area)",
    "CREATE INDEX items_spot ON items USING spgist (spot)",
    "CREATE INDEX items_brin ON items USING brin (id) WITH (pages_per_range = 2)",
    "UPDATE items SET name = name || 'x' WHERE id % 10 = 0",
    "DELETE FROM items WHERE id % 11 = 0",
    "VACUUM (FREEZE) items",
    "CREATE TABLE documents (id int, body text)",
    "ALTER TABLE documents ALTER body SET STORAGE EXTERNAL",
    "INSERT INTO documents SELECT g, repeat(md5(g::text), 300) FROM generate_series(1, 40) g",
    "CREATE TABLE shrinking (id int, filler text)",
    "INSERT INTO shrinking SELECT g, repeat('s', 400) FROM generate_series(1, 1000) g",
    "CREATE TABLE emptied (id int)",
    "INSERT INTO emptied SELECT generate_series(1, 3000)",
    "CREATE TABLE dropped (id int)",
    "INSERT INTO dropped SELECT generate_series(1, 3000)",
    "CREATE TABLE untouched (id int, filler text)",
    "INSERT INTO untouched SELECT g, repeat('u', 400) FROM generate_series(1, 1000) g",
    "VACUUM (FREEZE) untouched",  # so that reading it sets no hint bits
    "CREATE UNLOGGED TABLE scratch (id int PRIMARY KEY, n serial)",
    "INSERT INTO scratch SELECT generate_series(1, 500)",
    "CREATE SEQUENCE counter",
    "SELECT setval('counter', 77)",
    "CREATE DATABASE template_of_ours",
)
_QUERIES: tuple[LiteralString, ...] = (
    "SELECT count(*), sum(hashtext(i::text)) FROM items i",
    "SELECT id FROM items WHERE name = md5('4711')",
    "SELECT count(*) FROM items WHERE name BETWEEN 'a' AND 'b'",
    "SELECT count(*), sum(id) FROM items WHERE tags @> ARRAY[5]",
    "SELECT count(*), sum(id) FROM items WHERE area && box(point(10, 10), point(20, 20))",
    "SELECT count(*), sum(id) FROM items WHERE spot <@ box(point(10, 10), point(20, 20))",
    "SELECT count(*), sum(id) FROM items WHERE id BETWEEN 100 AND 900",
    "SELECT count(id) FROM items WHERE id > 0",
    "SELECT id, md5(body) FROM documents ORDER BY id",
    "SELECT count(*), sum(id) FROM shrinking",
    "SELECT count(*), sum(id) FROM emptied",
    "SELECT last_value FROM counter",
    "SELECT count(*), sum(hashtext(a::text)) FROM pg_attribute a WHERE attrelid < 16384",
)
_PLANS: tuple[LiteralString, ...] = (
    "SET enable_indexscan = off; SET enable_bitmapscan = off; SET enable_indexonlyscan = off",
    "SET enable_seqscan = off",
    "SET enable_seqscan = off; SET enable_bitmapscan = off",
)


@pytest.fixture(scope="module")
def volume() -> Iterator[tuple[Original, list[Any]]]:
    """The original, stopped, and what it answered."""
    with stock_postgres() as server:
        server.run(*_CONTENT)
        server.run("CREATE TABLE there (id int PRIMARY KEY)", database="template_of_ours")
        server.run(
            "INSERT INTO there SELECT generate_series(1, 2000)",
            "CREATE UNLOGGED TABLE bare (id int)",
            database="template_of_ours",
        )
        answers = [server.run(plan, query) for plan in _PLANS for query in _QUERIES]
        server.stop()
        yield Original(engine=server.engine, home=server.data.parent, data=server.data), answers


@pytest.fixture(scope="module")
def original(volume: tuple[Original, list[Any]]) -> Original:
    return volume[0]


@pytest.fixture(scope="module")
def library(original: Original) -> Path:
    return shim.build(original.home / "shim")


async def test_a_reader_without_a_page_answers_like_the_original(
    volume: tuple[Original, list[Any]], library: Path
) -> None:
    original, answers = volume
    async with shimmed_postgres(original, library, "reader") as server:
        untouched = (await server.file_of("untouched")).relative_to(server.data)
        assert server.local_bytes(untouched) == 0

        found = [await server.run(plan, query) for plan in _PLANS for query in _QUERIES]

        assert found == answers
        # Asked in recovery, so at the replay LSN; and no more than was read.
        assert all(lsn > 0 for _key, lsn in server.source.asked)
        assert server.local_bytes(untouched) == 0
        assert server.pages is not None
        assert server.pages.counters.failures == 0


async def test_a_page_is_asked_for_once(original: Original, library: Path) -> None:
    async with shimmed_postgres(original, library, "once") as server:
        path = await server.file_of("untouched")
        for _ in range(2):  # with 1 MB of shared buffers and a ring, the second scan reads files
            await server.run("SELECT count(*) FROM untouched", "SELECT count(*) FROM items")
        number = int(path.name)
        asked = [key for key, _lsn in server.source.asked if key.relation.relation == number]
        assert len(asked) == len(set(asked)) > 50
        assert path.read_bytes() == server.source.file_of(page_key(path, 0)).read_bytes()


async def test_the_promoted_writer_changes_pages_it_never_had(
    original: Original, library: Path
) -> None:
    async with shimmed_postgres(original, library, "writer") as server:
        await server.promote()
        assert await server.run("SELECT count(*) FROM scratch") == [(0,)]  # unlogged: reset
        await server.run("INSERT INTO scratch SELECT generate_series(1, 300)")
        await server.run("UPDATE items SET name = 'new' WHERE id % 3 = 0")
        await server.run("CHECKPOINT", "SELECT sum(id) FROM untouched")
        assert await server.run(
            "SET enable_seqscan = off", "SELECT count(*) FROM items WHERE name = 'new'"
        ) == await server.run(
            "SET enable_indexscan = off; SET enable_bitmapscan = off",
            "SELECT count(*) FROM items WHERE id % 3 = 0",
        )
        assert await server.run("SELECT count(*) FROM scratch") == [(300,)]


async def test_a_sequential_scan_is_read_ahead_and_stays_exact(
    original: Original, library: Path
) -> None:
    async with shimmed_postgres(original, library, "scan") as server:
        path = await server.file_of("untouched")
        assert await server.run("SELECT count(*) FROM untouched") == [(1000,)]
        assert server.pages is not None
        of_it = [
            key for key, _lsn in server.source.asked if key.relation.relation == int(path.name)
        ]
        assert server.pages.counters.ahead > 0
        assert len(of_it) == len(set(of_it))
        assert path.read_bytes() == server.source.file_of(page_key(path, 0)).read_bytes()


async def test_a_bitmap_scan_passes_on_its_hints(original: Original, library: Path) -> None:
    async with shimmed_postgres(original, library, "hints") as server:
        rows = await server.run(
            "SET enable_seqscan = off; SET enable_indexscan = off",
            "SET effective_io_concurrency = 32",
            "SELECT count(*), sum(id) FROM items WHERE tags @> ARRAY[5]",
        )
        assert server.pages is not None
        assert server.pages.counters.ahead > 10
        assert rows == await server.run(
            "SET enable_bitmapscan = off",
            "SELECT count(*), sum(id) FROM items WHERE 5 = ANY (tags)",
        )


async def test_reextension_over_pages_that_wait(original: Original, library: Path) -> None:
    """A scan stops with pages waiting in its process and in the agent; then the table is truncated
    by vacuum and grows again: what it reads there must be what was written there."""
    async with shimmed_postgres(original, library, "grows") as server:
        await server.promote()
        scanning = await server.connect()
        async with scanning:
            await scanning.execute("BEGIN; DECLARE c CURSOR FOR SELECT id FROM shrinking")
            cursor = await scanning.execute("FETCH 200 FROM c")
            assert len(await cursor.fetchall()) == 200
            await scanning.execute("COMMIT")
            assert server.pages is not None
            await server.run("DELETE FROM shrinking WHERE id > 20", "VACUUM shrinking")
            path = await server.file_of("shrinking")
            assert path.stat().st_size < 5 * PAGE_BYTES
            await server.run(
                "INSERT INTO shrinking SELECT -g, repeat('n', 400) FROM generate_series(1, 300) g",
                "CHECKPOINT",
            )
            # As a bulk extension leaves it: blocks that were never written.
            os.truncate(path, 60 * PAGE_BYTES)
            for session in (scanning, await server.connect()):
                cursor = await session.execute("SELECT count(*), min(id), max(id) FROM shrinking")
                assert await cursor.fetchone() == (320, -300, 20)
            await session.close()


async def test_what_was_cut_off_stays_cut_off(original: Original, library: Path) -> None:
    async with shimmed_postgres(original, library, "cuts") as server:
        await server.promote()
        await server.run("DELETE FROM shrinking WHERE id > 20", "VACUUM shrinking")
        await server.run("TRUNCATE emptied", "DROP TABLE dropped")
        path = await server.file_of("shrinking")
        assert path.stat().st_size < 5 * PAGE_BYTES
        # What a bulk extension leaves: pages without WAL. The volume still has rows there.
        os.truncate(path, 40 * PAGE_BYTES)

        assert await server.run("SELECT count(*), max(id) FROM shrinking") == [(20, 20)]
        assert await server.run("SELECT count(*) FROM emptied") == [(0,)]
        assert server.pages is not None
        assert server.pages.counters.zeros >= 35
        assert server.pages.counters.cuts >= 3


async def test_copying_a_database_reads_its_pages(original: Original, library: Path) -> None:
    async with shimmed_postgres(original, library, "copies") as server:
        await server.promote()
        await server.run(
            "CREATE DATABASE by_file TEMPLATE template_of_ours STRATEGY file_copy",
            "CREATE DATABASE by_wal TEMPLATE template_of_ours STRATEGY wal_log",
        )
        for database in ("by_file", "by_wal"):
            rows = await server.run(
                "SET enable_seqscan = off",
                "SELECT sum(id) FROM there WHERE id > 0",
                database=database,
            )
            assert rows == [(2001000,)]
            assert await server.run("SELECT count(*) FROM bare", database=database) == [(0,)]
        await server.run("DROP DATABASE by_file")


async def test_a_base_backup_has_every_page_and_stores_none(
    original: Original, library: Path
) -> None:
    async with shimmed_postgres(original, library, "backup") as server:
        untouched = (await server.file_of("untouched")).relative_to(server.data)
        backup = server.socket_directory / "copy"
        await asyncio.to_thread(
            original.engine.run,
            "pg_basebackup",
            f"--pgdata={backup}",
            f"--host={server.socket_directory}",
            "--port=5432",
            "--username=postgres",
            "--wal-method=none",
            "--checkpoint=fast",
            "--no-sync",
        )
        assert (backup / untouched).read_bytes() == (original.data / untouched).read_bytes()
        assert server.local_bytes(untouched) == 0


async def test_a_page_that_cannot_be_had_is_an_error_and_nothing_else(
    original: Original, library: Path
) -> None:
    async with shimmed_postgres(original, library, "errors") as server:
        number = int((await server.file_of("untouched")).name)
        server.source.failing[number] = NotMaterializable("no redo for this record")
        session = await server.connect()
        async with session:
            with pytest.raises(psycopg.errors.IoError, match="Input/output error"):
                await session.execute("SELECT count(*) FROM untouched")
            cursor = await session.execute("SELECT count(*) FROM emptied")
            assert await cursor.fetchone() == (3000,)

            server.source.failing.clear()
            cursor = await session.execute("SELECT count(*) FROM untouched")
            assert await cursor.fetchone() == (1000,)


async def test_a_session_survives_a_restart_of_its_agent(original: Original, library: Path) -> None:
    async with shimmed_postgres(original, library, "restart") as server:
        session = await server.connect()
        async with session:
            await session.execute("SELECT count(*) FROM emptied")
            assert server.pages is not None
            await server.pages.close()
            with pytest.raises(psycopg.errors.IoError):
                await session.execute("SELECT count(*) FROM untouched")

            await server.serve_pages()
            cursor = await session.execute("SELECT count(*) FROM untouched")
            assert await cursor.fetchone() == (1000,)

            assert server.pages is not None
            await server.pages.close()
            await server.serve_pages()  # this time between two queries: not even noticed
            cursor = await session.execute("SELECT count(*) FROM documents")
            assert await cursor.fetchone() == (40,)


async def test_a_relation_whose_drop_cannot_be_reported_keeps_its_file(
    original: Original, library: Path
) -> None:
    async with shimmed_postgres(original, library, "unreported") as server:
        await server.promote()
        path = await server.file_of("dropped")
        session = await server.connect()
        async with session:
            await session.execute("SELECT count(*) FROM dropped")
            # The catalog pages the drop needs are read first, in a transaction that is undone.
            await session.execute("BEGIN")
            await session.execute("DROP TABLE dropped")
            await session.execute("ROLLBACK")
            assert server.pages is not None
            await server.pages.close()
            await session.execute("DROP TABLE dropped")
            assert path.stat().st_size > 0
            cursor = await session.execute("SELECT 1")
            assert await cursor.fetchone() == (1,)


# --- what stock PostgreSQL never does -----------------------------------------------------------

_FAKE_ENGINE = """
#include <stdbool.h>
#include <stdint.h>
void *UsedShmemSegAddr = &UsedShmemSegAddr;
bool in_recovery = true;
bool RecoveryInProgress(void) { return in_recovery; }
uint64_t GetXLogReplayRecPtr(uint32_t *timeline) { (void) timeline; return 1000; }
uint64_t GetXLogInsertRecPtr(void) { return 2000; }
"""

_DRIVER = """
import ctypes, json, os, signal
libc = ctypes.CDLL(None, use_errno=True)  # resolves names as PostgreSQL would: ours first
libc.pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
libc.pread.restype = libc.read.restype = ctypes.c_ssize_t
libc.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
libc.ftruncate.argtypes = [ctypes.c_int, ctypes.c_long]
def opened(path, flags=os.O_RDWR):
    return libc.open(path.encode(), flags)
def pread(fd, length, offset):
    buffer = ctypes.create_string_buffer(length)
    got = libc.pread(fd, buffer, length, offset)
    return ctypes.get_errno() if got < 0 else buffer.raw[:got].hex()
def read(fd, length):
    buffer = ctypes.create_string_buffer(length)
    got = libc.read(fd, buffer, length)
    return ctypes.get_errno() if got < 0 else buffer.raw[:got].hex()
def become_writer():
    ctypes.c_bool.in_dll(libc, "in_recovery").value = False
"""


@pytest.fixture(scope="module")
def fake_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that makes a program look like PostgreSQL to the shim."""
    folder = tmp_path_factory.mktemp("engine")
    (folder / "engine.c").write_text(_FAKE_ENGINE)
    subprocess.run(
        [*shim.compiler(), "-shared", "-fPIC", "-o", folder / "engine.so", folder / "engine.c"],
        check=True,
    )
    return folder / "engine.so"


MAGIC = 0x32534742


def page_of(block: int) -> bytes:
    return struct.pack("<I", block + 1) * (PAGE_BYTES // 4)


async def give_page(request: ShimRequest) -> bytes:
    """A well-behaved agent's answer."""
    if request.operation is Operation.CUT:
        return answer(Outcome.DONE)
    first = request.key.block
    return answer_pages([page_of(block) for block in range(first, first + request.window)])


@asynccontextmanager
async def agent(
    path: Path, reply: Callable[[ShimRequest], Awaitable[bytes]] = give_page
) -> AsyncIterator[list[ShimRequest]]:
    """An agent that sends what `reply` gives, or hangs up if that is nothing."""
    requests: list[ShimRequest] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                requests.append(ShimRequest.unpack(await reader.readexactly(REQUEST_BYTES)))
                if requests[-1].operation is Operation.PREFETCH:
                    continue
                if not (given := await reply(requests[-1])):
                    break
                writer.write(given)
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield requests
    finally:
        server.close()


class Driver:
    """Runs Python snippets as if they were PostgreSQL: the shim loaded, PGDATA as directory."""

    def __init__(self, data: Path, libraries: list[Path]) -> None:
        self.data = data
        self.socket_path = data / "pages"
        self._libraries = libraries
        self.variables: dict[str, str] = {}
        (data / "base" / "5").mkdir(parents=True)
        (data / "global").mkdir()

    def relation(self, name: str, blocks: int) -> Path:
        path = self.data / name
        with path.open("wb") as file:
            file.truncate(blocks * PAGE_BYTES)
        return path

    async def run(self, code: str) -> Any:
        """The value that `code` leaves in `result`."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", f"{_DRIVER}\n{code}\nprint(json.dumps(result))"),
            cwd=self.data,
            env={
                "LD_PRELOAD": ":".join(map(str, self._libraries)),
                shim.SOCKET_VARIABLE: str(self.socket_path),
                **self.variables,
            },
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0
        return json.loads(output)


@pytest.fixture
def driver(library: Path, fake_engine: Path) -> Iterator[Driver]:
    # Not tmp_path: a unix socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="boreal-shim-") as folder:
        yield Driver(Path(folder), [library, fake_engine])


async def test_any_part_of_a_file_can_be_read(driver: Driver) -> None:
    driver.relation("base/5/100", 4)
    volume = b"".join(page_of(block) for block in range(4))
    async with agent(driver.socket_path):
        parts = await driver.run(
            "fd = opened('base/5/100', os.O_RDONLY)\n"
            "result = [pread(fd, 100, 8150), pread(fd, 20000, 3), pread(fd, 9000, 30000),"
            "          pread(fd, 8192, 32768), read(fd, 10000), read(fd, 40000)]"
        )
    assert [bytes.fromhex(part) for part in parts] == [
        volume[8150:8250], volume[3:20003], volume[30000:], b"", volume[:10000], volume[10000:],
    ]  # fmt: skip
    assert driver.data.joinpath("base/5/100").read_bytes() == bytes(4 * PAGE_BYTES)


async def test_a_page_is_stored_through_a_writable_file_and_only_where_it_was_missing(
    driver: Driver,
) -> None:
    path = driver.relation("base/5/100", 3)
    with path.open("r+b") as file:
        file.seek(PAGE_BYTES)
        file.write(b"newer".ljust(PAGE_BYTES, b"."))
    async with agent(driver.socket_path) as requests:
        await driver.run("fd = opened('base/5/100')\nresult = pread(fd, 3 * 8192, 0)")
    assert [request.key.block for request in requests] == [0, 2]
    newer = b"newer".ljust(PAGE_BYTES, b".")
    assert path.read_bytes() == page_of(0) + newer + page_of(2)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("base/5/100", (1663, 5, 100, 0, 0)),
        ("./base/5/100", (1663, 5, 100, 0, 0)),
        ("base/5/100_vm", (1663, 5, 100, 2, 0)),
        ("base/5/100_init", (1663, 5, 100, 3, 0)),
        ("base/5/100.3", (1663, 5, 100, 0, 3 * 131072)),
        ("base/5/4294967295_vm.1", (1663, 5, 4294967295, 2, 131072)),
        ("global/1262", (1664, 0, 1262, 0, 0)),
        ("base/5/100_fsm", None),
        ("base/5/t3_100", None),
        ("base/5/100.", None),
        ("base/5/100x", None),
        ("base/5/4294967296", None),
        ("base/5/pg_filenode.map", None),
        ("global/pg_control", None),
        ("base/5", None),
    ],
)
async def test_relation_files_are_known_by_their_path(
    driver: Driver, name: str, key: tuple[int, ...] | None
) -> None:
    if name != "base/5":
        driver.relation(name, 1)
    async with agent(driver.socket_path) as requests:
        await driver.run(f"fd = opened({name!r}, os.O_RDONLY)\nresult = pread(fd, 8192, 0)")
    found = [(*request.key.relation, request.key.block) for request in requests]
    assert found == ([key] if key else [])
    assert all(request.in_recovery and request.lsn == 1000 for request in requests)


async def test_a_closed_file_is_forgotten(driver: Driver) -> None:
    driver.relation("base/5/100", 1)
    driver.relation("plain", 1)
    async with agent(driver.socket_path) as requests:
        same, zeros = await driver.run(
            "first = opened('base/5/100'); libc.close(first)\n"
            "second = opened('plain')\n"
            "result = [first == second, pread(second, 8192, 0)]"
        )
    assert (same, bytes.fromhex(zeros), requests) == (True, bytes(PAGE_BYTES), [])


async def test_cuts_are_reported_before_they_are_done(driver: Driver) -> None:
    path = driver.relation("base/5/100.1", 9)
    seen: list[tuple[int, int, int]] = []

    async def watch(request: ShimRequest) -> bytes:
        seen.append((request.key.block, request.lsn, path.stat().st_size // PAGE_BYTES))
        return await give_page(request)

    async with agent(driver.socket_path, watch):
        await driver.run(
            "fd = opened('base/5/100.1')\n"
            "result = [libc.ftruncate(fd, 8 * 8192)]\n"
            "become_writer()\n"
            "result += [libc.ftruncate(fd, 5 * 8192), libc.truncate(b'base/5/100.1', 0),"
            "           libc.unlink(b'base/5/100.1'), libc.unlink(b'base/5/none_fsm')]"
        )
    assert seen == [
        (131072 + 8, 1000, 9),
        (131072 + 5, 2000, 8),
        (131072, 2000, 5),
        (131072, 2000, 0),
    ]
    assert not path.exists()


async def test_without_an_agent_nothing_is_cut_and_nothing_is_read(driver: Driver) -> None:
    path = driver.relation("base/5/100", 2)
    result = await driver.run(
        "become_writer(); fd = opened('base/5/100')\n"
        "result = [pread(fd, 8192, 0), read(fd, 8192), libc.ftruncate(fd, 8192),"
        "          libc.truncate(b'base/5/100', 0), libc.unlink(b'base/5/100')]"
    )
    assert result == [errno.EIO, errno.EIO, -1, -1, -1]
    assert path.stat().st_size == 2 * PAGE_BYTES


@pytest.mark.parametrize(
    "given",
    [
        b"",
        answer(Outcome.FAILED),
        answer(Outcome.DONE),
        struct.pack("=IHHQ", MAGIC, 77, 1, 0),
        struct.pack("=IHHQ", 0xBAD, Outcome.PAGES, 1, 0),
        struct.pack("=IHHQ", MAGIC, Outcome.PAGES, 0, 0),
        struct.pack("=IHHQ", MAGIC, Outcome.PAGES, 2, 0),
        struct.pack("=IHHQ", MAGIC, Outcome.PAGES, 1, 2) + page_of(0),
        answer_pages([None]) + b"more",
    ],
    ids=["hangs up", "failed", "done", "unknown", "magic", "no page", "two pages", "bit", "long"],
)
async def test_no_other_answer_is_taken_for_a_page(driver: Driver, given: bytes) -> None:
    driver.relation("base/5/100", 1)

    async def reply(_request: ShimRequest) -> bytes:
        return given

    async with agent(driver.socket_path, reply):
        code = "fd = opened('base/5/100'); result = pread(fd, 8192, 0)"
        assert await driver.run(code) == errno.EIO


async def test_a_legitimate_zero_page_is_answered_but_not_written(driver: Driver) -> None:
    path = driver.relation("base/5/100", 1)

    async def reply(_request: ShimRequest) -> bytes:
        return answer_pages([None])

    async with agent(driver.socket_path, reply):
        page = await driver.run("fd = opened('base/5/100'); result = pread(fd, 8192, 0)")
    assert bytes.fromhex(page) == bytes(PAGE_BYTES)
    assert path.stat().st_blocks == 0


async def test_half_a_page_is_not_left_in_a_file(driver: Driver) -> None:
    path = driver.relation("base/5/100", 1)
    async with agent(driver.socket_path):
        page = await driver.run(
            "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            "fd = opened('base/5/100'); result = pread(fd, 8192, 0)"
        )
    assert bytes.fromhex(page) == page_of(0)
    assert path.read_bytes() == bytes(PAGE_BYTES)


async def test_forked_processes_have_connections_of_their_own(driver: Driver) -> None:
    driver.relation("base/5/100", 200)
    async with agent(driver.socket_path) as requests:
        ok = await driver.run(
            "fd = opened('base/5/100', os.O_RDONLY)\n"
            "page = lambda b: (b + 1).to_bytes(4, 'little').hex() * 2048\n"
            "right = lambda b: pread(fd, 8192, b * 8192) == page(b)\n"
            "result = right(0)\n"
            "children = []\n"
            "for child in range(4):\n"
            "    pid = os.fork()\n"
            "    if pid == 0:\n"
            "        os._exit(0 if all(right(b) for b in range(child, 200, 4)) else 1)\n"
            "    children.append(pid)\n"
            "result = result and right(7)\n"
            "result = result and all(os.waitpid(pid, 0)[1] == 0 for pid in children)"
        )
    assert ok
    assert len(requests) == 202


async def test_signals_do_not_disturb_a_wait(driver: Driver) -> None:
    driver.relation("base/5/100", 1)

    async def slowly(request: ShimRequest) -> bytes:
        await asyncio.sleep(0.02)
        return await give_page(request)

    async with agent(driver.socket_path, slowly) as requests:
        pages = await driver.run(
            "signal.signal(signal.SIGALRM, lambda *_: None)\n"
            "signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)\n"
            "fd = opened('base/5/100', os.O_RDONLY)\n"
            "result = [pread(fd, 8192, 0) for _ in range(20)]\n"
            "signal.setitimer(signal.ITIMER_REAL, 0)"
        )
    assert {bytes.fromhex(page) for page in pages} == {page_of(0)}
    assert len(requests) == 20


# --- pages that wait, and hints ------------------------------------------------------------------


@pytest.fixture
def counted(driver: Driver) -> Iterator[Losses]:
    """The file of losses, without which the shim reads nothing ahead."""
    losses = Losses(driver.socket_path, Account.current())
    yield losses
    losses.close()


def runs(requests: list[ShimRequest]) -> list[tuple[int, int]]:
    return [(request.key.block, request.window) for request in requests]


_SCAN = """
fd = opened('base/5/100', {flags})
page = lambda b: (b + 1).to_bytes(4, 'little').hex() * 2048
right = lambda b: pread(fd, 8192, b * 8192) == page(b)
result = all([right(b) for b in {blocks}])
"""


@pytest.mark.parametrize("flags", ["os.O_RDWR", "os.O_RDONLY"])
async def test_a_sequential_reader_gets_growing_windows_up_to_the_end(
    driver: Driver, counted: Losses, flags: str
) -> None:
    path = driver.relation("base/5/100", 300)
    async with agent(driver.socket_path) as requests:
        assert await driver.run(_SCAN.format(flags=flags, blocks="range(300)"))
    assert runs(requests) == [
        *((0, 1), (1, 2), (3, 4), (7, 8), (15, 16), (31, 32), (63, 64), (127, 64), (191, 64)),
        (255, 45),
    ]
    stored = b"".join(page_of(block) for block in range(300))
    assert path.read_bytes() == (stored if flags == "os.O_RDWR" else bytes(len(stored)))


async def test_pages_that_wait_are_not_in_the_file(driver: Driver, counted: Losses) -> None:
    path = driver.relation("base/5/100", 20)
    async with agent(driver.socket_path) as requests:
        assert await driver.run(_SCAN.format(flags="os.O_RDWR", blocks="range(8)"))
    assert runs(requests)[-1] == (7, 8)
    assert path.read_bytes() == b"".join(map(page_of, range(8))) + bytes(12 * PAGE_BYTES)


async def test_a_random_reader_gets_single_pages(driver: Driver, counted: Losses) -> None:
    driver.relation("base/5/100", 5000)
    async with agent(driver.socket_path) as requests:
        blocks = "[n * 1237 % 5000 for n in range(100)]"
        assert await driver.run(_SCAN.format(flags="os.O_RDWR", blocks=blocks))
    assert {window for _block, window in runs(requests)} == {1}


async def test_a_worker_of_a_parallel_scan_gets_its_chunks(driver: Driver, counted: Losses) -> None:
    """It reads eight blocks and jumps over those of two fellows (table_block_parallelscan)."""
    driver.relation("base/5/100", 480)
    async with agent(driver.socket_path) as requests:
        blocks = "[c * 24 + n for c in range(20) for n in range(8)]"
        assert await driver.run(_SCAN.format(flags="os.O_RDWR", blocks=blocks))
    assert runs(requests)[4:] == [(chunk * 24, 8) for chunk in range(1, 20)]


async def test_readers_of_several_files_are_told_apart(driver: Driver, counted: Losses) -> None:
    for number in (100, 101, 102):
        driver.relation(f"base/5/{number}", 64)
    async with agent(driver.socket_path) as requests:
        assert await driver.run(
            "fds = [opened(f'base/5/{number}') for number in (100, 101, 102)]\n"
            "page = lambda b: (b + 1).to_bytes(4, 'little').hex() * 2048\n"
            "result = all([pread(fd, 8192, b * 8192) == page(b) for b in range(64) for fd in fds])"
        )
    assert len(requests) == 3 * 7


async def test_a_window_ends_where_pages_are_here(driver: Driver, counted: Losses) -> None:
    path = driver.relation("base/5/100", 64)
    with path.open("r+b") as file:
        file.seek(10 * PAGE_BYTES)
        file.write(page_of(10) + page_of(11))
    async with agent(driver.socket_path) as requests:
        assert await driver.run(_SCAN.format(flags="os.O_RDWR", blocks="range(64)"))
    assert runs(requests)[:5] == [(0, 1), (1, 2), (3, 4), (7, 3), (12, 6)]


async def test_a_window_may_come_short_and_with_zeros(driver: Driver, counted: Losses) -> None:
    driver.relation("base/5/100", 64)

    async def reply(request: ShimRequest) -> bytes:
        first = request.key.block
        blocks = range(first, first + (request.window + 1) // 2)
        return answer_pages([page_of(block) if block % 3 else None for block in blocks])

    async with agent(driver.socket_path, reply):
        pages = await driver.run(
            "fd = opened('base/5/100'); result = [pread(fd, 8192, b * 8192) for b in range(64)]"
        )
    assert [bytes.fromhex(page) for page in pages] == [
        page_of(block) if block % 3 else bytes(PAGE_BYTES) for block in range(64)
    ]


_LOSSES = {
    # A block that was cut off and is there again must not get its old page ...
    "truncation": "libc.ftruncate(fd, 8 * 8192); os.truncate('base/5/100', 40 * 8192)",
    "drop": "libc.unlink(b'base/5/200')",
    # ... nor one that was changed and then evicted the page from before (see `reply`).
    "eviction": "pread(opened('base/5/200'), 8192, 0)",
}


@pytest.mark.parametrize("loss", _LOSSES)
async def test_waiting_pages_are_void_after_a_loss(
    driver: Driver, counted: Losses, loss: str
) -> None:
    driver.relation("base/5/100", 40)
    driver.relation("base/5/200", 1)
    lost = False

    async def reply(request: ShimRequest) -> bytes:
        nonlocal lost
        lost = lost or request.key.relation.relation == 200
        if request.operation is Operation.CUT:
            lost = True
            return answer(Outcome.DONE)
        if loss == "eviction" and request.key.relation.relation == 200:
            with counted.evicting():
                pass
        return answer_pages([None] * request.window) if lost else await give_page(request)

    async with agent(driver.socket_path, reply) as requests:
        pages = await driver.run(
            "fd = opened('base/5/100')\n"
            "before = [pread(fd, 8192, b * 8192) for b in range(9)]\n"
            f"{_LOSSES[loss]}\n"
            "result = [pread(fd, 8192, b * 8192) for b in range(9, 20)]"
        )
    assert runs(requests)[:4] == [(0, 1), (1, 2), (3, 4), (7, 8)]
    assert requests[-1].losses == counted.count() > 0
    assert {bytes.fromhex(page) for page in pages} == {bytes(PAGE_BYTES)}


async def test_hints_are_passed_on_for_blocks_that_are_not_here(
    driver: Driver, counted: Losses
) -> None:
    path = driver.relation("base/5/100", 10)
    driver.relation("plain", 10)
    with path.open("r+b") as file:
        file.write(page_of(0))
    async with agent(driver.socket_path) as requests:
        page = await driver.run(
            "libc.posix_fadvise.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_long,"
            " ctypes.c_int]\n"
            "hint = lambda fd, b: libc.posix_fadvise(fd, b * 8192, 8192, os.POSIX_FADV_WILLNEED)\n"
            "fd = opened('base/5/100'); plain = opened('plain')\n"
            "assert [hint(fd, b) for b in (0, 7, 3, 10, 99)] == [0] * 5 and hint(plain, 1) == 0\n"
            "result = pread(fd, 8192, 7 * 8192)"
        )
    assert bytes.fromhex(page) == page_of(7)
    assert [(request.operation, request.key.block) for request in requests] == [
        (Operation.PREFETCH, 7),
        (Operation.PREFETCH, 3),
        (Operation.GET_PAGES, 7),
    ]


async def test_a_lost_agent_costs_hints_and_nothing_else(driver: Driver, counted: Losses) -> None:
    driver.relation("base/5/100", 10)
    assert (
        await driver.run(
            "fd = opened('base/5/100')\n"
            "result = [libc.posix_fadvise(fd, 0, 8192, os.POSIX_FADV_WILLNEED) for _ in range(9)]"
        )
        == [0] * 9
    )


async def test_writes_and_reads_respect_the_lock_of_an_eviction(
    driver: Driver, counted: Losses
) -> None:
    """While the agent holds the range and counts oddly, nobody reads or writes it."""
    path = driver.relation("base/5/100", 4)
    path.write_bytes(b"".join(map(page_of, range(4))))
    driver.variables[shim.LIMITED_VARIABLE] = "1"
    code = (
        "libc.pwrite.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_long]\n"
        "fd = opened('base/5/100')\n"
        "result = [pread(fd, 8192, 3 * 8192), libc.pwrite(fd, b'n' * 8192, 8192, 0)]\n"
        "result.append(pread(fd, 8192, 8192))"
    )
    with path.open("r+b") as file, counted.evicting():
        held = struct.pack("@hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 2 * PAGE_BYTES, 0)
        fcntl.fcntl(file, 37, held)  # F_OFD_SETLK
        async with agent(driver.socket_path):
            running = asyncio.create_task(driver.run(code))
            assert await asyncio.wait([running], timeout=1.5) == (set(), {running})
            assert path.read_bytes()[:PAGE_BYTES] == page_of(0)
            free = struct.pack("@hhqqi4x", fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0)
            fcntl.fcntl(file, 37, free)
            other, written, read = await running
    assert bytes.fromhex(other) == page_of(3)
    assert written == PAGE_BYTES
    assert bytes.fromhex(read) == page_of(1)
    assert path.read_bytes()[:PAGE_BYTES] == b"n" * PAGE_BYTES


# --- the environment it finds itself in ----------------------------------------------------------


def run_with(library: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={"LD_PRELOAD": str(library), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def test_other_programs_are_left_alone(library: Path, tmp_path: Path) -> None:
    variables = {shim.SOCKET_VARIABLE: "/nowhere", shim.PARENT_VARIABLE: "1"}
    file = tmp_path / "file"
    file.write_text("content")
    assert run_with(library, "cat", str(file), **variables).stdout == "content"


def test_without_its_variable_it_does_nothing(library: Path, original: Original) -> None:
    done = run_with(library, str(original.engine.tool("postgres")), "--version")
    assert done.returncode == 0
    assert "16." in done.stdout


@pytest.mark.parametrize(
    "variables",
    [
        {shim.SOCKET_VARIABLE: "/" + "x" * 108},
        {shim.SOCKET_VARIABLE: "/s", shim.PARENT_VARIABLE: "1"},
    ],
    ids=["socket path", "parent"],
)
def test_an_engine_it_cannot_serve_does_not_start(
    library: Path, original: Original, variables: dict[str, str]
) -> None:
    done = run_with(library, str(original.engine.tool("postgres")), "--version", **variables)
    assert done.returncode == 2
    assert "boreal shim:" in done.stderr


def test_the_engine_reads_files_only_by_calls_that_are_wrapped(original: Original) -> None:
    """An upgrade of the engine that reads or cuts files in other ways must not go unnoticed."""
    binary = original.engine.tool("postgres").read_bytes()
    others = ("open64", "openat", "pread64", "preadv", "preadv64", "readv", "truncate64",
              "ftruncate64", "unlinkat", "copy_file_range", "sendfile", "fallocate")  # fmt: skip
    assert [name for name in others if f"\0{name}\0".encode() in binary] == []


_STARTER = """
import os, subprocess, sys, time
from compute_node import shim
from pathlib import Path
library, socket, user, *command = sys.argv[1:]
how = {"user": int(user), "group": int(user)} if os.geteuid() == 0 else {}
environment = shim.environment(Path(library), Path(socket))
child = subprocess.Popen(command, cwd="/", stderr=subprocess.DEVNULL, env=environment, **how)
print(child.pid, flush=True)
time.sleep(60)
"""


def test_postgres_ends_with_its_agent(original: Original, library: Path) -> None:
    """The starter is killed; what it started must go."""
    data = original.home / "orphan"
    subprocess.run(["cp", "-a", original.data, data], check=True)
    # Started by a process of its own, which then waits to be killed.
    starter = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _STARTER,
            *(str(library), str(data / "pages"), str(original.engine.account.uid)),
            *(str(original.engine.tool("postgres")), "-D", str(data)),
            *("--listen_addresses=", f"--unix_socket_directories={data}"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert starter.stdout is not None
    with starter, starter.stdout:
        postmaster = psutil.Process(int(starter.stdout.readline()))
        wait_until(
            (data / "postmaster.pid").exists,
            timeout_s=20,
            otherwise=lambda: AssertionError("PostgreSQL did not start"),
        )
        starter.kill()
    wait_until(
        lambda: not postmaster.is_running() or postmaster.status() == psutil.STATUS_ZOMBIE,
        timeout_s=20,
        otherwise=lambda: AssertionError("PostgreSQL outlived its agent"),
    )


# --- the build -----------------------------------------------------------------------------------


def test_the_build_is_cached_and_readable_by_all(tmp_path: Path) -> None:
    library = shim.build(tmp_path / "built")
    made = library.stat()
    assert made.st_mode & 0o777 == 0o755
    assert shim.build(tmp_path / "built") == library
    assert library.stat().st_ino == made.st_ino
    assert [path.name for path in (tmp_path / "built").iterdir()] == [library.name]


def test_a_missing_compiler_is_told_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(BadUsage, match="ziglang"):
        shim.build(tmp_path / "built")


def test_a_failing_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cc").write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProcessFailed, match="no such luck"):
        shim.build(tmp_path / "built")
    assert list((tmp_path / "built").iterdir()) == []
