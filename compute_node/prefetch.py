"""Pages fetched before PostgreSQL misses them, kept until it does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import structlog

from boreal.errors import BorealError
from boreal.types import BlockNumber, Lsn, PageKey, RelationFork
from compute_node.page_protocol import Run

MAX_FETCH = 128
"""Pages of one fetch at most, one message of a node: a message costs as much as a dozen pages,
however few it carries. Fetches end where block numbers are multiples of it, so that readers who
want overlapping runs want the same fetches."""
CAPACITY_PAGES = 4096
"""What is kept and what is under way, together: 32 MiB. The oldest make room."""
AT_ONCE = 16
"""Fetches under way."""
GATHER_S = 0.003
"""Hints wait so long for their neighbours: one call fetches them all."""
_GAP_BLOCKS = 8
"""Hints so close to each other become one run: an extra page costs less than an extra call."""

_log = structlog.get_logger(__name__)

Fetch = Callable[[Run, Lsn], Awaitable[list[bytes | None]]]
"""Gives every page of a run, for a process that stands at that LSN."""


@dataclass(slots=True, eq=False)
class _Fetched:
    """A run that was fetched or is being fetched."""

    run: Run
    losses: int
    """The count of losses before it was asked for."""
    task: asyncio.Task[list[bytes | None]]
    left: int
    """Pages not handed over yet."""


class ReadAhead:
    """Fetches runs in the background and hands each page over once.

    Invariant: nothing is handed over that was asked for before the last cut or eviction, which is
    what `losses` counts. Why that suffices is argued in `compute_node.page_service`. A failed fetch
    is forgotten: whoever needs the page asks for it again and meets the reason.
    """

    def __init__(
        self,
        fetch: Fetch,
        losses: Callable[[], int],
        *,
        capacity_pages: int = CAPACITY_PAGES,
        at_once: int = AT_ONCE,
    ) -> None:
        self._fetch = fetch
        self._losses = losses
        self._capacity_pages = capacity_pages
        self._turns = asyncio.Semaphore(at_once)
        self._blocks: dict[RelationFork, dict[int, _Fetched]] = {}
        self._oldest_first: dict[_Fetched, None] = {}
        self._pages = 0
        self._hints: set[PageKey] = set()
        self._gathering: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Pages kept or under way."""
        return self._pages

    async def close(self) -> None:
        """End what is under way, forget the rest."""
        if self._gathering is not None:
            self._gathering.cancel()
        tasks = [fetched.task for fetched in self._oldest_first]
        for fetched in list(self._oldest_first):
            self._forget(fetched)
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- filling it ------------------------------------------------------------------------------

    def want(self, run: Run, lsn: Lsn, losses: int) -> None:
        """Fetch what of `run` is neither here nor under way.

        `losses` was counted before it was known that the pages as of `lsn` are the right ones.
        """
        known = self._blocks.get(run.fork, {})
        first, end = run.first, run.first + run.blocks
        while first < end:
            if (fetched := known.get(first)) is not None and self._is_current(fetched):
                first = BlockNumber(fetched.run.first + fetched.run.blocks)
                continue
            longest = min(MAX_FETCH - first % MAX_FETCH, end - first)
            count = 1
            while count < longest and first + count not in known:
                count += 1
            self._start(Run(run.fork, first, count), lsn, losses)
            first = BlockNumber(first + count)

    def hint(self, key: PageKey, lsn: Lsn, losses: int) -> None:
        """Fetch this page, together with others hinted at within the same moment."""
        if len(self._hints) >= self._capacity_pages:
            return
        self._hints.add(key)
        if self._gathering is None:
            loop = asyncio.get_running_loop()
            self._gathering = loop.call_later(GATHER_S, self._follow_hints, lsn, losses)

    def _follow_hints(self, lsn: Lsn, losses: int) -> None:
        """What was true for the first of the hints serves them all: the others came later."""
        hints, self._hints, self._gathering = sorted(self._hints), set(), None
        for run in _runs(hints):
            self.want(run, lsn, losses)

    def _start(self, run: Run, lsn: Lsn, losses: int) -> None:
        task = asyncio.get_running_loop().create_task(self._carry_out(run, lsn))
        fetched = _Fetched(run, losses, task, run.blocks)
        task.add_done_callback(lambda _task: self._done(fetched))
        known = self._blocks.setdefault(run.fork, {})
        for block in range(run.first, run.first + run.blocks):
            known[block] = fetched
        self._oldest_first[fetched] = None
        self._pages += run.blocks
        while self._pages > self._capacity_pages:
            self._forget(next(iter(self._oldest_first)))

    async def _carry_out(self, run: Run, lsn: Lsn) -> list[bytes | None]:
        async with self._turns:
            return await self._fetch(run, lsn)

    def _done(self, fetched: _Fetched) -> None:
        if fetched.task.cancelled():
            return
        if (error := fetched.task.exception()) is not None:
            self._forget(fetched)
            unexpected = None if isinstance(error, BorealError) else error
            _log.info(
                "not fetched ahead", run=str(fetched.run), why=str(error), exc_info=unexpected
            )

    # --- emptying it -----------------------------------------------------------------------------

    async def take(self, run: Run) -> list[bytes | None]:
        """The pages of `run` that are here, from its first block on without a gap.

        Waits for the first if it is under way. Empty if it is neither; None for a page of zeros.
        """
        pages: list[bytes | None] = []
        while len(pages) < run.blocks:
            block = run.first + len(pages)
            fetched = self._blocks.get(run.fork, {}).get(block)
            if fetched is None or (pages and not fetched.task.done()):
                break
            if self._is_current(fetched) and not fetched.task.done():
                await asyncio.wait((fetched.task,))
            if not self._is_current(fetched):
                self._forget(fetched)
                break
            at = block - fetched.run.first
            taken = fetched.task.result()[at : at + run.blocks - len(pages)]
            pages += taken
            fetched.left -= len(taken)
            if fetched.left <= 0:
                self._forget(fetched)
        return pages

    def _is_current(self, fetched: _Fetched) -> bool:
        """Whether it may be handed over, or may be so when it is here."""
        task = fetched.task
        failed = task.done() and (task.cancelled() or task.exception() is not None)
        return not failed and fetched.losses == self._losses()

    def _forget(self, fetched: _Fetched) -> None:
        if fetched not in self._oldest_first:
            return
        del self._oldest_first[fetched]
        run = fetched.run
        self._pages -= run.blocks
        known = self._blocks[run.fork]
        for block in range(run.first, run.first + run.blocks):
            if known.get(block) is fetched:
                del known[block]
        if not known:
            del self._blocks[run.fork]
        fetched.task.cancel()


def _runs(keys: Sequence[PageKey]) -> Iterator[Run]:
    """The ordered keys as runs of at most MAX_FETCH blocks."""
    start = 0
    for position in range(1, len(keys) + 1):
        first, last = keys[start], keys[position - 1]
        if position < len(keys):
            following = keys[position]
            if (
                following.relation == first.relation
                and following.block - last.block <= 1 + _GAP_BLOCKS
                and following.block - first.block < MAX_FETCH
            ):
                continue
        yield Run(first.relation, first.block, last.block - first.block + 1)
        start = position
