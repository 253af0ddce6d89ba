"""Noticing that the other end of a socket is gone, while what it sent still waits to be read."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable

_AT_ONCE = 256


class Hangups:
    """Tells of sockets whose other end was closed, or at least shut down for sending.

    A socket with unread data is always readable, so the event loop cannot tell: this is a second
    epoll that asks for nothing else, and is itself watched by the loop.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._told: dict[int, Callable[[], None]] = {}
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._look)

    def close(self) -> None:
        """Watch nothing any more."""
        asyncio.get_running_loop().remove_reader(self._epoll.fileno())
        self._epoll.close()

    def watch(self, watched: socket.socket, tell: Callable[[], None]) -> None:
        """Call `tell`, once, when the other end is gone."""
        descriptor = watched.fileno()
        self._epoll.register(descriptor, select.EPOLLRDHUP | select.EPOLLONESHOT)
        self._told[descriptor] = tell

    def forget(self, watched: socket.socket) -> None:
        """Watch it no more. To be called before it is closed.

        (Where somebody else holds the same connection, the kernel would go on watching it.)
        """
        descriptor = watched.fileno()
        del self._told[descriptor]
        self._epoll.unregister(descriptor)

    def _look(self) -> None:
        for descriptor, _events in self._epoll.poll(0, _AT_ONCE):
            if (tell := self._told.get(descriptor)) is not None:
                tell()
