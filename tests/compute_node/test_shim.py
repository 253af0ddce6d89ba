"""The page shim: stock PostgreSQL on relation files without pages must answer like the original.

Goal: whatever PostgreSQL reads of a relation file, and by whichever call, is what the volume holds;
what the volume cannot give is an error, never zeros; and nothing newer is ever overwritten.

Method: a stock cluster of many kinds of relation is stopped and plays the volume. Copies of it
whose relation files are empty of pages run under the real shim against the real page service.
(What stock PostgreSQL never does: test_shim_files.py and test_shim_ahead.py. Connections:
test_shim_handover.py and test_shim_lease.py.)
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import psycopg
import pytest

from boreal.errors import NotMaterializable
from boreal.types import PAGE_BYTES
from tests.compute_node.shim_volume import PLANS, QUERIES
from tests.compute_node.shimmed import Original, page_key, shimmed_postgres


async def test_a_reader_without_a_page_answers_like_the_original(
    volume: tuple[Original, list[Any]], library: Path
) -> None:
    original, answers = volume
    async with shimmed_postgres(original, library, "reader") as server:
        untouched = (await server.file_of("untouched")).relative_to(server.data)
        assert server.local_bytes(untouched) == 0

        found = [await server.run(plan, query) for plan in PLANS for query in QUERIES]

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
