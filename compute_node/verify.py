"""`boreal verify`: are the pages that storage materializes PostgreSQL's own, on every node?

After a checkpoint every page this writer ever changed lies in its local files, as PostgreSQL wrote
it. The pages as of that moment are asked of one node, the nodes taking turns run by run, and
compared under PostgreSQL's own masks for what is not in the WAL (hint bits, unused space). All
other nodes tell a digest of the run's raw pages: redo is deterministic, so whoever follows the same
log has the same bytes. Where digests differ, the odd nodes' pages are fetched too and each block
that differs is named.

Blocks PostgreSQL never touched are not in its files, and storage keeps forks that no catalog names
(orphans): there the nodes are compared with each other only.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from boreal.errors import BorealError
from boreal.pages import PageKind, digest_pages, page_lsn
from boreal.rpc import compute_pb2
from boreal.rpc.edge import fork_to_wire
from boreal.types import PAGE_BYTES, BlockNumber, Lsn, NodeName, RelationFork
from compute_node.compare import Comparer, PageFault, differences, disagreements, read_local
from compute_node.fleet import Fleet
from compute_node.instance import Instance
from compute_node.postgres import make_durable
from compute_node.verify_nodes import VerifyNodes, split_by_majority
from compute_node.verify_targets import (
    Piece,
    Run,
    Target,
    catalogued,
    local_blocks,
    runs,
    with_storage,
)

_T = TypeVar("_T")
_ATTEMPTS = 3
"""A page that differs is looked at again after a checkpoint: it may just have been written."""
_RUNS_A_NODE = 2
"""Under way at once, so that no node waits for the others."""
_COMPARERS = max(1, min(2, (os.cpu_count() or 1) // 2))
_PROGRESS_PAGES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What one node has otherwise."""

    node: NodeName
    target: Target
    block: BlockNumber
    reason: str

    def event(self) -> compute_pb2.VerifyEvent:
        """As it is told to who asked."""
        return compute_pb2.VerifyEvent(
            difference=compute_pb2.PageDifference(
                node=self.node,
                database=self.target.database,
                relation=self.target.name,
                fork=fork_to_wire(self.target.fork),
                block=self.block,
                reason=self.reason,
            )
        )


@dataclass(frozen=True, slots=True)
class _Told:
    """What the nodes told of one run."""

    pages: dict[NodeName, list[list[bytes | None]]] = field(default_factory=dict)
    """Of each piece."""
    digests: dict[NodeName, bytes] = field(default_factory=dict)
    failures: dict[NodeName, tuple[Piece, BorealError]] = field(default_factory=dict)


class Verification:
    """One comparison of everything: of the files below `path` with what `nodes` have.

    `checkpoint` brings PostgreSQL's pages to its files, and returns an LSN up to which the log of
    them is durable.
    """

    def __init__(
        self,
        path: Path,
        checkpoint: Callable[[], Coroutine[Any, Any, Lsn]],
        nodes: VerifyNodes,
        comparers: Sequence[Comparer],
    ) -> None:
        self._path = path
        self._take_checkpoint = checkpoint
        self._checkpointing = asyncio.Lock()
        self._comparers: asyncio.Queue[Comparer] = asyncio.Queue()
        for comparer in comparers:
            self._comparers.put_nowait(comparer)
        self.nodes = nodes
        self.lsn = Lsn(0)

    async def checkpoint(self) -> None:
        """Compare as of now, from here on."""
        async with self._checkpointing:
            self.lsn = await self._take_checkpoint()

    # --- sizes -----------------------------------------------------------------------------------

    async def sizes(
        self, targets: Sequence[Target]
    ) -> tuple[dict[RelationFork, int], list[Difference]]:
        """The forks storage has, and where nodes differ in that, or have more than PostgreSQL.

        Fewer blocks are no difference: PostgreSQL does not log that it extends a fork by empty
        pages. That those which are not empty are missing, the comparison of the pages tells.
        """
        known = {target.fork: target for target in targets}
        for attempt in range(_ATTEMPTS):
            if attempt:
                await self.checkpoint()
            sizes, found = await self._sizes_once(known)
            if not found:
                break
        return sizes, found

    async def _sizes_once(
        self, known: dict[RelationFork, Target]
    ) -> tuple[dict[RelationFork, int], list[Difference]]:
        names, lsn = self.nodes.names, self.lsn
        answers = await asyncio.gather(*(self.nodes.sizes(name, lsn) for name in names))
        told = {
            name: answer
            for name, answer in zip(names, answers, strict=True)
            if not isinstance(answer, BorealError)
        }
        agreed, odd = split_by_majority(told, lambda sizes: frozenset(sizes.items()))
        sizes = told[agreed[0]] if agreed else {}
        found = [
            Difference(
                node=name,
                target=known.get(fork) or _orphan(fork),
                block=BlockNumber(min(sizes.get(fork, 0), told[name].get(fork, 0))),
                reason=f"{_blocks(told[name].get(fork))} here, {_blocks(sizes.get(fork))} on the "
                "other nodes",
            )
            for name in odd
            for fork in sorted(sizes.keys() | told[name].keys())
            if sizes.get(fork) != told[name].get(fork)
        ]
        for fork, target in known.items():
            blocks = local_blocks(self._path, fork)
            found += [
                Difference(
                    node=name,
                    target=target,
                    block=BlockNumber(blocks),
                    reason=f"{_blocks(theirs[fork])} here, {_blocks(blocks)} in PostgreSQL",
                )
                for name, theirs in told.items()
                if blocks is not None and blocks < theirs.get(fork, 0)
            ]
        return sizes, found

    # --- pages -----------------------------------------------------------------------------------

    async def check(self, run: Run) -> tuple[Run, list[Difference]]:
        """Compare one run of blocks, again after a checkpoint while it differs."""
        for attempt in range(_ATTEMPTS):
            if attempt:
                await self.checkpoint()
            found = await self._check_once(run)
            if not found:
                break
        return run, found

    async def _check_once(self, run: Run) -> list[Difference]:
        names, lsn = self.nodes.names, self.lsn
        if not names:
            return []
        speaker = names[run.number % len(names)]
        told = _Told()
        await asyncio.gather(
            self._fetch(told, speaker, run, lsn),
            *(self._fetch_digest(told, name, run, lsn) for name in names if name != speaker),
        )
        agreed, odd = split_by_majority(told.digests)
        unseen = [name for name in odd if name not in told.pages]
        if agreed and not any(name in told.pages for name in agreed):
            unseen.append(agreed[0])
        await asyncio.gather(*(self._fetch(told, name, run, lsn) for name in unseen))
        failures = [
            Difference(
                node=name,
                target=piece.target,
                block=BlockNumber(piece.first),
                reason=f"{error.code}: {error.message}",
            )
            for name, (piece, error) in told.failures.items()
            if name not in self.nodes.lost
        ]
        return failures + await self._judge(run, told.pages, agreed, odd)

    async def _fetch(self, told: _Told, name: NodeName, run: Run, lsn: Lsn) -> None:
        pages: list[list[bytes | None]] = []
        for piece in run.pieces:
            answer = await self.nodes.pages(name, piece.target.fork, piece.first, piece.blocks, lsn)
            if isinstance(answer, BorealError):
                told.failures[name] = (piece, answer)
                return
            pages.append(answer)
        told.pages[name] = pages
        told.digests[name] = digest_pages(chain.from_iterable(pages))

    async def _fetch_digest(self, told: _Told, name: NodeName, run: Run, lsn: Lsn) -> None:
        ranges = [(piece.target.fork, piece.first, piece.blocks) for piece in run.pieces]
        digest = await self.nodes.digest(name, ranges, lsn)
        if isinstance(digest, BorealError):
            told.failures[name] = (run.pieces[0], digest)
        else:
            told.digests[name] = digest

    async def _judge(
        self,
        run: Run,
        pages: dict[NodeName, list[list[bytes | None]]],
        agreed: Sequence[NodeName],
        odd: Sequence[NodeName],
    ) -> list[Difference]:
        """What is wrong with the pages the nodes agree on, and with those of the odd ones."""
        spoken = next((pages[name] for name in agreed if name in pages), None)
        if spoken is None:
            return []
        found = []
        for number, piece in enumerate(run.pieces):
            reference = spoken[number]
            speaker = next(name for name in agreed if name in pages)
            faults = dict.fromkeys(agreed, await self._against_postgres(speaker, piece, reference))
            for name in odd:
                if name in pages:
                    theirs = pages[name][number]
                    apart = dict(disagreements(piece.first, reference, theirs))
                    apart |= dict(await self._against_postgres(name, piece, theirs))
                    faults[name] = [PageFault(block, apart[block]) for block in sorted(apart)]
            found += [
                Difference(node=name, target=piece.target, block=block, reason=reason)
                for name, of_node in faults.items()
                for block, reason in of_node
            ]
        return found

    async def _against_postgres(
        self, name: NodeName, piece: Piece, stored: Sequence[bytes | None]
    ) -> list[PageFault]:
        target = piece.target
        if target.kind is None:
            return []
        comparer = await self._comparers.get()
        try:
            found = await comparer.compare(target.kind, target.fork, piece.first, stored)
        finally:
            self._comparers.put_nowait(comparer)
        return await self._not_as_written(name, target, found) if found else found

    async def _not_as_written(
        self, name: NodeName, target: Target, found: Sequence[PageFault]
    ) -> list[PageFault]:
        """Those that differ also as of the LSN of PostgreSQL's own page.

        Under load its file may be behind the LSN that is compared at, or already past it. A map's
        LSN tells nothing, but bits get cleared: what is cleared in the file is so afterwards.
        """
        fork, kind = target.fork, target.kind
        local = await asyncio.to_thread(
            lambda: [read_local(self._path, fork, fault.block, 1)[0] for fault in found]
        )
        await self.checkpoint()  # from here on the log is durable up to what was just read
        left, now = [], self.lsn
        for fault, mine in zip(found, local, strict=True):
            if kind is not None and len(mine) == PAGE_BYTES:
                lsn = now if kind is PageKind.VISIBILITY_MAP else page_lsn(mine)
                theirs = await self.nodes.pages(name, fork, fault.block, 1, lsn)
                if not isinstance(theirs, BorealError) and not differences(
                    kind, fault.block, [mine], theirs
                ):
                    continue
            left.append(fault)
        return left


def _orphan(fork: RelationFork) -> Target:
    return Target(database="", name=str(fork), fork=fork, kind=None, blocks=0)


def _blocks(count: int | None) -> str:
    return "no such fork" if count is None else f"{count} blocks"


@asynccontextmanager
async def comparison(
    path: Path,
    checkpoint: Callable[[], Coroutine[Any, Any, Lsn]],
    fleet: Fleet,
    names: Sequence[NodeName],
) -> AsyncIterator[Verification]:
    """A verification with all it needs, for as long as it lasts. No name: every node."""
    async with AsyncExitStack() as stack:
        nodes = VerifyNodes(fleet, names)
        stack.push_async_callback(nodes.close)
        comparers = []
        for _ in range(_COMPARERS):
            comparers.append(await Comparer.start(path))
            stack.push_async_callback(comparers[-1].close)
        verification = Verification(path, checkpoint, nodes, comparers)
        await verification.checkpoint()
        yield verification


async def _in_window(calls: Iterable[Coroutine[Any, Any, _T]], width: int) -> AsyncGenerator[_T]:
    """Run the calls, `width` at a time; yields their results as they come."""
    running: set[asyncio.Task[_T]] = set()
    try:
        for call in calls:
            running.add(asyncio.create_task(call))
            if len(running) == width:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        for ended in asyncio.as_completed(running):
            yield await ended
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def verify(
    writer: Instance, nodes: Sequence[NodeName]
) -> AsyncIterator[compute_pb2.VerifyEvent]:
    """Compare every page of every relation; `nodes` empty means every storage node."""

    async def checkpoint() -> Lsn:
        async with writer.postgres.connect() as connection:
            await connection.execute("checkpoint")
            return await make_durable(connection)

    async with comparison(writer.pgdata, checkpoint, writer.fleet, nodes) as verification:
        compared = verification.nodes.names
        listed = await catalogued(writer.postgres, writer.pgdata)
        sizes, apart = await verification.sizes(listed)
        targets, orphans = with_storage(listed, sizes)
        for difference in apart:
            yield difference.event()
        differences = len(apart)
        total = sum(target.blocks for target in (*targets, *orphans))
        done = told = 0
        checks = (verification.check(run) for run in runs((*targets, *orphans)))
        async with aclosing(_in_window(checks, _RUNS_A_NODE * len(compared))) as checked:
            async for run, found in checked:
                for difference in found:
                    yield difference.event()
                differences += len(found)
                done += run.blocks
                if done - told >= _PROGRESS_PAGES or done == total:
                    told = done
                    yield compute_pb2.VerifyEvent(
                        progress=compute_pb2.VerifyProgress(pages_done=done, pages_total=total)
                    )
        for name, error in verification.nodes.lost.items():
            differences += 1
            yield compute_pb2.VerifyEvent(
                difference=compute_pb2.PageDifference(
                    node=name, reason=f"it was not compared to the end: {error.message}"
                )
            )
        yield compute_pb2.VerifyEvent(
            summary=compute_pb2.VerifySummary(
                pages=total,
                relations=len({(target.database, target.name) for target in targets}),
                databases=len({target.database for target in targets}),
                differences=differences,
                lsn=verification.lsn,
                nodes=compared,
                orphans=len(orphans),
                orphan_pages=sum(target.blocks for target in orphans),
            )
        )
