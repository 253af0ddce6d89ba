"""Goal: who has no certificate of the cluster's gets no answer from any of its processes, and
clients may have TLS, with the server's name checked.

Method: one cluster, made with certificates as it is by default; intruders at every port of every
kind of process, and a storage node that would join. (How clients are encrypted:
tests/compute_node/test_shim_tls.py, tests/control_plane/test_endpoints_tls.py; that all else works
with certificates, every other test here shows.)
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from grpc import aio

from boreal.certificates import issue
from boreal.cluster import HOST, free_ports
from boreal.frames import FrameReader, frame
from boreal.rpc import (
    compute_pb2,
    compute_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    storage_pb2,
    storage_pb2_grpc,
)
from boreal.rpc.edge import volume_ref
from boreal.rpc.identity import PEER_NAME, Identity
from boreal.types import VolumeId
from tests.cluster.local import LocalCluster, RecordingClient, check_ledgers, local_cluster, until

pytestmark = pytest.mark.timeout(240)

_ANSWER_S = 10.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster("--readers=1") as running:
        running.query("create table ledger (client text, n int, primary key (client, n))")
        yield running


@pytest.fixture(scope="module")
def foreign() -> Iterator[Path]:
    """An identity of another cluster."""
    directory = Path(tempfile.mkdtemp(prefix="boreal-foreign-"))
    issue(directory, ["sn-9"])
    yield directory / "sn-9"
    shutil.rmtree(directory)


class Intruder(Enum):
    """Who comes without a certificate of the cluster's."""

    PLAIN = "unencrypted"
    NAMELESS = "TLS without a certificate"
    FOREIGN = "a certificate of another authority"


# --- gRPC ----------------------------------------------------------------------------------------

Call = Callable[[aio.Channel], Awaitable[Any]]
_EVERY_SERVICE: Mapping[str, Call] = {
    "Control": lambda channel: control_pb2_grpc.ControlStub(channel).GetStatus(
        control_pb2.GetClusterStatusRequest(), timeout=_ANSWER_S
    ),
    "Compute": lambda channel: compute_pb2_grpc.ComputeStub(channel).GetStatus(
        compute_pb2.GetComputeStatusRequest(), timeout=_ANSWER_S
    ),
    "StorageLog": lambda channel: storage_pb2_grpc.StorageLogStub(channel).GetPosition(
        storage_pb2.GetPositionRequest(), timeout=_ANSWER_S
    ),
    "Bundles": lambda channel: storage_pb2_grpc.BundlesStub(channel).GetManifest(
        storage_pb2.GetManifestRequest(), timeout=_ANSWER_S
    ),
    "StoragePages": lambda channel: storage_pb2_grpc.StoragePagesStub(channel).GetIndexState(
        storage_pb2.GetIndexStateRequest(), timeout=_ANSWER_S
    ),
}


def port_of(cluster: LocalCluster, service: str) -> int:
    config = cluster.config
    node = config.storage[0]
    return {
        "Control": config.control_port,
        "Compute": config.compute[0].agent_port,
        "StorageLog": node.log_port,
        "Bundles": node.log_port,
        "StoragePages": node.pages_port,
    }[service]


def credentials(cluster: LocalCluster, foreign: Path, who: Intruder) -> grpc.ChannelCredentials:
    authority = (cluster.directory / "tls" / "ca.crt").read_bytes()
    if who is Intruder.NAMELESS:
        return grpc.ssl_channel_credentials(authority)
    pair = [(foreign / name).read_bytes() for name in ("tls.key", "tls.crt")]
    return grpc.ssl_channel_credentials(authority, *pair)


def channel_of(
    cluster: LocalCluster, foreign: Path, port: int, who: Intruder | None
) -> aio.Channel:
    """A channel as the intruder opens it, or as the cluster's own do."""
    address = f"{HOST}:{port}"
    if who is Intruder.PLAIN:
        return aio.insecure_channel(address)
    own = Identity.load(cluster.config.command_tls_dir).channel_credentials()
    options = [("grpc.ssl_target_name_override", PEER_NAME)]
    shown = credentials(cluster, foreign, who) if who else own
    return aio.secure_channel(address, shown, options=options)


@pytest.mark.parametrize("service", _EVERY_SERVICE)
async def test_no_service_answers_an_intruder(
    cluster: LocalCluster, foreign: Path, service: str
) -> None:
    port = port_of(cluster, service)
    for who in Intruder:
        async with channel_of(cluster, foreign, port, who) as channel:
            with pytest.raises(aio.AioRpcError) as refused:
                await _EVERY_SERVICE[service](channel)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE, who
        assert refused.value.trailing_metadata() in (None, ()), "a handler was asked"
    async with channel_of(cluster, foreign, port, None) as channel:
        try:
            await _EVERY_SERVICE[service](channel)
        except aio.AioRpcError as error:  # the handler's: there is no such volume
            trailing: Any = error.trailing_metadata()
            assert "boreal-error-bin" in dict(trailing)


async def test_ours_do_not_answer_to_an_impostor(cluster: LocalCluster, foreign: Path) -> None:
    """A server of another authority is not told anything either."""
    server = aio.server()
    port = server.add_secure_port(f"{HOST}:0", Identity.load(foreign).server_credentials())
    await server.start()
    async with channel_of(cluster, foreign, port, None) as channel:
        with pytest.raises(aio.AioRpcError) as refused:
            await _EVERY_SERVICE["Control"](channel)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    await server.stop(None)


# --- the framed lanes ----------------------------------------------------------------------------


def context_of(cluster: LocalCluster, foreign: Path, who: Intruder | None) -> ssl.SSLContext:
    if who is None:
        return Identity.load(cluster.config.command_tls_dir).client_context()
    context = ssl.create_default_context(cafile=str(cluster.directory / "tls" / "ca.crt"))
    if who is Intruder.FOREIGN:
        context.load_cert_chain(foreign / "tls.crt", foreign / "tls.key")
    return context


def answer(port: int, request: bytes, context: ssl.SSLContext | None) -> bytes:
    """What a lane says to a request, until it hangs up or has said one message."""
    frames, received = FrameReader("test"), b""
    with (
        suppress(ConnectionError, ssl.SSLError),
        socket.create_connection((HOST, port), timeout=_ANSWER_S) as plain,
    ):
        lane = context.wrap_socket(plain, server_hostname=PEER_NAME) if context else plain
        with lane:
            lane.sendall(request)
            while data := lane.recv(4096):
                received += data
                if next(iter(frames.feed(data)), None) is not None:
                    break
    return received


def test_no_lane_answers_an_intruder(cluster: LocalCluster, foreign: Path) -> None:
    node = cluster.config.storage[0]
    volume = volume_ref(VolumeId("vol-nobodys"), 1)
    append = storage_pb2.AppendRequest(volume=volume, data=b"log")
    get = storage_pb2.GetPagesRequest(volume=volume, count=1)
    pages = storage_pb2.PageCall(call=1, get=get, within_ms=1000)
    for port, message in ((node.frames_port, append), (node.page_frames_port, pages)):
        request = frame(message.SerializeToString())
        assert b"UnknownVolume" in answer(port, request, context_of(cluster, foreign, None))
        for who in (Intruder.NAMELESS, Intruder.FOREIGN):
            assert answer(port, request, context_of(cluster, foreign, who)) == b"", who
        assert b"UnknownVolume" not in answer(port, request, None)


# --- a process that would join -------------------------------------------------------------------


@pytest.mark.parametrize("security", ["insecure", "foreign"])
def test_a_process_without_a_certificate_is_not_taken_in(
    cluster: LocalCluster, foreign: Path, tmp_path: Path, security: str
) -> None:
    ports = zip(
        ("--log-port", "--frames-port", "--pages-port", "--page-frames-port"),
        free_ports(4),
        strict=True,
    )
    said = tmp_path / "log"
    with said.open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "storage_node", "--name=sn-9", "--zone=a"),
                *(f"--data-dir={tmp_path}", f"--control={cluster.config.control_address}"),
                *(f"{option}={port}" for option, port in ports),
                "--insecure" if security == "insecure" else f"--tls-dir={foreign}",
            ],
            stderr=log,
        )
    try:
        until(lambda: '"heard": false' in said.read_text(), 30, "it to notice that nobody listens")
        assert [node["name"] for node in cluster.status()["storage"]] == [
            f"sn-{number}" for number in range(1, 7)
        ]
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_commits_go_on_beside_them(cluster: LocalCluster, foreign: Path) -> None:
    """Who knocks in vain holds nobody up."""
    frames = [node.frames_port for node in cluster.config.storage]
    with RecordingClient(cluster, "beside") as client:
        for port in frames * 5:
            answer(port, b"", context_of(cluster, foreign, Intruder.FOREIGN))
        client.progress(20)
    assert client.errors == []
    check_ledgers(cluster, client)


# --- clients -------------------------------------------------------------------------------------


def test_clients_check_the_name_at_every_address(cluster: LocalCluster, foreign: Path) -> None:
    authority = str(cluster.directory / "tls" / "ca.crt")
    for dsn in (cluster.dsn, cluster.reader_dsn, cluster.dsn_of("db-2")):
        for host in ("127.0.0.1", "localhost"):
            with cluster.connect(
                dsn, host=host, sslmode="verify-full", sslrootcert=authority
            ) as session:
                assert session.pgconn.ssl_in_use
                assert session.execute("select 1").fetchone() == (1,)
        with cluster.connect(dsn) as session:
            assert session.pgconn.ssl_in_use  # as libpq prefers
        with cluster.connect(dsn, sslmode="disable") as session:
            assert not session.pgconn.ssl_in_use
        with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
            cluster.connect(dsn, sslmode="verify-full", sslrootcert=str(foreign / "ca.crt"))


def test_the_authority_is_for_all_to_read_and_no_key_is(cluster: LocalCluster) -> None:
    tls = cluster.directory / "tls"
    assert (tls / "ca.crt").stat().st_mode & 0o777 == 0o644
    keys = [*tls.rglob("*.key"), *cluster.directory.glob("db-*/run/tls.key")]
    assert len(keys) == 1 + len((*cluster.config.names, "boreal")) + 2
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}
    account = cluster.engine.account
    for instance in ("db-1", "db-2"):
        assert (cluster.directory / instance / "run" / "tls.key").stat().st_uid == account.uid
    in_bundles = [path for path in cluster.directory.rglob("bundles/**/*") if "tls" in path.name]
    assert in_bundles == []


def test_it_is_turned_off_on_purpose_only(cluster: LocalCluster) -> None:
    """The last of this module: it leaves a cluster without TLS."""
    running = cluster.boreal("up", "--insecure", check=False)
    assert "boreal down" in running
    cluster.boreal("down")
    cluster.up("--insecure")
    with cluster.connect() as session:
        assert not session.pgconn.ssl_in_use
        assert session.execute("select count(*) >= 20 from ledger").fetchone() == (True,)
    cluster.up()
    assert cluster.config.insecure

    async def asked() -> str:
        async with aio.insecure_channel(cluster.config.control_address) as channel:
            return str((await _EVERY_SERVICE["Control"](channel)).writer)

    assert asyncio.run(asked()) in cluster.instances
