"""Every relation page of a cluster as redo has it, and what records do beyond their blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from boreal.pages import visibility
from boreal.types import PAGE_BYTES, BlockNumber, Fork, PageKey, RelationFork
from boreal.wal import (
    DatabaseCopied,
    DatabaseDropped,
    Effect,
    RelationCreated,
    RelationDropped,
    RelationTruncated,
    VisibilityCleared,
)
from tests.storage_node.redo.relation_files import RelationFiles


class ReplayedPages:
    """Begins as a stopped cluster's files; only what was changed is kept apart."""

    def __init__(self, files: RelationFiles) -> None:
        self._base: dict[RelationFork, bytes] = {}
        self._changed: defaultdict[RelationFork, dict[int, bytearray]] = defaultdict(dict)
        self.sizes: dict[RelationFork, int] = {}
        """The blocks each fork is known to have."""
        for fork in files.forks:
            if fork.fork is not Fork.FSM:
                self._base[fork] = b"".join(content for _, content in files.pages(fork))
                self.sizes[fork] = files.blocks(fork)

    def get(self, page: PageKey) -> bytes | bytearray | None:
        """The page; None if nothing is known of it, so that it is all zeros."""
        found = self._changed.get(page.relation, {}).get(page.block)
        if found is not None:
            return found
        base = self._base.get(page.relation, b"")
        return base[page.block * PAGE_BYTES : (page.block + 1) * PAGE_BYTES] or None

    def put(self, page: PageKey, content: bytearray) -> None:
        """Replace the page; the fork grows as far as needed."""
        self._changed[page.relation][page.block] = content
        self.sizes[page.relation] = max(self.sizes.get(page.relation, 0), page.block + 1)

    def changed(self, fork: RelationFork) -> set[int]:
        """The blocks of a fork that records have changed."""
        return set(self._changed.get(fork, ()))

    def _create(self, fork: RelationFork) -> None:
        """The fork exists, empty if it did not yet."""
        self.sizes.setdefault(fork, 0)

    def _cut(self, fork: RelationFork, blocks: int) -> None:
        """The fork ends there."""
        if fork not in self.sizes:
            return
        self.sizes[fork] = min(self.sizes[fork], blocks)
        self._base[fork] = self._base.get(fork, b"")[: blocks * PAGE_BYTES]
        for block in [block for block in self._changed[fork] if block >= blocks]:
            del self._changed[fork][block]

    def _drop(self, gone: set[RelationFork]) -> None:
        """These forks are no more."""
        for fork in gone:
            self._base.pop(fork, None)
            self._changed.pop(fork, None)
            self.sizes.pop(fork, None)

    def _copy(self, source: RelationFork, target: RelationFork) -> None:
        """`target` begins as what `source` is now."""
        self._base[target] = self._base.get(source, b"")
        changed = self._changed.get(source, {})
        self._changed[target] = {block: bytearray(page) for block, page in changed.items()}
        self.sizes[target] = self.sizes[source]

    def take(self, effect: Effect) -> None:
        """Do what a record does besides changing its blocks."""
        match effect:
            case VisibilityCleared(page=page, heap_block=block, bits=bits):
                self._change_map(page, lambda content: visibility.clear(content, block, bits))
            case RelationTruncated(relation=fork, blocks=blocks, forks=forks):
                if Fork.MAIN in forks:
                    self._cut(fork, blocks)
                if Fork.VM in forks:
                    self._cut_map(fork._replace(fork=Fork.VM), blocks)
            case RelationCreated(relation=fork):
                self._create(fork)
            case _:
                self._take_of_many(effect)

    def _take_of_many(self, effect: Effect) -> None:
        """An effect on all forks of a relation, or all relations of a database."""
        match effect:
            case RelationDropped():
                gone = (effect.tablespace, effect.database, effect.relation)
                self._drop({fork for fork in self.sizes if fork[:3] == gone})
            case DatabaseDropped(database=database, tablespaces=tablespaces):
                places = {(tablespace, database) for tablespace in tablespaces}
                self._drop({fork for fork in self.sizes if fork[:2] in places})
            case DatabaseCopied():
                source = (effect.source_tablespace, effect.source_database)
                for fork in [fork for fork in self.sizes if fork[:2] == source]:
                    target = (effect.tablespace, effect.database, fork.relation, fork.fork)
                    self._copy(fork, RelationFork(*target))
            case _:
                pass  # what CREATE DATABASE (WAL_LOG) makes comes relation by relation

    def _change_map(self, page: PageKey, change: Callable[[bytearray], None]) -> None:
        content = self.get(page)
        if content is not None:
            changed = bytearray(content)
            change(changed)
            self.put(page, changed)

    def _cut_map(self, fork: RelationFork, heap_blocks: int) -> None:
        kept = visibility.truncated_blocks(heap_blocks)
        self._cut(fork, kept)
        if kept:
            last = PageKey(fork, BlockNumber(kept - 1))
            self._change_map(last, lambda content: visibility.truncate(content, heap_blocks))
