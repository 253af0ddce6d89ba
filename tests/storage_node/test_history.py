"""Goal: every page at every LSN from the floor on is right, whatever happened to it, and whenever
the process dies.

Method: random histories by seed (history.py) in a real log, indexed in pieces with tiny layers, a
floor that moves, retirement, and restarts; at each stop pages are compared with the model. A second
test kills the volume's writes at each place in turn, before and after they are durable.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boreal.types import Fork
from storage_node.index import PageIndex
from tests.storage_node.history import State, make_history
from tests.storage_node.history_kit import (
    append_history,
    differences,
    history_segment,
    history_store,
    open_history,
    run_or_die,
    settled,
)
from tests.storage_node.page_volume_kit import WAIT_S, Indexed, running

LOG_BYTES = 800 * 1024


def _check(parts: Indexed, states: list[State]) -> None:
    for state in states:
        if parts.index.lowest <= state.lsn <= parts.ingest.reached:
            assert differences(parts, state) == [], f"at {state.lsn:X}"


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 8))]
)
async def test_every_page_is_the_models(tmp_path: Path, seed: int) -> None:
    history = make_history(seed, LOG_BYTES, states=25)
    chance = history.random
    segment = history_segment(tmp_path, history)
    append_history(segment, history, history.import_lsn)
    history_store(segment, history).close()
    parts = open_history(segment)
    retirements = 0
    for state in history.states:
        append_history(segment, history, state.lsn)
        async with running(parts) as ingest:
            await ingest.wait_for(state.lsn, WAIT_S)
            if chance.random() < 0.5:
                below = [one.lsn for one in history.states if one.lsn <= state.lsn]
                segment.shared.floor = max(segment.shared.floor, chance.choice(below))
            if chance.random() < 0.5:
                await settled(parts)
        retirements += parts.index.retired > history.import_lsn
        _check(parts, chance.sample(history.states, 3))
        if chance.random() < 0.3:
            parts.index.close()
            parts.store.close()
            parts = open_history(segment)
    async with running(parts) as ingest:
        await ingest.wait_for(history.wal.end, WAIT_S)
        await settled(parts)
    _check(parts, history.states)
    assert retirements > 5
    assert segment.shared.retired == parts.index.retired > history.import_lsn
    assert parts.index.lowest > history.import_lsn
    assert any(fork.fork is Fork.VM for fork in history.sizes)
    parts.close()


class _Killed(BaseException):
    """The process is gone."""


def _die(index: PageIndex, number: int, *, durable: bool) -> None:
    """Let write `number` be the last, whether it gets to the disk or not."""
    write = index._write
    count = 0

    async def dying(work: Callable[[], Any]) -> Any:
        nonlocal count
        count += 1
        if count >= number:
            if durable and count == number:
                await write(work)
            raise _Killed
        return await write(work)

    index._write = dying  # type: ignore[method-assign]


@pytest.mark.parametrize("durable", [False, True])
async def test_killed_at_any_write_it_continues(tmp_path: Path, durable: bool) -> None:
    """Each run is killed one write later than the one before, until one runs to its end."""
    history = make_history(99, 700 * 1024, states=12)
    segment = history_segment(tmp_path, history)
    append_history(segment, history, history.wal.end)
    history_store(segment, history).close()
    segment.shared.floor = history.states[-3].lsn
    kills = 0
    killed = True
    while killed:
        parts = open_history(segment)
        _die(parts.index, 1 + kills, durable=durable)
        killed = await run_or_die(parts, _ended(parts))
        _check(parts, history.states)
        kills += killed
        parts.index.close()
        parts.store.close()
    parts = open_history(segment)
    assert parts.index.lowest > history.import_lsn
    async with running(parts) as ingest:
        await ingest.wait_for(history.wal.end, WAIT_S)
    _check(parts, history.states)
    assert kills > 5
    parts.close()


async def _ended(parts: Indexed) -> None:
    await parts.ingest.wait_for(parts.segment.state.scl, WAIT_S)
    await settled(parts)
