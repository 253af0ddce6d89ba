"""Builds volumes out of a recorded run: a real segment, a real import, a real index."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

from boreal.rpc import storage_pb2
from boreal.rpc.edge import fork_to_wire, volume_ref
from boreal.types import PAGE_BYTES, Epoch, Fork, Lsn, NodeName, VolumeId
from storage_node.compaction import Compaction
from storage_node.config import CHAIN_RECORDS, RETAIN_LOG_BYTES, StorageConfig
from storage_node.index import PageIndex
from storage_node.ingest import Ingest
from storage_node.materialize import Materializer
from storage_node.page_store import PageStore
from storage_node.redo import Redo
from storage_node.redo.native import NativeRedo
from storage_node.retire import Retirement
from storage_node.segment import Segment, VolumeFacts
from storage_node.settle import QUIET_S
from tests.storage_node.recorded_run import RecordedRun

VOLUME = VolumeId("volume-1")
EPOCH = Epoch(1)
_MESSAGE_BYTES = 32 * PAGE_BYTES
_APPEND_BYTES = 1 << 20
WAIT_S = 60.0


def storage_config(data_dir: Path, pages_port: int = 0, page_frames_port: int = 0) -> StorageConfig:
    """A node that serves pages only."""
    (data_dir / "volumes").mkdir(parents=True, exist_ok=True)
    return StorageConfig(
        name=NodeName("sn-1"),
        zone="a",
        data_dir=data_dir,
        host="127.0.0.1",
        control="127.0.0.1:1",
        log_port=1,
        frames_port=2,
        pages_port=pages_port,
        page_frames_port=page_frames_port,
    )


def make_segment(config: StorageConfig, run: RecordedRun, *, volume: VolumeId = VOLUME) -> Segment:
    """The empty segment of a volume."""
    facts = VolumeFacts(system_identifier=run.system_identifier, start=run.wal_start)
    return Segment.create(config.volume(volume), EPOCH, facts)


def append(segment: Segment, run: RecordedRun, end: Lsn, vdl: Lsn | None = None) -> None:
    """Append the run's WAL up to `end`; all of it is durable unless `vdl` says otherwise."""
    epoch = segment.state.lineage.last.epoch
    for at in range(segment.state.scl, end, _APPEND_BYTES):
        stop = min(at + _APPEND_BYTES, end)
        data = run.wal[at - run.wal_start : stop - run.wal_start]
        segment.stage(epoch, at, data, min(vdl or end, end))
        segment.flush()


def tell_vdl(segment: Segment, vdl: Lsn) -> None:
    """An append without bytes."""
    segment.stage(segment.state.lineage.last.epoch, segment.state.scl, b"", vdl)
    segment.flush()


def import_messages(
    run: RecordedRun, volume: VolumeId = VOLUME, epoch: int = EPOCH
) -> Iterator[storage_pb2.ImportPagesRequest]:
    """The stream that imports the run's first files."""
    ref = volume_ref(volume, epoch)
    for fork, content in run.imported.items():
        for at in range(0, max(len(content), 1), _MESSAGE_BYTES):
            yield storage_pb2.ImportPagesRequest(
                volume=ref,
                lsn=run.import_lsn,
                fork=fork_to_wire(fork),
                first_block=at // PAGE_BYTES,
                pages=content[at : at + _MESSAGE_BYTES],
            )
    yield storage_pb2.ImportPagesRequest(volume=ref, lsn=run.import_lsn, last=True)


def fill_store(directory: Path, run: RecordedRun) -> PageStore:
    """A sealed store of the run's first files."""
    directory.mkdir(parents=True, exist_ok=True)
    store = PageStore(directory)
    store.begin()
    for fork, content in run.imported.items():
        if fork.fork is not Fork.FSM:
            store.add(fork, 0, content)
    store.seal(run.import_lsn)
    return store


class Indexed:
    """A volume's parts, put together in this process."""

    def __init__(
        self,
        segment: Segment,
        store: PageStore,
        *,
        redo: Redo | None = None,
        retain_bytes: int = RETAIN_LOG_BYTES,
        chain_records: int = CHAIN_RECORDS,
        quiet_s: float = QUIET_S,
    ) -> None:
        self.segment = segment
        self.store = store
        assert store.imported is not None
        shared = segment.shared
        self.index = PageIndex.open(
            segment.layout.pages / "index",
            store.imported,
            log_start=shared.start,
            retain_bytes=retain_bytes,
            chain_records=chain_records,
        )
        self.ingest = Ingest(
            volume=VOLUME,
            index=self.index,
            log=segment.reader,
            shared=shared,
            redo=redo or NativeRedo(),
        )
        self.materializer = Materializer(
            imported_page=store.page,
            read_log=lambda at, length: segment.reader.read(at, Lsn(at + length)),
            redo=redo or NativeRedo(),
        )
        self.retirement = Retirement(
            index=self.index,
            materializer=self.materializer,
            floor=lambda: shared.floor,
            retain_bytes=retain_bytes,
        )
        self.compaction = Compaction(
            volume=VOLUME,
            index=self.index,
            materializer=self.materializer,
            shared=shared,
            retirement=self.retirement,
            chain_records=chain_records,
            on_sealed=self.ingest.wake,
            quiet_s=quiet_s,
        )
        self.ingest.on_work = self.compaction.wake

    def close(self) -> None:
        self.index.close()
        self.store.close()
        self.segment.close()


@asynccontextmanager
async def running(indexed: Indexed) -> AsyncIterator[Ingest]:
    """Let the ingest and the work in the background run."""
    tasks = [
        asyncio.create_task(indexed.ingest.run()),
        asyncio.create_task(indexed.compaction.run()),
    ]
    try:
        yield indexed.ingest
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
