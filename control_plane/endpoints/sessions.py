"""The sessions that were handed over, as far as this process still has to do with them.

PostgreSQL serves them alone. But a writer that was frozen (its machine, its process) and deposed
meanwhile cannot tell its clients so, and they would wait for it as long as they live. So a copy of
each connection is kept, unused, beside the carrier it was handed over with, and closed when the
carrier ends, for then PostgreSQL's process has ended. When another instance becomes the writer, the
sessions of the former one are ended by that copy.

What this process does not know of, because it was started since, only PostgreSQL can end.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass

import structlog

from boreal.types import InstanceName
from control_plane.endpoints.choice import Route
from control_plane.endpoints.hangups import Hangups

_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Session:
    """One of them."""

    client: socket.socket
    carrier: socket.socket
    instance: InstanceName
    of_writer: bool
    """The instance was the writer at some time of the session."""


class Sessions:
    """Those whose end has not been seen yet; `most` of them at most, the others are not kept."""

    def __init__(self, hangups: Hangups, most: int) -> None:
        self._hangups = hangups
        self._most = most
        self._sessions: set[_Session] = set()

    def __len__(self) -> int:
        return len(self._sessions)

    def keep(self, client: socket.socket, carrier: socket.socket, route: Route) -> None:
        """A connection was taken by the instance of `route`. Copies both sockets."""
        if len(self._sessions) >= self._most:
            return
        session = _Session(client.dup(), carrier.dup(), route.instance, route.writer)
        self._sessions.add(session)
        self._hangups.watch(session.carrier, lambda: self._drop(session))

    def writer_is(self, writer: InstanceName) -> None:
        """End the sessions of every former writer."""
        deposed = []
        for session in self._sessions:
            if session.instance == writer:
                session.of_writer = True
            elif session.of_writer:
                deposed.append(session)
        for session in deposed:
            with suppress(OSError):  # the client was first
                session.client.shutdown(socket.SHUT_RDWR)
            self._drop(session)
        if deposed:
            _log.info("sessions of a former writer were ended", writer=writer, count=len(deposed))

    def close(self) -> None:
        """Keep none any more. They go on."""
        for session in tuple(self._sessions):
            self._drop(session)

    def _drop(self, session: _Session) -> None:
        self._sessions.discard(session)
        self._hangups.forget(session.carrier)
        session.carrier.close()
        session.client.close()
