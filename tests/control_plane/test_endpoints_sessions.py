"""Sessions through an endpoint are sessions with PostgreSQL, and nothing of them is left behind.

Method: the real endpoints' process in front of stock PostgreSQL with the shim; the control plane's
routing is told by a real gRPC server in the test. (Whom a connection goes to, and what happens
while there is nobody: test_endpoints_routing.py.)
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest

from boreal.cluster import HOST
from tests.support.endpoints_process import EndpointsProcess, endpoints
from tests.support.handed_over import HandedOver, handed_over

_CONNECTIONS = 120


@pytest.fixture(scope="module")
def instances() -> Iterator[tuple[HandedOver, HandedOver, HandedOver]]:
    with handed_over("db-1") as one, handed_over("db-2") as two, handed_over("db-3") as three:
        yield one, two, three


@pytest.fixture
async def process(
    instances: tuple[HandedOver, HandedOver, HandedOver], tmp_path: Path
) -> AsyncIterator[EndpointsProcess]:
    """The endpoints, with db-1 as writer and two readers."""
    one, two, three = instances
    routes = (one.route(writer=True), two.route(), three.route())
    async with endpoints(tmp_path, *routes) as (running, _routings):
        yield running


async def test_a_session_is_the_clients_own(process: EndpointsProcess) -> None:
    session = await process.connect()
    async with session:
        cursor = await session.execute(
            "SELECT host(client_addr), client_port, inet_server_port() FROM pg_stat_activity"
            " WHERE pid = pg_backend_pid()"
        )
        row = await cursor.fetchone()
        with socket.socket(fileno=os.dup(session.fileno())) as own:
            assert row == (*own.getsockname(), process.writer_port)


async def test_much_data_goes_both_ways(process: EndpointsProcess) -> None:
    session = await process.connect()
    rows = [(number, hashlib.sha256(str(number).encode()).hexdigest()) for number in range(100_000)]
    async with session, session.cursor() as cursor:
        await cursor.execute("CREATE TEMP TABLE t (id int, word text)")
        async with cursor.copy("COPY t FROM STDIN") as copy:
            for row in rows:
                await copy.write_row(row)
        async with cursor.copy("COPY (SELECT * FROM t ORDER BY id) TO STDOUT") as copy:
            lines = b"".join([bytes(block) async for block in copy]).decode().splitlines()
        assert lines == [f"{number}\t{word}" for number, word in rows]
        await cursor.execute("SELECT id, word FROM t ORDER BY id")
        assert await cursor.fetchall() == rows
        await cursor.execute("SELECT repeat('x', 50000000)")
        assert await cursor.fetchone() == ("x" * 50_000_000,)


@pytest.mark.parametrize("safe", [True, False], ids=["PQcancelStart", "PQcancel"])
async def test_a_query_is_cancelled_wherever_it_runs(process: EndpointsProcess, safe: bool) -> None:
    """By drivers that ask for encryption first, and by those that do not."""
    sessions = [await process.connect(reader=True) for _ in range(2)]
    sessions.append(await process.connect())
    for session in sessions:
        asked = asyncio.create_task(session.execute("SELECT pg_sleep(100)"))
        other = await process.connect()
        await other.close()
        while not asked.done():
            if safe:
                await session.cancel_safe(timeout=10)
            else:
                await asyncio.to_thread(session.cancel)
            await asyncio.wait([asked], timeout=0.2)
        with pytest.raises(psycopg.errors.QueryCanceled):
            await asked
        assert await (await session.execute("SELECT 1")).fetchone() == (1,)
        await session.close()


def raw(process: EndpointsProcess) -> socket.socket:
    return socket.create_connection((HOST, process.writer_port), timeout=20)


_SSL = struct.pack("!II", 8, 80877103)
_GSS = struct.pack("!II", 8, 80877104)
_PARAMETERS = b"user\0postgres\0database\0postgres\0\0"
_STARTUP = struct.pack("!II", 8 + len(_PARAMETERS), 3 << 16) + _PARAMETERS


def begin_session(client: socket.socket) -> bytes:
    client.sendall(_STARTUP)
    received = b""
    while not received.endswith(b"Z\0\0\0\5I"):
        data = client.recv(4096)
        assert data, received
        received += data
    return received


@pytest.mark.parametrize(
    "requests",
    [(), (_SSL,), (_GSS,), (_GSS, _SSL), (_SSL, _GSS)],
    ids=["none", "S", "G", "GS", "SG"],
)
async def test_encryption_is_declined_as_postgresql_does(
    process: EndpointsProcess, requests: tuple[bytes, ...]
) -> None:
    def talk() -> None:
        with raw(process) as client:
            for request in requests:
                client.sendall(request)
                assert client.recv(10) == b"N"
            assert begin_session(client).startswith(b"R\0\0\0\x08\0\0\0\0")

    await asyncio.to_thread(talk)


async def test_a_client_that_insists_on_tls_is_told(process: EndpointsProcess) -> None:
    with pytest.raises(psycopg.OperationalError, match="SSL"):
        await process.connect(sslmode="require")


async def test_a_first_message_may_come_in_pieces(process: EndpointsProcess) -> None:
    def talk() -> None:
        with raw(process) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for part in (_SSL[:3], _SSL[3:]):
                client.sendall(part)
                if part is _SSL[:3]:
                    other = raw(process)
                    other.close()
            assert client.recv(10) == b"N"
            for position in range(12):
                client.sendall(_STARTUP[position : position + 1])
            client.sendall(_STARTUP[12:])
            received = b""
            while not received.endswith(b"Z\0\0\0\5I"):
                received += client.recv(4096)

    await asyncio.to_thread(talk)


async def test_postgresql_itself_answers_what_is_no_session(process: EndpointsProcess) -> None:
    def talk(message: bytes) -> bytes:
        with raw(process) as client:
            client.sendall(message)
            received = b""
            while data := client.recv(4096):
                received += data
            return received

    old = await asyncio.to_thread(talk, struct.pack("!II", 8, 2 << 16))
    assert b"0A000" in old or b"unsupported frontend protocol" in old
    unknown = struct.pack("!II", 8 + 12, 3 << 16) + b"user\0nobody\0"
    assert b"FATAL" in await asyncio.to_thread(talk, unknown)


async def test_sessions_outlive_the_endpoints(process: EndpointsProcess) -> None:
    session = await process.connect()
    async with session:
        await session.execute("CREATE TEMP TABLE kept AS SELECT 7 AS n")
        await process.end(signal.SIGKILL)
        assert await (await session.execute("SELECT n FROM kept")).fetchone() == (7,)


async def test_queries_do_not_concern_the_endpoints(process: EndpointsProcess) -> None:
    """The process is not even woken by them, although it had the connection once."""
    session = await process.connect()
    async with session:
        before = process.observed.num_ctx_switches().voluntary
        for _ in range(2000):
            await session.execute("SELECT 1")
        assert process.observed.num_ctx_switches().voluntary - before < 1000


async def test_no_descriptor_is_left_behind(
    process: EndpointsProcess, instances: tuple[HandedOver, HandedOver, HandedOver]
) -> None:
    pids = [process.observed.pid, *(instance.server.pid for instance in instances)]

    def open_files() -> list[int]:
        return [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids]

    await process.instance()
    await process.instance(reader=True)
    before = open_files()
    for number in range(_CONNECTIONS):
        match number % 4:
            case 0:
                await process.instance()
            case 1:
                await process.instance(reader=True)
            case 2:
                raw(process).close()
            case _:
                with raw(process) as client:
                    client.sendall(_SSL if number % 8 == 3 else _STARTUP)
    async with asyncio.timeout(30):
        while any(now > then for now, then in zip(open_files(), before, strict=True)):
            await asyncio.sleep(0.05)
