"""Connections that are handed over: PostgreSQL serves them as if it had accepted them itself.

Goal: the client is served, under its own address; nothing that comes by the socket for handovers
disturbs the postmaster or leaves anything open in it; a connection that was withdrawn is not
served. Method: the endpoint's part played by hand, against stock PostgreSQL with the shim.
(The endpoints themselves: tests/control_plane/test_endpoints_*.py.)
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from boreal.waiting import wait_until
from tests.support.handed_over import HandedOver, handed_over

_CLOSE_ON_EXEC = 0o2000000
_STARTUP = b"user\0postgres\0database\0postgres\0\0"
_STARTUP = struct.pack("!II", 8 + len(_STARTUP), 3 << 16) + _STARTUP


@pytest.fixture(scope="module")
def instance() -> Iterator[HandedOver]:
    with handed_over("db-1") as made:
        yield made


@contextmanager
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's end of a connection, and the end that was accepted."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=10)
        accepted, _ = listener.accept()
        with client, accepted:
            yield client, accepted


def offer(instance: HandedOver, *descriptors: int, message: bytes = b"\0") -> socket.socket:
    """Offer descriptors; the carrier, on which the answer comes."""
    carrier = instance.carrier()
    socket.send_fds(carrier, [message], descriptors)
    return carrier


def ask(client: socket.socket, query: str) -> bytes:
    """What PostgreSQL answers to a query on a fresh connection, up to its second ReadyForQuery."""
    body = query.encode() + b"\0"
    client.sendall(_STARTUP + b"Q" + struct.pack("!I", 4 + len(body)) + body)
    received = b""
    while received.count(b"Z\0\0\0\5I") < 2:
        data = client.recv(65536)
        assert data, received
        received += data
    return received


def sockets_of(pid: int) -> list[str]:
    """The sockets a process has open, by inode."""
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            links.append(str(entry.readlink()))
    return sorted(link for link in links if link.startswith("socket:"))


def has_only(pid: int, sockets: list[str]) -> None:
    """PostgreSQL closes its copy once it has forked the process that serves the connection."""
    wait_until(
        lambda: sockets_of(pid) == sockets,
        timeout_s=10,
        otherwise=lambda: AssertionError(f"{sockets_of(pid)}, not {sockets}"),
    )


def serves(instance: HandedOver) -> None:
    with psycopg.connect(f"host=127.0.0.1 port={instance.port} user=postgres dbname=postgres") as s:
        assert s.execute("SELECT 1").fetchone() == (1,)


def test_a_connection_that_is_handed_over_is_the_clients(instance: HandedOver) -> None:
    postmaster = instance.server.pid
    before = sockets_of(postmaster)
    with tcp_pair() as (client, accepted):
        carrier = offer(instance, accepted.fileno())
        assert carrier.recv(2) == b"\0"
        accepted.close()
        host, port = client.getsockname()
        received = ask(
            client,
            "SELECT pid, host(client_addr), client_port FROM pg_stat_activity"
            " WHERE pid = pg_backend_pid()",
        )
        assert host.encode() in received
        assert str(port).encode() in received
        ((backend,),) = instance.server.run(
            f"SELECT pid FROM pg_stat_activity WHERE client_port = {port}"
        )
        # The client's and the carrier, and the postmaster has neither any more.
        assert len(sockets_of(backend)) == 2 + len(sockets_of_any_backend(instance))
        has_only(postmaster, before)
        flags = [
            line.split()[1]
            for entry in Path(f"/proc/{backend}/fdinfo").iterdir()
            if str(Path(f"/proc/{backend}/fd/{entry.name}").readlink()).startswith("socket:")
            for line in entry.read_text().splitlines()
            if line.startswith("flags:")
        ]
        assert all(int(flag, 8) & _CLOSE_ON_EXEC for flag in flags)
        assert readable(carrier) is False
        client.sendall(b"X\0\0\0\4")
        assert carrier.recv(1) == b""
        assert client.recv(1) == b""
        carrier.close()


def readable(carrier: socket.socket) -> bool:
    """Whether there is something to read, if only the end."""
    return bool(select.select([carrier], [], [], 0)[0])


def test_a_program_that_a_session_runs_does_not_keep_its_carrier(instance: HandedOver) -> None:
    with tcp_pair() as (client, accepted), offer(instance, accepted.fileno()) as carrier:
        assert carrier.recv(1) == b"\0"
        ask(client, "COPY (SELECT 1) TO PROGRAM 'sleep 30 > /dev/null 2>&1 < /dev/null &'")
        client.sendall(b"X\0\0\0\4")
        assert carrier.recv(1) == b""


def test_a_session_that_cannot_be_ends_its_carrier(instance: HandedOver) -> None:
    with tcp_pair() as (client, accepted), offer(instance, accepted.fileno()) as carrier:
        assert carrier.recv(1) == b"\0"
        client.sendall(struct.pack("!II", 8 + 12, 3 << 16) + b"user\0nobody\0")
        assert carrier.recv(1) == b""


def sockets_of_any_backend(instance: HandedOver) -> list[str]:
    """Sockets a process of PostgreSQL has that has no client: the checkpointer's."""
    (pid,) = instance.server.run(
        "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'"
    )[0]
    return sockets_of(pid)


def no_descriptor(_stack: ExitStack) -> list[int]:
    return []


def two_connections(stack: ExitStack) -> list[int]:
    return [stack.enter_context(tcp_pair())[1].fileno() for _ in range(2)]


def a_file(stack: ExitStack) -> list[int]:
    return [stack.enter_context(Path("/proc/self/status").open()).fileno()]


def a_listener(stack: ExitStack) -> list[int]:
    return [stack.enter_context(socket.create_server(("127.0.0.1", 0))).fileno()]


def a_unix_socket(stack: ExitStack) -> list[int]:
    one, other = socket.socketpair()
    stack.enter_context(one)
    return [stack.enter_context(other).fileno()]


@pytest.mark.parametrize(
    "brings", [no_descriptor, two_connections, a_file, a_listener, a_unix_socket]
)
@pytest.mark.parametrize("message", [b"\0", b"garbage" * 500])
def test_what_brings_no_connection_is_hung_up_on(
    instance: HandedOver, brings: Callable[[ExitStack], list[int]], message: bytes
) -> None:
    postmaster = instance.server.pid
    before = sockets_of(postmaster)
    with ExitStack() as stack:
        carrier = stack.enter_context(offer(instance, *brings(stack), message=message))
        with suppress(ConnectionResetError):  # where more came than the shim reads
            assert carrier.recv(1) == b""
        serves(instance)
    assert instance.server.pid == postmaster
    has_only(postmaster, before)


def test_carriers_that_say_nothing_hold_nobody_up_for_long(instance: HandedOver) -> None:
    before = sockets_of(instance.server.pid)
    with ExitStack() as stack:
        silent = [stack.enter_context(instance.carrier()) for _ in range(5)]
        stack.enter_context(instance.carrier()).close()
        serves(instance)
        assert [carrier.recv(1) for carrier in silent] == [b""] * 5
    has_only(instance.server.pid, before)


def test_a_client_that_left_meanwhile_harms_nobody(instance: HandedOver) -> None:
    with tcp_pair() as (client, accepted):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        with offer(instance, accepted.fileno()) as carrier:
            assert carrier.recv(1) == b""
    serves(instance)


@contextmanager
def frozen(instance: HandedOver) -> Iterator[None]:
    os.kill(instance.server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(instance.server.pid, signal.SIGCONT)


@pytest.mark.parametrize("how", [socket.SHUT_RDWR, None], ids=["shut down", "closed"])
def test_a_connection_that_was_withdrawn_is_not_served(
    instance: HandedOver, how: int | None
) -> None:
    with tcp_pair() as (client, accepted):
        client.sendall(_STARTUP)
        with frozen(instance):
            carrier = offer(instance, accepted.fileno())
            if how is None:
                carrier.close()
            else:
                carrier.shutdown(how)
                assert carrier.recv(1) == b""
        serves(instance)  # so it has come to the one before
        accepted.settimeout(10)
        assert accepted.recv(len(_STARTUP)) == _STARTUP
        accepted.sendall(b"ours")
        assert client.recv(100) == b"ours"
        carrier.close()


def test_offers_to_a_postmaster_that_dies_come_back() -> None:
    with handed_over("db-9") as instance, tcp_pair() as (_client, accepted):
        with frozen(instance):
            carrier = offer(instance, accepted.fileno())
            os.kill(instance.server.pid, signal.SIGKILL)
        with carrier, pytest.raises(ConnectionResetError):
            carrier.recv(1)


def test_the_engine_takes_connections_and_messages_only_by_calls_that_are_wrapped(
    instance: HandedOver,
) -> None:
    """An upgrade of the engine that does it otherwise must not go unnoticed."""
    binary = instance.server.engine.tool("postgres")
    symbols = subprocess.run(["nm", "-D", binary], capture_output=True, text=True, check=False)
    content = symbols.stdout or binary.read_bytes().decode("latin-1")
    others = ("accept4", "recvmsg", "recvmmsg", "SSL_read", "gss_unwrap")
    assert [name for name in others if name in content] == []
