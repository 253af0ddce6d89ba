"""The writer's lease in PostgreSQL's processes: without it no client's message gets through.

Goal: while the lease has run out nobody is served over TCP and nothing is lost; what ends a session
ends a held one too; the agent's own connections are not held. Method: stock PostgreSQL under the
real shim, with the agent's real word of the lease; what the storage nodes would say is said here.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from boreal.certificates import issue
from boreal.cluster import HOST, free_ports
from boreal.rpc.identity import CERTIFICATE_FILE, KEY_FILE
from compute_node.lease import Lease
from compute_node.shim import ClientTls
from tests.compute_node.shimmed import Original, ShimmedPostgres, shimmed_postgres

_FAR_S = 3600.0
_PATIENCE_S = 0.5
"""How long something that must not happen is given to happen."""


def release(word: Lease) -> None:
    """Let the lease be held for long."""
    word.renew([time.monotonic() + _FAR_S] * 6)


@asynccontextmanager
async def leased(
    original: Original, library: Path, name: str, tls: ClientTls | None = None
) -> AsyncIterator[tuple[ShimmedPostgres, Lease]]:
    (port,) = free_ports(1)
    async with shimmed_postgres(
        original, library, name, tcp_port=port, leased=True, tls=tls
    ) as server:
        assert server.lease is not None
        yield server, server.lease


async def client(server: ShimmedPostgres) -> psycopg.AsyncConnection[Any]:
    """A session over TCP."""
    return await psycopg.AsyncConnection.connect(
        host=HOST, port=server.port, user="postgres", dbname="postgres", autocommit=True
    )


async def sent(session: psycopg.AsyncConnection[Any], query: str) -> asyncio.Task[Any]:
    """Send a query; the task that waits for its first row. It is not answered for a while."""

    async def ask() -> Any:
        cursor = await session.execute(query.encode())
        return (await cursor.fetchone() or [None])[0]

    task = asyncio.create_task(ask())
    assert await asyncio.wait([task], timeout=_PATIENCE_S) == (set(), {task})
    return task


async def test_messages_wait_for_the_lease(original: Original, library: Path) -> None:
    async with leased(original, library, "waits") as (server, word):
        session = await client(server)
        async with session:
            assert server.lease is not None
            assert await (await session.execute("SELECT 1")).fetchone() == (1,)  # none needed
            word.hold_back()
            asked = await sent(session, "SELECT count(*) FROM untouched")
            fresh = asyncio.create_task(client(server))
            # Not the agent's.
            assert await server.run("SELECT count(*) FROM emptied") == [(3000,)]
            assert await asyncio.wait([asked, fresh], timeout=_PATIENCE_S) == (
                set(),
                {asked, fresh},
            )
            release(word)
            assert await asked == 1000
            await (await fresh).close()
            assert await (await session.execute("SELECT 2")).fetchone() == (2,)


async def test_a_lease_that_runs_out_by_itself_holds_too(original: Original, library: Path) -> None:
    async with leased(original, library, "ends") as (server, word):
        session = await client(server)
        async with session:
            word.hold_back()
            word.renew([time.monotonic()] * 6)
            await session.execute("SELECT 1")
            while word.held(time.monotonic):
                await asyncio.sleep(0.01)
            asked = await sent(session, "SELECT 7")
            release(word)
            assert await asked == 7


async def test_messages_in_private_wait_for_it_too(original: Original, library: Path) -> None:
    directory = original.home / "tls"
    issue(directory, ["db-1"])
    tls = ClientTls(
        certificate=directory / "db-1" / CERTIFICATE_FILE, key=directory / "db-1" / KEY_FILE
    )
    for path in (tls.certificate.parent, tls.key):
        original.engine.account.own(path)
    async with leased(original, library, "private", tls) as (server, word):
        session = await client(server)
        async with session:
            assert session.pgconn.ssl_in_use
            word.hold_back()
            asked = await sent(session, "SELECT 7")
            fresh = asyncio.create_task(client(server))
            assert await asyncio.wait([asked, fresh], timeout=_PATIENCE_S) == (
                set(),
                {asked, fresh},
            )
            release(word)
            assert await asked == 7
            await (await fresh).close()


async def test_nothing_of_a_long_message_is_lost(original: Original, library: Path) -> None:
    """The lease comes and goes while a client sends; what it sends is all there."""
    parameter = os.urandom(3 << 20).hex()
    async with leased(original, library, "long") as (server, word):
        session = await client(server)

        async def come_and_go() -> None:
            while True:
                word.hold_back()
                await asyncio.sleep(0.02)
                release(word)
                await asyncio.sleep(0.005)

        async with session:
            changing = asyncio.create_task(come_and_go())
            try:
                for _ in range(3):
                    cursor = await session.execute("SELECT %s", (parameter,))
                    assert await cursor.fetchone() == (parameter,)
            finally:
                changing.cancel()
                with suppress(asyncio.CancelledError):
                    await changing


async def test_a_held_session_can_be_terminated(original: Original, library: Path) -> None:
    async with leased(original, library, "terminated") as (server, word):
        session = await client(server)
        word.hold_back()
        asked = await sent(session, "SELECT 1")
        backend = session.info.backend_pid
        await server.run(f"SELECT pg_terminate_backend({backend}, 10000)")
        with pytest.raises(psycopg.errors.AdminShutdown):
            await asked
        assert not psutil.pid_exists(backend)


async def test_no_transaction_begins_while_a_writer_makes_way(
    original: Original, library: Path
) -> None:
    async with leased(original, library, "drains") as (server, word):
        busy, idle = await client(server), await client(server)
        release(word)
        await busy.execute("BEGIN")
        word.drain()
        asked = await sent(idle, "SELECT 1")
        fresh = asyncio.create_task(client(server))
        for number in range(3):  # simple queries, and after a few prepared ones
            assert await (await busy.execute("SELECT %s", (number,))).fetchone() == (number,)
        await busy.execute("COMMIT")
        late = await sent(busy, "SELECT 2")
        assert not fresh.done()
        for session, task in ((idle, asked), (busy, late)):
            await server.run(f"SELECT pg_terminate_backend({session.info.backend_pid}, 10000)")
            with pytest.raises(psycopg.errors.AdminShutdown):
                await task
        fresh.cancel()


async def gone(pid: int) -> None:
    """Wait for a process to end."""
    with suppress(psutil.NoSuchProcess):
        async with asyncio.timeout(20):
            while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT, signal.SIGKILL])
async def test_a_held_session_ends_with_its_postmaster(
    original: Original, library: Path, how: signal.Signals
) -> None:
    async with leased(original, library, "postmaster") as (server, word):
        session = await client(server)
        word.hold_back()
        asked = await sent(session, "SELECT 1")
        backend = session.info.backend_pid
        os.kill(server.postmaster, how)
        with pytest.raises(psycopg.OperationalError):
            await asked
        await gone(backend)


async def test_who_hangs_up_while_held_is_noticed_afterwards(
    original: Original, library: Path
) -> None:
    async with leased(original, library, "hangs-up") as (server, word):
        session = await client(server)
        word.hold_back()
        asked = await sent(session, "SELECT 1")
        backend = session.info.backend_pid
        asked.cancel()
        with suppress(asyncio.CancelledError, psycopg.Error):
            await asked
        await session.close()
        release(word)
        await gone(backend)


async def test_a_frozen_session_answers_nothing_it_got_after_the_lease(
    original: Original, library: Path
) -> None:
    """The lease runs out while the process is stopped, and the query comes then."""
    async with leased(original, library, "frozen") as (server, word):
        session = await client(server)
        async with session:
            release(word)
            await session.execute("SELECT 1")
            backend = session.info.backend_pid
            os.kill(backend, signal.SIGSTOP)
            word.hold_back()
            asked = await sent(session, "SELECT 5")
            os.kill(backend, signal.SIGCONT)
            assert await asyncio.wait([asked], timeout=_PATIENCE_S) == (set(), {asked})
            release(word)
            assert await asked == 5
