"""The fleet: any one node serves a read, a quorum holds what must last.

Goal: a read succeeds while one node can serve it, whatever the others do, and fails with each
node's reason otherwise; a quorum call succeeds exactly with enough nodes, without waiting for a
hung one; a newer epoch is never retried away. Method: real servers with small state, told to
fail or hang; the choice of a node, being pure, by its values.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from boreal.errors import (
    BorealError,
    CorruptData,
    IngestStopped,
    Internal,
    MalformedRequest,
    NoBundle,
    NotIndexedYet,
    NotMaterializable,
    OversizeRequest,
    QuorumUnavailable,
    StaleEpoch,
    UnknownVolume,
    Unreachable,
)
from boreal.quorum import Lineage
from boreal.types import (
    PAGE_BYTES,
    BlockNumber,
    Epoch,
    Fork,
    Lsn,
    NodeName,
    RelationFork,
    Timeline,
    VolumeId,
)
from compute_node.fleet import DEFAULT_LIMITS, MAX_READ_LOG_BYTES, Fleet
from compute_node.read_path import AVOID_S, PROBE_EVERY, NodeHealth, Patience, order_nodes
from compute_node.storage_client import BundleFile, BundleManifest, Deadlines, PageRun
from tests.compute_node.fleet_node import LOG_START, SYSTEM_IDENTIFIER, FleetNode, running

HEAP = RelationFork(1663, 5, 16384, Fork.MAIN)
LSN = Lsn(LOG_START + 100)
LIMITS = replace(
    DEFAULT_LIMITS,
    pages=Patience(attempt_s=0.3, total_s=2.0),
    windows=Patience(attempt_s=0.3, total_s=2.0),
    bulk=Patience(attempt_s=0.5, total_s=2.0),
    changes=Deadlines(call_s=1.0),
)


def page_of(number: int) -> bytes:
    return bytes([number]) * PAGE_BYTES


@asynccontextmanager
async def six(epoch: int = 1) -> AsyncIterator[tuple[Fleet, list[FleetNode]]]:
    """A fleet of six nodes that hold five pages of HEAP."""
    nodes = [FleetNode(f"sn-{number}") for number in range(1, 7)]
    for node in nodes:
        node.pages[HEAP] = [page_of(number) for number in range(1, 6)]
    fleet = Fleet(VolumeId("v"), Epoch(epoch), limits=LIMITS)
    try:
        async with running(*nodes) as members:
            await fleet.set_members(members)
            yield fleet, nodes
    finally:
        await fleet.close()


async def page_at(fleet: Fleet, block: int) -> bytes | None:
    (page,) = await fleet.get_pages(HEAP, BlockNumber(block), 1, LSN)
    return page


def calls(nodes: list[FleetNode], call: str) -> list[int]:
    return [node.calls.count(call) for node in nodes]


# --- reads --------------------------------------------------------------------------------------


async def test_one_node_is_asked_for_a_page() -> None:
    async with six() as (fleet, nodes):
        page = await page_at(fleet, 2)
        beyond = await page_at(fleet, 5)
        assert (page, beyond) == (page_of(3), None)
        assert sum(calls(nodes, "GetPages")) == 2


async def test_pages_come_in_order_with_gaps_told() -> None:
    async with six() as (fleet, _nodes):
        pages = await fleet.get_pages(HEAP, BlockNumber(1), 6, LSN)
        assert pages == [page_of(2), page_of(3), page_of(4), page_of(5), None, None]


async def test_the_other_reads_come_from_any_node() -> None:
    async with six() as (fleet, nodes):
        for node in nodes[:5]:
            node.failure = UnknownVolume("not here")
        nodes[5].log = bytes(range(250)) * 100
        nodes[5].contents[hashlib.sha256(b"x").digest()] = b"x"
        assert await fleet.list_relations(LSN) == {HEAP: 5}
        assert (
            await fleet.read_log(Lsn(LOG_START + 3), Lsn(LOG_START + 20003))
            == (nodes[5].log[3:20003])
        )
        assert await fleet.get_content(hashlib.sha256(b"x").digest()) == b"x"


@pytest.mark.parametrize(
    "failure",
    [
        UnknownVolume("restored without it"),
        NotIndexedYet("behind", indexed_lsn=5),
        CorruptData("checksum"),
        IngestStopped("stopped", lsn=5),
        Internal("a bug"),
    ],
    ids=lambda failure: failure.code,
)
async def test_the_next_node_is_asked_when_one_cannot_serve(failure: BorealError) -> None:
    async with six() as (fleet, nodes):
        for node in nodes[:5]:
            node.failure = failure
        for _ in range(20):
            assert await page_at(fleet, 0) == page_of(1)
        # Found once, the good node is asked first; the others are left alone for a while.
        assert calls(nodes, "GetPages") == [1, 1, 1, 1, 1, 20]


async def test_hung_and_dead_nodes_are_passed_over() -> None:
    async with six() as (fleet, nodes):
        nodes[0].hanging = nodes[1].hanging = True
        nodes[2].lane.port = 1  # nobody listens there
        await fleet.set_members([node.member for node in nodes])
        started = time.monotonic()
        assert await page_at(fleet, 0) == page_of(1)
        assert time.monotonic() - started < 1.5
        nodes[0].hanging = nodes[1].hanging = False


async def test_a_read_that_nobody_serves_fails_with_every_reason() -> None:
    async with six() as (fleet, nodes):
        for node in nodes:
            node.failure = CorruptData(f"checksum on {node.name}")
        started = time.monotonic()
        with pytest.raises(QuorumUnavailable) as raised:
            await page_at(fleet, 0)
        assert time.monotonic() - started < LIMITS.pages.total_s + 1
        assert all(f"checksum on {node.name}" in raised.value.message for node in nodes)
        assert "1663/5/16384:0" in raised.value.message


async def test_a_node_that_comes_back_is_found_within_the_time() -> None:
    async with six() as (fleet, nodes):
        for node in nodes:
            node.failure = NotIndexedYet("behind", indexed_lsn=5)
        reading = asyncio.create_task(page_at(fleet, 0))
        while sum(calls(nodes, "GetPages")) < 6:
            await asyncio.sleep(0.005)
        nodes[3].failure = None
        assert await reading == page_of(1)


async def test_what_no_other_node_would_mend_is_raised_at_once() -> None:
    async with six() as (fleet, nodes):
        for node in nodes:
            node.failure = NotMaterializable("no redo for it")
        with pytest.raises(NotMaterializable):
            await page_at(fleet, 0)
        assert sum(calls(nodes, "GetPages")) == 1


async def test_a_newer_epoch_is_raised_and_can_be_taken_over() -> None:
    async with six() as (fleet, nodes):
        for node in nodes:
            node.state = node.state.fence(Epoch(4))
        with pytest.raises(StaleEpoch) as raised:
            await page_at(fleet, 0)
        fleet.raise_epoch(Epoch(raised.value.details["promised_epoch"]))
        fleet.raise_epoch(Epoch(2))  # never back
        assert fleet.epoch == 4
        assert await page_at(fleet, 0) == page_of(1)


async def test_a_named_node_is_asked_alone_and_its_error_is_told() -> None:
    async with six() as (fleet, nodes):
        nodes[3].failure = CorruptData("checksum")
        with pytest.raises(CorruptData):
            await fleet.get_pages(HEAP, BlockNumber(0), 1, LSN, node=NodeName("sn-4"))
        with pytest.raises(Unreachable, match="sn-9 is not one of the fleet"):
            await fleet.get_pages(HEAP, BlockNumber(0), 1, LSN, node=NodeName("sn-9"))
        assert sum(calls(nodes, "GetPages")) == 1


async def test_a_short_log_is_corrupt() -> None:
    async with six() as (fleet, nodes):
        nodes[0].log = b"short"
        with pytest.raises(CorruptData, match="sent 5 bytes"):
            await fleet.read_log(LOG_START, Lsn(LOG_START + 6), node=NodeName("sn-1"))


async def test_requests_out_of_range_are_refused() -> None:
    fleet = Fleet(VolumeId("v"), Epoch(1), limits=LIMITS)
    with pytest.raises(MalformedRequest):
        await fleet.get_pages(HEAP, BlockNumber(0), 0, LSN)
    with pytest.raises(OversizeRequest):
        await fleet.read_log(Lsn(0), Lsn(MAX_READ_LOG_BYTES + 1))
    with pytest.raises(MalformedRequest):
        PageRun(relation=HEAP, first=BlockNumber(0), pages=b"half")
    with pytest.raises(QuorumUnavailable):
        await fleet.fence(Epoch(2))


# --- quorum calls -------------------------------------------------------------------------------


async def test_fence_and_adopt_take_four_and_wait_for_no_hung_node() -> None:
    async with six() as (fleet, nodes):
        nodes[0].hanging = nodes[5].hanging = True
        started = time.monotonic()
        fenced = await fleet.fence(Epoch(2))
        assert time.monotonic() - started < 0.9
        assert set(fenced) == {"sn-2", "sn-3", "sn-4", "sn-5"}
        assert all(position.state.promised == 2 for position in fenced.values())
        assert fleet.epoch == 2

        lineage = Lineage.of([(1, LOG_START), (2, LOG_START)])
        nodes[0].hanging = nodes[5].hanging = False
        adopted = await fleet.adopt(lineage)
        assert len(adopted) >= 4
        assert all(position.state.lineage == lineage for position in adopted.values())
        # Those that were not waited for take it too.
        async with asyncio.timeout(2):
            while not all(node.state.lineage == lineage for node in nodes):
                await asyncio.sleep(0.005)


async def test_nobody_recovers_under_an_epoch_of_another_that_he_heard_of() -> None:
    """A reader takes over newer epochs; what it does as a writer must not be done under one."""
    async with six() as (fleet, nodes):
        await fleet.fence(Epoch(4))
        fleet.raise_epoch(Epoch(5))  # a page was refused, while recovery is under way
        with pytest.raises(StaleEpoch):
            await fleet.fence(Epoch(4))
        with pytest.raises(StaleEpoch):
            await fleet.adopt(Lineage.of([(1, LOG_START), (4, LOG_START)]))
        assert all(node.state.promised == 4 for node in nodes if node.state.promised != 1)


async def test_three_are_not_enough() -> None:
    async with six() as (fleet, nodes):
        for node in nodes[:3]:
            node.failure = Internal(f"trouble on {node.name}")
        nodes[3].hanging = True
        started = time.monotonic()
        with pytest.raises(QuorumUnavailable) as raised:
            await fleet.fence(Epoch(2))
        assert time.monotonic() - started < 0.9  # not even a hung node is waited for in vain
        assert raised.value.details["needed"] == 4
        assert "trouble on sn-1" in raised.value.message
        nodes[3].hanging = False


async def test_a_superseded_writer_is_told_at_once() -> None:
    async with six(epoch=3) as (fleet, nodes):
        nodes[2].state = nodes[2].state.fence(Epoch(9))
        for node in (*nodes[:2], *nodes[3:]):
            node.hanging = True
        with pytest.raises(StaleEpoch) as raised:
            await fleet.fence(Epoch(4))
        assert raised.value.details["promised_epoch"] == 9
        for node in nodes:
            node.hanging = False


async def test_positions_are_those_of_whoever_answers() -> None:
    async with six() as (fleet, nodes):
        nodes[0].hanging = True
        nodes[1].failure = UnknownVolume("not here")
        positions = await fleet.positions(within_s=0.3)
        assert set(positions) == {"sn-3", "sn-4", "sn-5", "sn-6"}
        assert positions[NodeName("sn-3")].state == nodes[2].state
        assert positions[NodeName("sn-3")].system_identifier == SYSTEM_IDENTIFIER
        nodes[0].hanging = False
        assert set(await fleet.index_states()) == {node.name for node in nodes} - {"sn-2"}


async def test_a_volume_is_made_and_filled_on_every_node_that_can() -> None:
    async with six() as (fleet, nodes):
        for node in nodes:
            node.pages.clear()
        nodes[4].failure = Internal("no")
        await fleet.create_volume(system_identifier=SYSTEM_IDENTIFIER, start=LOG_START)
        pages = [page_of(number % 251) for number in range(300)]  # more than one message holds
        taken = await fleet.import_pages(
            LSN, lambda: [PageRun(relation=HEAP, first=BlockNumber(0), pages=b"".join(pages))]
        )
        good = [node for node in nodes if node.failure is None]
        assert taken == {node.name: 300 for node in good}
        assert all(node.pages == {HEAP: pages} for node in good)
        assert all(node.created and node.created.start_lsn == LOG_START for node in good)
        await fleet.drop_volume()


async def test_members_come_and_go() -> None:
    async with six() as (fleet, nodes):
        assert list(fleet.members) == [node.name for node in nodes]
        await fleet.set_members([nodes[1].member])
        assert [node.name for node in fleet.nodes] == ["sn-2"]
        assert await page_at(fleet, 0) == page_of(1)
        assert calls(nodes, "GetPages") == [0, 1, 0, 0, 0, 0]


# --- bundles ------------------------------------------------------------------------------------


def bundle(end: int, *contents: bytes) -> tuple[BundleManifest, dict[bytes, bytes]]:
    by_hash = {hashlib.sha256(content).digest(): content for content in contents}
    files = [
        BundleFile(path=f"file-{n}", sha256=sha256, size_bytes=len(content), mode=0o600)
        for n, (sha256, content) in enumerate(by_hash.items())
    ]
    directory = BundleFile(path="pg_xact", sha256=b"", size_bytes=0, mode=0o700)
    manifest = BundleManifest(
        redo=Lsn(end - 10),
        end=Lsn(end),
        timeline=Timeline(1),
        epoch=Epoch(1),
        taken_at="now",
        files=(directory, *files),
    )
    return manifest, by_hash


async def test_a_bundle_comes_back_and_unchanged_files_are_not_sent_again() -> None:
    async with six() as (fleet, nodes):
        big = bytes(range(256)) * 5000  # more than one chunk
        manifest, contents = bundle(1000, b"control", b"", big)
        put = await fleet.put_bundle(manifest, contents.__getitem__)
        assert len(put.nodes) >= 4
        assert put.files_sent == 3 * len(put.nodes)
        assert await fleet.latest_bundle() == manifest
        assert await fleet.get_content(hashlib.sha256(big).digest()) == big
        async with asyncio.timeout(2):  # those not waited for
            while not all(node.manifests for node in nodes):
                await asyncio.sleep(0.005)

        newer, contents = bundle(2000, b"control", b"", big, b"changed")
        put = await fleet.put_bundle(newer, contents.__getitem__)
        assert put.files_sent == len(put.nodes)
        assert put.bytes_sent == len(b"changed") * len(put.nodes)
        assert await fleet.latest_bundle() == newer
        assert await fleet.latest_bundle(Lsn(1999)) == manifest


async def test_the_newest_bundle_is_found_through_any_three_nodes() -> None:
    async with six() as (fleet, nodes):
        old, _ = bundle(1000)
        new, _ = bundle(2000)
        await fleet.put_bundle(old, dict[bytes, bytes]().__getitem__)
        nodes[0].failure = nodes[1].failure = Internal("away")
        await fleet.put_bundle(new, dict[bytes, bytes]().__getitem__)
        nodes[0].failure = nodes[1].failure = None
        for node in nodes[3:]:  # of the four that have it, one is left
            node.failure = Internal("away")
        assert await fleet.latest_bundle() == new
        nodes[2].failure = Internal("away")
        with pytest.raises(QuorumUnavailable):
            await fleet.latest_bundle()


async def test_no_bundle_is_told_only_by_a_read_quorum() -> None:
    async with six() as (fleet, nodes):
        with pytest.raises(NoBundle):
            await fleet.latest_bundle()
        for node in nodes[:4]:
            node.failure = Internal("away")
        with pytest.raises(QuorumUnavailable):
            await fleet.latest_bundle()


async def test_a_content_that_is_not_what_it_should_be_is_taken_from_another_node() -> None:
    async with six() as (fleet, nodes):
        sha256 = hashlib.sha256(b"right").digest()
        for node in nodes:
            node.contents[sha256] = b"wrong"
        nodes[4].contents[sha256] = b"right"
        assert await fleet.get_content(sha256) == b"right"


# --- choosing a node ----------------------------------------------------------------------------

A, B, C = NodeName("a"), NodeName("b"), NodeName("c")


def test_the_fastest_comes_first() -> None:
    health = {
        A: NodeHealth(latency_s=0.3),
        B: NodeHealth(latency_s=0.1),
        C: NodeHealth(latency_s=0.2),
    }
    assert order_nodes(health, now=0.0, turn=1) == [B, C, A]


def test_an_unknown_node_is_tried() -> None:
    assert order_nodes({A: NodeHealth(latency_s=0.3), B: NodeHealth()}, now=0.0, turn=1) == [B, A]


def test_a_failed_node_comes_last_until_its_time_is_over() -> None:
    health = {
        A: NodeHealth(latency_s=0.1).failed(100.0),
        B: NodeHealth(latency_s=0.9),
        C: NodeHealth(latency_s=0.1).failed(99.0),
    }
    assert order_nodes(health, now=100.0, turn=1) == [B, C, A]
    assert order_nodes(health, now=99.0 + AVOID_S, turn=1) == [C, B, A]
    assert order_nodes(health, now=100.0 + AVOID_S, turn=1) == [A, C, B]


def test_every_good_node_is_probed_now_and_then() -> None:
    health = {name: NodeHealth(latency_s=n + 1.0) for n, name in enumerate((A, B, C))}
    first = [order_nodes(health, now=0.0, turn=turn)[0] for turn in range(1, 4 * PROBE_EVERY + 1)]
    assert first.count(A) == 4 * PROBE_EVERY - 4
    assert first.count(B) == first.count(C) == 2


def test_latency_is_smoothed_and_an_answer_ends_a_failure() -> None:
    health = NodeHealth().answered(1.0)
    assert health.latency_s == 1.0
    assert 1.0 < health.answered(2.0).latency_s < 2.0
    assert health.failed(7.0).answered(1.0) == health
