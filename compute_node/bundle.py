"""Bundles: all a compute node needs besides pages and log.

A bundle is a data directory without its relation files: the control file, CLOG, multixact, relation
maps, free space maps, a few hundred kilobytes. Storage keeps it without looking inside. A new
compute node lays it out, puts sparse relation files of the right length beside it, and lets stock
redo do the rest.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psycopg

from boreal.engine import Engine
from boreal.errors import CorruptData
from boreal.types import (
    PAGE_BYTES,
    WAL_SEGMENT_BYTES,
    Fork,
    Lsn,
    RelationFork,
    Timeline,
    wal_file_name,
    wal_segment_start,
)
from boreal.wal import Rmgr, WalDecoder
from compute_node import control_file, pgdata
from compute_node.fleet import BundlePut, Fleet
from compute_node.postgres import make_durable
from compute_node.storage_client import BundleFile, BundleManifest

_FETCHES_AT_ONCE = 16
_RUNNING_XACTS = 0x10
_OVERFLOW_AT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectedFile:
    """One file or directory of a bundle. `content` is None for a directory."""

    path: str
    content: bytes | None
    mode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Files, and the stretch of log that makes them consistent."""

    redo: Lsn
    """Replay starts here; relation sizes are those of this LSN."""
    end: Lsn
    """Consistent from here on."""
    timeline: Timeline
    files: tuple[CollectedFile, ...]

    async def store(self, fleet: Fleet) -> BundlePut:
        """Put it on a write quorum; contents a node has already are not sent again.

        The log up to `end` must be durable before: a bundle ahead of the log is one that recovery
        may cut the ground from under.
        """
        contents: dict[bytes, bytes] = {}
        listed = []
        for file in self.files:
            digest = b"" if file.content is None else hashlib.sha256(file.content).digest()
            if file.content is not None:
                contents[digest] = file.content
            size = len(file.content or b"")
            listed.append(
                BundleFile(path=file.path, sha256=digest, size_bytes=size, mode=file.mode)
            )
        manifest = BundleManifest(
            redo=self.redo,
            end=self.end,
            timeline=self.timeline,
            epoch=fleet.epoch,
            taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
            files=tuple(listed),
        )
        return await fleet.put_bundle(manifest, contents.__getitem__)


def collect_files(path: Path) -> Iterator[CollectedFile]:
    """Read what belongs in a bundle from a data directory. Files may vanish meanwhile."""
    for relative, is_directory in pgdata.bundle_paths(path):
        try:
            mode = (path / relative).stat().st_mode & 0o777
            content = None if is_directory else _read_settled(path / relative)
        except FileNotFoundError:
            continue
        yield CollectedFile(path=relative, content=content, mode=mode)


def _read_settled(file: Path) -> bytes:
    """Read a small file that PostgreSQL may be writing, untorn: until two reads agree."""
    before = file.read_bytes()
    while (after := file.read_bytes()) != before:
        before = after
    return after


async def take(
    connection: psycopg.AsyncConnection[tuple[object, ...]], path: Path, timeline: Timeline
) -> Bundle:
    """Take a bundle of the running writer; returns when the log up to its end is durable.

    Not by pg_backup_start and pg_backup_stop: each forces PostgreSQL to a new WAL segment, and so
    ships up to 16 MiB of zeros to six nodes. What they add is of no use here. They guard against
    torn relation pages, but those come from storage, as of the LSN being replayed; the other files
    are in the state recovery expects them in, that of any moment after the checkpoint.
    """
    await connection.execute("checkpoint")
    # Read before the others: what they hold is then never older than the checkpoint it names.
    control = _read_settled(path / control_file.PATH)
    files = await asyncio.to_thread(lambda: tuple(collect_files(path)))
    end = await make_durable(connection)
    redo, _ = control_file.redo_of(control)
    standby = CollectedFile(
        path=control_file.PATH, content=control_file.as_standby(control, end), mode=0o600
    )
    others = (file for file in files if file.path != control_file.PATH)
    return Bundle(redo=redo, end=end, timeline=timeline, files=(*others, standby))


def would_wait(path: Path, redo: Lsn, end: Lsn, timeline: Timeline) -> bool:
    """Whether a standby that replays [redo, end) has to wait for more before it can be read.

    So it is if the last list of running transactions in there lacks some of their subtransactions
    (xl_running_xacts, standbydefs.h; ProcArrayApplyRecoveryInfo, procarray.c). A crash may be all
    that follows, so such a moment makes no bundle.
    """
    wal = bytearray()
    segment = wal_segment_start(redo)
    while segment < end:
        wal += (path / "pg_wal" / wal_file_name(timeline, segment)).read_bytes()
        segment = Lsn(segment + WAL_SEGMENT_BYTES)
    base = wal_segment_start(redo)
    overflowed = False
    for record in WalDecoder(redo).feed(bytes(wal[redo - base : end - base])):
        if record.rmgr == Rmgr.STANDBY and record.info == _RUNNING_XACTS:
            overflowed = record.main_data[_OVERFLOW_AT] != 0
    return overflowed


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What it took to lay out a PGDATA."""

    bytes_written: int
    relations_ms: int
    """Until storage had told the sizes of all relations, which waits for its index."""
    contents_ms: int
    """Then, until all files were there."""
    written_ms: int


async def restore(manifest: BundleManifest, fleet: Fleet, path: Path, engine: Engine) -> Restored:
    """Lay out `path` (empty, existing) from a bundle.

    Afterwards it holds a standby that needs only a feed and a page service. Relation files are
    sparse: their length is right, their content comes on demand.
    """
    began = time.monotonic()
    relations = await fleet.list_relations(manifest.redo)
    listed = time.monotonic()
    contents = await _fetch(fleet, {file.sha256 for file in manifest.files if file.sha256})
    fetched = time.monotonic()

    def lay_out() -> None:
        for file in manifest.files:
            _place(path, file, contents, engine)
        for fork, blocks in relations.items():
            if fork.fork is not Fork.FSM:
                _make_sparse(path, fork, blocks, engine)
        _write(path / "standby.signal", b"", 0o600, engine)

    await asyncio.to_thread(lay_out)
    return Restored(
        bytes_written=sum(file.size_bytes for file in manifest.files),
        relations_ms=round(1000 * (listed - began)),
        contents_ms=round(1000 * (fetched - listed)),
        written_ms=round(1000 * (time.monotonic() - fetched)),
    )


async def _fetch(fleet: Fleet, digests: set[bytes]) -> dict[bytes, bytes]:
    gate = asyncio.Semaphore(_FETCHES_AT_ONCE)

    async def fetch(digest: bytes) -> bytes:
        async with gate:
            return await fleet.get_content(digest)

    async with asyncio.TaskGroup() as group:
        tasks = {digest: group.create_task(fetch(digest)) for digest in digests}
    return {digest: task.result() for digest, task in tasks.items()}


def _place(path: Path, file: BundleFile, contents: dict[bytes, bytes], engine: Engine) -> None:
    target = path / file.path
    if not target.resolve().is_relative_to(path.resolve()):
        raise CorruptData(f"a bundle names a file outside PGDATA: {file.path!r}")
    if not file.sha256:
        target.mkdir(mode=file.mode, exist_ok=True)
        engine.account.own(target)
        return
    _write(target, contents[file.sha256], file.mode, engine)


def _make_sparse(path: Path, fork: RelationFork, blocks: int, engine: Engine) -> None:
    for segment, size in pgdata.segment_sizes(blocks):
        target = path / pgdata.relation_path(fork, segment)
        if not target.parent.exists():
            continue  # its database was dropped while the bundle was taken; redo drops it again
        with target.open("wb") as file:
            file.truncate(size * PAGE_BYTES)
        target.chmod(0o600)
        engine.account.own(target)


def _write(target: Path, content: bytes, mode: int, engine: Engine) -> None:
    target.write_bytes(content)
    target.chmod(mode)
    engine.account.own(target)
