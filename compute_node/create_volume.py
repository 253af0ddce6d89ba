"""Making a volume: initdb, then everything it wrote goes to the six storage nodes, once.

The only time pages cross the network towards storage. The volume's log begins with the WAL segment
that holds initdb's last checkpoint, so that a compute node can start from the first bundle as from
any other.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from boreal.engine import Engine
from boreal.errors import CorruptWal, ProcessFailed, QuorumUnavailable
from boreal.frames import MAX_APPEND_BYTES
from boreal.quorum import DurabilityTracker, Lineage, QuorumRule
from boreal.rpc import control_pb2
from boreal.types import (
    PAGE_BYTES,
    RELATION_SEGMENT_BLOCKS,
    BlockNumber,
    Epoch,
    Fork,
    Lsn,
    Timeline,
    VolumeId,
    parse_lsn,
    wal_file_name,
    wal_segment_start,
)
from boreal.wal import last_record_end
from compute_node import pgdata
from compute_node.bundle import Bundle, collect_files
from compute_node.config import ADMIN, DATABASE, ComputeConfig
from compute_node.fleet import Fleet
from compute_node.postgres import create_roles_sql
from compute_node.replica_status import create_functions_sql
from compute_node.shipper import Shipper, storage_addresses
from compute_node.storage_client import MAX_IMPORT_PAGES, PageRun

_log = structlog.get_logger(__name__)

_EVERY_NODE = QuorumRule(copies=6, write=6, read=1)
_SHIP_TIMEOUT_S = 60
_TEMPLATES = ("template0", "template1")
"""What databases to come are copies of. template0 takes no connections, but a single user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshCluster:
    """A PostgreSQL data directory nobody has used yet, shut down cleanly."""

    path: Path
    system_identifier: int
    checkpoint: Lsn
    """Where its last checkpoint record begins: replay starts here."""
    end: Lsn
    """Where its WAL ends: the base pages count as of here."""
    wal: bytes
    """Its WAL from the start of the checkpoint's segment up to `end`."""


def make_cluster(config: ComputeConfig, engine: Engine) -> FreshCluster:
    """Run initdb, make the roles and functions, shut down. Blocking: a second or two."""
    path = config.data_dir / "initdb"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    engine.account.own(path)
    engine.run(
        "initdb",
        f"--pgdata={path}",
        f"--username={ADMIN}",
        "--encoding=UTF8",
        "--locale=C.UTF-8",
        "--auth=reject",
        "--no-sync",
        "--no-instructions",
    )
    for database in _TEMPLATES:
        _run_single_user(engine, path, database, create_functions_sql())
    _run_single_user(
        engine, path, DATABASE, create_functions_sql() + create_roles_sql(config.master_password)
    )
    control = engine.run("pg_controldata", str(path))
    checkpoint = parse_lsn(_field(control, "Latest checkpoint location"))
    start = wal_segment_start(checkpoint)
    segment = (path / "pg_wal" / wal_file_name(1, start)).read_bytes()
    end = last_record_end(segment, start)
    if end is None:
        raise CorruptWal("initdb left no WAL record", lsn=start)
    return FreshCluster(
        path=path,
        system_identifier=int(_field(control, "Database system identifier")),
        checkpoint=checkpoint,
        end=end,
        wal=segment[: end - start],
    )


def _run_single_user(engine: Engine, path: Path, database: str, statements: str) -> None:
    done = subprocess.run(
        [
            *(str(engine.tool("postgres")), "--single", "-D", str(path)),
            *("-c", "fsync=off", "-c", "exit_on_error=true", "-c", "log_checkpoints=off", database),
        ],
        input=statements,
        env=engine.environment(),
        capture_output=True,
        text=True,
        cwd=path,
        timeout=60,
        check=False,
        **engine.account.popen_arguments(),
    )
    if done.returncode != 0:
        raise ProcessFailed(f"could not prepare {database}: {done.stderr.strip()[-2000:]}")


def _field(controldata: str, name: str) -> str:
    match = re.search(rf"^{re.escape(name)}:\s+(\S+)$", controldata, re.MULTILINE)
    if match is None:
        raise ProcessFailed(f"pg_controldata does not tell «{name}»")
    return match.group(1)


def base_pages(cluster: Path) -> Iterator[PageRun]:
    """Every page of every relation, fork by fork; free space maps stay with the bundle."""
    step = MAX_IMPORT_PAGES * PAGE_BYTES
    for file in pgdata.relation_files(cluster):
        if file.fork.fork is Fork.FSM:
            continue
        first = file.segment * RELATION_SEGMENT_BLOCKS
        content = (cluster / file.path).read_bytes()
        for offset in range(0, max(len(content), 1), step):
            yield PageRun(
                relation=file.fork,
                first=BlockNumber(first + offset // PAGE_BYTES),
                pages=content[offset : offset + step],
            )


async def create_volume(
    config: ComputeConfig,
    engine: Engine,
    volume: VolumeId,
    epoch: Epoch,
    members: Sequence[control_pb2.StorageNode],
) -> int:
    """Make `volume` on every storage node; return its PostgreSQL system identifier.

    Needs all six nodes: the base pages are the one thing a node cannot get from its peers' logs.
    Raises what the fleet raises; a volume left half made is never used, the next attempt gets
    another id.
    """
    began = time.monotonic()
    cluster = await asyncio.to_thread(make_cluster, config, engine)
    _log.info("initdb done", seconds=round(time.monotonic() - began, 2))
    start = wal_segment_start(cluster.checkpoint)
    fleet = Fleet(volume, epoch, rule=_EVERY_NODE)
    try:
        await fleet.set_members(members)
        await fleet.create_volume(
            system_identifier=cluster.system_identifier,
            start=start,
        )
        await fleet.import_pages(cluster.end, lambda: base_pages(cluster.path))
        await _ship(volume, Lineage.of([(epoch, start)]), cluster.wal, members)
        bundle = Bundle(
            redo=cluster.end,
            end=cluster.end,
            timeline=Timeline(1),
            files=tuple(await asyncio.to_thread(lambda: list(collect_files(cluster.path)))),
        )
        await bundle.store(fleet)
    finally:
        await fleet.close()
        await asyncio.to_thread(shutil.rmtree, cluster.path)
    _log.info("volume made", volume=volume, seconds=round(time.monotonic() - began, 2))
    return cluster.system_identifier


async def _ship(
    volume: VolumeId, lineage: Lineage, wal: bytes, members: Sequence[control_pb2.StorageNode]
) -> None:
    start = lineage.last.start
    end = start + len(wal)
    durable = asyncio.Event()

    def on_vdl(vdl: Lsn) -> None:
        if vdl >= end:
            durable.set()

    shipper = Shipper(
        volume=volume,
        lineage=lineage,
        start=start,
        tracker=DurabilityTracker(_EVERY_NODE, start),
        members=storage_addresses(members),
        on_vdl=on_vdl,
    )
    shipping = asyncio.create_task(shipper.run())
    waiting = asyncio.create_task(durable.wait())
    try:
        for at in range(0, len(wal), MAX_APPEND_BYTES):
            shipper.push(Lsn(start + at), wal[at : at + MAX_APPEND_BYTES])
        done, _ = await asyncio.wait(
            {shipping, waiting}, timeout=_SHIP_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        if shipping in done:
            shipping.result()  # raises what ended it
        if waiting not in done:
            raise QuorumUnavailable(
                f"not every storage node has the first log after {_SHIP_TIMEOUT_S} s"
            )
    finally:
        shipping.cancel()
        waiting.cancel()
        await asyncio.wait({shipping, waiting})
