"""Pages fetched before they are missed.

Goal: each is handed over once, in order and without a gap, never after a loss; nothing is fetched
twice, memory is bounded, and a failure harms nobody. Method: a fetch that the test lets through.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from boreal.errors import NotMaterializable
from boreal.types import BlockNumber, Fork, Lsn, PageKey, RelationFork
from compute_node.page_protocol import Run
from compute_node.prefetch import MAX_FETCH, ReadAhead

HEAP = RelationFork(1663, 5, 16384, Fork.MAIN)
LSN = Lsn(1000)


def run(first: int, blocks: int) -> Run:
    return Run(HEAP, BlockNumber(first), blocks)


@dataclass(slots=True)
class Storage:
    """Gives pages that say which they are."""

    asked: list[Run] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    failing: bool = False
    losses: int = 0

    async def fetch(self, wanted: Run, lsn: Lsn) -> list[bytes | None]:
        assert lsn == LSN
        self.asked.append(wanted)
        await self.open.wait()
        if self.failing:
            raise NotMaterializable("no")
        return pages(wanted.first, wanted.blocks)


def pages(first: int, blocks: int) -> list[bytes | None]:
    return [b"%d" % block for block in range(first, first + blocks)]


@asynccontextmanager
async def reading_ahead(storage: Storage, **limits: int) -> AsyncIterator[ReadAhead]:
    ahead = ReadAhead(storage.fetch, lambda: storage.losses, **limits)
    try:
        yield ahead
    finally:
        await ahead.close()


async def test_pages_are_handed_over_once() -> None:
    storage = Storage()
    storage.open.set()
    async with reading_ahead(storage) as ahead:
        ahead.want(run(10, 8), LSN, 0)
        assert await ahead.take(run(9, 4)) == []  # not from its first block on
        assert await ahead.take(run(10, 3)) == pages(10, 3)
        assert await ahead.take(run(13, 64)) == pages(13, 5)
        assert len(ahead) == 0
        assert await ahead.take(run(10, 3)) == []


async def test_what_is_here_or_under_way_is_not_asked_for_again() -> None:
    storage = Storage()
    async with reading_ahead(storage) as ahead:
        ahead.want(run(10, 4), LSN, 0)
        ahead.want(run(8, 10), LSN, 0)
        ahead.want(run(8, 10), LSN, 0)
        taking = asyncio.create_task(ahead.take(run(8, 10)))
        await asyncio.sleep(0)
        storage.open.set()
        assert await taking == pages(8, 10)
        assert sorted(storage.asked) == [run(8, 2), run(10, 4), run(14, 4)]


async def test_a_take_waits_for_its_first_page_only() -> None:
    storage = Storage()
    storage.open.set()
    async with reading_ahead(storage) as ahead:
        ahead.want(run(0, 2), LSN, 0)
        await asyncio.sleep(0.01)
        storage.open.clear()
        ahead.want(run(2, 2), LSN, 0)
        assert await ahead.take(run(0, 4)) == pages(0, 2)


async def test_after_a_loss_nothing_is_given_and_it_is_asked_for_anew() -> None:
    storage = Storage()
    async with reading_ahead(storage) as ahead:
        ahead.want(run(0, 2), LSN, 0)
        taking = asyncio.create_task(ahead.take(run(0, 2)))
        await asyncio.sleep(0)
        storage.losses = 1
        storage.open.set()
        assert await taking == []
        ahead.want(run(4, 2), LSN, 0)  # counted before the loss, told after it
        assert await ahead.take(run(4, 2)) == []
        ahead.want(run(4, 2), LSN, 1)
        assert await ahead.take(run(4, 2)) == pages(4, 2)


async def test_a_failure_is_forgotten() -> None:
    storage = Storage(failing=True)
    storage.open.set()
    async with reading_ahead(storage) as ahead:
        ahead.want(run(0, 2), LSN, 0)
        assert await ahead.take(run(0, 2)) == []
        storage.failing = False
        ahead.want(run(0, 2), LSN, 0)
        assert await ahead.take(run(0, 2)) == pages(0, 2)


async def test_the_oldest_make_room() -> None:
    storage = Storage()
    storage.open.set()
    async with reading_ahead(storage, capacity_pages=100) as ahead:
        for first in range(0, 1000, 10):
            ahead.want(run(first, 10), LSN, 0)
            assert len(ahead) <= 100
        assert await ahead.take(run(890, 10)) == []
        assert await ahead.take(run(900, 10)) == pages(900, 10)


async def test_calls_under_way_are_bounded() -> None:
    storage = Storage()
    async with reading_ahead(storage, at_once=3) as ahead:
        ahead.want(run(0, 10 * MAX_FETCH), LSN, 0)
        await asyncio.sleep(0.01)
        assert storage.asked == [run(n * MAX_FETCH, MAX_FETCH) for n in range(3)]


async def test_readers_who_want_overlapping_runs_want_the_same_fetches() -> None:
    storage = Storage()
    storage.open.set()
    async with reading_ahead(storage) as ahead:
        ahead.want(run(40, 344), LSN, 0)
        ahead.want(run(72, 440), LSN, 0)
        await asyncio.sleep(0.01)
        assert storage.asked == [run(40, 88), run(128, 128), run(256, 128), run(384, 128)]
        assert await ahead.take(run(100, 64)) == pages(100, 64)


async def test_closing_ends_what_is_under_way() -> None:
    storage = Storage()
    async with reading_ahead(storage) as ahead:
        ahead.want(run(0, 10), LSN, 0)
        ahead.hint(PageKey(HEAP, BlockNumber(50)), LSN, 0)
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
    assert storage.asked == [run(0, 10)]
