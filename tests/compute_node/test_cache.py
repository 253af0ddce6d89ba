"""The bounded cache: pages are taken out of files in use, and nobody can tell but by the disk.

Goal: only what storage brings back is evicted, exactly as it was; no read or write beside an
eviction goes wrong. Method: the choice and the punching on plain files; the waiting for
transactions on a stock PostgreSQL; a reader on the real shim whose pages are evicted under
concurrent scans.
(tests/cluster/test_cache_size.py has a writer, whose changes only real storage nodes follow.)
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from boreal.engine import Account
from boreal.errors import NotNow
from boreal.types import PAGE_BYTES, Lsn
from compute_node import cache, shim
from compute_node.cache import BoundedCache, RelationFiles, settle_reader, settle_writer
from compute_node.fleet import ANY_END
from compute_node.losses import Losses
from compute_node.storage_client import IndexState
from tests.compute_node.shimmed import Original, ShimmedPostgres, shimmed_postgres
from tests.support.stock_postgres import StockPostgres, stock_postgres

MB = 1024 * 1024


# --- plain files ----------------------------------------------------------------------------------


@pytest.fixture
def pgdata() -> Iterator[Path]:
    # Not tmp_path, which may be of a file system without holes.
    with tempfile.TemporaryDirectory(prefix="boreal-cache-", dir="/var/tmp") as folder:
        for directory in ("base/5", "global"):
            (Path(folder) / directory).mkdir(parents=True)
        yield Path(folder)


def make(pgdata: Path, name: str, pages: int) -> Path:
    path = pgdata / name
    path.write_bytes(os.urandom(PAGE_BYTES * pages))
    return path


def blocks_here(path: Path) -> list[int]:
    content = path.read_bytes()
    pages = [content[at : at + PAGE_BYTES] for at in range(0, len(content), PAGE_BYTES)]
    return [block for block, page in enumerate(pages) if any(page)]


def evict(files: RelationFiles, wanted_bytes: int = 1 << 40) -> int:
    return files.punch(files.choose(wanted_bytes))


def test_only_what_storage_brings_back_is_evicted(pgdata: Path) -> None:
    kept = [
        make(pgdata, name, 3)
        for name in (
            *("global/20001", "base/5/1259", "base/5/20001_vm", "base/5/20001_fsm"),
            *("base/5/20002", "base/5/20002_init", "base/5/20002.1", "base/5/t3_20003"),
            *("base/5/20004_init", "base/5/pg_filenode.map"),
        )
    ]
    kept.append(make(pgdata, "base/5/20005", 1))  # may be a sequence
    gone = [make(pgdata, name, 3) for name in ("base/5/20001", "base/5/20006")]
    gone.append(make(pgdata, "base/5/20006.1", 1))
    before = {path: path.read_bytes() for path in kept}
    assert evict(RelationFiles(pgdata)) == 7 * PAGE_BYTES
    assert {path: path.read_bytes() for path in kept} == before
    assert [blocks_here(path) for path in gone] == [[], [], []]
    assert gone[0].stat().st_size == 3 * PAGE_BYTES
    assert gone[0].stat().st_blocks == 0


def test_what_changed_since_it_was_chosen_stays(pgdata: Path) -> None:
    path = make(pgdata, "base/5/20001", 64)
    other = make(pgdata, "base/5/20002", 16)
    unlogged = make(pgdata, "base/5/20003", 16)
    dropped = make(pgdata, "base/5/20004", 16)
    files = RelationFiles(pgdata)
    chosen = files.choose(1 << 40)
    with path.open("r+b") as file:
        file.seek(20 * PAGE_BYTES + 77)
        file.write(b"x")
    content = other.read_bytes()
    other.unlink()
    make(pgdata, "base/5/other", 1)  # takes the inode, if anything does
    other.write_bytes(content)
    make(pgdata, "base/5/20003_init", 1)
    dropped.unlink()
    assert files.punch(chosen) == 48 * PAGE_BYTES
    assert blocks_here(path) == list(range(16, 32))
    assert len(blocks_here(unlogged)) == 16


def test_what_is_being_written_stays(pgdata: Path) -> None:
    path = make(pgdata, "base/5/20001", 64)
    files = RelationFiles(pgdata)
    chosen = files.choose(1 << 40)
    with path.open("r+b") as file:
        writing = struct.pack("@hhqqi4x", fcntl.F_WRLCK, 0, 40 * PAGE_BYTES, PAGE_BYTES, 0)
        fcntl.fcntl(file, 37, writing)  # F_OFD_SETLK
        assert files.punch(chosen) == 48 * PAGE_BYTES
    assert blocks_here(path) == list(range(32, 48))


def test_the_hand_goes_round_all_files(pgdata: Path) -> None:
    paths = [make(pgdata, f"base/5/{20001 + n}", 64) for n in range(4)]
    files = RelationFiles(pgdata)
    assert files.local_bytes() >= 256 * PAGE_BYTES
    for _ in range(8):
        assert evict(files, 32 * PAGE_BYTES) == 32 * PAGE_BYTES
    assert [blocks_here(path) for path in paths] == [[]] * 4
    make(pgdata, "base/5/20001", 64)
    assert evict(files, 32 * PAGE_BYTES) == 32 * PAGE_BYTES
    assert files.choose(1 << 40)


async def test_a_round_shrinks_to_the_bound_and_not_further(pgdata: Path) -> None:
    make(pgdata, "base/5/20001", 2048)
    losses = Losses(pgdata / "pages", Account.current())
    bounded = BoundedCache(RelationFiles(pgdata), losses, 8 * MB)
    settled = 0

    async def settle() -> None:
        nonlocal settled
        settled += 1

    assert not await bounded.shrink(settle, lambda: False)  # e.g. it is being promoted
    assert bounded.evicted_bytes == 0
    while await bounded.shrink(settle, lambda: True):
        pass
    assert 7 * MB <= RelationFiles(pgdata).local_bytes() <= 8 * MB
    count, rounds = losses.count(), settled
    assert count % 2 == 0
    assert not await bounded.shrink(settle, lambda: True)
    assert (losses.count(), settled) == (count, rounds)
    losses.close()


# --- waiting until all is in the log --------------------------------------------------------------


@pytest.fixture(scope="module")
def stock() -> Iterator[StockPostgres]:
    with stock_postgres() as server:
        server.run(
            "CREATE TABLE items (id int)", "INSERT INTO items SELECT generate_series(1, 9000)"
        )
        yield server


@dataclass(slots=True)
class Indexed:
    """A fleet of which as many nodes have indexed everything."""

    nodes: int = 3

    async def index_states(self) -> dict[str, IndexState]:
        everything = IndexState(indexed=Lsn(2**60), scl=Lsn(2**60), failure="")
        return {f"sn-{number}": everything for number in range(self.nodes)}


@dataclass(slots=True)
class ReadPoint:
    lsn: Lsn = ANY_END

    def advance_read_point(self, lsn: Lsn) -> None:
        self.lsn = lsn


async def settle(server: StockPostgres, fleet: Indexed) -> Lsn:
    pages = ReadPoint()
    connection = await psycopg.AsyncConnection.connect(
        host=str(server.socket_directory),
        port=5432,
        user="postgres",
        dbname="postgres",
        autocommit=True,
    )
    async with connection:
        await settle_writer(connection, fleet, pages)  # type: ignore[arg-type]
    return pages.lsn


@pytest.mark.parametrize(
    ("statement", "is_waited_for"),
    [
        ("INSERT INTO items VALUES (0)", True),
        ("LOCK TABLE items IN SHARE UPDATE EXCLUSIVE MODE", True),  # what a vacuum holds
        ("SELECT * FROM items FOR UPDATE", True),
        ("SELECT sum(id) FROM items", False),
        ("SELECT 1", False),
    ],
)
async def test_only_who_may_have_changed_pages_is_waited_for(
    stock: StockPostgres, statement: str, is_waited_for: bool
) -> None:
    before = stock.run("SELECT pg_current_wal_insert_lsn() - '0/0'")[0][0]
    with stock.connect() as session:
        session.execute("BEGIN")
        session.execute(statement.encode())
        settling = asyncio.create_task(settle(stock, Indexed()))
        done, _ = await asyncio.wait([settling], timeout=1.0)
        assert bool(done) is not is_waited_for
        session.execute("COMMIT")
    assert await asyncio.wait_for(settling, 10) >= before


async def test_a_prepared_transaction_is_not_waited_for(stock: StockPostgres) -> None:
    stock.run("BEGIN", "INSERT INTO items VALUES (0)", "PREPARE TRANSACTION 'one'")
    await asyncio.wait_for(settle(stock, Indexed()), 10)
    stock.run("ROLLBACK PREPARED 'one'")


async def test_the_read_point_waits_for_storage_nodes(
    stock: StockPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_SETTLE_WITHIN_S", 0.3)
    with pytest.raises(NotNow, match="indexed"):
        await settle(stock, Indexed(nodes=2))


# --- under PostgreSQL -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original() -> Iterator[Original]:
    with stock_postgres() as server:
        server.run(
            "CREATE TABLE wide (id int PRIMARY KEY, filler text)",
            "INSERT INTO wide SELECT g, repeat(md5(g::text), 30) FROM generate_series(1, 12000) g",
            "CREATE INDEX wide_md5 ON wide (md5(filler))",
            "VACUUM (FREEZE) wide",
        )
        server.stop()
        yield Original(engine=server.engine, home=server.data.parent, data=server.data)


async def checksum(server: ShimmedPostgres, first: int) -> tuple[object, ...]:
    (row,) = await server.run(
        "SET enable_seqscan = off; SET enable_bitmapscan = off",
        f"SELECT count(*), sum(hashtext(w::text)) FROM wide w WHERE id >= {first}",
    )
    return row


async def test_readers_notice_nothing_while_all_is_evicted_again_and_again(
    original: Original,
) -> None:
    library = shim.build(original.home / "shim")
    async with shimmed_postgres(original, library, "evicted", cache_limited=True) as server:
        assert server.pages is not None
        bounded = BoundedCache(RelationFiles(server.data), server.pages.losses, 1)
        right = {first: await checksum(server, first) for first in (1, 4000, 8000)}
        assert right[1][0] == 12000
        reading = True

        async def evict_on() -> None:
            async with await server.connect() as connection:
                while reading:
                    await bounded.shrink(lambda: settle_reader(connection), lambda: True)

        async def scan(first: int) -> None:
            for _ in range(4):
                assert await checksum(server, first) == right[first]
                rows = await server.run("SELECT count(*), sum(hashtext(w::text)) FROM wide w")
                assert rows == [right[1]]

        evicting = asyncio.create_task(evict_on())
        try:
            await asyncio.gather(scan(1), scan(4000), scan(8000), scan(1))
        finally:
            reading = False
            await evicting
        assert bounded.evicted_bytes > 20 * MB
        assert server.pages.counters.failures == 0
