"""From one WAL record that was taken apart to the index entries it amounts to."""

from __future__ import annotations

from boreal.pages import visibility
from boreal.types import Fork, PageKey, RelationFork
from boreal.wal import (
    DatabaseCopied,
    DatabaseCreated,
    Effect,
    RelationCreated,
    RelationDropped,
    RelationTruncated,
    VisibilityCleared,
    WalRecord,
    effects,
)
from storage_node.entries import Kind
from storage_node.layer import OpenLayer
from storage_node.redo import Redo, Step

_KINDS = {Step.BASE: Kind.BASE, Step.CHANGE: Kind.CHANGE, Step.UNKNOWN: Kind.UNKNOWN}
_KEPT_FORKS = (Fork.MAIN, Fork.VM, Fork.INIT)
"""Not the free space map: it has no WAL of its own, so it comes with the bundle."""


def index_record(layer: OpenLayer, record: WalRecord, redo: Redo) -> None:
    """Index one record under every page it touches and every fork it resizes.

    Raises IngestStopped or CorruptWal for a record that must not be passed; what it left in the
    layer by then lies past the layer's end.
    """
    for block in record.blocks:
        if block.page.relation.fork is Fork.FSM:
            continue
        kind = _KINDS.get(redo.step(record, block))
        if kind is not None:
            layer.touch(block.page, record.start, kind)
        layer.reach(block.page, record.end)
    for effect in effects(record):
        _add_effect(layer, record, effect)


def _add_effect(layer: OpenLayer, record: WalRecord, effect: Effect) -> None:
    match effect:
        case VisibilityCleared(page=page):
            layer.touch(page, record.start, Kind.MAP_CLEAR)
        case RelationCreated(relation=fork):
            if fork.fork is not Fork.FSM:
                layer.create(fork, record.end)
        case RelationTruncated():
            _truncate(layer, record, effect)
        case RelationDropped(tablespace=tablespace, database=database, relation=relation):
            for kept in _KEPT_FORKS:
                layer.drop(RelationFork(tablespace, database, relation, kept), record.end)
        case DatabaseCreated():
            pass  # its relations follow
        case DatabaseCopied():
            source = (effect.source_tablespace, effect.source_database)
            layer.copy_database(source, effect.tablespace, effect.database, record.end)
        case _:
            for tablespace in effect.tablespaces:
                layer.drop_database(tablespace, effect.database, record.end)


def _truncate(layer: OpenLayer, record: WalRecord, effect: RelationTruncated) -> None:
    """smgr_redo (storage.c): the main fork, and the map to what still covers it."""
    if Fork.MAIN in effect.forks:
        layer.cut(effect.relation, record.end, effect.blocks)
    if Fork.VM not in effect.forks:
        return
    map_fork = effect.relation._replace(fork=Fork.VM)
    if effect.blocks % visibility.HEAP_BLOCKS_PER_PAGE:
        page = PageKey(map_fork, visibility.map_block(effect.blocks))
        layer.touch(page, record.start, Kind.MAP_CUT)
    layer.cut(map_fork, record.end, visibility.truncated_blocks(effect.blocks))
