"""Retirement: pages are stored as of a floor, so that the log and the layers before it can go.

Nobody asks for a page as of an LSN below the floor. When more log than wanted is kept below it, the
older half of the layers there goes in bulk: a page they tell of that has no newer base at or below
the floor gets a version. After that no state of a page from the floor on needs their log.

The order is what makes a crash harmless at any moment, and what lets pages be read meanwhile. First
it is made durable that nothing below the floor is served; then databases that were copied as files
get their pages, and pages get their versions, each in one transaction with the deletion of those it
supersedes; then the layers go; only then are the facts trimmed that hid what was in them. What is
done again is the same again.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Final

import structlog

from boreal.errors import CorruptData, NotMaterializable, RedoFailed
from boreal.pages.layout import is_zero
from boreal.types import BlockNumber, Lsn, PageKey, format_lsn
from storage_node.entries import page_key, page_of_key, start_of
from storage_node.index import IndexView, PageIndex
from storage_node.layer_file import PageEntries, SealedLayer
from storage_node.materialize import Materializer, Path
from storage_node.trim_facts import finish_copy, trim
from storage_node.turns import Turns
from storage_node.versions import Refusal, refusal_row, version_row

RECORDS_A_TURN: Final = 16
VERSIONS_A_COMMIT: Final = 256
"""2 MiB at most."""

_log = structlog.get_logger(__name__)


class _Job:
    """One retirement under way: these layers, as of this floor."""

    def __init__(self, layers: Sequence[SealedLayer], floor: Lsn) -> None:
        self.layers = layers
        self.floor = floor
        self.pages = _last_entries(layers)
        self.all_looked_at = False
        self.pages_made = 0
        self.refused = 0


class Retirement:
    """Retires layers of one volume's index. One task uses it."""

    def __init__(
        self,
        *,
        index: PageIndex,
        materializer: Materializer,
        floor: Callable[[], Lsn],
        retain_bytes: int,
    ) -> None:
        """`floor` as in storage_node.shared_state; 0: unknown."""
        self._index = index
        self._materializer = materializer
        self._floor = floor
        self._retain_bytes = retain_bytes
        self._turns = Turns(lambda: materializer.reads)
        self._rows: list[tuple[bytes, bytes]] = []
        self._superseded: list[tuple[bytes, int]] = []
        self.has_time: Callable[[], bool] = lambda: False
        """Whether the log is quiet: if not, what is retired must keep up with what comes."""
        self.refused = 0
        """Pages that could not be made and are refused from then on, since this process began."""

    async def run(self) -> bool:
        """Retire if it is time; whether layers were dropped.

        Raises RedoFailed, BeyondLog, BelowLogStart where a page cannot be made now but may be one
        day: nothing it rests on is dropped.
        """
        job = self._begin()
        if job is None:
            return False
        self._rows, self._superseded = [], []
        await self._index.raise_lowest(job.floor)
        await self._finish_copies(job.floor)
        await self._store_pages(job)
        await self._index.drop_layers(len(job.layers))
        # Not before: what a cut hides is in those layers.
        await trim(self._index, job.floor, {fork for fork, _ in self._index.imported.forks})
        self.refused += job.refused
        _log.info(
            "log retired",
            up_to=format_lsn(job.layers[-1].end),
            floor=format_lsn(job.floor),
            pages=job.pages_made,
            refused=job.refused,
        )
        return True

    def _begin(self) -> _Job | None:
        floor = self._floor()
        if floor - self._index.retired <= self._retain_bytes:
            return None
        # Layers end where records do: as of such an LSN no record is half in.
        below = [layer for layer in self._index.layers if layer.end <= floor]
        if not below or below[-1].end < self._index.lowest:
            return None  # a floor lower than before, after a restart: it will be back there
        return _Job(below[: (len(below) + 1) // 2], below[-1].end)

    # --- pages ---------------------------------------------------------------------------------

    async def _store_pages(self, job: _Job) -> None:
        """Store every page that needs it."""
        self._turns.begin()
        while not job.all_looked_at:
            path = self._next_path(job)
            if path is not None:
                await self._make(job, path)
            await self._give_way()
            await self._commit(VERSIONS_A_COMMIT)
        await self._commit(0)

    async def _give_way(self) -> None:
        if self._turns.over:
            await self._turns.give_way(patient=self.has_time())

    def _next_path(self, job: _Job) -> Path | None:
        """The way to the next page that needs a version, if one comes up in this turn."""
        with self._index.view() as view:
            for key, entry in job.pages:
                path = self._look(job, view, key, entry)
                if path is not None or self._turns.over:
                    return path
        job.all_looked_at = True
        return None

    def _look(self, job: _Job, view: IndexView, key: bytes, entry: int) -> Path | None:
        """The way to a page of which `entry` is the last to be dropped, if it needs a version."""
        page = page_of_key(key)
        size = view.size(page.relation, job.floor)
        if size is None or page.block >= size:
            return None  # whatever makes it again will make it anew: a cut lies in between
        start = start_of(entry)
        ground = view.ground(page, job.floor)
        if ground.since > start:
            return None
        version = view.version(key, job.floor)
        if version is not None and version.lsn > start and version.sound:
            self._superseded.append((key, version.lsn))
            return None
        try:
            return self._materializer.path(view, page, job.floor)
        except NotMaterializable as error:
            self._refuse(job, key, Refusal.UNKNOWN_RECORD, error.details.get("lsn", 0))
        except RedoFailed:
            raise
        except CorruptData as error:
            self._refuse_damaged(job, page, key, error)
        return None

    async def _make(self, job: _Job, path: Path) -> None:
        try:
            while not path.complete:
                self._materializer.walk(path, RECORDS_A_TURN)
                await self._give_way()
        except NotMaterializable as error:
            self._refuse(job, path.key, Refusal.UNKNOWN_RECORD, error.details.get("lsn", 0))
        except RedoFailed:
            raise  # the log is sound: a better redo may yet make the page of it
        except CorruptData as error:
            self._refuse_damaged(job, path.page, path.key, error)
        else:
            self._rows.append(version_row(path.key, path.end, path.content))
            self._superseded.append((path.key, path.end))
            job.pages_made += 1

    def _refuse_damaged(self, job: _Job, page: PageKey, key: bytes, error: CorruptData) -> None:
        # Waiting does not repair it; other nodes have the page.
        _log.error("page is lost on this node", page=str(page), error=error.message)
        self._refuse(job, key, Refusal.DAMAGED, error.details.get("lsn", 0))

    def _refuse(self, job: _Job, key: bytes, reason: Refusal, about: int) -> None:
        self._rows.append(refusal_row(key, job.floor, reason, about))
        self._superseded.append((key, job.floor))
        job.refused += 1

    async def _commit(self, at_least: int) -> None:
        if len(self._rows) + len(self._superseded) // 4 <= at_least and at_least:
            return
        rows, self._rows = self._rows, []
        superseded, self._superseded = self._superseded, []
        if rows or superseded:
            await self._index.store(rows, superseded)
            self._turns.begin()

    # --- copied databases ----------------------------------------------------------------------

    async def _finish_copies(self, floor: Lsn) -> None:
        """Carry out every FILE_COPY up to the floor: what they copied is about to be trimmed."""
        with self._index.view() as view:
            copies = view.facts.copies(floor)
        for lsn, source, copy in copies:
            with self._index.view() as view:
                sizes = view.facts.relations_of(*source, lsn - 1)
            for fork, blocks in sizes.items():
                copied = fork._replace(tablespace=copy[0], database=copy[1])
                for block in range(blocks):
                    self._copy_page(
                        PageKey(fork, BlockNumber(block)),
                        PageKey(copied, BlockNumber(block)),
                        Lsn(lsn),
                    )
                    await self._give_way()
                    await self._commit(VERSIONS_A_COMMIT)
            await self._commit(0)
            await finish_copy(self._index, lsn, copy, sizes)
            _log.info("database copied", database=copy[1], pages=sum(sizes.values()))

    def _copy_page(self, source: PageKey, page: PageKey, lsn: Lsn) -> None:
        key = page_key(page)
        try:
            with self._index.view() as view:
                content = self._materializer.page(view, source, Lsn(lsn - 1))
        except NotMaterializable as error:
            about = error.details.get("lsn", 0)
            self._rows.append(refusal_row(key, lsn, Refusal.UNKNOWN_RECORD, about))
        except RedoFailed:
            raise
        except CorruptData as error:
            _log.error("page is lost on this node", page=str(page), error=error.message)
            self._rows.append(refusal_row(key, lsn, Refusal.DAMAGED, 0))
        else:
            if content is not None and not is_zero(content):
                self._rows.append(version_row(key, lsn, content))


def _last_entries(layers: Sequence[SealedLayer]) -> Iterator[tuple[bytes, int]]:
    """Each page of these layers, in key order, and its last entry in them."""
    pages: Iterable[PageEntries] = heapq.merge(
        *(layer.all() for layer in layers), key=attrgetter("key")
    )
    for key, group in groupby(pages, key=attrgetter("key")):
        yield key, max(page.entries[-1] for page in group)
