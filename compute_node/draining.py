"""How a writer makes way: its clients' transactions end, its log gets durable."""

from __future__ import annotations

import asyncio
import time

import structlog

from boreal.types import format_lsn
from compute_node.config import ADMIN, ComputeConfig
from compute_node.lease import Lease
from compute_node.postgres import Connection, Postgres, make_durable

_TRANSACTIONS_S = 1.0
"""So long transactions under way may take to end."""
_DURABLE_S = 5.0
_SETTLE_S = 0.01
"""A message that was let through just before has begun its transaction by then."""
_POLL_S = 0.005

_CLIENTS = f"""
    from pg_stat_activity where backend_type = 'client backend' and usename <> '{ADMIN}'"""
_END_IDLE = f"select pg_terminate_backend(pid) {_CLIENTS} and state = 'idle'"
_END_ALL = f"select pg_terminate_backend(pid) {_CLIENTS}"
_COUNT = f"select count(*) {_CLIENTS}"

_log = structlog.get_logger(__name__)


async def drain(config: ComputeConfig, postgres: Postgres, lease: Lease) -> None:
    """Let no transaction begin any more, end all sessions, make all that was written durable.

    A session is ended between two transactions, or after a second. What it takes to end PostgreSQL
    without losing anything; whatever fails here, what was acknowledged is durable anyway.
    """
    if config.handover_socket is not None:
        config.handover_socket.unlink(missing_ok=True)
    lease.drain()
    began = time.monotonic()
    session = await postgres.session()
    await asyncio.sleep(_SETTLE_S)
    left = await _end_sessions(session)
    ended = time.monotonic()
    async with asyncio.timeout(_DURABLE_S):
        durable = await make_durable(session)
    _log.info(
        "drained",
        durable=format_lsn(durable),
        sessions_ended_ms=round((ended - began) * 1000),
        durable_ms=round((time.monotonic() - ended) * 1000),
        transactions_cut=left,
    )


async def rehearse(postgres: Postgres) -> None:
    """Do what costs nothing now and would cost time then: read the catalogs it takes."""
    await _count(await postgres.session())


async def _end_sessions(connection: Connection) -> int:
    """End every client's session; return how many had a transaction cut off."""
    deadline = time.monotonic() + _TRANSACTIONS_S
    while time.monotonic() < deadline:
        await connection.execute(_END_IDLE.encode())
        if not await _count(connection):
            return 0
        await asyncio.sleep(_POLL_S)
    left = await _count(connection)
    await connection.execute(_END_ALL.encode())
    return left


async def _count(connection: Connection) -> int:
    row = await (await connection.execute(_COUNT.encode())).fetchone()
    return int(str(row[0])) if row else 0
