"""The server side of streaming replication: how the agent's own standby gets its WAL.

To PostgreSQL's walreceiver this is a primary; behind it is whatever holds the volume's log. It
hands out bytes up to the source's ceiling only, so no reader ever holds WAL that the quorum lacks.
Source: PostgreSQL documentation, "Streaming Replication Protocol"; libpqwalreceiver.c for what the
walreceiver expects.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from compute_node.feed_session import FeedSession, FeedSource, StandbyProgress

__all__ = ["Feed", "FeedSource", "StandbyProgress"]

MAX_CONNECTIONS = 16
"""One standby is ours; a few connections of it that are just ending may be there too."""

_log = structlog.get_logger(__name__)


class Feed:
    """A walsender for our own standby: `primary_conninfo = 'host=<socket_dir> port=<port>'`.

    Whoever can open the socket is let in: the directory's permissions are the authentication.
    """

    def __init__(self, source: FeedSource, path: Path) -> None:
        self._source = source
        self._path = path
        self._server: asyncio.Server | None = None
        self._sessions: dict[FeedSession, asyncio.Task[None]] = {}

    @classmethod
    async def start(cls, source: FeedSource, *, socket_dir: Path, port: int) -> Feed:
        """Listen on `<socket_dir>/.s.PGSQL.<port>` (an old socket file is replaced; mode 0777)."""
        feed = cls(source, socket_dir / f".s.PGSQL.{port}")
        feed._path.unlink(missing_ok=True)
        feed._server = await asyncio.start_unix_server(feed._accept, feed._path)
        feed._path.chmod(0o777)  # PostgreSQL runs under another account than the agent
        return feed

    @property
    def standbys(self) -> tuple[StandbyProgress, ...]:
        """Those now streaming."""
        return tuple(s.progress for s in self._sessions if s.progress is not None)

    async def close(self) -> None:
        """Stop listening and end every connection. Idempotent."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._sessions.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()
        self._path.unlink(missing_ok=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._sessions) >= MAX_CONNECTIONS:
            _log.warning("feed is full", connections=len(self._sessions))
            writer.close()
            return
        session = FeedSession(self._source, reader, writer)
        task = asyncio.get_running_loop().create_task(session.run(), name="feed session")
        self._sessions[session] = task
        task.add_done_callback(lambda _: self._sessions.pop(session, None))
