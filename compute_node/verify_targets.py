"""What `boreal verify` has to compare: what the catalogs name and what storage keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psycopg

from boreal.pages import PageKind
from boreal.types import PAGE_BYTES, RELATION_SEGMENT_BLOCKS, Fork, RelationFork
from compute_node import pgdata
from compute_node.postgres import Postgres

RUN_BLOCKS = 128
"""1 MiB: one message of GetPages, where it is all one relation's."""

_DATABASES = "select oid::int8, datname::text from pg_database where datallowconn order by datname"
_RELATIONS = """
select quote_ident(n.nspname) || '.' || quote_ident(c.relname), pg_relation_filenode(c.oid)::int8,
       c.relisshared, c.relpersistence::text, coalesce(a.amname::text, ''), c.relkind::text
  from pg_class c join pg_namespace n on n.oid = c.relnamespace left join pg_am a on a.oid = c.relam
 where pg_relation_filenode(c.oid) is not null and c.relpersistence <> 't'
 order by 1
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One relation fork to compare."""

    database: str
    """Empty for an orphan, as `name` is then the fork's own."""
    name: str
    fork: RelationFork
    kind: PageKind | None
    """None for an orphan: there is nothing of PostgreSQL's to hold it against."""
    blocks: int


class Piece(NamedTuple):
    """Consecutive blocks of one target."""

    target: Target
    first: int
    blocks: int


class Run(NamedTuple):
    """What is compared at once: pieces of at most `RUN_BLOCKS` in all. Most relations are small."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def blocks(self) -> int:
        """Of all its pieces."""
        return sum(piece.blocks for piece in self.pieces)


async def catalogued(postgres: Postgres, path: Path) -> list[Target]:
    """Every fork that the catalogs name and storage keeps, with its blocks in the local files."""
    found: list[Target] = []
    async with postgres.connect() as connection:
        databases = await (await connection.execute(_DATABASES)).fetchall()
    for oid, name in databases:
        async with postgres.connect(str(name)) as connection:
            found += await _of_database(connection, path, int(str(oid)), str(name))
    # A shared relation is in every database's catalogs.
    return list({target.fork: target for target in reversed(found)}.values())[::-1]


async def _of_database(
    connection: psycopg.AsyncConnection[tuple[object, ...]], path: Path, oid: int, database: str
) -> list[Target]:
    found = []
    for row in await (await connection.execute(_RELATIONS)).fetchall():
        name, number, is_shared, persistence, access_method, relkind = row
        tablespace = pgdata.GLOBAL_TABLESPACE if is_shared else pgdata.DEFAULT_TABLESPACE
        # Of an unlogged relation only the init fork is in the log.
        for kept in (Fork.INIT,) if persistence == "u" else (Fork.MAIN, Fork.VM):
            fork = RelationFork(tablespace, 0 if is_shared else oid, int(str(number)), kept)
            blocks = local_blocks(path, fork)
            if blocks is not None:
                kind = _kind(kept, str(access_method), str(relkind))
                found.append(
                    Target(database=database, name=str(name), fork=fork, kind=kind, blocks=blocks)
                )
    return found


def _kind(fork: Fork, access_method: str, relkind: str) -> PageKind:
    if fork is Fork.VM:
        return PageKind.VISIBILITY_MAP
    if relkind == "S":
        return PageKind.SEQUENCE
    known = {kind.value: kind for kind in PageKind}
    return known.get(access_method, PageKind.GENERIC)


def local_blocks(path: Path, fork: RelationFork) -> int | None:
    """The length of a fork's files in blocks; None if there is no such file."""
    blocks = None
    segment = 0
    while (size_bytes := _size_bytes(path / pgdata.relation_path(fork, segment))) is not None:
        blocks = segment * RELATION_SEGMENT_BLOCKS + size_bytes // PAGE_BYTES
        segment += 1
    return blocks


def _size_bytes(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


def with_storage(
    targets: Sequence[Target], sizes: Mapping[RelationFork, int]
) -> tuple[list[Target], list[Target]]:
    """The targets as large as they are anywhere; the orphans, which storage alone knows. Pure."""
    known = {target.fork for target in targets}
    grown = [
        Target(
            database=target.database,
            name=target.name,
            fork=target.fork,
            kind=target.kind,
            blocks=max(target.blocks, sizes.get(target.fork, 0)),
        )
        for target in targets
    ]
    orphans = [
        Target(database="", name=str(fork), fork=fork, kind=None, blocks=blocks)
        for fork, blocks in sorted(sizes.items())
        if fork not in known
    ]
    return grown, orphans


def runs(targets: Iterable[Target]) -> Iterator[Run]:
    """All blocks of the targets, in order, `RUN_BLOCKS` at a time."""
    number, pieces, room = 0, list[Piece](), RUN_BLOCKS
    for target in targets:
        first = 0
        while first < target.blocks:
            blocks = min(room, target.blocks - first)
            pieces.append(Piece(target, first, blocks))
            first += blocks
            room -= blocks
            if room == 0:
                yield Run(number, tuple(pieces))
                number, pieces, room = number + 1, [], RUN_BLOCKS
    if pieces:
        yield Run(number, tuple(pieces))
