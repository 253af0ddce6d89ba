"""A connection is given up by the kernel once its other end is silent, plain or encrypted.

(That it then is: tests/deploy/test_compose.py, where a node is cut off and comes back.)
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
import uvloop

from boreal.certificates import issue
from boreal.cluster import HOST
from boreal.rpc.identity import PEER_NAME, Identity
from boreal.sockets import GIVE_UP_MS, notice_silence


async def options(identity: Identity | None) -> tuple[int, int]:
    loop = asyncio.get_running_loop()
    tls: dict[str, Any] = {} if identity is None else {"ssl": identity.server_context()}
    server = await loop.create_server(asyncio.Protocol, HOST, 0, **tls)
    port = server.sockets[0].getsockname()[1]
    told: dict[str, Any] = (
        {} if identity is None else {"ssl": identity.client_context(), "server_hostname": PEER_NAME}
    )
    transport, _ = await loop.create_connection(asyncio.Protocol, HOST, port, **told)
    notice_silence(transport)
    own = transport.get_extra_info("socket")
    found = (
        own.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
        own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    )
    transport.abort()
    server.close()
    await server.wait_closed()
    return found


@pytest.mark.parametrize("encrypted", [False, True])
def test_silence_is_noticed(tmp_path: Path, encrypted: bool) -> None:
    """On the event loop that all processes use."""
    issue(tmp_path, ["sn-1"])
    identity = Identity.load(tmp_path / "sn-1") if encrypted else None
    assert uvloop.run(options(identity)) == (GIVE_UP_MS, 1)
