"""TLS of clients through the endpoints: PostgreSQL answers it, or who refuses in its place does.

Method: the real endpoints' process in front of stock PostgreSQL with the shim, all with
certificates of one authority; clients are libpq's.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from boreal.certificates import issue
from boreal.cluster import HOST
from boreal.rpc.identity import Identity
from tests.support.endpoints_process import endpoints
from tests.support.handed_over import HandedOver, handed_over

_TLS_REQUEST = struct.pack("!II", 8, 80877103)
_GSSAPI_REQUEST = struct.pack("!II", 8, 80877104)


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    directory = tmp_path_factory.mktemp("tls")
    issue(directory, ["all"])
    return Identity.load(directory / "all")


@pytest.fixture(scope="module")
def instance(identity: Identity) -> Iterator[HandedOver]:
    with handed_over("db-1", tls_dir=identity.directory) as one:
        yield one


def verified(identity: Identity) -> dict[str, str]:
    return {"sslmode": "verify-full", "sslrootcert": str(identity.directory / "ca.crt")}


async def test_the_request_is_handed_over_unread(
    identity: Identity, instance: HandedOver, tmp_path: Path
) -> None:
    async with endpoints(tmp_path, instance.route(writer=True), identity=identity) as (process, _):
        for reader in (False, True):
            session = await process.connect(reader=reader, **verified(identity))
            async with session:
                assert session.pgconn.ssl_in_use
                address = await (await session.execute("SELECT inet_client_port()")).fetchone()
                with socket.socket(fileno=socket.dup(session.pgconn.socket)) as client:
                    assert address == (client.getsockname()[1],)
        session = await process.connect(sslmode="disable")
        async with session:
            assert not session.pgconn.ssl_in_use


async def test_gssapi_is_declined_and_tls_may_follow(
    identity: Identity, instance: HandedOver, tmp_path: Path
) -> None:
    async with endpoints(tmp_path, instance.route(writer=True), identity=identity) as (process, _):

        def ask() -> tuple[bytes, bytes]:
            with socket.create_connection((HOST, process.writer_port), timeout=10) as client:
                client.sendall(_GSSAPI_REQUEST)
                first = client.recv(10)
                client.sendall(_TLS_REQUEST)
                return first, client.recv(10)

        assert await asyncio.to_thread(ask) == (b"N", b"S")


async def test_who_waits_for_a_writer_gets_its_tls(
    identity: Identity, instance: HandedOver, tmp_path: Path
) -> None:
    async with endpoints(tmp_path, identity=identity) as (process, routings):
        waiting = asyncio.create_task(process.instance(**verified(identity)))
        await process.logged("connections wait")
        routings.become(instance.route(writer=True))
        assert await waiting == "db-1"


async def test_a_refusal_is_heard_by_clients_that_insist(
    identity: Identity, tmp_path: Path
) -> None:
    patience = ("--patience", "0.2")
    async with endpoints(tmp_path, arguments=patience, identity=identity) as (process, _routings):
        for options in (verified(identity), {"sslmode": "prefer"}, {"sslmode": "disable"}):
            with pytest.raises(psycopg.OperationalError, match="has had no writer") as refused:
                await process.connect(**options)
            assert "SSL" not in str(refused.value)


async def test_a_client_that_breaks_off_while_it_is_refused_harms_nobody(
    identity: Identity, instance: HandedOver, tmp_path: Path
) -> None:
    patience = ("--patience", "0.2")
    async with endpoints(tmp_path, arguments=patience, identity=identity) as (process, routings):

        def break_off() -> bytes:
            with socket.create_connection((HOST, process.writer_port), timeout=10) as client:
                client.sendall(_TLS_REQUEST)
                answer = client.recv(1)
                client.sendall(b"no TLS at all, and no startup packet")
                while client.recv(4096):
                    pass
                return answer

        assert await asyncio.to_thread(break_off) == b"S"
        await process.logged("a client was not told why it gets no session")
        routings.become(instance.route(writer=True))
        assert await process.instance(**verified(identity)) == "db-1"
