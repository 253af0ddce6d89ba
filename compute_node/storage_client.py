"""One storage node as its callers see it: typed calls with deadlines that fail as BorealErrors.

Protobuf and gRPC stop here. Which node to ask, and how many must answer, is `compute_node.fleet`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from boreal.errors import CorruptData, MalformedRequest
from boreal.quorum import Lineage, SegmentState
from boreal.rpc import common_pb2, storage_pb2, storage_pb2_grpc
from boreal.rpc.edge import (
    calling,
    fork_from_wire,
    fork_to_wire,
    lineage_from_wire,
    lineage_to_wire,
    open_channel,
    volume_ref,
)
from boreal.types import (
    PAGE_BYTES,
    BlockNumber,
    Epoch,
    Lsn,
    NodeName,
    RelationFork,
    Timeline,
    VolumeId,
    format_lsn,
)
from compute_node.page_lane import PageLane

MAX_PAGES_PER_CALL = 1024
"""GetPagesRequest.count, proto/storage.proto."""
MAX_IMPORT_PAGES = 128
"""ImportPagesRequest.pages: 1 MiB."""
_CONTENT_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long a call that changes something may take, in seconds. Reads are told by the caller."""

    call_s: float = 5.0
    """A call that changes a little durable state."""
    content_s: float = 60.0
    """One file of a bundle."""
    import_s: float = 600.0
    """The import of a fresh volume."""


class VolumeEpoch(NamedTuple):
    """What every call names: the volume, and the epoch the caller acts under."""

    volume: VolumeId
    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where a storage node listens, as HOST:PORT."""

    log: str
    frames: str
    pages: str
    page_frames: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentPosition:
    """Where one node's segment of the volume stands."""

    state: SegmentState
    system_identifier: int
    writer_silent_s: float = 0.0
    """In the answer to Fence: how long, at the least, the node had not heard from a writer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexState:
    """How far one node's page index has come, and why it stopped if it did."""

    indexed: Lsn
    scl: Lsn
    failure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRun:
    """Whole consecutive pages of one fork, for the import of a fresh volume. None: it is empty."""

    relation: RelationFork
    first: BlockNumber
    pages: bytes

    def __post_init__(self) -> None:
        if len(self.pages) % PAGE_BYTES:
            raise MalformedRequest(
                f"{len(self.pages)} bytes of {self.relation} are not whole pages"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleFile:
    """One file of a bundle. `sha256` is empty for a directory."""

    path: str
    sha256: bytes
    size_bytes: int
    mode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleManifest:
    """What a compute node is rebuilt from, besides pages and log (design section 5)."""

    redo: Lsn
    end: Lsn
    timeline: Timeline
    epoch: Epoch
    taken_at: str
    files: tuple[BundleFile, ...]


class StorageClient:
    """The three services of one storage node, and its lane of GetPages.

    Connections are made anew by themselves. A call raises the error the node answered, Unreachable
    if the node is not there, or UnknownOutcome once its deadline passed.
    """

    def __init__(self, name: NodeName, addresses: Addresses, deadlines: Deadlines) -> None:
        self.name = name
        self.addresses = addresses
        self._deadlines = deadlines
        self._log_channel = open_channel(addresses.log)
        self._pages_channel = open_channel(addresses.pages)
        self._page_lane = PageLane(name, addresses.page_frames)
        self._log = storage_pb2_grpc.StorageLogStub(self._log_channel)
        self._bundles = storage_pb2_grpc.BundlesStub(self._log_channel)
        self._pages = storage_pb2_grpc.StoragePagesStub(self._pages_channel)

    async def close(self, *, grace_s: float | None = None) -> None:
        """Let the connections go; calls under way have `grace_s` to end, else are cancelled."""
        await asyncio.gather(
            self._log_channel.close(grace_s),
            self._pages_channel.close(grace_s),
            self._page_lane.close(grace_s=grace_s or 0.0),
        )

    # --- log ---------------------------------------------------------------------------------

    async def create_volume(
        self,
        on: VolumeEpoch,
        *,
        system_identifier: int,
        start: Lsn,
    ) -> SegmentPosition:
        """Make the node's segment of a new volume; idempotent for equal arguments."""
        request = storage_pb2.CreateVolumeRequest(
            volume=volume_ref(*on),
            system_identifier=system_identifier,
            start_lsn=start,
        )
        with calling(self.name, "CreateVolume"):
            return _position(await self._log.CreateVolume(request, timeout=self._deadlines.call_s))

    async def drop_volume(self, on: VolumeEpoch) -> None:
        """Remove the node's segment; idempotent."""
        request = storage_pb2.DropVolumeRequest(volume=volume_ref(*on))
        with calling(self.name, "DropVolume"):
            await self._log.DropVolume(request, timeout=self._deadlines.call_s)

    async def position(self, on: VolumeEpoch, *, within_s: float) -> SegmentPosition:
        """Where the segment stands."""
        request = storage_pb2.GetPositionRequest(volume=volume_ref(*on))
        with calling(self.name, "GetPosition"):
            return _position(await self._log.GetPosition(request, timeout=within_s))

    async def fence(self, on: VolumeEpoch) -> SegmentPosition:
        """Recovery step 1: have the node refuse every epoch older than `epoch` from now on."""
        request = storage_pb2.FenceRequest(volume=volume_ref(*on))
        with calling(self.name, "Fence"):
            return _position(await self._log.Fence(request, timeout=self._deadlines.call_s))

    async def adopt(self, on: VolumeEpoch, lineage: Lineage) -> SegmentPosition:
        """Recovery step 4: have the node take `lineage` and discard what parts from it."""
        request = storage_pb2.AdoptRequest(volume=volume_ref(*on), lineage=lineage_to_wire(lineage))
        with calling(self.name, "Adopt"):
            return _position(await self._log.Adopt(request, timeout=self._deadlines.call_s))

    async def read_log(self, on: VolumeEpoch, start: Lsn, end: Lsn, *, within_s: float) -> bytes:
        """Log bytes [start, end), held in memory; CorruptData unless every byte came."""
        request = storage_pb2.GetLogRequest(volume=volume_ref(*on), start_lsn=start, end_lsn=end)
        log = bytearray()
        with calling(self.name, "GetLog"):
            async for chunk in self._log.GetLog(request, timeout=within_s):
                if chunk.start_lsn != start + len(log):
                    raise CorruptData(
                        f"{self.name} sent log from {format_lsn(chunk.start_lsn)} where "
                        f"{format_lsn(start + len(log))} was due"
                    )
                log += chunk.data
        if len(log) != end - start:
            raise CorruptData(
                f"{self.name} sent {len(log)} bytes of log from {format_lsn(start)}, "
                f"not {end - start}"
            )
        return bytes(log)

    # --- pages -------------------------------------------------------------------------------

    def get_pages(
        self,
        on: VolumeEpoch,
        relation: RelationFork,
        first: BlockNumber,
        count: int,
        *,
        lsn: Lsn,
        lineage_epoch: Epoch,
        within_s: float,
    ) -> asyncio.Future[list[bytes | None]]:
        """`count` pages as of `lsn`; None for a block the fork did not have at that LSN."""
        request = storage_pb2.GetPagesRequest(
            volume=volume_ref(*on),
            fork=fork_to_wire(relation),
            first_block=first,
            count=count,
            lsn=lsn,
            lineage_epoch=lineage_epoch,
        )
        return self._page_lane.get_pages(request, within_s)

    async def digest_pages(
        self,
        on: VolumeEpoch,
        ranges: Iterable[tuple[RelationFork, int, int]],
        *,
        lsn: Lsn,
        lineage_epoch: Epoch,
        within_s: float,
    ) -> bytes:
        """`boreal.pages.digest_pages` of what `get_pages` would return for all the ranges in turn,
        each (fork, first block, count); MAX_PAGES_PER_CALL pages at most."""
        request = storage_pb2.DigestPagesRequest(
            volume=volume_ref(*on),
            ranges=(
                storage_pb2.PageRange(fork=fork_to_wire(fork), first_block=first, count=count)
                for fork, first, count in ranges
            ),
            lsn=lsn,
            lineage_epoch=lineage_epoch,
        )
        with calling(self.name, "DigestPages"):
            return (await self._pages.DigestPages(request, timeout=within_s)).sha256

    async def list_relations(
        self, on: VolumeEpoch, *, lsn: Lsn, lineage_epoch: Epoch, within_s: float
    ) -> dict[RelationFork, int]:
        """Every relation fork that exists at `lsn`, with its size in blocks."""
        request = storage_pb2.ListRelationsRequest(
            volume=volume_ref(*on), lsn=lsn, lineage_epoch=lineage_epoch
        )
        sizes: dict[RelationFork, int] = {}
        with calling(self.name, "ListRelations"):
            async for batch in self._pages.ListRelations(request, timeout=within_s):
                sizes.update((fork_from_wire(r.fork), r.blocks) for r in batch.relations)
        return sizes

    async def index_state(self, on: VolumeEpoch, *, within_s: float) -> IndexState:
        """How far the page index has come."""
        request = storage_pb2.GetIndexStateRequest(volume=volume_ref(*on))
        with calling(self.name, "GetIndexState"):
            state = await self._pages.GetIndexState(request, timeout=within_s)
        return IndexState(
            indexed=Lsn(state.indexed_lsn), scl=Lsn(state.log_scl), failure=state.failure
        )

    async def import_pages(self, on: VolumeEpoch, lsn: Lsn, runs: Iterable[PageRun]) -> int:
        """Give a fresh volume its base: all pages count as of `lsn`. Return how many were taken."""
        with calling(self.name, "ImportPages"):
            response = await self._pages.ImportPages(
                _import_requests(volume_ref(*on), lsn, runs),
                timeout=self._deadlines.import_s,
            )
        return response.pages

    # --- bundles -----------------------------------------------------------------------------

    async def find_missing(self, on: VolumeEpoch, hashes: Iterable[bytes]) -> frozenset[bytes]:
        """Which of these contents the node lacks."""
        request = storage_pb2.FindMissingRequest(volume=volume_ref(*on), sha256=hashes)
        with calling(self.name, "FindMissing"):
            response = await self._bundles.FindMissing(request, timeout=self._deadlines.call_s)
        return frozenset(response.sha256)

    async def put_content(self, on: VolumeEpoch, sha256: bytes, content: bytes) -> None:
        """Store one file's content under its hash."""
        ref = volume_ref(*on)
        requests = (
            storage_pb2.PutContentRequest(volume=ref, sha256=sha256, data=chunk)
            for chunk in _chunks(content)
        )
        with calling(self.name, "PutContent"):
            await self._bundles.PutContent(requests, timeout=self._deadlines.content_s)

    async def put_manifest(self, on: VolumeEpoch, manifest: BundleManifest) -> None:
        """Make a bundle known on this node, which holds all its contents already."""
        request = storage_pb2.PutManifestRequest(
            volume=volume_ref(*on), manifest=_manifest_to_wire(manifest)
        )
        with calling(self.name, "PutManifest"):
            await self._bundles.PutManifest(request, timeout=self._deadlines.call_s)

    async def get_manifest(
        self, on: VolumeEpoch, max_end: Lsn, *, within_s: float
    ) -> BundleManifest:
        """The node's newest bundle that ends at or below `max_end` (0: any); NoBundle if none."""
        request = storage_pb2.GetManifestRequest(volume=volume_ref(*on), max_end_lsn=max_end)
        with calling(self.name, "GetManifest"):
            return _manifest_from_wire(await self._bundles.GetManifest(request, timeout=within_s))

    async def get_content(self, on: VolumeEpoch, sha256: bytes, *, within_s: float) -> bytes:
        """One content, checked against its hash."""
        request = storage_pb2.GetContentRequest(volume=volume_ref(*on), sha256=sha256)
        content = bytearray()
        with calling(self.name, "GetContent"):
            async for chunk in self._bundles.GetContent(request, timeout=within_s):
                content += chunk.data
        if hashlib.sha256(content).digest() != sha256:
            raise CorruptData(f"{self.name} sent another content than {sha256.hex()}")
        return bytes(content)


def _position(wire: storage_pb2.Position) -> SegmentPosition:
    return SegmentPosition(
        state=SegmentState(
            promised=Epoch(wire.promised_epoch),
            lineage=lineage_from_wire(wire.lineage),
            start=Lsn(wire.start_lsn),
            scl=Lsn(wire.scl),
            vdl=Lsn(wire.vdl),
        ),
        system_identifier=wire.system_identifier,
        writer_silent_s=wire.writer_silent_ms / 1000,
    )


def _import_requests(
    ref: common_pb2.VolumeRef, lsn: Lsn, runs: Iterable[PageRun]
) -> Iterator[storage_pb2.ImportPagesRequest]:
    limit_bytes = MAX_IMPORT_PAGES * PAGE_BYTES
    for run in runs:
        for start in range(0, max(len(run.pages), 1), limit_bytes):
            yield storage_pb2.ImportPagesRequest(
                volume=ref,
                lsn=lsn,
                fork=fork_to_wire(run.relation),
                first_block=run.first + start // PAGE_BYTES,
                pages=run.pages[start : start + limit_bytes],
            )
    yield storage_pb2.ImportPagesRequest(volume=ref, lsn=lsn, last=True)


def _chunks(content: bytes) -> Iterator[bytes]:
    """At least one chunk: an empty file is a content too."""
    for start in range(0, max(len(content), 1), _CONTENT_CHUNK_BYTES):
        yield content[start : start + _CONTENT_CHUNK_BYTES]


def _manifest_to_wire(manifest: BundleManifest) -> storage_pb2.BundleManifest:
    return storage_pb2.BundleManifest(
        redo_lsn=manifest.redo,
        end_lsn=manifest.end,
        timeline=manifest.timeline,
        epoch=manifest.epoch,
        taken_at=manifest.taken_at,
        files=(
            storage_pb2.BundleFile(
                path=file.path, sha256=file.sha256, size_bytes=file.size_bytes, mode=file.mode
            )
            for file in manifest.files
        ),
    )


def _manifest_from_wire(wire: storage_pb2.BundleManifest) -> BundleManifest:
    return BundleManifest(
        redo=Lsn(wire.redo_lsn),
        end=Lsn(wire.end_lsn),
        timeline=Timeline(wire.timeline),
        epoch=Epoch(wire.epoch),
        taken_at=wire.taken_at,
        files=tuple(
            BundleFile(path=f.path, sha256=f.sha256, size_bytes=f.size_bytes, mode=f.mode)
            for f in wire.files
        ),
    )
