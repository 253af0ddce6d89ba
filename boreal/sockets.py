"""Options of the connections we make ourselves, beside gRPC's (`boreal.rpc.edge`)."""

from __future__ import annotations

import socket
from asyncio import BaseTransport

_IDLE_S = 5
_PROBE_S = 5
GIVE_UP_MS = 10_000


def notice_silence(transport: BaseTransport) -> None:
    """Have the kernel break a connection whose other end it has not heard for GIVE_UP_MS.

    A peer behind a broken network hangs up on nobody, and what is sent to it is sent again for a
    quarter of an hour, with longer and longer pauses: long after the network is mended the
    connection would be of no use yet (tcp(7), TCP_USER_TIMEOUT).
    """
    own: socket.socket = transport.get_extra_info("socket")
    own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S)
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GIVE_UP_MS)
