"""The open layer: what the log since the last sealed layer did, in memory.

It can be made again from the log at any time, so it is kept nowhere else until it is sealed
(storage_node.layer_file).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from boreal.pages import visibility
from boreal.types import Fork, Lsn, PageKey, RelationFork
from storage_node.entries import (
    Kind,
    fork_of_part,
    fork_part,
    part_of_fork,
    raw_key,
    raw_key_of,
)
from storage_node.facts import Facts
from storage_node.map_clears import MapClears

LAYER_LOG_BYTES: Final = 16 * 1024 * 1024
LAYER_PAGES: Final = 65_536
"""A layer is full at so much log (or less: see PageIndex) or so many pages.

In memory a page takes about 250 bytes and an entry 40, a map clear included, and a record is hardly
ever smaller than 50 bytes: 32 MiB at most. Of one volume two layers are in memory at a time, an
open and a frozen one.
"""
_MAP_FORK: Final = bytes((Fork.VM,))
_MAP_CLEAR: Final = int(Kind.MAP_CLEAR)

SizeOf = Callable[[RelationFork, int], int | None]
"""The size of a fork as of an LSN, from everything that is indexed."""


class _OpenFork:
    """A fork this layer has met: its size now (-1: absent), the blocks it has entries for."""

    __slots__ = ("blocks", "fork", "size")

    def __init__(self, fork: RelationFork, size: int) -> None:
        self.fork = fork
        self.size = size
        self.blocks: list[int] = []


class OpenLayer:
    """Implements `boreal.wal.touches.Touches`. Only grows; one task writes it.

    Invariant: `end` is a record's end; every record in [begin, end) is in here, once. While records
    are being noted there are some past `end`; `cut_back` takes them out if that is interrupted.

    A block that is in `pages` lies within its fork's present size: only a page that is new here
    needs its fork's size looked at. So when a fork is cut, the pages cut off move to `aside`.
    """

    def __init__(self, begin: Lsn, size_of: SizeOf, *, log_bytes: int, hot_at: int) -> None:
        """It is full at `log_bytes`. `hot_at`, a power of two: tell of a page every so many
        entries."""
        self._log_bytes = log_bytes
        self.begin = begin
        self.end = begin
        self.pages: dict[bytes, list[int]] = {}
        self.hot: list[bytes] = []
        self.hot_mask = hot_at - 1
        self.facts = Facts()
        self._clears: dict[bytes, MapClears] = {}
        self._aside: dict[bytes, list[int]] = {}
        self._forks: dict[bytes, _OpenFork] = {}
        self._size_of = size_of

    @property
    def full(self) -> bool:
        """Whether it should be sealed."""
        pages = len(self.pages) + len(self._aside)
        return pages >= LAYER_PAGES or self.end - self.begin >= self._log_bytes

    @property
    def half_full(self) -> bool:
        """Whether it will soon be full."""
        pages = len(self.pages) + len(self._aside)
        return pages >= LAYER_PAGES // 2 or self.end - self.begin >= self._log_bytes // 2

    def entries(self, raw: bytes) -> list[int]:
        """The page's entries, ascending. Not to be changed."""
        entries = self.pages.get(raw, [])
        aside = self._aside.get(raw) if self._aside else None
        return entries if aside is None else aside + entries

    def clears(self, raw: bytes) -> MapClears | None:
        """What spares a look at the log for some entries of a map page."""
        return self._clears.get(raw)

    # --- plain records (boreal.wal.touches) ----------------------------------------------------

    def first(self, key: bytes, end: int) -> None:
        """See `Touches.first`."""
        fork = self._forks.get(key[:12]) or self._meet(key[:12], end)
        block = int.from_bytes(key[12:], "little")
        fork.blocks.append(block)
        if block >= fork.size:
            self._resize(fork, end, block + 1)

    def cleared(self, key: bytes, start: int, bits: int) -> None:
        """See `Touches.cleared`."""
        heap_block = int.from_bytes(key[12:], "little")
        number = heap_block // visibility.HEAP_BLOCKS_PER_PAGE
        raw = key[:12] + number.to_bytes(4, "little") + _MAP_FORK
        clears = self._clears.get(raw)
        if clears is None:
            clears = self._clears[raw] = MapClears()
        clears.note(start, heap_block, bits)
        entries = self.pages.get(raw)
        if entries is None:
            self._note(raw, start | Kind.MAP_CLEAR)
            return
        entry = start | _MAP_CLEAR
        if entries[-1] != entry:  # an update may clear bits of two blocks
            entries.append(entry)
            if not len(entries) & self.hot_mask:
                self.hot.append(raw)

    # --- records that were taken apart ---------------------------------------------------------

    def touch(self, page: PageKey, start: int, kind: Kind) -> None:
        """The record at `start` does something to `page`."""
        self._note(raw_key(page), start | kind)

    def reach(self, page: PageKey, lsn: int) -> None:
        """From `lsn` on the page's fork reaches at least to the page."""
        fork = self._fork(page.relation, lsn)
        if page.block >= fork.size:
            self._resize(fork, lsn, page.block + 1)

    def create(self, fork: RelationFork, lsn: int) -> None:
        """From `lsn` on the fork exists."""
        known = self._fork(fork, lsn)
        if known.size < 0:
            self._resize(known, lsn, 0)

    def cut(self, fork: RelationFork, lsn: int, blocks: int) -> None:
        """The fork is cut to `blocks` blocks if it is longer."""
        known = self._fork(fork, lsn)
        if known.size > blocks:
            self.facts.cut(fork, lsn, blocks)
            self._set_aside(known, blocks)
            self._resize(known, lsn, blocks)

    def drop(self, fork: RelationFork, lsn: int) -> None:
        """The fork is gone, if it was there."""
        known = self._fork(fork, lsn)
        if known.size >= 0:
            self.facts.cut(fork, lsn, 0)
            self._set_aside(known, 0)
            self.facts.resize(fork, lsn, None)
            known.size = -1

    def drop_database(self, tablespace: int, database: int, lsn: int) -> None:
        """All the database has in the tablespace is gone."""
        self.facts.drop_database(tablespace, database, lsn)
        self._forget_sizes(tablespace, database)

    def copy_database(
        self, source: tuple[int, int], tablespace: int, database: int, lsn: int
    ) -> None:
        """The database has in the tablespace what `source` has."""
        self.facts.copy_database(source, tablespace, database, lsn)
        self._forget_sizes(tablespace, database)

    def cut_back(self) -> None:
        """Take out what was noted of records past `end`. They may be noted again then."""
        for raw, entries in self.pages.items():
            self._aside.setdefault(raw, []).extend(entries)
        self.pages.clear()
        self._clears.clear()
        self._forks.clear()
        for raw, entries in list(self._aside.items()):
            while entries and entries[-1] >= self.end:
                entries.pop()
            if not entries:
                del self._aside[raw]
        self.facts.cut_back(self.end)

    # --- sealing -------------------------------------------------------------------------------

    def forks(self) -> list[tuple[bytes, list[int]]]:
        """Every fork with entries, as `fork_part`, and its blocks, each once. Unordered."""
        if not self._aside:
            return [(part, fork.blocks) for part, fork in self._forks.items() if fork.blocks]
        blocks = {part: set(fork.blocks) for part, fork in self._forks.items()}
        for raw in self._aside:
            number = int.from_bytes(raw[12:16], "little")
            blocks.setdefault(fork_part(raw), set()).add(number)
        return [(part, list(numbers)) for part, numbers in blocks.items() if numbers]

    # -------------------------------------------------------------------------------------------

    def _note(self, raw: bytes, entry: int) -> None:
        entries = self.pages.get(raw)
        if entries is None:
            self.pages[raw] = [entry]
            part = fork_part(raw)
            fork = self._forks.get(part) or self._meet(part, entry)
            fork.blocks.append(int.from_bytes(raw[12:16], "little"))
            return
        if entries[-1] == entry:
            return  # the same record in another way
        entries.append(entry)
        if not len(entries) & self.hot_mask:
            self.hot.append(raw)

    def _fork(self, fork: RelationFork, lsn: int) -> _OpenFork:
        part = part_of_fork(fork)
        return self._forks.get(part) or self._meet(part, lsn)

    def _meet(self, part: bytes, lsn: int) -> _OpenFork:
        fork = fork_of_part(part)
        size = self._size_of(fork, lsn)
        known = self._forks[part] = _OpenFork(fork, -1 if size is None else size)
        return known

    def _resize(self, fork: _OpenFork, lsn: int, blocks: int) -> None:
        self.facts.resize(fork.fork, lsn, blocks)
        fork.size = blocks

    def _set_aside(self, fork: _OpenFork, blocks: int) -> None:
        """Take the pages at or past `blocks` out of `pages`."""
        part = part_of_fork(fork.fork)
        kept = []
        for number in fork.blocks:
            if number < blocks:
                kept.append(number)
                continue
            raw = raw_key_of(part, number)
            self._aside.setdefault(raw, []).extend(self.pages.pop(raw))
        fork.blocks = kept

    def _forget_sizes(self, tablespace: int, database: int) -> None:
        for part, fork in list(self._forks.items()):
            if (fork.fork.tablespace, fork.fork.database) == (tablespace, database):
                self._set_aside(fork, 0)
                del self._forks[part]
