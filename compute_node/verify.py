"""`boreal verify`: are the pages that storage materializes PostgreSQL's own?

After a checkpoint every page this writer ever changed lies in its local files, as PostgreSQL wrote
it. Each is compared with what each storage node materializes from the log at that moment, under
PostgreSQL's own masks for what is not in the WAL (hint bits, unused space). Blocks PostgreSQL
never touched are not in its files; for those the storage nodes are compared with each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg

from boreal.errors import BorealError, CorruptData
from boreal.pages import PageKind, is_zero, mask_page, page_lsn, same_page
from boreal.rpc import compute_pb2
from boreal.rpc.edge import fork_to_wire
from boreal.types import (
    PAGE_BYTES,
    RELATION_SEGMENT_BLOCKS,
    BlockNumber,
    Fork,
    Lsn,
    NodeName,
    RelationFork,
    format_lsn,
)
from compute_node import pgdata
from compute_node.instance import Instance
from compute_node.postgres import make_durable

_CHUNK_BLOCKS = 64
_ZERO_PAGE = bytes(PAGE_BYTES)
_ATTEMPTS = 3
"""A page that differs is looked at again after a checkpoint: it may just have been written."""

_RELATIONS = """
select quote_ident(n.nspname) || '.' || quote_ident(c.relname), pg_relation_filenode(c.oid),
       c.relisshared, c.relpersistence::text, coalesce(a.amname, ''), c.relkind::text
  from pg_class c join pg_namespace n on n.oid = c.relnamespace left join pg_am a on a.oid = c.relam
 where pg_relation_filenode(c.oid) is not null and c.relpersistence <> 't'
 order by 1
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """One relation fork to compare."""

    database: str
    name: str
    fork: RelationFork
    kind: PageKind
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Difference:
    node: NodeName
    block: BlockNumber
    reason: str


def _kind(fork: Fork, access_method: str, relkind: str) -> PageKind:
    if fork is Fork.VM:
        return PageKind.VISIBILITY_MAP
    if relkind == "S":
        return PageKind.SEQUENCE
    known = {kind.value: kind for kind in PageKind}
    return known.get(access_method, PageKind.GENERIC)


def _fork_blocks(path: Path, fork: RelationFork) -> int | None:
    """The length of a fork's files in blocks; None if there is no such file."""
    blocks = None
    segment = 0
    while (file := path / pgdata.relation_path(fork, segment)).exists():
        blocks = segment * RELATION_SEGMENT_BLOCKS + file.stat().st_size // PAGE_BYTES
        segment += 1
    return blocks


def _read_local(path: Path, fork: RelationFork, first: int, count: int) -> list[bytes]:
    """Blocks [first, first + count) of one segment, as they lie in the local files."""
    segment, block = divmod(first, RELATION_SEGMENT_BLOCKS)
    with (path / pgdata.relation_path(fork, segment)).open("rb") as file:
        file.seek(block * PAGE_BYTES)
        content = file.read(count * PAGE_BYTES)
    return [content[at : at + PAGE_BYTES] for at in range(0, count * PAGE_BYTES, PAGE_BYTES)]


def differences(
    kind: PageKind,
    first: BlockNumber,
    local: Sequence[bytes],
    stored: Mapping[NodeName, Sequence[bytes | None]],
) -> list[_Difference]:
    """Compare one run of blocks. Pure.

    `local` blocks that are short or all zero are not in the local file: there the first node speaks
    for PostgreSQL. A stored None is a block storage does not have; zeros are its equal.
    """
    found = []
    for index, mine in enumerate(local):
        here = len(mine) == PAGE_BYTES and not is_zero(mine)
        reference = mine if here else None
        for node, pages in stored.items():
            theirs = pages[index] or _ZERO_PAGE
            reference = theirs if reference is None else reference
            block = BlockNumber(first + index)
            reason = _difference(reference, theirs, kind, block)
            if reason:
                found.append(_Difference(node=node, block=block, reason=reason))
    return found


def _difference(expected: bytes, got: bytes, kind: PageKind, block: BlockNumber) -> str:
    """What is wrong with `got`; empty if nothing is."""
    if expected == got:
        return ""
    try:
        same = same_page(got, expected, kind, block)
    except CorruptData as error:
        return error.message
    return "" if same else _describe(expected, got, kind, block)


def _describe(expected: bytes, got: bytes, kind: PageKind, block: BlockNumber) -> str:
    if is_zero(got):
        return "storage has zeros"
    ours, theirs = bytearray(expected), bytearray(got)
    mask_page(ours, kind, block)
    mask_page(theirs, kind, block)
    at = [index for index in range(PAGE_BYTES) if ours[index] != theirs[index]]
    lsns = f"PostgreSQL's LSN {format_lsn(page_lsn(expected))}, {format_lsn(page_lsn(got))} here"
    return f"{len(at)} bytes differ, the first at offset {at[0]}; {lsns}"


class _Verification:
    """One run over all databases."""

    def __init__(self, writer: Instance, nodes: Sequence[NodeName]) -> None:
        self._writer = writer
        self._nodes = list(nodes) or sorted(writer.fleet.members)
        self._path = writer.pgdata
        self.lsn = Lsn(0)

    async def checkpoint(self) -> None:
        """Bring PostgreSQL's pages to its files, and the log up to them to storage."""
        async with self._writer.postgres.connect() as connection:
            await connection.execute("checkpoint")
            self.lsn = await make_durable(connection)

    async def targets(self) -> list[_Target]:
        """Every fork of every relation that storage keeps."""
        found: list[_Target] = []
        async with self._writer.postgres.connect() as connection:
            rows = await connection.execute(
                "select oid, datname from pg_database where datallowconn order by datname"
            )
            databases = [(int(str(oid)), str(name)) for oid, name in await rows.fetchall()]
        for oid, name in databases:
            async with self._writer.postgres.connect(name) as connection:
                found += await self._targets_of(connection, oid, name, shared=not found)
        return found

    async def _targets_of(
        self,
        connection: psycopg.AsyncConnection[tuple[object, ...]],
        oid: int,
        database: str,
        *,
        shared: bool,
    ) -> list[_Target]:
        found = []
        for row in await (await connection.execute(_RELATIONS)).fetchall():
            name, number, is_shared, persistence, access_method, relkind = row
            if is_shared and not shared:
                continue
            # Of an unlogged relation only the init fork is in the log.
            forks = (Fork.INIT,) if persistence == "u" else (Fork.MAIN, Fork.VM)
            for fork in forks:
                where = (
                    (pgdata.GLOBAL_TABLESPACE, 0)
                    if is_shared
                    else (
                        pgdata.DEFAULT_TABLESPACE,
                        oid,
                    )
                )
                relation = RelationFork(*where, int(str(number)), fork)
                blocks = _fork_blocks(self._path, relation)
                if blocks is not None:
                    kind = _kind(fork, str(access_method), str(relkind))
                    found.append(
                        _Target(
                            database=database,
                            name=str(name),
                            fork=relation,
                            kind=kind,
                            blocks=blocks,
                        )
                    )
        return found

    async def compare(self, target: _Target, first: int, count: int) -> list[_Difference]:
        """Compare one run of blocks, again after a checkpoint while it differs."""
        for attempt in range(_ATTEMPTS):
            if attempt:
                await self.checkpoint()
            found = await self._compare_once(target, first, count)
            if not found:
                return []
        return found

    async def _compare_once(self, target: _Target, first: int, count: int) -> list[_Difference]:
        local = await asyncio.to_thread(_read_local, self._path, target.fork, first, count)
        asked = await asyncio.gather(
            *(self._stored(node, target, first, count) for node in self._nodes)
        )
        failed = [answer for answer in asked if isinstance(answer, _Difference)]
        stored = {
            node: answer
            for node, answer in zip(self._nodes, asked, strict=True)
            if not isinstance(answer, _Difference)
        }
        found = await asyncio.to_thread(differences, target.kind, BlockNumber(first), local, stored)
        return failed + found

    async def _stored(
        self, node: NodeName, target: _Target, first: int, count: int
    ) -> list[bytes | None] | _Difference:
        block = BlockNumber(first)
        try:
            return await self._writer.fleet.get_pages(
                target.fork, block, count, self.lsn, node=node
            )
        except BorealError as error:
            return _Difference(node=node, block=block, reason=f"{error.code}: {error.message}")

    def summary(self, targets: Sequence[_Target], wrong: int) -> compute_pb2.VerifyEvent:
        """The closing message."""
        return compute_pb2.VerifyEvent(
            summary=compute_pb2.VerifySummary(
                pages=sum(target.blocks for target in targets),
                relations=len({(target.database, target.name) for target in targets}),
                databases=len({target.database for target in targets}),
                differences=wrong,
                lsn=self.lsn,
                nodes=self._nodes,
            )
        )


async def verify(
    writer: Instance, nodes: Sequence[NodeName]
) -> AsyncIterator[compute_pb2.VerifyEvent]:
    """Compare every page of every relation; `nodes` empty means every storage node."""
    run = _Verification(writer, nodes)
    await run.checkpoint()
    targets = await run.targets()
    total = sum(target.blocks for target in targets)
    done = wrong = 0
    for target in targets:
        for first in range(0, target.blocks, _CHUNK_BLOCKS):
            count = min(_CHUNK_BLOCKS, target.blocks - first)
            for difference in await run.compare(target, first, count):
                wrong += 1
                yield compute_pb2.VerifyEvent(
                    difference=compute_pb2.PageDifference(
                        node=difference.node,
                        database=target.database,
                        relation=target.name,
                        fork=fork_to_wire(target.fork),
                        block=difference.block,
                        reason=difference.reason,
                    )
                )
            done += count
            yield compute_pb2.VerifyEvent(
                progress=compute_pb2.VerifyProgress(pages_done=done, pages_total=total)
            )
    yield run.summary(targets, wrong)
