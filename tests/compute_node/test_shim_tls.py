"""Clients' TLS in PostgreSQL's processes, done by the shim.

Goal: who asks gets it and nobody else is disturbed; what PostgreSQL refuses it goes on to refuse;
nothing is lost on the way, however it comes. Method: stock PostgreSQL with the real shim; clients
are libpq's, and sockets that say what no libpq would.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from boreal.certificates import issue
from boreal.cluster import HOST
from boreal.rpc.identity import Identity
from tests.support.handed_over import HandedOver, handed_over

_TLS_REQUEST = struct.pack("!II", 8, 80877103)
_GSSAPI_REQUEST = struct.pack("!II", 8, 80877104)
_PARAMETERS = b"user\0postgres\0database\0postgres\0\0"
_STARTUP = struct.pack("!II", 8 + len(_PARAMETERS), 3 << 16) + _PARAMETERS
_BOUND_S = 20.0


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    directory = tmp_path_factory.mktemp("tls")
    issue(directory, ["db-1"])
    return Identity.load(directory / "db-1")


@pytest.fixture(scope="module")
def instance(identity: Identity) -> Iterator[HandedOver]:
    with handed_over("db-1", {"authentication_timeout": "2s"}, identity.directory) as one:
        yield one


def options(instance: HandedOver, identity: Identity, **more: Any) -> dict[str, Any]:
    return {
        "host": HOST,
        "port": instance.port,
        "user": "postgres",
        "dbname": "postgres",
        "autocommit": True,
        "sslmode": "verify-full",
        "sslrootcert": str(identity.directory / "ca.crt"),
        **more,
    }


def tcp(instance: HandedOver) -> socket.socket:
    return socket.create_connection((HOST, instance.port), timeout=_BOUND_S)


def said(client: socket.socket) -> bytes:
    """All that comes until PostgreSQL hangs up."""
    received = b""
    with suppress(ConnectionResetError):
        while data := client.recv(4096):
            received += data
    return received


def handshaken(client: socket.socket, identity: Identity) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(identity.directory / "ca.crt"))
    return context.wrap_socket(client, server_hostname=HOST)


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_what_is_said_arrives_whole_both_ways(
    instance: HandedOver, identity: Identity, version: str
) -> None:
    bounds = {"ssl_min_protocol_version": version, "ssl_max_protocol_version": version}
    with psycopg.connect(**options(instance, identity, **bounds)) as session:
        assert session.pgconn.ssl_in_use
        big = os.urandom(6 << 20)
        row = session.execute("SELECT %b::bytea", (big,), binary=True).fetchone()
        assert row == (big,)
        with session.cursor().copy("COPY (SELECT generate_series(1, 300000)) TO STDOUT") as copy:
            assert sum(1 for _row in copy.rows()) == 300_000
        assert session.execute("SELECT 1").fetchone() == (1,)


def test_a_client_that_does_not_ask_has_none(instance: HandedOver, identity: Identity) -> None:
    with psycopg.connect(**options(instance, identity, sslmode="disable")) as session:
        assert not session.pgconn.ssl_in_use
        assert session.execute("SELECT 1").fetchone() == (1,)


def test_a_client_that_trusts_others_goes_away(
    instance: HandedOver, identity: Identity, tmp_path: Path
) -> None:
    issue(tmp_path, ["db-1"])
    others = options(instance, identity, sslrootcert=str(tmp_path / "ca.crt"))
    with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
        psycopg.connect(**others)
    with psycopg.connect(**options(instance, identity)) as session:
        assert session.execute("SELECT 1").fetchone() == (1,)


def test_a_request_may_come_in_pieces_and_after_one_for_gssapi(
    instance: HandedOver, identity: Identity
) -> None:
    with tcp(instance) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(_GSSAPI_REQUEST)
        assert client.recv(1) == b"N"
        for position in range(len(_TLS_REQUEST)):
            client.sendall(_TLS_REQUEST[position : position + 1])
            _await_taken(client)
        assert client.recv(1) == b"S"
        with handshaken(client, identity) as encrypted:
            encrypted.sendall(_STARTUP)
            assert encrypted.recv(1) == b"R"


def _await_taken(client: socket.socket) -> None:
    """Wait until PostgreSQL has read it all, so that the next piece is one by itself."""
    server, own = client.getpeername()[1], client.getsockname()[1]
    deadline = time.monotonic() + _BOUND_S
    while _unread(server, own) != 0:
        assert time.monotonic() < deadline


def _unread(port: int, peer: int) -> int | None:
    """Bytes that wait at this end of a connection (proc(5), /proc/net/tcp)."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _number, local, remote, _state, queues, *_rest = line.split()
        if local.endswith(f":{port:04X}") and remote.endswith(f":{peer:04X}"):
            return int(queues.partition(":")[2], 16)
    return None


def test_what_came_before_the_answer_is_refused(instance: HandedOver) -> None:
    """What somebody put in between must not count as said in private (CVE-2021-23214)."""
    with tcp(instance) as client:
        client.sendall(_TLS_REQUEST + _STARTUP)
        answer = said(client)
    assert answer.startswith(b"N")
    assert b"received unencrypted data after SSL request" in answer


def test_what_is_no_handshake_ends_that_connection_alone(
    instance: HandedOver, identity: Identity
) -> None:
    postmaster = instance.server.pid
    for nonsense in (_STARTUP, b"\x16\x03\x01\xff\xff" + b"x" * 100, os.urandom(500)):
        with tcp(instance) as client:
            client.sendall(_TLS_REQUEST)
            assert client.recv(1) == b"S"
            client.sendall(nonsense)
            client.shutdown(socket.SHUT_WR)
            assert b"FATAL" not in said(client)
    with psycopg.connect(**options(instance, identity)) as session:
        assert session.execute("SELECT 1").fetchone() == (1,)
    assert instance.server.pid == postmaster


def test_who_stops_in_mid_handshake_is_hung_up_on(instance: HandedOver) -> None:
    """By authentication_timeout, and leaves no process."""
    before = _processes(instance)
    with tcp(instance) as client:
        client.sendall(_TLS_REQUEST)
        assert client.recv(1) == b"S"
        assert said(client) == b""
    deadline = time.monotonic() + _BOUND_S
    while _processes(instance) - before:
        assert time.monotonic() < deadline


def _processes(instance: HandedOver) -> set[psutil.Process]:
    return set(psutil.Process(instance.server.pid).children())


def test_what_was_said_in_private_ends_in_order(instance: HandedOver, identity: Identity) -> None:
    """A client learns that its session was ended, and that nobody cut it."""
    with psycopg.connect(**options(instance, identity)) as session:
        pid = session.info.backend_pid
        with psycopg.connect(**options(instance, identity)) as other:
            other.execute("SELECT pg_terminate_backend(%s, 10000)", (pid,))
        with pytest.raises(psycopg.errors.AdminShutdown) as ended:
            session.execute("SELECT 1")
        assert "unexpected eof" not in str(ended.value)
    with tcp(instance) as client:
        client.sendall(_TLS_REQUEST)
        assert client.recv(1) == b"S"
        with handshaken(client, identity) as encrypted:
            encrypted.sendall(_STARTUP)
            encrypted.sendall(b"X" + struct.pack("!I", 4))  # Terminate
            while encrypted.recv(4096):  # raises ssl.SSLEOFError unless it ends in order
                pass


async def test_waiting_for_a_message_costs_nothing(
    instance: HandedOver, identity: Identity
) -> None:
    """What OpenSSL holds back does not keep PostgreSQL busy, nor waiting in vain."""
    session = await psycopg.AsyncConnection.connect(**options(instance, identity))
    async with session:
        process = psutil.Process(session.info.backend_pid)
        await session.execute("SELECT 1")
        before = sum(process.cpu_times()[:2])
        async with asyncio.timeout(_BOUND_S):
            async with session.pipeline():  # many messages in one record
                cursors = [await session.execute("SELECT %s::int", (n,)) for n in range(200)]
            assert [await cursor.fetchone() for cursor in cursors] == [(n,) for n in range(200)]
            await session.execute("LISTEN news")
            await session.execute("SELECT pg_sleep(1)")
        assert sum(process.cpu_times()[:2]) - before < 0.5


def test_a_statement_is_cancelled_with_and_without_tls(
    instance: HandedOver, identity: Identity
) -> None:
    with psycopg.connect(**options(instance, identity)) as session:
        for cancel in (session.cancel, session.cancel_safe):
            pid = session.info.backend_pid
            generator = session.pgconn
            generator.send_query(b"SELECT pg_sleep(600)")
            generator.flush()
            with psycopg.connect(**options(instance, identity)) as other:
                query = "SELECT wait_event FROM pg_stat_activity WHERE pid = %s"
                deadline = time.monotonic() + _BOUND_S
                while other.execute(query, (pid,)).fetchone() != ("PgSleep",):
                    assert time.monotonic() < deadline
            cancel()
            result = generator.get_result()
            assert result is not None
            assert b"canceling statement" in result.error_message
            while generator.get_result() is not None:
                pass


def test_a_key_that_cannot_be_used_keeps_the_engine_from_starting(
    identity: Identity, tmp_path: Path
) -> None:
    """Better than to serve in the clear what was meant to be private."""
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).write_bytes((identity.directory / name).read_bytes())
    (tmp_path / "tls.key").write_text("something else")
    why = "boreal shim: clients cannot be shown the certificate"
    with pytest.raises(RuntimeError, match=why), handed_over("db-9", None, tmp_path):
        pass
