"""What is what in a PostgreSQL data directory: relation files, bundle files, and the rest."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from boreal.errors import Internal
from boreal.types import RELATION_SEGMENT_BLOCKS, Fork, RelationFork

AGENT_DIRECTORY = "boreal"
"""Below PGDATA: what the agent lets PostgreSQL know, of one start only."""

DEFAULT_TABLESPACE = 1663
GLOBAL_TABLESPACE = 1664

_RELATION = re.compile(
    r"(?:base/(?P<database>\d+)|global)/(?P<relation>\d+)(?:_(?P<fork>fsm|vm|init))?"
    r"(?:\.(?P<segment>\d+))?"
)
_TEMPORARY = re.compile(r"t\d+_\d+(_\w+)?(\.\d+)?")

# Contents a fresh start must not bring along, after PostgreSQL's own list for base backups
# (excludeDirContents and excludeFiles in backend/backup/basebackup.c). Slots and statistics are not
# in the WAL; the WAL is the volume; the configuration is the agent's to write.
_EMPTIED = frozenset(
    {
        *("pg_wal", "pg_replslot", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots"),
        *("pg_stat", "pg_stat_tmp", "pg_subtrans", AGENT_DIRECTORY),
    }
)
_SKIPPED = frozenset(
    {
        *("postmaster.pid", "postmaster.opts", "current_logfiles"),
        *("backup_label", "tablespace_map", "standby.signal", "recovery.signal"),
        *("postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf"),
    }
)
_PREFIXES = ("pgsql_tmp", "pg_internal.init")


@dataclass(frozen=True, slots=True, kw_only=True)
class RelationFile:
    """One segment file of a relation fork. `path` is relative to PGDATA."""

    path: str
    fork: RelationFork
    segment: int


def parse_relation_path(path: str) -> RelationFile | None:
    """The relation file at `path` below PGDATA; None if it is another kind of file.

    The naming is PostgreSQL's GetRelationPath (common/relpath.c) and _mdfd_segpath (md.c).
    """
    match = _RELATION.fullmatch(path)
    if match is None:
        return None
    database = match["database"]
    return RelationFile(
        path=path,
        fork=RelationFork(
            DEFAULT_TABLESPACE if database else GLOBAL_TABLESPACE,
            int(database or 0),
            int(match["relation"]),
            Fork[match["fork"].upper()] if match["fork"] else Fork.MAIN,
        ),
        segment=int(match["segment"] or 0),
    )


def relation_path(fork: RelationFork, segment: int) -> str:
    """Where a segment file of a fork lies below PGDATA. Internal for another tablespace's."""
    if fork.tablespace not in {DEFAULT_TABLESPACE, GLOBAL_TABLESPACE}:
        raise Internal(f"{fork} lies in a tablespace of its own; there are none here")
    directory = f"base/{fork.database}" if fork.tablespace == DEFAULT_TABLESPACE else "global"
    name = f"{directory}/{fork.relation}{fork.fork.suffix}"
    return f"{name}.{segment}" if segment else name


def segment_sizes(blocks: int) -> Iterator[tuple[int, int]]:
    """The (segment, blocks) files of a fork of that many blocks: at least one."""
    segment = 0
    while blocks > RELATION_SEGMENT_BLOCKS:
        yield segment, RELATION_SEGMENT_BLOCKS
        blocks -= RELATION_SEGMENT_BLOCKS
        segment += 1
    yield segment, blocks


def relation_files(pgdata: Path) -> Iterator[RelationFile]:
    """Every relation file, in path order. Temporary relations' files are none."""
    directories = [pgdata / "global", *sorted((pgdata / "base").iterdir())]
    for directory in directories:
        for name in sorted(entry.name for entry in directory.iterdir()):
            found = parse_relation_path(f"{directory.relative_to(pgdata)}/{name}")
            if found is not None:
                yield found


def bundle_paths(pgdata: Path) -> Iterator[tuple[str, bool]]:
    """What belongs in a bundle: (path below PGDATA, whether it is a directory), parents first.

    Free space maps do: they have no WAL of their own, and without them a new compute node would
    extend every table it inserts into.
    """
    for directory, subdirectories, files in os.walk(pgdata):
        subdirectories[:] = sorted(d for d in subdirectories if not d.startswith("pgsql_tmp"))
        relative = os.path.relpath(directory, pgdata)
        if relative != ".":
            yield relative, True
        top = relative.split("/", 1)[0]
        if top in _EMPTIED:
            subdirectories.clear()
            continue
        for name in sorted(files):
            path = name if relative == "." else f"{relative}/{name}"
            if name in _SKIPPED or _TEMPORARY.fullmatch(name) or name.startswith(_PREFIXES):
                continue
            relation = parse_relation_path(path)
            if relation is None or relation.fork.fork is Fork.FSM:
                yield path, False
