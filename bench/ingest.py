"""`python -m bench.ingest`: what it costs a storage node to index and materialize pgbench's WAL.

A stock PostgreSQL runs `pgbench -N` once; its WAL is then fed to a volume's page index in this
process. Times are CPU times, so that other work on the machine disturbs them less. `make bench`
measures whole clusters.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import structlog

from boreal.types import (
    PAGE_BYTES,
    Epoch,
    Fork,
    Lsn,
    PageKey,
    RelationFork,
    VolumeId,
    parse_lsn,
    wal_segment_start,
)
from boreal.wal import WalDecoder
from boreal.wal.touches import TouchDecoder
from storage_node.config import VolumeLayout
from storage_node.index import PageIndex
from storage_node.ingest import Ingest
from storage_node.layer import LAYER_LOG_BYTES, OpenLayer
from storage_node.layer_file import LayerImage
from storage_node.log import LogReader
from storage_node.materialize import Materializer
from storage_node.page_store import PageStore
from storage_node.redo.native import NativeRedo
from storage_node.segment import Segment, VolumeFacts
from tests.storage_node.recorded_run import read_relation_files
from tests.support.stock_postgres import StockPostgres, stock_postgres

_APPEND_BYTES = 1 << 20
_CHUNK_BYTES = 32 * 1024
_SETTINGS = {"full_page_writes": "off", "wal_level": "replica", "shared_buffers": "256MB"}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PgbenchWal:
    """The WAL of one pgbench run, and the files before it."""

    start: Lsn
    import_lsn: Lsn
    end: Lsn
    data: bytes
    files: dict[RelationFork, bytes]
    transactions: int


def _pgbench(server: StockPostgres, *arguments: str) -> str:
    connection = ("-h", str(server.socket_directory), "-p", "5432", "-U", "postgres")
    done = subprocess.run(
        [str(server.engine.tool("pgbench")), *connection, *arguments, "postgres"],
        env=server.engine.environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def record(scale: int, clients: int, seconds: int) -> PgbenchWal:
    """Run pgbench -N on a stock PostgreSQL."""
    with stock_postgres(_SETTINGS) as server:
        _pgbench(server, "-i", "-q", "-s", str(scale))
        server.stop()
        control = server.engine.run("pg_controldata", str(server.data))
        (line,) = [one for one in control.splitlines() if "Latest checkpoint location" in one]
        import_lsn = parse_lsn(line.split()[-1])
        files = read_relation_files(server.data)
        server.start()
        output = _pgbench(server, "-N", "-n", "-c", str(clients), "-j", "2", "-T", str(seconds))
        (row,) = server.run("SELECT pg_current_wal_flush_lsn()::text")
        end = parse_lsn(row[0])
        server.stop()
        first, wal = server.wal()
    start = wal_segment_start(import_lsn)
    (count,) = [one for one in output.splitlines() if "actually processed" in one]
    return PgbenchWal(
        start=start,
        import_lsn=import_lsn,
        end=end,
        data=wal[start - first : end - first],
        files=files,
        transactions=int(count.split()[-1].partition("/")[0]),
    )


class _Volume:
    """A volume with all of the WAL in its log."""

    def __init__(self, home: Path, wal: PgbenchWal) -> None:
        self.wal = wal
        self.layout = VolumeLayout(root=home / "volume")
        facts = VolumeFacts(system_identifier=1, start=wal.start)
        self.segment = Segment.create(self.layout, Epoch(1), facts)
        for at in range(0, len(wal.data), _APPEND_BYTES):
            piece = wal.data[at : at + _APPEND_BYTES]
            self.segment.stage(1, wal.start + at, piece, wal.start + at + len(piece))
            self.segment.flush()
        self.layout.pages.mkdir()
        self.store = PageStore(self.layout.pages)
        self.store.begin()
        for fork, content in wal.files.items():
            if fork.fork is not Fork.FSM:
                self.store.add(fork, 0, content)
        imported = self.store.seal(wal.import_lsn)
        self.index = PageIndex.open(self.layout.pages / "index", imported, log_start=wal.start)
        self.log = LogReader(self.layout.root)
        self.redo = NativeRedo()


def _show(what: str, seconds: float, count: int, unit: str = "record") -> None:
    rate = count / seconds if seconds else 0
    print(
        f"{what:<34}{seconds:8.2f} s{rate:12,.0f} {unit}s/s{seconds / count * 1e6:9.2f} us/{unit}"
    )


def _decode(wal: PgbenchWal, records: int, open_layer: OpenLayer) -> None:
    begin = time.thread_time()
    decoder = WalDecoder(wal.import_lsn)
    data = wal.data[wal.import_lsn - wal.start :]
    for at in range(0, len(data), _CHUNK_BYTES):
        for _ in decoder.feed(data[at : at + _CHUNK_BYTES]):
            pass
    _show("decode, every record parsed", time.thread_time() - begin, records)
    begin = time.thread_time()
    parsed = 0
    touches = TouchDecoder(wal.import_lsn, open_layer)
    for at in range(0, len(data), _CHUNK_BYTES):
        for _ in touches.feed(data[at : at + _CHUNK_BYTES]):
            parsed += 1
    _show("decode and note plain records", time.thread_time() - begin, records)
    print(f"  of which were parsed: {parsed / records:.1%}")


async def _index(volume: _Volume, records: int) -> None:
    """The ingest as it runs in a node; layers are sealed as they get full."""
    index = volume.index
    ingest = Ingest(
        volume=VolumeId("bench"),
        index=index,
        log=volume.log,
        shared=volume.segment.shared,
        redo=volume.redo,
    )
    sealing = 0.0
    begin_all = time.process_time()
    task = asyncio.create_task(ingest.run())
    pages = 0
    while index.sealed_to < volume.wal.end - PAGE_BYTES:
        await asyncio.sleep(0)
        if index.indexed >= volume.wal.end - PAGE_BYTES and index.frozen is None:
            index.freeze()
        if index.frozen is not None:
            pages += len(index.frozen.pages)
            started = time.process_time()
            image = LayerImage(index.frozen)
            for _ in image.steps():
                pass
            await index.seal(image)
            sealing += time.process_time() - started
            ingest.wake()
    task.cancel()
    await asyncio.wait([task])
    total = time.process_time() - begin_all
    _show("index: read, check, note", total - sealing, records)
    _show("seal", sealing, records)
    _show("index and seal", total, records)
    print(f"  {len(index.layers)} layers of {pages / len(index.layers):,.0f} pages")


def _materialize(volume: _Volume, most_seconds: float) -> None:
    """Every page that changed, as retirement would make it; as many as the time allows."""
    made = Materializer(
        imported_page=volume.store.page,
        read_log=lambda at, length: volume.log.read(at, Lsn(at + length)),
        redo=volume.redo,
        cached_pages=0,
    )
    applied = pages = longest = 0
    begin = time.thread_time()
    with volume.index.view() as view:
        lsn = volume.index.indexed
        for fork, blocks in sorted(view.relations(lsn).items()):
            for block in range(blocks):
                page = PageKey(fork, block)  # type: ignore[arg-type]
                if not view.entries(page, 0, lsn):
                    continue
                path = made.path(view, page, lsn)
                made.walk(path, path.length)
                applied += path.length
                longest = max(longest, path.length)
                pages += 1
            if time.thread_time() - begin > most_seconds:
                break
    seconds = time.thread_time() - begin
    _show("materialize", seconds, applied)
    _show("", seconds, pages, "page")
    print(f"  {pages} pages, {applied / max(pages, 1):.1f} records each, {longest} at most")


@click.command()
@click.option("--scale", default=20, show_default=True)
@click.option("--clients", default=16, show_default=True)
@click.option("--seconds", default=15, show_default=True, help="How long pgbench runs.")
@click.option("--materialize-seconds", default=30.0, show_default=True)
def main(scale: int, clients: int, seconds: int, materialize_seconds: float) -> None:
    """Measure."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    wal = record(scale, clients, seconds)
    decoder = WalDecoder(wal.import_lsn)
    records = sum(1 for _ in decoder.feed(wal.data[wal.import_lsn - wal.start :]))
    size = wal.end - wal.import_lsn
    print(
        f"{wal.transactions} transactions, {records} records "
        f"({records / wal.transactions:.1f} each), {size / records:.0f} bytes a record"
    )
    home = Path(tempfile.mkdtemp(prefix="boreal-bench-"))
    try:
        volume = _Volume(home, wal)
        spare = OpenLayer(wal.import_lsn, lambda *_: 1 << 30, log_bytes=LAYER_LOG_BYTES, hot_at=32)
        _decode(wal, records, spare)
        asyncio.run(_index(volume, records))
        _materialize(volume, materialize_seconds)
        volume.index.close()
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
