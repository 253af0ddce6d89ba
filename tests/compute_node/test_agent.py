"""Goal: an instance changes its role as ordered, without help and without loss: reader to writer,
writer to reader once superseded, a writer that makes way; and what a former life left behind
neither serves nor writes.

Method: agents as real processes on six real storage nodes, under a control plane that gives the
orders of the test (`agent_kit`); clients are real sessions.
"""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import suppress

import psutil
import psycopg
import pytest

from tests.compute_node.agent_kit import Cluster, Connection, cluster, until


async def rows(connection: Connection) -> list[int]:
    cursor = await connection.execute("select i from t order by i")
    return [row[0] for row in await cursor.fetchall()]


async def ended(connection: Connection) -> None:
    """Use a session until it is ended by the other side."""
    with suppress(psycopg.OperationalError):
        while True:
            await connection.execute("select 1")


async def two_instances(made: Cluster) -> None:
    """db-1 writes, db-2 reads, and has the one row of `t`."""
    writer = await made.begin("db-1")
    async with await writer.connect() as connection:
        await connection.execute("create table t (i int)")
        await connection.execute("insert into t values (1)")
    reader = await made.join("db-2", 2)
    async with await reader.connect() as connection:
        assert await rows(connection) == [1]


async def test_the_roles_change_and_a_superseded_writer_comes_back_by_itself() -> None:
    async with cluster() as made:
        await two_instances(made)
        former, reader = made.agents["db-1"], made.agents["db-2"]
        async with await reader.connect() as session, await former.connect() as lost:
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                await session.execute("insert into t values (2)")
            made.tell("db-2", "WRITE", 3)
            made.tell("db-1", "READ", 3)
            await made.state("db-2", "WRITER")
            await session.execute("insert into t values (2)")  # the session lived through it
            with pytest.raises(psycopg.OperationalError):
                await lost.execute("select 1")
        await made.reborn("db-1", 3)
        made.tell("db-1", "READ", 3)
        await made.serves("db-1")
        async with await former.connect() as session:
            assert await rows(session) == [1, 2]
        status = made.control.status("db-1")
        assert status.replay_lsn >= status.vdl > 0
        assert not status.links


async def test_a_writer_that_makes_way_lets_a_transaction_end_and_no_session_begin() -> None:
    async with cluster() as made:
        await two_instances(made)
        writer = made.agents["db-1"]
        async with await writer.connect() as busy, await writer.connect() as idle:
            await busy.set_autocommit(False)
            await busy.execute("insert into t values (2)")
            made.tell("db-1", "YIELD", 2)
            await made.state("db-1", "YIELDING")
            await busy.execute("insert into t values (3)")
            await busy.commit()
            with pytest.raises(psycopg.OperationalError):
                async with await writer.connect() as late:
                    await late.execute("select 1")
            await ended(idle)
        await made.reborn("db-1", 3)
        made.tell("db-2", "WRITE", 3, former_gone=True)
        await made.serves("db-2")
        await made.state("db-2", "WRITER")
        async with await made.agents["db-2"].connect() as session:
            assert await rows(session) == [1, 2, 3]


async def test_a_frozen_writer_serves_nobody_once_another_acknowledges() -> None:
    async with cluster() as made:
        await two_instances(made)
        former, reader = made.agents["db-1"], made.agents["db-2"]
        async with await former.connect() as session:
            assert await rows(session) == [1]
            former.send(signal.SIGSTOP)  # its agent; its PostgreSQL goes on
            lease_ns = former.lease
            assert lease_ns > time.monotonic_ns()
            made.tell("db-2", "WRITE", 3)
            await made.state("db-2", "WRITER")
            async with await reader.connect() as connection:
                await connection.execute("insert into t values (2)")
            assert time.monotonic_ns() > lease_ns
            stale = asyncio.create_task(rows(session))
            done, _ = await asyncio.wait({stale}, timeout=1.0)
            assert not done, "a deposed writer answered"
            former.send(signal.SIGCONT)
            with pytest.raises(psycopg.OperationalError):
                await stale
        await made.reborn("db-1", 3)


async def test_a_new_incarnation_proves_that_nothing_of_the_former_runs() -> None:
    async with cluster() as made:
        writer = await made.begin("db-1")
        async with await writer.connect() as session:
            cursor = await session.execute("select pg_backend_pid()")
            row = await cursor.fetchone()
            assert row is not None
            backend = psutil.Process(row[0])
            # Neither of them minds that its postmaster is gone before it next waits for something.
            working = asyncio.create_task(
                session.execute("select count(*) from generate_series(1, 1000000000)")
            )
            await until(lambda: backend.cpu_times().user > 0.05, "the query to be at work")
            writer.postmaster.kill()
            await made.reborn("db-1", 3)
            assert not backend.is_running() or backend.status() == psutil.STATUS_ZOMBIE
            with pytest.raises(psycopg.OperationalError):
                await working
        made.tell("db-1", "WRITE", 3, former_gone=True)
        await made.serves("db-1")
        writer.stop()
        writer.start()
        await made.reborn("db-1", 4)
        made.tell("db-1", "WRITE", 4, former_gone=True)
        await made.serves("db-1")
