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

from boreal.process_tree import exists
from tests.compute_node.agent_kit import AgentProcess, Cluster, Connection, cluster, until


async def rows(connection: Connection) -> list[int]:
    cursor = await connection.execute("select i from t order by i")
    return [row[0] for row in await cursor.fetchall()]


async def ended(connection: Connection) -> None:
    """Use a session until it is ended by the other side."""
    with suppress(psycopg.OperationalError):
        while True:
            await connection.execute("select 1")


async def two_instances(made: Cluster) -> tuple[AgentProcess, AgentProcess]:
    """db-1 writes, db-2 reads, and has the one row of `t`."""
    writer = await made.begin("db-1")
    async with await writer.connect() as connection:
        await connection.execute("create table t (i int)")
        await connection.execute("insert into t values (1)")
    reader = await made.join("db-2", 2)
    async with await reader.connect() as connection:
        assert await rows(connection) == [1]
    return writer, reader


async def test_the_roles_change_without_help_and_without_loss() -> None:
    async with cluster() as made:
        first, second = await two_instances(made)
        await a_superseded_writer_comes_back_by_itself(made, first, second)
        await a_writer_makes_way(made, second, first)


async def a_superseded_writer_comes_back_by_itself(
    made: Cluster, former: AgentProcess, reader: AgentProcess
) -> None:
    async with await reader.connect() as session, await former.connect() as lost:
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            await session.execute("insert into t values (2)")
        made.tell(reader.name, "WRITE", 3)
        made.tell(former.name, "READ", 3)
        await made.state(reader.name, "WRITER")
        await session.execute("insert into t values (2)")  # the session lived through it
        with pytest.raises(psycopg.OperationalError):
            await lost.execute("select 1")
    await made.reborn(former.name, 3)
    made.tell(former.name, "READ", 3)
    await made.serves(former.name)
    async with await former.connect() as session:
        assert await rows(session) == [1, 2]
    status = made.control.status(former.name)
    assert status.replay_lsn >= status.vdl > 0
    assert not status.links


async def a_writer_makes_way(made: Cluster, writer: AgentProcess, target: AgentProcess) -> None:
    lives = made.lives(writer.name)
    async with await writer.connect() as busy, await writer.connect() as idle:
        await busy.set_autocommit(False)
        await busy.execute("insert into t values (3)")
        made.tell(writer.name, "YIELD", 3)
        await made.state(writer.name, "YIELDING")
        await busy.execute("insert into t values (4)")
        await busy.commit()
        await ended(busy)
        await ended(idle)
    await made.reborn(writer.name, lives + 1)
    made.tell(target.name, "WRITE", 4, former_gone=True)
    await made.state(target.name, "WRITER")
    async with await target.connect() as session:
        assert await rows(session) == [1, 2, 3, 4]


async def test_what_was_deposed_or_left_behind_serves_nobody() -> None:
    async with cluster() as made:
        first, second = await two_instances(made)
        await a_frozen_writer_serves_nobody_once_another_acknowledges(made, first, second)
        await a_new_incarnation_proves_that_nothing_of_the_former_runs(made, second)
        await a_frozen_postgres_is_no_secret(made, second)


async def a_frozen_writer_serves_nobody_once_another_acknowledges(
    made: Cluster, former: AgentProcess, reader: AgentProcess
) -> None:
    async with await former.connect() as session:
        assert await rows(session) == [1]
        former.send(signal.SIGSTOP)  # its agent; its PostgreSQL goes on
        lease_ns = former.lease
        assert lease_ns > time.monotonic_ns()
        made.tell(reader.name, "WRITE", 3)
        await made.state(reader.name, "WRITER")
        async with await reader.connect() as connection:
            await connection.execute("insert into t values (2)")
        assert time.monotonic_ns() > lease_ns
        stale = asyncio.create_task(rows(session))
        done, _ = await asyncio.wait({stale}, timeout=1.0)
        assert not done, "a deposed writer answered"
        former.send(signal.SIGCONT)
        with pytest.raises(psycopg.OperationalError):
            await stale
    await made.reborn(former.name, 3)


async def a_new_incarnation_proves_that_nothing_of_the_former_runs(
    made: Cluster, writer: AgentProcess
) -> None:
    lives = made.lives(writer.name)
    async with await writer.connect() as session:
        backend = psutil.Process(session.info.backend_pid)
        # It does not mind that its postmaster is gone before it next waits for something.
        working = asyncio.create_task(
            session.execute("select count(*) from generate_series(1, 1000000000)")
        )
        await until(lambda: backend.cpu_times().user > 0.05, "the query to be at work")
        writer.postmaster.kill()
        await made.reborn(writer.name, lives + 1)
        # Killed it is; the kernel may be about to take it down.
        await until(lambda: not exists(backend), "the backend to be gone", 1)
        with pytest.raises(psycopg.OperationalError):
            await working
    made.tell(writer.name, "WRITE", 4, former_gone=True)
    await made.state(writer.name, "WRITER")
    postmaster = writer.postmaster
    writer.stop()
    writer.start()
    await made.reborn(writer.name, lives + 2)
    await until(lambda: not exists(postmaster), "the postmaster to be gone", 1)
    made.tell(writer.name, "WRITE", 5, former_gone=True)
    await made.state(writer.name, "WRITER")


async def a_frozen_postgres_is_no_secret(made: Cluster, writer: AgentProcess) -> None:
    lives = made.lives(writer.name)
    for process in (writer.postmaster, *writer.postmaster.children()):
        process.suspend()
    await made.reborn(writer.name, lives + 1)
