"""Goal: whichever node holds whatever wrongly, it is named, and nobody else is.

Method: six storage nodes in this process over real sockets, their pages made by hand; PostgreSQL's
files in a directory. (Whole clusters are verified in tests/cluster.)
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from boreal.errors import CorruptData, Unreachable
from boreal.pages import PageKind, digest_pages
from boreal.rpc import storage_pb2
from boreal.rpc.edge import fork_from_wire
from boreal.types import PAGE_BYTES, Epoch, Fork, Lsn, NodeName, RelationFork, VolumeId
from compute_node.fleet import Fleet
from compute_node.verify import Difference, Verification, comparison
from compute_node.verify_nodes import split_by_majority
from compute_node.verify_targets import RUN_BLOCKS, Target, local_blocks, runs, with_storage
from tests.compute_node.fleet_node import FleetNode, running
from tests.compute_node.heap_pages import heap_page

NAMES = tuple(NodeName(f"sn-{n}") for n in range(1, 7))
TABLE, SMALL, ORPHAN = (RelationFork(1663, 5, number, Fork.MAIN) for number in (16384, 9, 77))
PAGE = heap_page()
HINTED = heap_page(infomask=0x0002 | 0x0100 | 0x0800)
OTHER = heap_page(data=b"abd", lsn=0x200)


class Node(FleetNode):
    """Has a digest, and counts the pages it sends."""

    pages_sent = 0

    async def get_pages(
        self, request: storage_pb2.GetPagesRequest
    ) -> AsyncIterator[storage_pb2.PageImages]:
        async for images in super().get_pages(request):
            self.pages_sent += len(images.exists)
            yield images

    async def DigestPages(self, request: Any, context: Any) -> storage_pb2.PageDigest:  # noqa: N802
        await self._enter("DigestPages", request.volume)
        pages: list[bytes | None] = []
        for asked in request.ranges:
            known = self.pages.get(fork_from_wire(asked.fork), [])
            wanted = range(asked.first_block, asked.first_block + asked.count)
            pages += [known[block] if block < len(known) else None for block in wanted]
        return storage_pb2.PageDigest(sha256=digest_pages(pages))


def target(fork: RelationFork, blocks: int) -> Target:
    return Target(
        database="postgres", name=f"t{fork.relation}", fork=fork, kind=PageKind.HEAP, blocks=blocks
    )


class World:
    """Six nodes and PostgreSQL, which all have the same."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nodes = [Node(name) for name in NAMES]
        self.checkpoints = 0
        self.targets = [target(TABLE, 300), target(SMALL, 3)]
        for node in self.nodes:
            node.pages = {TABLE: [PAGE] * 300, SMALL: [OTHER] * 3, ORPHAN: [PAGE] * 2}
        (path / "base" / "5").mkdir(parents=True)
        self.write(TABLE, [HINTED] * 300)
        self.write(SMALL, [OTHER, bytes(PAGE_BYTES), OTHER])

    def write(self, fork: RelationFork, pages: list[bytes]) -> None:
        (self.path / "base" / "5" / str(fork.relation)).write_bytes(b"".join(pages))

    async def checkpoint(self) -> Lsn:
        self.checkpoints += 1
        return Lsn(self.checkpoints)

    @asynccontextmanager
    async def comparing(self, *names: NodeName) -> AsyncIterator[Verification]:
        async with AsyncExitStack() as stack:
            members = await stack.enter_async_context(running(*self.nodes))
            fleet = Fleet(VolumeId("vol-1"), Epoch(1))
            stack.push_async_callback(fleet.close)
            await fleet.set_members(members)
            yield await stack.enter_async_context(
                comparison(self.path, self.checkpoint, fleet, names)
            )

    async def compare(self) -> list[tuple[str, str, int]]:
        """(node, relation, block) of each difference."""
        async with self.comparing() as verification:
            sizes, found = await verification.sizes(self.targets)
            targets, orphans = with_storage(self.targets, sizes)
            for run in runs((*targets, *orphans)):
                found += (await verification.check(run))[1]
            self.lost = set(verification.nodes.lost)
        return sorted(map(_named, found))


def _named(difference: Difference) -> tuple[str, str, int]:
    return difference.node, difference.target.name, difference.block


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_no_difference_and_the_nodes_take_turns(world: World) -> None:
    assert await world.compare() == []
    assert world.checkpoints == 1
    assert sum(node.pages_sent for node in world.nodes) == 305
    assert sum(node.pages_sent > 0 for node in world.nodes) == 3  # as many as there are runs


@pytest.mark.parametrize("odd", range(6))
async def test_a_node_that_has_a_page_otherwise(world: World, odd: int) -> None:
    world.nodes[odd].pages[TABLE][200] = OTHER
    world.nodes[odd].pages[SMALL][0] = PAGE
    assert await world.compare() == [(NAMES[odd], "t16384", 200), (NAMES[odd], "t9", 0)]
    assert world.checkpoints > 1  # looked at again


async def test_bytes_that_postgres_does_not_compare_differ_between_nodes(world: World) -> None:
    world.nodes[4].pages[TABLE][7] = HINTED
    assert await world.compare() == [(NAMES[4], "t16384", 7)]


async def test_blocks_only_storage_has_are_compared_between_nodes(world: World) -> None:
    world.nodes[3].pages[SMALL][1] = PAGE  # a hole in PostgreSQL's file
    world.nodes[2].pages[ORPHAN][1] = OTHER
    assert await world.compare() == [
        (NAMES[2], "1663/5/77", 1),
        (NAMES[3], "t9", 1),
    ]


async def test_all_nodes_wrong_alike(world: World) -> None:
    world.write(TABLE, [*[PAGE] * 299, OTHER])
    assert await world.compare() == [(name, "t16384", 299) for name in NAMES]


async def test_sizes(world: World) -> None:
    world.nodes[1].pages[SMALL].pop()
    del world.nodes[5].pages[ORPHAN]
    world.write(TABLE, [PAGE] * 298)
    world.targets[0] = target(TABLE, 298)
    found = await world.compare()
    assert (NAMES[1], "t9", 2) in found
    assert (NAMES[5], "1663/5/77", 0) in found
    assert [name for name, relation, _ in found if relation == "t16384"] == list(NAMES)


async def test_blocks_postgres_extended_by_without_log_are_no_difference(world: World) -> None:
    world.write(TABLE, [PAGE] * 300 + [bytes(PAGE_BYTES)] * 10)
    world.targets[0] = target(TABLE, 310)
    assert await world.compare() == []


async def test_a_difference_that_goes_away_is_none(world: World) -> None:
    """PostgreSQL had just written the page; after the next checkpoint storage has it too."""
    world.write(SMALL, [PAGE] * 3)

    async def checkpoint() -> Lsn:
        world.checkpoints += 1
        if world.checkpoints == 2:
            world.write(SMALL, [OTHER] * 3)
        return Lsn(world.checkpoints)

    world.checkpoint = checkpoint  # type: ignore[method-assign]
    assert await world.compare() == []
    assert world.checkpoints == 3  # one more, to take the page as of its own LSN


async def test_a_node_that_fails_is_named_and_the_others_are_compared(world: World) -> None:
    world.nodes[0].failure = CorruptData("block 3 does not match its checksum")
    world.nodes[2].pages[SMALL][2] = PAGE
    found = await world.compare()
    assert (NAMES[2], "t9", 2) in found
    assert {name for name, _, _ in found} == {NAMES[0], NAMES[2]}


async def test_a_node_out_of_reach_is_lost(world: World) -> None:
    world.nodes[3].failure = Unreachable("nobody is there")
    assert await world.compare() == []
    assert world.lost == {NAMES[3]}


async def test_only_the_named_nodes_are_asked(world: World) -> None:
    world.nodes[0].pages[TABLE][0] = OTHER
    async with world.comparing(NAMES[1], NAMES[4]) as verification:
        for run in runs(world.targets):
            assert (await verification.check(run))[1] == []
    assert [bool(node.calls) for node in world.nodes] == [False, True, False, False, True, False]
    with pytest.raises(Unreachable):
        async with world.comparing(NodeName("sn-9")):
            pass


def test_the_majority_is_right_and_a_tie_is_the_firsts() -> None:
    a, b, c, d = NAMES[:4]
    assert split_by_majority({a: 1, b: 2, c: 2}) == ([b, c], [a])
    assert split_by_majority({a: 1, b: 2, c: 2, d: 1}) == ([a, d], [b, c])
    assert split_by_majority({a: 1}) == ([a], [])
    assert split_by_majority({}) == ([], [])


def test_runs_hold_every_block_once() -> None:
    targets = [target(TABLE, 2 * RUN_BLOCKS + 5), target(SMALL, 0), target(ORPHAN, 7)]
    made = list(runs(targets))
    assert [run.blocks for run in made] == [RUN_BLOCKS, RUN_BLOCKS, 12]
    assert [run.number for run in made] == [0, 1, 2]
    blocks = [
        (piece.target.fork, piece.first + n)
        for run in made
        for piece in run.pieces
        for n in range(piece.blocks)
    ]
    assert blocks == [(each.fork, n) for each in targets for n in range(each.blocks)]


def test_local_blocks_of_several_segment_files(tmp_path: Path) -> None:
    (tmp_path / "base" / "5").mkdir(parents=True)
    assert local_blocks(tmp_path, TABLE) is None
    with (tmp_path / "base" / "5" / "16384").open("wb") as file:
        file.truncate(1 << 30)
    (tmp_path / "base" / "5" / "16384.1").write_bytes(PAGE * 3)
    assert local_blocks(tmp_path, TABLE) == 131072 + 3
