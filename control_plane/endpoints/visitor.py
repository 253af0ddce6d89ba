"""One client's connection, from when it was accepted until PostgreSQL has it."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from dataclasses import dataclass, field

from control_plane.endpoints.choice import Endpoint
from control_plane.endpoints.greeting import (
    CANCEL_BYTES,
    DECLINED,
    HEAD_BYTES,
    Greeting,
    greeting_of,
    refusal,
)

_DRAINED_BYTES = 65536
_NEGOTIATIONS = 2
"""A client may ask for each kind of encryption once (ProcessStartupPacket, postmaster.c)."""


@dataclass(slots=True, eq=False)
class Visitor:
    """A client's connection that is still ours. Its socket does not block."""

    client: socket.socket
    endpoint: Endpoint
    may_encrypt: bool
    """PostgreSQL, or who refuses in its place, is to answer a request for TLS."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when there may be something new for this one; whoever waits then looks what."""
    gone: bool = False
    """The client hung up."""

    def hung_up(self) -> None:
        """The client did."""
        self.gone = True
        self.news.set()

    async def wait(self, until: float, source: socket.socket | None = None) -> None:
        """Wait for news, which bytes to read from `source` are too, until `until` at the longest.

        `until` is of the loop's clock. What was news before the call may be forgotten by it: look
        first.
        """
        loop = asyncio.get_running_loop()
        self.news.clear()
        if source is not None:
            loop.add_reader(source, self.news.set)
        try:
            async with asyncio.timeout_at(until):
                await self.news.wait()
        except TimeoutError:
            return
        finally:
            if source is not None:
                loop.remove_reader(source)

    async def greet(self, until: float) -> Greeting | None:
        """What the client wants; encryption that is not to be had was declined then.

        None: it says nothing in time. Its message is left unread. OSError if the connection breaks.
        """
        needed, negotiations = HEAD_BYTES, 0
        try:
            while (first := await self._peek(needed, until)) is not None:
                greeting = greeting_of(first)
                if self._is_declined(greeting) and negotiations < _NEGOTIATIONS:
                    negotiations += 1
                    self.client.recv(HEAD_BYTES)
                    self.client.send(DECLINED)
                elif greeting is Greeting.CANCEL and needed < CANCEL_BYTES:
                    needed = CANCEL_BYTES
                else:
                    return greeting
            return None
        finally:
            self._wake_at(1)  # as it was: the socket may be PostgreSQL's next

    def _is_declined(self, greeting: Greeting) -> bool:
        if greeting is Greeting.TLS:
            return not self.may_encrypt
        return greeting is Greeting.GSSAPI

    async def _peek(self, length: int, until: float) -> bytes | None:
        """The next `length` bytes, unread; None if they do not come."""
        self._wake_at(length)
        loop = asyncio.get_running_loop()
        while True:
            with suppress(BlockingIOError):
                data = self.client.recv(length, socket.MSG_PEEK)
                if len(data) == length:
                    return data
            if self.gone or loop.time() >= until:
                return None
            await self.wait(until, self.client)

    def _wake_at(self, length: int) -> None:
        """Have the kernel tell of bytes to read only when there are so many."""
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, length)

    def take(self, length: int) -> bytes:
        """Read what `greet` has seen."""
        return self.client.recv(length)

    def refuse(self, sqlstate: str, message: str) -> None:
        """Tell the client why it gets no session, as PostgreSQL would; then hang up."""
        with suppress(OSError):
            # The kernel would answer unread bytes with a reset, which may overtake the message.
            with suppress(BlockingIOError):
                self.client.recv(_DRAINED_BYTES)
            self.client.send(refusal(sqlstate, message))
            self.client.shutdown(socket.SHUT_WR)
