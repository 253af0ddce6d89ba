"""Relaying a connection to an instance that cannot be handed the connection itself.

Handing over a descriptor takes a directory that both sides see. Where there is none (the instance
runs on another machine) every byte goes through here, both ways and unread; that costs some CPU for
each message, and PostgreSQL takes this process for the client. And unlike a handover it cannot be
withdrawn: what the kernel of a frozen instance accepts waits there until the writer is another.

Bounded: while a side does not take what it is sent, the other is not read. How one side ends
reaches the other in order, after all that came before it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

_BUFFER_BYTES = 64 * 1024
_LINGER_S = 30.0
"""For a client to hang up after PostgreSQL did. An abrupt end could take from it PostgreSQL's last
words, which say why; and one that has nothing to send might never notice."""

_PROBE_S = 5
_PROBES = 2
"""A side that is idle is asked after so long, again as often; then it counts as gone."""


class Relay:
    """One connection, relayed: `connect`, `begin`; it ends by itself, or by `end`.

    `on_end` is called once, when neither side is left.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end = on_end
        self._client, self._server = _Side(self), _Side(self)
        self._client.other, self._server.other = self._server, self._client
        self._linger: asyncio.TimerHandle | None = None
        self._ending = False

    async def connect(self, host: str, port: int) -> None:
        """Connect to the instance, which waits for a first word. OSError if it is not there."""
        await asyncio.get_running_loop().create_connection(lambda: self._server, host, port)

    async def begin(self, client: socket.socket) -> None:
        """Relay between the instance and `client` from now on, by a copy of that socket."""
        own = client.dup()
        await asyncio.get_running_loop().connect_accepted_socket(lambda: self._client, own)
        if self._ending or not self._server.open:  # meanwhile
            self.end()

    def end(self) -> None:
        """Hang up on both, at once."""
        self._ending = True
        self._client.abort()
        self._server.abort()
        self._look()

    def finished(self, side: _Side) -> None:
        """A side has said all it had to say, or is gone."""
        side.other.finish()
        if self._client.silent and self._server.silent:
            self._client.close()
            self._server.close()
        elif side is self._server and self._linger is None:
            loop = asyncio.get_running_loop()
            self._linger = loop.call_later(_LINGER_S, self.end)

    def lost(self, side: _Side) -> None:
        """A side is gone."""
        if side is self._client:
            self._server.close()  # PostgreSQL notices, as if its client had gone
        else:
            self.finished(side)
        self._look()

    def _look(self) -> None:
        """Notice that neither is left."""
        if not self._client.open and not self._server.open:
            if self._linger is not None:
                self._linger.cancel()
            on_end, self._on_end = self._on_end, _nothing
            on_end()


def _nothing() -> None:
    """What is left to do when all is done."""


class _Side(asyncio.Protocol):
    """One of the two connections of a relay."""

    other: _Side

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._transport: asyncio.Transport | None = None
        self.silent = False
        """It will say no more."""

    @property
    def open(self) -> bool:
        """Whether it is connected."""
        return self._transport is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_BUFFER_BYTES)
        own = self._transport.get_extra_info("socket")
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The client's own keepalive ends here: whether the machine behind is gone, only we can ask.
        own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_S)
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S)
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)

    def data_received(self, data: bytes) -> None:
        if (there := self.other.alive) is not None:
            there.write(data)

    def eof_received(self) -> bool:
        self.silent = True
        self._relay.finished(self)
        return True  # the other direction goes on

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - ended is ended
        self._transport = None
        self.silent = True
        self._relay.lost(self)

    def pause_writing(self) -> None:
        if (there := self.other.alive) is not None:
            there.pause_reading()

    def resume_writing(self) -> None:
        if (there := self.other.alive) is not None:
            there.resume_reading()

    @property
    def alive(self) -> asyncio.Transport | None:
        """Its transport, while that is of use."""
        transport = self._transport
        return None if transport is None or transport.is_closing() else transport

    def finish(self) -> None:
        """Tell it, after all that it has still to be sent, that no more will come."""
        if (here := self.alive) is not None:
            here.write_eof()

    def close(self) -> None:
        """Hang up once it was sent all."""
        if (here := self.alive) is not None:
            here.close()

    def abort(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()
