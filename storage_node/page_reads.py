"""What reads of pages have in common, however they come: their limits, their waits, their turns."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from boreal.errors import MalformedRequest, OversizeRequest
from boreal.rpc import common_pb2
from boreal.rpc.edge import fork_from_wire
from boreal.types import PAGE_BYTES, Lsn, RelationFork
from storage_node.page_volume import PageVolume

MAX_PAGES_A_CALL: Final = 1024
MAX_PAGES_A_MESSAGE: Final = 128
MAX_BLOCKS: Final = 0xFFFFFFFE
MAX_WAIT_S: Final = 30.0
_PAGES_A_TURN = 16
"""Pages made before other calls and the ingest get their turn."""
_ANSWER_S = 0.2


def patience_s(remaining_s: float) -> float:
    """How long a call may wait, so that a typed refusal still gets back before its deadline."""
    return min(remaining_s - min(remaining_s / 4, _ANSWER_S), MAX_WAIT_S)


def message_runs(
    asked: Iterable[tuple[common_pb2.RelationFork, int, int]],
) -> list[tuple[RelationFork, range]]:
    """The (fork, first block, count) asked for, cut into what one message holds.

    MalformedRequest or OversizeRequest if they are not 1 to MAX_PAGES_A_CALL pages that can exist.
    """
    runs = []
    total = 0
    for fork, first, count in asked:
        total += count
        if total > MAX_PAGES_A_CALL:
            raise OversizeRequest(
                f"{total} pages were asked for; the limit is {MAX_PAGES_A_CALL}",
                limit_bytes=MAX_PAGES_A_CALL * PAGE_BYTES,
            )
        end = first + count
        if count == 0 or end - 1 > MAX_BLOCKS:
            raise MalformedRequest(f"blocks {first} to {end - 1} are no range")
        runs += [
            (fork_from_wire(fork), range(begin, min(begin + MAX_PAGES_A_MESSAGE, end)))
            for begin in range(first, end, MAX_PAGES_A_MESSAGE)
        ]
    if not runs:
        raise MalformedRequest("no pages were asked for")
    return runs


async def read_pages(
    volume: PageVolume, fork: RelationFork, blocks: range, lsn: Lsn
) -> list[bytes | None]:
    """Pages of a volume whose index has come to `lsn`; other calls get their turns in between."""
    pages: list[bytes | None] = []
    for turn in range(blocks.start, blocks.stop, _PAGES_A_TURN):
        if pages:
            await asyncio.sleep(0)
        pages += volume.pages(fork, range(turn, min(turn + _PAGES_A_TURN, blocks.stop)), lsn)
    return pages
