"""A page at an LSN: back to its newest base at or below it, then forward record by record."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from time import monotonic

import structlog

from boreal.errors import CorruptData, CorruptWal, NotMaterializable, RedoFailed
from boreal.histogram import Durations, Sizes
from boreal.pages import visibility
from boreal.types import (
    PAGE_BYTES,
    BlockNumber,
    Fork,
    Lsn,
    PageKey,
    RelationFork,
    format_lsn,
)
from boreal.wal import (
    BlockRef,
    RelationTruncated,
    VisibilityCleared,
    WalRecord,
    effects,
    record_at,
)
from storage_node.entries import Kind, kind_of, page_key, start_of
from storage_node.facts import Ground
from storage_node.index import IndexView
from storage_node.map_clears import MapClears
from storage_node.redo import Redo, Step
from storage_node.versions import Version

CACHED_PAGES = 1024
"""8 MiB a volume."""
_CACHED_RECORDS = 256
_CACHED_RECORD_BYTES = 4 * 1024 * 1024

_log = structlog.get_logger(__name__)


class Path:
    """The way to one page at one LSN: what it starts from and the records still to be applied.

    Holds all it takes but the log, so that it may be walked in several turns of the event loop.
    """

    __slots__ = ("clears", "content", "end", "entries", "key", "limit", "lsn", "next", "page")

    def __init__(
        self,
        page: PageKey,
        key: bytes,
        lsn: Lsn,
        limit: Lsn,
        *,
        content: bytes,
        end: Lsn,
        entries: list[int],
        clears: tuple[MapClears, ...],
    ) -> None:
        self.page = page
        self.key = key
        """storage_node.entries.page_key."""
        self.lsn = lsn
        self.limit = limit
        """How far the log may be read."""
        self.content = content
        """The page at `end`: after every record of it that ends at or below."""
        self.end = end
        self.entries = entries
        self.clears = clears
        self.next = 0
        """The first entry not yet applied."""

    @property
    def length(self) -> int:
        """Records between the base and the page."""
        return len(self.entries)

    @property
    def complete(self) -> bool:
        """Whether `content` is the page wanted."""
        return self.next >= len(self.entries)


class Materializer:
    """Makes pages of one volume.

    Invariant of the cache: a page under (key, entry) is its state after that entry, and every
    entry before it, so it never goes stale.
    """

    def __init__(
        self,
        *,
        imported_page: Callable[[PageKey], bytes | None],
        read_log: Callable[[Lsn, int], bytes],
        redo: Redo,
        cached_pages: int = CACHED_PAGES,
    ) -> None:
        self._imported_page = imported_page
        self._read_log = read_log
        self._redo = redo
        self._cache: OrderedDict[tuple[bytes, int], tuple[bytes, Lsn]] = OrderedDict()
        self._cached_pages = cached_pages
        self._records: dict[Lsn, WalRecord] = {}
        """By their start, the oldest first: those that are wanted again soon, as those of several
        pages are when pages are read in order. What is indexed never changes."""
        self._record_bytes = 0
        self.reads = 0
        """Calls of `pages`, by which readers come; the node's own work uses `page`. Grows."""
        self.longest_chain = 0
        """The most records that lay between a page asked for and its base. Set it back at will."""
        self.stored = 0
        """Pages asked for that took no more than their stored version. Grows, as `cached` does."""
        self.cached = 0
        """Times a page in memory spared some of the way from the base."""
        self.chains = Sizes(0, 10)
        """Records applied to make a page that was asked for."""
        self.redone = Durations(first=5)
        """What making such a page took."""

    def pages(
        self, view: IndexView, fork: RelationFork, blocks: Sequence[int], lsn: Lsn
    ) -> list[bytes | None]:
        """Several pages of a fork as of `lsn`. Raises as `page` does.

        Quick where a stored version is all it takes.
        """
        size = view.size(fork, lsn) or 0
        pages: list[bytes | None] = []
        for block, version in zip(blocks, view.versions(fork, blocks, lsn), strict=True):
            page = version.intact() if version is not None and block < size else None
            if page is not None:
                self.stored += 1
            elif block < size:  # not that simple, or damaged
                page = self.page(view, PageKey(fork, BlockNumber(block)), lsn)
            pages.append(page)
        self.reads += 1
        return pages

    def page(self, view: IndexView, page: PageKey, lsn: Lsn) -> bytes | None:
        """The page as of `lsn`; None if its fork is absent or shorter then.

        Raises NotMaterializable where redo does not know a record on its path, CorruptData or
        CorruptWal where something it rests on is damaged. `lsn` must be within what is indexed.
        """
        size = view.size(page.relation, lsn)
        if size is None or page.block >= size:
            return None
        began = monotonic()
        path = self.path(view, page, lsn)
        self.walk(path, path.length)
        self.chains.observe(path.length)
        self.redone.observe(monotonic() - began)
        return path.content

    def path(self, view: IndexView, page: PageKey, lsn: Lsn, *, cached: bool = True) -> Path:
        """How to make a page that exists at `lsn`. Raises as `page` does.

        With `cached` false it starts from what is stored, not from what is in the cache.
        """
        key = page_key(page)
        ground = view.ground(page, lsn)
        version = view.version(key, lsn)
        if version is not None and version.lsn < ground.since:
            version = None
        since = ground.since if version is None else version.lsn
        entries = view.entries(page, since, lsn)
        content, end, first = self._nearest(page, key, entries, lsn, view.indexed, cached)
        if content is None:
            content, end = self._beneath(view, page, version, ground)
            if end != since:
                entries = view.entries(page, end, lsn)
        path = Path(
            page,
            key,
            lsn,
            view.indexed,
            content=content,
            end=end,
            entries=entries[first:],
            clears=view.clears(page) if page.relation.fork is Fork.VM else (),
        )
        self.longest_chain = max(self.longest_chain, path.length)
        return path

    def _nearest(
        self, page: PageKey, key: bytes, entries: list[int], lsn: Lsn, limit: Lsn, cached: bool
    ) -> tuple[bytes | None, Lsn, int]:
        """The newest page among `entries` to start from, its LSN, and the first entry after it.

        Takes entries whose record ends past `lsn` off the end of the list.
        """
        for number in range(len(entries) - 1, -1, -1):
            entry = entries[number]
            known = self._cache.get((key, entry)) if cached else None
            if known is not None and known[1] <= lsn:
                self._cache.move_to_end((key, entry))
                self.cached += 1
                return known[0], known[1], number + 1
            kind = kind_of(entry)
            if kind not in {Kind.BASE, Kind.UNKNOWN}:
                continue
            start = start_of(entry)
            if number == len(entries) - 1 and self._record(start, limit, again=True).end > lsn:
                entries.pop()
            elif kind is Kind.UNKNOWN:
                raise _unknown(page, start)
            else:
                return bytes(PAGE_BYTES), start, number
        return None, Lsn(0), 0

    def walk(self, path: Path, count: int) -> None:
        """Apply the next `count` records at most. CorruptWal, RedoFailed, NotMaterializable."""
        until = min(path.next + count, len(path.entries))
        if path.next >= until:
            return
        content = bytearray(path.content)
        while path.next < until:
            if path.clears and _clear_as_noted(content, path, until):
                continue
            end = self._apply(content, path, path.entries[path.next])
            if end > path.lsn:
                del path.entries[path.next :]
                break
            path.end = end
            path.next += 1
        path.content = bytes(content)
        if path.complete and path.next:
            self._remember((path.key, path.entries[-1]), path.content, path.end)

    def _beneath(
        self, view: IndexView, page: PageKey, version: Version | None, ground: Ground
    ) -> tuple[bytes, Lsn]:
        """The content the page's entries start from, and the LSN it is of."""
        if version is not None:
            try:
                return version.content(page), version.lsn
            except CorruptData as error:
                # The log may still reach back to what was before it. But what has the LSN of its
                # ground is the ground: a page of a copied database.
                older = view.version(page_key(page), version.lsn - 1)
                if older is not None and older.lsn < ground.since:
                    older = None
                before = ground.since if older is None else older.lsn
                if before < view.retired or before == version.lsn:
                    raise
                _log.error("stored version is damaged", page=str(page), error=error.message)
                return self._beneath(view, page, older, ground)
        if ground.source is not None:
            copied = self.page(view, ground.source, Lsn(ground.since - 1))
        else:
            copied = self._imported_page(page) if ground.imported else None
        # No history at all: PostgreSQL does not log that it extends a fork by empty pages.
        return copied if copied is not None else bytes(PAGE_BYTES), ground.since

    def _apply(self, content: bytearray, path: Path, entry: int) -> Lsn:
        """Apply one record unless it ends past the path's LSN; its end."""
        start, page = start_of(entry), path.page
        record = self._record(start, path.limit)
        if record.end > path.lsn:
            return record.end
        kind = kind_of(entry)
        if kind is Kind.MAP_CLEAR:
            for effect in effects(record):
                if isinstance(effect, VisibilityCleared) and effect.page == page:
                    visibility.clear(content, effect.heap_block, effect.bits)
        elif kind is Kind.MAP_CUT:
            for effect in effects(record):
                if isinstance(effect, RelationTruncated):
                    visibility.truncate(content, effect.blocks)
        else:
            self._redo_block(content, record, _block_of(record, page))
        return record.end

    def _record(self, start: Lsn, limit: Lsn, *, again: bool = False) -> WalRecord:
        """The record that begins at `start`, its CRC checked when it was read.

        `again`: it will be asked for again even if it is of one page.
        """
        record = self._records.get(start)
        if record is not None:
            return record
        record = record_at(self._read_log, start, limit)
        if again or len(record.blocks) > 1:
            records = self._records
            records[start] = record
            self._record_bytes += record.end - start
            while len(records) > _CACHED_RECORDS or self._record_bytes > _CACHED_RECORD_BYTES:
                dropped = records.pop(next(iter(records)))
                self._record_bytes -= dropped.end - dropped.start
        return record

    def _redo_block(self, content: bytearray, record: WalRecord, block: BlockRef) -> None:
        step = self._redo.step(record, block)
        if step is Step.NOTHING:
            return
        if step is Step.UNKNOWN:
            raise _unknown(block.page, record.start)
        try:
            self._redo.apply(content, record, block)
        except CorruptWal as error:
            raise RedoFailed(error.message, **error.details) from error

    def _remember(self, place: tuple[bytes, int], content: bytes, end: Lsn) -> None:
        self._cache[place] = (content, end)
        if len(self._cache) > self._cached_pages:
            self._cache.popitem(last=False)


def _clear_as_noted(content: bytearray, path: Path, until: int) -> bool:
    """Apply entries, short of `until`, that can be without the log; whether there were any.

    Where their records end is not known then, but they do before the page's next one begins. So the
    last entry is not among them: only the log tells whether its record ends below the LSN wanted.
    """
    begin = path.next
    until = min(until, len(path.entries) - 1)
    for clears in path.clears:
        path.next = clears.apply(content, path.entries, path.next, until)
    if path.next == begin:
        return False
    path.end = start_of(path.entries[path.next])
    return True


def _unknown(page: PageKey, start: Lsn) -> NotMaterializable:
    return NotMaterializable(
        f"{page} depends on the record at {format_lsn(start)}, which storage cannot redo",
        lsn=start,
    )


def _block_of(record: WalRecord, page: PageKey) -> BlockRef:
    for block in record.blocks:
        if block.page == page:
            return block
    raise CorruptWal(
        f"the record at {format_lsn(record.start)} does not name {page}, as the index says",
        lsn=record.start,
    )
