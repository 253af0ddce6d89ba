"""Passing a cancel request on: to every instance, for it does not say whose session it means."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

_WITHIN_S = 2.0

_log = structlog.get_logger(__name__)


async def copy_to_all(request: bytes, addresses: Iterable[tuple[str, int]]) -> None:
    """Send `request` to each address; return when PostgreSQL has dealt with it at all of them.

    One that does not answer within _WITHIN_S is left out: there is nothing to be cancelled there.
    """
    async with asyncio.TaskGroup() as tasks:
        for host, port in addresses:
            tasks.create_task(_copy(request, host, port))


async def _copy(request: bytes, host: str, port: int) -> None:
    try:
        async with asyncio.timeout(_WITHIN_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(request)
                await reader.read(1)  # PostgreSQL hangs up once it has sent the signal
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        _log.info("an instance got no cancel request", host=host, port=port, why=str(error))
