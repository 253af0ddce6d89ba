"""A page at an LSN: back to its newest base at or below it, then forward record by record."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable

from boreal.errors import CorruptWal, NotMaterializable
from boreal.pages import visibility
from boreal.types import PAGE_BYTES, Lsn, PageKey, format_lsn
from boreal.wal import BlockRef, WalRecord, read_record
from storage_node.index import Entry, Ground, IndexView, Kind
from storage_node.redo import Redo

CACHED_PAGES = 1024
"""8 MiB a volume."""

_CLEARED = struct.Struct(">IB")
_MAP_CUT = struct.Struct(">I")


def pack_cleared(cleared: list[tuple[int, int]]) -> bytes:
    """The payload of Kind.MAP_CLEAR: (heap block, bits) of each clear."""
    return b"".join(_CLEARED.pack(*one) for one in cleared)


def pack_map_cut(heap_blocks: int) -> bytes:
    """The payload of Kind.MAP_CUT."""
    return _MAP_CUT.pack(heap_blocks)


class Materializer:
    """Makes pages of one volume.

    Invariant of the cache: a page under (page, LSN) is its state after the last thing that happened
    to it at or below any LSN up to the next thing, so it never goes stale.
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
        self._cache: OrderedDict[tuple[PageKey, Lsn], bytes] = OrderedDict()
        self._cached_pages = cached_pages

    def page(self, view: IndexView, page: PageKey, lsn: Lsn) -> bytes | None:
        """The page as of `lsn`; None if its fork is absent or shorter then.

        Raises NotMaterializable where redo does not know a record on its path, CorruptData or
        CorruptWal where something it rests on is damaged. `lsn` must be within what is indexed.
        """
        size = view.size(page.relation, lsn)
        if size is None or page.block >= size:
            return None
        return self._version(view, page, lsn)

    def _version(self, view: IndexView, page: PageKey, lsn: Lsn) -> bytes:
        ground = view.ground(page, lsn)
        path: list[Entry] = []
        content: bytes | None = None
        for entry in view.history(page, ground.since, lsn):
            content = self._recall(page, entry.end)
            if content is not None:
                break
            if entry.kind is Kind.UNKNOWN:
                raise NotMaterializable(
                    f"{page} at {format_lsn(lsn)} depends on the record at "
                    f"{format_lsn(entry.start)}, which storage cannot redo",
                    lsn=entry.start,
                )
            path.append(entry)
            if entry.kind is Kind.BASE:
                content = bytes(PAGE_BYTES)
                break
        if content is None:
            content = self._beneath(view, page, ground)
        if not path:
            return content
        changed = bytearray(content)
        for entry in reversed(path):
            self._step(changed, page, entry)
        return self._remember(page, path[0].end, bytes(changed))

    def _beneath(self, view: IndexView, page: PageKey, ground: Ground) -> bytes:
        if ground.source is not None:
            copied = self.page(view, ground.source, Lsn(ground.since - 1))
        else:
            copied = self._imported_page(page) if ground.imported else None
        # No history at all: PostgreSQL does not log that it extends a fork by empty pages.
        return copied if copied is not None else bytes(PAGE_BYTES)

    def _step(self, content: bytearray, page: PageKey, entry: Entry) -> None:
        if entry.kind is Kind.MAP_CLEAR:
            for heap_block, bits in _CLEARED.iter_unpack(entry.payload):
                visibility.clear(content, heap_block, bits)
        elif entry.kind is Kind.MAP_CUT:
            visibility.truncate(content, _MAP_CUT.unpack(entry.payload)[0])
        else:
            record = read_record(self._read_log, entry.start, entry.end)
            self._redo.apply(content, record, _block_of(record, page))

    def _recall(self, page: PageKey, end: Lsn) -> bytes | None:
        content = self._cache.get((page, end))
        if content is not None:
            self._cache.move_to_end((page, end))
        return content

    def _remember(self, page: PageKey, end: Lsn, content: bytes) -> bytes:
        self._cache[page, end] = content
        if len(self._cache) > self._cached_pages:
            self._cache.popitem(last=False)
        return content


def _block_of(record: WalRecord, page: PageKey) -> BlockRef:
    for block in record.blocks:
        if block.page == page:
            return block
    raise CorruptWal(
        f"the record at {format_lsn(record.start)} does not name {page}, as the index says",
        lsn=record.start,
    )
