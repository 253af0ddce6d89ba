"""Whom the endpoints' connections go to as roles change, instances die, and the control plane does.

Method: the real endpoints' process in front of stock PostgreSQL with the shim; the control plane's
routing is told by a real gRPC server in the test, which can be stopped. Dead and frozen instances
are real ones.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from boreal.cluster import HOST
from boreal.rpc import control_pb2
from tests.support.endpoints_process import (
    EndpointsProcess,
    Routings,
    control_plane,
    endpoints,
)
from tests.support.handed_over import HandedOver, handed_over

Instances = tuple[HandedOver, HandedOver, HandedOver]

_PARAMETERS = b"user\0postgres\0database\0postgres\0\0"
_STARTUP = struct.pack("!II", 8 + len(_PARAMETERS), 3 << 16) + _PARAMETERS


@pytest.fixture(scope="module")
def instances() -> Iterator[Instances]:
    with handed_over("db-1") as one, handed_over("db-2") as two, handed_over("db-3") as three:
        yield one, two, three


@contextmanager
def frozen(instance: HandedOver) -> Iterator[None]:
    os.kill(instance.server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(instance.server.pid, signal.SIGCONT)


def nobody(name: str, *, writer: bool = False) -> control_pb2.Route:
    """A route to an instance that is gone."""
    return control_pb2.Route(
        instance=name, writer=writer, host=HOST, postgres_port=1, handover=f"/nowhere/{name}"
    )


def visit(process: EndpointsProcess, *, reader: bool = False) -> socket.socket:
    """A client that has asked for a session."""
    port = process.reader_port if reader else process.writer_port
    client = socket.create_connection((HOST, port), timeout=30)
    client.sendall(_STARTUP)
    return client


async def said(client: socket.socket) -> bytes:
    """All the endpoint or PostgreSQL says until it hangs up."""

    def read() -> bytes:
        received = b""
        while data := client.recv(4096):
            received += data
        return received

    return await asyncio.to_thread(read)


async def test_connections_wait_for_a_writer(instances: Instances, tmp_path: Path) -> None:
    one, two, _three = instances
    async with endpoints(tmp_path, two.route()) as (process, routings):
        waiting = [asyncio.create_task(process.instance()) for _ in range(40)]
        await process.logged("connections wait")
        assert await process.instance(reader=True) == "db-2"
        assert not any(task.done() for task in waiting)
        routings.become(one.route(), two.route(writer=True))
        assert set(await asyncio.gather(*waiting)) == {"db-2"}
        await process.logged("connections wait no more")
        assert await process.instance() == "db-2"
        assert await process.instance(reader=True) == "db-1"


async def test_the_first_routing_may_be_late(instances: Instances, tmp_path: Path) -> None:
    async with endpoints(tmp_path) as (process, routings):
        waiting = [asyncio.create_task(process.instance(reader=reader)) for reader in (0, 1)]
        await process.logged("connections wait", 2)
        routings.become(instances[0].route(writer=True))
        assert await asyncio.gather(*waiting) == ["db-1", "db-1"]


async def test_the_readers_endpoint_spreads_and_falls_back(
    instances: Instances, tmp_path: Path
) -> None:
    one, two, three = instances
    writer = one.route(writer=True)
    async with endpoints(tmp_path, writer, two.route(), three.route()) as (process, routings):
        met = Counter([await process.instance(reader=True) for _ in range(20)])
        assert met == {"db-2": 10, "db-3": 10}
        at_once = await asyncio.gather(*(process.instance(reader=True) for _ in range(20)))
        assert set(at_once) == {"db-2", "db-3"}
        routings.become(writer, three.route())
        await process.logged("routing changes", 2)
        assert {await process.instance(reader=True) for _ in range(4)} == {"db-3"}
        routings.become(writer)
        await process.logged("routing changes", 3)
        assert {await process.instance(reader=True) for _ in range(4)} == {"db-1"}


async def test_a_dead_instance_is_passed_over(instances: Instances, tmp_path: Path) -> None:
    one, two, _three = instances
    routes = (one.route(writer=True), two.route(), nobody("db-7"))
    async with endpoints(tmp_path, *routes) as (process, routings):
        assert {await process.instance(reader=True) for _ in range(30)} == {"db-2"}
        await process.logged("an instance took no connection")
        routings.become(one.route(writer=True), nobody("db-7"), nobody("db-8"))
        await process.logged("routing changes", 2)
        assert {await process.instance(reader=True) for _ in range(30)} == {"db-1"}


async def test_an_instance_that_dies_gives_its_connections_back(
    instances: Instances, tmp_path: Path
) -> None:
    """It dies with connections in its backlog; they go to the next writer."""
    _one, two, _three = instances
    with handed_over("db-9") as dying:
        async with endpoints(tmp_path, dying.route(writer=True)) as (process, routings):
            assert await process.instance() == "db-9"
            with frozen(dying):
                waiting = [asyncio.create_task(process.instance()) for _ in range(20)]
                await process.logged("connections wait")
                os.kill(dying.server.pid, signal.SIGKILL)
            routings.become(two.route(writer=True))
            assert set(await asyncio.gather(*waiting)) == {"db-2"}


async def test_a_frozen_instance_gets_no_connection_that_went_elsewhere(
    instances: Instances, tmp_path: Path
) -> None:
    one, two, _three = instances
    async with endpoints(tmp_path, one.route(writer=True)) as (process, routings):
        with frozen(one):
            waiting = [asyncio.create_task(process.connect()) for _ in range(20)]
            await process.logged("an instance took no connection")
            routings.become(two.route(writer=True))
            sessions = await asyncio.gather(*waiting)
            for session in sessions:
                assert await name_of(session) == "db-2"
        # What it finds when it goes on is nothing: it serves, and nobody is served twice.
        clients = "SELECT count(*) FROM pg_stat_activity WHERE client_addr IS NOT NULL"
        assert await asyncio.to_thread(one.server.run, clients) == [(0,)]
        for session in sessions:
            assert await name_of(session) == "db-2"
            await session.close()
        routings.become(one.route(writer=True))
        await process.logged("routing changes", 3)
        assert await process.instance() == "db-1"


async def test_a_frozen_reader_costs_others_nothing(instances: Instances, tmp_path: Path) -> None:
    one, two, three = instances
    routes = (one.route(writer=True), two.route(), three.route())
    async with endpoints(tmp_path, *routes) as (process, _routings):
        with frozen(two):
            stuck = [asyncio.create_task(process.instance(reader=True)) for _ in range(2)]
            assert {await process.instance(reader=True) for _ in range(10)} == {"db-3"}
            assert set(await asyncio.gather(*stuck)) == {"db-3"}


async def ended(session: psycopg.AsyncConnection[Any]) -> None:
    """The session gets no answer any more, but its end."""
    with pytest.raises(psycopg.OperationalError):
        await session.execute("SELECT 1")
    await session.close()


async def test_sessions_of_a_deposed_writer_end_though_it_is_frozen(
    instances: Instances, tmp_path: Path
) -> None:
    one, two, three = instances
    first = (one.route(writer=True), two.route(), three.route())
    async with endpoints(tmp_path, *first) as (process, routings):
        of_writer = [await process.connect() for _ in range(3)]
        of_readers = [await process.connect(reader=True) for _ in range(2)]
        with frozen(one), ExitStack() as stack:
            for session in of_writer:  # the postmaster does not answer, nor do they
                os.kill(session.info.backend_pid, signal.SIGSTOP)
                stack.callback(os.kill, session.info.backend_pid, signal.SIGCONT)
            asked = [asyncio.create_task(ended(session)) for session in of_writer]
            routings.become(two.route(), three.route())
            await process.logged("routing changes", 2)
            assert await asyncio.wait(asked, timeout=0.3) == (set(), set(asked))
            routings.become(two.route(writer=True), three.route())
            await asyncio.gather(*asked)
        assert sorted([await name_of(session) for session in of_readers]) == ["db-2", "db-3"]

        # One that was a reader's became the writer's.
        routings.become(three.route(writer=True), one.route())
        await process.logged("sessions of a former writer were ended", 2)
        names = []
        for session in of_readers:
            try:
                names.append(await name_of(session))
            except psycopg.OperationalError:
                names.append("ended")
            await session.close()
        assert sorted(names) == ["db-3", "ended"]


async def test_sessions_of_a_writer_that_comes_back_as_such_go_on(
    instances: Instances, tmp_path: Path
) -> None:
    one, two, _three = instances
    async with endpoints(tmp_path, one.route(writer=True), two.route()) as (process, routings):
        session = await process.connect()
        routings.become(two.route())
        await process.logged("routing changes", 2)
        routings.become(one.route(writer=True), two.route())
        await process.logged("routing changes", 3)
        assert await name_of(session) == "db-1"
        await session.close()


async def test_sessions_that_a_former_writer_takes_as_a_reader_go_on(
    instances: Instances, tmp_path: Path
) -> None:
    one, two, _three = instances
    async with endpoints(tmp_path, one.route(writer=True)) as (process, routings):
        before = await process.connect()
        routings.become(one.route())  # it is a reader already, and has no successor yet
        await process.logged("routing changes", 2)
        after = await process.connect(reader=True)
        routings.become(one.route(), two.route(writer=True))
        await process.logged("sessions of a former writer were ended")
        await ended(before)
        assert await name_of(after) == "db-1"
        await after.close()


async def name_of(session: psycopg.AsyncConnection[Any]) -> str:
    row = await (await session.execute("SHOW cluster_name")).fetchone()
    assert row is not None
    return str(row[0])


async def test_patience_ends_with_postgresqls_own_message(tmp_path: Path) -> None:
    async with endpoints(tmp_path, arguments=("--patience", "0.2")) as (process, _routings):
        with visit(process) as client:
            answer = await said(client)
        assert b"FATAL" in answer
        assert b"C57P03\0" in answer
        with pytest.raises(psycopg.OperationalError, match="no writer"):
            await process.connect()
        with pytest.raises(psycopg.OperationalError, match="no instance"):
            await process.connect(reader=True)


async def test_so_many_wait_and_no_more(instances: Instances, tmp_path: Path) -> None:
    async with endpoints(tmp_path, arguments=("--max-waiting", "3")) as (process, routings):
        waiting = [asyncio.create_task(process.instance()) for _ in range(3)]
        with ExitStack() as stack:
            await process.logged("connections wait")
            refused: list[bytes] = []
            while not refused:  # until all three are there
                client = stack.enter_context(visit(process))
                client.settimeout(0.2)
                try:
                    refused.append(await said(client))
                except TimeoutError:
                    client.close()
            assert b"C53300\0" in refused[0]
        routings.become(instances[0].route(writer=True))
        assert set(await asyncio.gather(*waiting)) == {"db-1"}
        assert await process.instance() == "db-1"


async def test_who_gives_up_waiting_makes_room(instances: Instances, tmp_path: Path) -> None:
    async with endpoints(tmp_path, arguments=("--max-waiting", "1")) as (process, routings):
        for count in range(1, 6):
            with visit(process):
                await process.logged("connections wait", count)
            await process.logged("connections wait no more", count)
        waiting = asyncio.create_task(process.instance())
        await process.logged("connections wait", 6)
        routings.become(instances[0].route(writer=True))
        assert await waiting == "db-1"


async def test_the_last_routing_stands_without_a_control_plane(
    instances: Instances, tmp_path: Path
) -> None:
    one, two, _three = instances
    routings = Routings()  # type: ignore[abstract]
    routings.become(one.route(writer=True))
    async with control_plane(routings) as (address, server):
        process = EndpointsProcess(tmp_path / "log", address)
        try:
            await process.logged("routing changes")
            assert await process.instance() == "db-1"
            await server.stop(None)
            await process.logged("the control plane is away; its last routing stands")
            assert await process.instance() == "db-1"
            routings.become(two.route(writer=True))
            async with control_plane(routings, int(address.rpartition(":")[2])):
                await process.logged("routing changes", 2)
                assert await process.instance() == "db-2"
        finally:
            await process.end(signal.SIGKILL)


async def test_a_routing_that_cannot_be_changes_nothing(
    instances: Instances, tmp_path: Path
) -> None:
    one, two, _three = instances
    async with endpoints(tmp_path, one.route(writer=True)) as (process, routings):
        routings.become(nobody("db-7", writer=True), nobody("db-8", writer=True))
        await process.logged("the control plane is away; its last routing stands")
        assert await process.instance() == "db-1"
        routings.become(two.route(writer=True))
        await process.logged("routing changes", 2)
        assert await process.instance() == "db-2"


async def test_it_ends_cleanly_and_tells_who_waits(instances: Instances, tmp_path: Path) -> None:
    async with endpoints(tmp_path, instances[1].route()) as (process, _routings):
        session = await process.connect(reader=True)
        with (
            visit(process) as waiting,
            socket.create_connection((HOST, process.writer_port), timeout=30) as silent,
        ):
            await process.logged("connections wait")
            assert await process.end(signal.SIGTERM) == 0
            assert b"C57P03\0" in await said(waiting)
            assert await said(silent) == b""
        assert await name_of(session) == "db-2"
        await session.close()
        with pytest.raises(ConnectionRefusedError):
            visit(process)


async def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    async with endpoints(tmp_path) as (process, _routings):
        second = EndpointsProcess(
            tmp_path / "second", "127.0.0.1:1", "--writer-port", str(process.writer_port)
        )
        assert await asyncio.to_thread(second.wait) == 1
        assert "cannot listen" in second.events()[-1]["why"]
