"""Refusing a client that asked for TLS: PostgreSQL would have answered that, but there is none."""

from __future__ import annotations

import asyncio
import socket
import ssl

import structlog

from control_plane.endpoints.greeting import GRANTED, HEAD_BYTES, refusal

_WITHIN_S = 5.0
_MESSAGE_BYTES = 10_000
"""A startup packet has no more (MAX_STARTUP_PACKET_LENGTH, postmaster.c)."""

_log = structlog.get_logger(__name__)


async def refuse_encrypted(
    client: socket.socket, context: ssl.SSLContext, sqlstate: str, message: str
) -> None:
    """Grant TLS, hear what the client wants, and tell it why it gets no session.

    Its request is still unread. In the clear a client that insists on TLS would not take our word
    for it, and would complain of a server that has no TLS. Bounded by _WITHIN_S.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_MESSAGE_BYTES)
    protocol = asyncio.StreamReaderProtocol(reader)
    try:
        client.recv(HEAD_BYTES)
        client.send(GRANTED)
        async with asyncio.timeout(_WITHIN_S):
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                client.dup(),
                ssl=context,
                ssl_handshake_timeout=_WITHIN_S,
                ssl_shutdown_timeout=_WITHIN_S,
            )
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            try:
                if await reader.read(_MESSAGE_BYTES):
                    writer.write(refusal(sqlstate, message))
            finally:
                writer.close()
            await writer.wait_closed()
    except (OSError, TimeoutError) as error:
        _log.info("a client was not told why it gets no session", why=str(error))
