"""A relayed connection is as good as one handed over, and costs bounded memory.

Method: the real endpoints' process in front of stock PostgreSQL whose routes have no handover path;
for what PostgreSQL never does (half a connection, a flood), a plain TCP server takes its place.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from boreal.cluster import HOST, free_ports
from boreal.errors import NotNow
from boreal.rpc import control_pb2
from boreal.rpc.health import check
from boreal.types import InstanceName
from control_plane.endpoints.choice import Endpoint, Route
from control_plane.endpoints.server import Endpoints, Limits, listen
from tests.support.endpoints_process import EndpointsProcess, endpoints
from tests.support.handed_over import HandedOver, handed_over

_PARAMETERS = b"user\0postgres\0database\0postgres\0\0"
_STARTUP = struct.pack("!II", 8 + len(_PARAMETERS), 3 << 16) + _PARAMETERS
_FLOOD_BYTES = 64 * 1024 * 1024
_CHUNK = b"x" * 65536


def route(instance: HandedOver, *, writer: bool = False) -> control_pb2.Route:
    """As of an instance elsewhere."""
    far = instance.route(writer=writer)
    far.handover = ""
    return far


@pytest.fixture(scope="module")
def instances() -> Iterator[tuple[HandedOver, HandedOver]]:
    with handed_over("db-1") as one, handed_over("db-2") as two:
        yield one, two


@pytest.fixture
async def process(
    instances: tuple[HandedOver, HandedOver], tmp_path: Path
) -> AsyncIterator[EndpointsProcess]:
    """The endpoints, with db-1 as writer and db-2 as reader."""
    one, two = instances
    async with endpoints(tmp_path, route(one, writer=True), route(two)) as (running, _routings):
        yield running


@contextmanager
def played(serve: Callable[[socket.socket], None]) -> Iterator[control_pb2.Route]:
    """An instance that is not PostgreSQL: every connection to it is `serve`d in a thread."""
    with socket.create_server((HOST, 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        yield control_pb2.Route(instance="db-1", writer=True, host=HOST, postgres_port=port)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


@asynccontextmanager
async def in_front_of(
    folder: Path, serve: Callable[[socket.socket], None]
) -> AsyncIterator[EndpointsProcess]:
    with played(serve) as far:
        async with endpoints(folder, far) as (running, _routings):
            yield running


def visit(process: EndpointsProcess) -> socket.socket:
    client = socket.create_connection((HOST, process.writer_port), timeout=20)
    client.sendall(_STARTUP)
    return client


def read_all(client: socket.socket) -> bytes:
    received = bytearray()
    while data := client.recv(1 << 20):
        received += data
    return bytes(received)


async def test_much_data_goes_both_ways(process: EndpointsProcess) -> None:
    assert [await process.instance(), await process.instance(reader=True)] == ["db-1", "db-2"]
    rows = [(number, hashlib.sha256(str(number).encode()).hexdigest()) for number in range(50_000)]
    session = await process.connect()
    async with session, session.cursor() as cursor:
        await cursor.execute("CREATE TEMP TABLE t (id int, word text)")
        async with cursor.copy("COPY t FROM STDIN") as copy:
            for row in rows:
                await copy.write_row(row)
        await cursor.execute("SELECT id, word FROM t ORDER BY id")
        assert await cursor.fetchall() == rows
        await cursor.execute("SELECT repeat('x', 50000000)")
        assert await cursor.fetchone() == ("x" * 50_000_000,)


async def test_a_query_is_cancelled(process: EndpointsProcess) -> None:
    session = await process.connect()
    async with session:
        asked = asyncio.create_task(session.execute("SELECT pg_sleep(100)"))
        while not asked.done():
            await session.cancel_safe(timeout=10)
            await asyncio.wait([asked], timeout=0.2)
        with pytest.raises(psycopg.errors.QueryCanceled):
            await asked


async def test_postgresqls_last_words_arrive(process: EndpointsProcess) -> None:
    session, other = await process.connect(), await process.connect()
    async with session, other:
        await other.execute("SELECT pg_terminate_backend(%s)", (session.info.backend_pid,))
        with pytest.raises(psycopg.errors.AdminShutdown):
            await session.execute("SELECT 1")


async def test_the_sessions_of_a_deposed_frozen_writer_end(
    instances: tuple[HandedOver, HandedOver], tmp_path: Path
) -> None:
    one, two = instances
    async with endpoints(tmp_path, route(one, writer=True), route(two)) as (process, routings):
        stuck, reading = await process.connect(), await process.connect(reader=True)
        backend = stuck.info.backend_pid
        os.kill(backend, signal.SIGSTOP)
        try:
            asked = asyncio.create_task(stuck.execute("SELECT 1"))
            routings.become(route(two, writer=True))
            with pytest.raises(psycopg.OperationalError):
                await asked
        finally:
            os.kill(backend, signal.SIGCONT)
        assert await (await reading.execute("SELECT 1")).fetchone() == (1,)
        assert await process.instance() == "db-2"
        await reading.close()


async def test_a_dead_instance_is_passed_over(
    instances: tuple[HandedOver, HandedOver], tmp_path: Path
) -> None:
    gone = control_pb2.Route(instance="db-7", host=HOST, postgres_port=free_ports(1)[0])
    routes = (route(instances[0], writer=True), route(instances[1]), gone)
    async with endpoints(tmp_path, *routes) as (process, _routings):
        assert {await process.instance(reader=True) for _ in range(10)} == {"db-2"}
        await process.logged("an instance took no connection")


async def test_half_a_connection_goes_on(tmp_path: Path) -> None:
    """A client that has said all it had to say still gets the whole answer."""

    def echo_once_all_is_said(connection: socket.socket) -> None:
        with connection:
            connection.sendall(read_all(connection))

    async with in_front_of(tmp_path, echo_once_all_is_said) as process:

        def talk() -> bytes:
            with visit(process) as client:
                client.sendall(_CHUNK * 100)
                client.shutdown(socket.SHUT_WR)
                return read_all(client)

        assert await asyncio.to_thread(talk) == _STARTUP + _CHUNK * 100


async def test_what_nobody_takes_waits_where_it_is(tmp_path: Path) -> None:
    """A client that does not read holds up PostgreSQL, not our memory; then it gets all."""
    sent = [0]

    def flood(connection: socket.socket) -> None:
        with connection:
            connection.recv(len(_STARTUP))
            while sent[0] < _FLOOD_BYTES:
                connection.sendall(_CHUNK)
                sent[0] += len(_CHUNK)

    async with in_front_of(tmp_path, flood) as process:
        before = process.observed.memory_info().rss
        with visit(process) as client:
            stalled, last = 0, -1
            async with asyncio.timeout(30):
                while stalled < 10:  # looks in a row at which nothing had moved
                    await asyncio.sleep(0.02)
                    stalled = stalled + 1 if sent[0] == last else 0
                    last = sent[0]
            assert sent[0] < _FLOOD_BYTES
            assert process.observed.memory_info().rss - before < 8 * 1024 * 1024
            assert len(await asyncio.to_thread(read_all, client)) == _FLOOD_BYTES


async def test_a_client_that_vanishes_is_gone_for_postgresql_too(tmp_path: Path) -> None:
    ended = threading.Event()

    def until_the_end(connection: socket.socket) -> None:
        with connection:
            read_all(connection)
        ended.set()

    async with in_front_of(tmp_path, until_the_end) as process:
        client = visit(process)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()  # with a reset
        assert await asyncio.to_thread(ended.wait, 20)


async def test_no_descriptor_is_left_behind(process: EndpointsProcess) -> None:
    def open_files() -> int:
        return len(list(Path(f"/proc/{process.observed.pid}/fd").iterdir()))

    await process.instance()
    before = open_files()
    for number in range(40):
        if number % 2:
            await process.instance(reader=bool(number % 4 == 1))
        else:
            visit(process).close()
    async with asyncio.timeout(30):
        while open_files() > before:
            await asyncio.sleep(0.05)


async def test_so_many_are_relayed_and_no_more(instances: tuple[HandedOver, HandedOver]) -> None:
    one = instances[0]
    far = Route(instance=InstanceName("db-1"), writer=True, host=HOST, port=one.port, handover="")
    (port,) = free_ports(1)
    where: dict[str, Any] = {"host": HOST, "port": port, "user": "postgres", "dbname": "postgres"}
    serving = Endpoints(Limits(sessions=2), None)
    serving.take_over((far,))
    with listen(HOST, port) as listener:
        running = asyncio.create_task(serving.run({Endpoint.WRITER: listener}))
        first = [await psycopg.AsyncConnection.connect(**where) for _ in range(2)]
        with pytest.raises(psycopg.OperationalError, match="too many"):
            await psycopg.AsyncConnection.connect(**where)
        await first[0].close()
        async with asyncio.timeout(20):
            while True:
                try:
                    again = await psycopg.AsyncConnection.connect(**where)
                    break
                except psycopg.OperationalError:
                    await asyncio.sleep(0.05)
        serving.stop()
        await running
        with pytest.raises(psycopg.OperationalError):
            await again.execute("SELECT 1")
        await first[1].close()


async def test_probes_are_answered(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    address = f"{HOST}:{port}"
    async with endpoints(tmp_path, arguments=(f"--health-port={port}",)) as (process, _routings):
        await check(address, ready=False, within_s=10)
        async with asyncio.timeout(20):  # it has no instance, but it has been told so
            while True:
                try:
                    await check(address, ready=True, within_s=10)
                    break
                except NotNow:
                    await asyncio.sleep(0.05)
        assert await process.end() == 0
