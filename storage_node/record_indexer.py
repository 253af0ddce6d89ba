"""From one WAL record to the index entries it amounts to."""

from __future__ import annotations

from collections.abc import Iterable

from boreal.pages import visibility
from boreal.types import Fork, Lsn, PageKey, RelationFork
from boreal.wal import WalRecord
from boreal.wal.effects import (
    DatabaseCopied,
    DatabaseCreated,
    DatabaseDropped,
    Effect,
    RelationCreated,
    RelationDropped,
    RelationTruncated,
    VisibilityCleared,
    effects,
)
from storage_node.index import IndexBatch, Kind
from storage_node.materialize import pack_cleared, pack_map_cut
from storage_node.redo import Redo, Step

REMEMBERED_SIZES = 50_000

_KINDS = {Step.BASE: Kind.BASE, Step.CHANGE: Kind.CHANGE, Step.UNKNOWN: Kind.UNKNOWN}
_KEPT_FORKS = (Fork.MAIN, Fork.VM, Fork.INIT)
"""Not the free space map: it has no WAL of its own, so it comes with the bundle."""


class RecordIndexer:
    """Turns records, in LSN order, into entries.

    Remembers the present sizes of forks it met. `forget` them when a batch they were learned in
    was not committed.
    """

    def __init__(self, redo: Redo) -> None:
        self._redo = redo
        self._sizes: dict[RelationFork, int | None] = {}

    def forget(self) -> None:
        """Look sizes up again."""
        self._sizes.clear()

    def add(self, batch: IndexBatch, record: WalRecord) -> None:
        """Index one record under every page it touches and every fork it resizes.

        Raises IngestStopped or CorruptWal for a record that must not be passed.
        """
        for block in record.blocks:
            fork, number = block.page
            if fork.fork is Fork.FSM:
                continue
            kind = _KINDS.get(self._redo.step(record, block))
            if kind is not None:
                batch.touch(block.page, record.start, record.end, kind)
            size = self._size(batch, fork, record.end)
            if size is None or number >= size:
                self._resize(batch, fork, record.end, number + 1)
        happened = effects(record)
        if happened:
            self._add_effects(batch, record, happened)

    def _add_effects(
        self, batch: IndexBatch, record: WalRecord, happened: Iterable[Effect]
    ) -> None:
        cleared: dict[PageKey, list[tuple[int, int]]] = {}
        for effect in happened:
            match effect:
                case VisibilityCleared(page=page, heap_block=heap_block, bits=bits):
                    cleared.setdefault(page, []).append((heap_block, bits))
                case RelationCreated(relation=fork):
                    if fork.fork is not Fork.FSM and self._size(batch, fork, record.end) is None:
                        self._resize(batch, fork, record.end, 0)
                case RelationTruncated():
                    self._truncate(batch, record, effect)
                case RelationDropped():
                    self._drop(batch, effect, record.end)
                case DatabaseCreated():
                    pass  # its relations follow
                case _:
                    _change_databases(batch, effect, record.end)
                    self.forget()
        for page, bits_of in cleared.items():
            payload = pack_cleared(bits_of)
            batch.touch(page, record.start, record.end, Kind.MAP_CLEAR, payload)

    def _truncate(self, batch: IndexBatch, record: WalRecord, effect: RelationTruncated) -> None:
        """smgr_redo (storage.c): the main fork, and the map to what still covers it."""
        if Fork.MAIN in effect.forks:
            self._cut(batch, effect.relation, record.end, effect.blocks)
        if Fork.VM not in effect.forks:
            return
        map_fork = effect.relation._replace(fork=Fork.VM)
        if effect.blocks % visibility.HEAP_BLOCKS_PER_PAGE:
            page = PageKey(map_fork, visibility.map_block(effect.blocks))
            payload = pack_map_cut(effect.blocks)
            batch.touch(page, record.start, record.end, Kind.MAP_CUT, payload)
        self._cut(batch, map_fork, record.end, visibility.truncated_blocks(effect.blocks))

    def _cut(self, batch: IndexBatch, fork: RelationFork, lsn: Lsn, blocks: int) -> None:
        size = self._size(batch, fork, lsn)
        if size is not None and size > blocks:
            batch.cut(fork, lsn, blocks)
            self._resize(batch, fork, lsn, blocks)

    def _drop(self, batch: IndexBatch, effect: RelationDropped, lsn: Lsn) -> None:
        for kept in _KEPT_FORKS:
            fork = RelationFork(effect.tablespace, effect.database, effect.relation, kept)
            if self._size(batch, fork, lsn) is not None:
                batch.cut(fork, lsn, 0)
                self._resize(batch, fork, lsn, None)

    def _size(self, batch: IndexBatch, fork: RelationFork, lsn: Lsn) -> int | None:
        if fork not in self._sizes:
            if len(self._sizes) >= REMEMBERED_SIZES:
                self._sizes.clear()
            self._sizes[fork] = batch.size(fork, lsn)
        return self._sizes[fork]

    def _resize(self, batch: IndexBatch, fork: RelationFork, lsn: Lsn, blocks: int | None) -> None:
        batch.resize(fork, lsn, blocks)
        self._sizes[fork] = blocks


def _change_databases(
    batch: IndexBatch, effect: DatabaseCopied | DatabaseDropped, lsn: Lsn
) -> None:
    if isinstance(effect, DatabaseCopied):
        source = (effect.source_tablespace, effect.source_database)
        batch.copy_database(source, effect.tablespace, effect.database, lsn)
        return
    for tablespace in effect.tablespaces:
        batch.drop_database(tablespace, effect.database, lsn)
