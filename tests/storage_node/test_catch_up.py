"""Whom a segment that fell behind asks, and for what; then two and three real nodes that do it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from boreal.errors import StaleEpoch
from boreal.quorum import Lineage, SegmentState
from boreal.types import WAL_SEGMENT_BYTES, Epoch, Lsn, NodeName
from storage_node.catch_up import MAX_PULL_BYTES, PeerPosition, Pull, Stranded, TakeLineage, decide
from tests.storage_node.node_process import LogClient, NodeProcess, fake_control, log_client

START = Lsn(WAL_SEGMENT_BYTES)
ONE = Lineage.of([(1, START)])
TWO = Lineage.of([(1, START), (2, START + 50)])
THREE = Lineage.of([(1, START), (2, START + 50), (3, START + 80)])
A, B = NodeName("sn-1"), NodeName("sn-2")


def own(lineage: Lineage, scl: int, promised: int | None = None) -> SegmentState:
    return SegmentState(
        promised=Epoch(promised or lineage.last.epoch),
        lineage=lineage,
        start=START,
        scl=Lsn(START + scl),
        vdl=START,
    )


def peer(
    lineage: Lineage, scl: int, promised: int | None = None, *, start: int = 0
) -> PeerPosition:
    state = own(lineage, scl, promised)
    return PeerPosition(
        promised=state.promised,
        lineage=lineage,
        start=Lsn(START + start),
        scl=state.scl,
        vdl=START,
    )


def pull(name: NodeName, start: int, end: int) -> Pull:
    return Pull(peer=name, start=Lsn(START + start), end=Lsn(START + end))


def test_the_peer_that_has_most_of_the_same_lineage() -> None:
    peers = {A: peer(TWO, 70), B: peer(TWO, 90)}
    assert decide(own(TWO, 60), peers) == pull(B, 60, 90)
    assert decide(own(TWO, 60), peers, avoid={B}) == pull(A, 60, 70)
    assert decide(own(TWO, 80), peers, avoid={B}) == pull(B, 80, 90)
    assert decide(own(TWO, 90), peers) is None
    assert decide(own(TWO, 0), {}) is None


def test_a_pull_is_bounded() -> None:
    assert decide(own(ONE, 0), {A: peer(ONE, MAX_PULL_BYTES + 5)}) == pull(A, 0, MAX_PULL_BYTES)


def test_only_from_those_whose_log_reaches_down_far_enough() -> None:
    peers = {A: peer(TWO, 70, start=60), B: peer(TWO, 90, start=61)}
    assert decide(own(TWO, 60), peers) == pull(A, 60, 70)
    assert decide(own(TWO, 61), peers) == pull(B, 61, 90)
    assert decide(own(TWO, 60), peers, avoid={A}) == pull(A, 60, 70)
    assert decide(own(TWO, 59), peers) == Stranded(start=Lsn(START + 60))
    assert decide(own(TWO, 59), {A: peer(ONE, 90), B: peer(TWO, 59)}) is None


def test_never_from_or_into_a_fenced_segment() -> None:
    assert decide(own(TWO, 60), {A: peer(TWO, 90, promised=3)}) is None
    assert decide(own(TWO, 60, promised=3), {A: peer(TWO, 90)}) is None


def test_never_from_another_lineage() -> None:
    other = Lineage.of([(1, START), (2, START + 40)])
    assert decide(own(TWO, 60), {A: peer(other, 90), B: peer(ONE, 90)}) is None


def test_the_newest_lineage_is_taken_first() -> None:
    peers = {A: peer(TWO, 90), B: peer(THREE, 81)}
    assert decide(own(ONE, 60), peers) == TakeLineage(peer=B, lineage=THREE)
    assert decide(own(TWO, 60), peers) == TakeLineage(peer=B, lineage=THREE)


def test_a_promise_is_kept_against_older_lineages() -> None:
    assert decide(own(ONE, 60, promised=3), {A: peer(TWO, 90)}) is None
    assert decide(own(ONE, 60, promised=3), {A: peer(THREE, 90)}) == TakeLineage(
        peer=A, lineage=THREE
    )


@pytest_asyncio.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[list[NodeProcess]]:
    async with fake_control() as (_, address):
        nodes = [NodeProcess(f"sn-{n}", tmp_path, address) for n in (1, 2)]
        try:
            await asyncio.gather(*(asyncio.to_thread(node.start) for node in nodes))
            yield nodes
        finally:
            for node in nodes:
                node.stop()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(15):
        while not await condition():
            await asyncio.sleep(0.05)


async def test_a_node_that_was_away_fetches_log_and_history(nodes: list[NodeProcess]) -> None:
    ahead, behind = nodes
    end = Lsn(START + WAL_SEGMENT_BYTES + 700_000)
    async with log_client(ahead.address) as one, log_client(behind.address) as two:
        for client in (one, two):
            await client.create(1, START)
            await client.append(1, START, bytes(1000))
        await asyncio.to_thread(behind.stop)
        at = Lsn(START + 1000)
        while at < end:
            at = await one.append(1, at, bytes(min(1 << 20, end - at)), vdl=at)
        await asyncio.to_thread(behind.start)

        async def level() -> bool:
            return (await two.position(9)).scl == (await one.position(9)).scl

        await until(level)
        assert await two.log(1, START, 0) == bytes(end - START)

        # An epoch this node hears of from nobody but its peer, which cuts what both hold.
        cut = Lsn(START + 500_000)
        third = Lineage.of([(1, START), (3, cut)])
        await one.fence(3)
        await one.adopt(3, third)
        await one.append(3, cut, b"\0" * 77)
        await until(level)
        position = await two.position(3)
        assert (position.promised_epoch, position.scl) == (3, cut + 77)
        with pytest.raises(StaleEpoch):
            await two.append(1, position.scl, b"x")


async def test_after_adopt_a_node_is_filled_from_its_peer(nodes: list[NodeProcess]) -> None:
    async with log_client(nodes[0].address) as one, log_client(nodes[1].address) as two:
        clients: list[LogClient] = [one, two]
        for client in clients:
            await client.create(1, START)
        await one.append(1, START, bytes(900_000))
        lineage = Lineage.of([(1, START), (2, START + 900_000)])
        for client in clients:
            await client.fence(2)
        for client in clients:
            await client.adopt(2, lineage)

        async def filled() -> bool:
            return (await two.position(2)).scl == START + 900_000

        await until(filled)
        assert await two.append(2, START + 900_000, bytes(5)) == START + 900_005
