"""Volumes made of random histories (history.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from pathlib import Path

from boreal.errors import NotMaterializable
from boreal.types import BlockNumber, Lsn, PageKey, RelationFork
from storage_node.index import IndexView
from storage_node.page_store import PageStore
from storage_node.redo import Redo
from storage_node.segment import Segment, VolumeFacts
from storage_node.settle import QUIET_S
from tests.storage_node.history import History, HistoryRedo, State
from tests.storage_node.page_volume_kit import EPOCH, VOLUME, WAIT_S, Indexed, storage_config

RETAIN_BYTES = 256 * 1024
"""Layers are 64 KiB of log then."""
CHAIN_RECORDS = 16
_RUN_BLOCKS = 6


def history_segment(directory: Path, history: History) -> Segment:
    """An empty segment."""
    config = storage_config(directory)
    facts = VolumeFacts(system_identifier=4711, start=history.start)
    return Segment.create(config.volume(VOLUME), EPOCH, facts)


def history_store(segment: Segment, history: History) -> PageStore:
    """The history's first pages."""
    segment.layout.pages.mkdir(exist_ok=True)
    store = PageStore(segment.layout.pages)
    store.begin()
    for fork, content in history.imported.items():
        store.add(fork, 0, content)
    store.seal(history.import_lsn)
    return store


def open_history(
    segment: Segment,
    redo: Redo | None = None,
    *,
    retain_bytes: int = RETAIN_BYTES,
    quiet_s: float = QUIET_S,
) -> Indexed:
    """The volume's parts; what is on disk decides what they begin with."""
    return Indexed(
        segment,
        PageStore(segment.layout.pages),
        redo=redo or HistoryRedo(),
        retain_bytes=retain_bytes,
        chain_records=CHAIN_RECORDS,
        quiet_s=quiet_s,
    )


def append_history(segment: Segment, history: History, end: Lsn) -> None:
    """Append the log up to `end`; all of it is durable."""
    at = segment.state.scl
    data = bytes(history.wal.data[at - history.start : end - history.start])
    for piece in range(0, len(data), 1 << 20):
        segment.stage(EPOCH, at + piece, data[piece : piece + (1 << 20)], end)
    segment.flush()


def differences(parts: Indexed, state: State) -> list[str]:
    """Everything that differs from the model."""
    found = []
    with parts.index.view() as view:
        relations = view.relations(state.lsn)
        if relations != state.sizes:
            found.append(f"sizes {set(relations.items()) ^ set(state.sizes.items())}")
        for fork, blocks in state.sizes.items():
            assert view.size(fork, state.lsn) == blocks
            found += _run_differences(parts, view, state, fork)
            for block in range(blocks + 1):
                page = PageKey(fork, block)  # type: ignore[arg-type]
                expected = state.page(page)
                try:
                    content = parts.materializer.page(view, page, state.lsn)
                except NotMaterializable:
                    if expected is not None:
                        found.append(f"{page} is refused")
                    continue
                if block == blocks:
                    assert content is None
                elif content != expected:
                    found.append(f"{page} is wrong")
    return found


def _run_differences(
    parts: Indexed, view: IndexView, state: State, fork: RelationFork
) -> Iterator[str]:
    """Of pages read several at once."""
    for first in range(0, state.sizes[fork] + 1, _RUN_BLOCKS):
        blocks = range(first, first + _RUN_BLOCKS)
        try:
            pages = parts.materializer.pages(view, fork, blocks, state.lsn)
        except NotMaterializable:
            continue
        for block, content in zip(blocks, pages, strict=True):
            page = PageKey(fork, BlockNumber(block))
            expected = state.page(page) if block < state.sizes[fork] else None
            if content != expected:
                yield f"{page} is wrong in {blocks}"


async def settled(parts: Indexed) -> None:
    """Wait until there is nothing to do in the background."""
    async with asyncio.timeout(WAIT_S):
        while True:
            retained = parts.segment.shared.floor - parts.index.retired
            floor = parts.segment.shared.floor
            below = any(layer.end <= floor for layer in parts.index.layers)
            to_retire = retained > RETAIN_BYTES and below and not parts.compaction.held
            if parts.compaction.idle and not to_retire:
                return
            parts.compaction.wake()
            await asyncio.sleep(0.005)


def history_volume(
    directory: Path,
    history: History,
    redo: Redo | None = None,
    *,
    end: Lsn | None = None,
    quiet_s: float = QUIET_S,
) -> Indexed:
    """A volume with the history's log, or with that up to `end`; nothing of it is indexed."""
    segment = history_segment(directory, history)
    append_history(segment, history, history.wal.end if end is None else end)
    history_store(segment, history).close()
    return open_history(segment, redo, quiet_s=quiet_s)


async def run_or_die(parts: Indexed, finished: Awaitable[None]) -> bool:
    """Let everything run until it has `finished`, or a write was the last; whether one was."""
    ingest = asyncio.create_task(parts.ingest.run())
    compaction = asyncio.create_task(parts.compaction.run())
    end = asyncio.ensure_future(finished)
    await asyncio.wait([compaction, end], timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
    died = compaction.done()
    assert died or end.done()
    for task in (ingest, compaction, end):
        task.cancel()
    await asyncio.wait([ingest, compaction, end])
    return died
