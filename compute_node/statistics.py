"""What PostgreSQL counts of itself, asked for now and then, for the metrics."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import LiteralString, NoReturn

import psycopg
import structlog

from compute_node.postgres import Connection, Postgres

EVERY_S = 5.0
"""Scrapes come every 15 seconds or so."""
_QUERY: LiteralString = """
    select sum(xact_commit)::int8, sum(xact_rollback)::int8, sum(blks_hit)::int8,
           sum(blks_read)::int8, sum(numbackends)::int8
    from pg_stat_database"""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatistics:
    """Over all databases, since this PostgreSQL was started (pg_stat_database)."""

    commits: int
    rollbacks: int
    blocks_hit: int
    blocks_read: int
    sessions: int
    """At this moment."""


class Statistics:
    """Keeps the statistics of one PostgreSQL that takes connections.

    Apart from `Postgres.watch_answers`, by which an instance lives or dies: this query reads
    catalogs, whose pages may have to come from storage, and nobody waits for it.
    """

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres
        self.latest: EngineStatistics | None = None
        """None: it has not answered yet."""

    async def run(self) -> NoReturn:
        """Ask until cancelled."""
        while True:
            try:
                async with self._postgres.connect() as connection:
                    while True:
                        self.latest = await _ask(connection)
                        await asyncio.sleep(EVERY_S)
            except psycopg.Error as error:  # it is ending, or ended this session
                _log.info("PostgreSQL tells no statistics", reason=str(error).strip())
            await asyncio.sleep(EVERY_S)


async def _ask(connection: Connection) -> EngineStatistics:
    row = await (await connection.execute(_QUERY)).fetchone()
    if row is None:
        raise psycopg.DataError("an aggregate without a row")
    commits, rollbacks, hit, read, sessions = (int(str(value or 0)) for value in row)
    return EngineStatistics(
        commits=commits, rollbacks=rollbacks, blocks_hit=hit, blocks_read=read, sessions=sessions
    )
