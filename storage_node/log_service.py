"""The gRPC services of the log process: StorageLog and Bundles. Protobuf stops here."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from typing import Any

from grpc import aio

from boreal.errors import BeyondLog, MalformedRequest, OversizeRequest
from boreal.frames import MAX_APPEND_BYTES
from boreal.rpc import storage_pb2, storage_pb2_grpc
from boreal.rpc.common_pb2 import VolumeRef
from boreal.rpc.edge import epoch_of, lineage_from_wire, lineage_to_wire
from boreal.types import Lsn, NodeName, format_lsn
from storage_node.append import AppendHandler
from storage_node.bundles import IncomingContent
from storage_node.config import check_volume_id
from storage_node.segment import Segment, VolumeFacts
from storage_node.volumes import Volumes

LOG_CHUNK_BYTES = 256 * 1024
"""Small enough that reading one holds up an append by a fraction of a millisecond."""
_CONTENT_CHUNK_BYTES = 1024 * 1024
_MAX_HASHES = 65536

Context = aio.ServicerContext[Any, Any]


def position_of(node: NodeName, segment: Segment) -> storage_pb2.Position:
    """Where a segment stands."""
    state = segment.state
    return storage_pb2.Position(
        node=node,
        promised_epoch=state.promised,
        lineage=lineage_to_wire(state.lineage),
        start_lsn=state.start,
        scl=state.scl,
        vdl=state.vdl,
        system_identifier=segment.facts.system_identifier,
    )


def _find(volumes: Volumes, ref: VolumeRef) -> Segment:
    """The segment a call is about, for a caller that was not superseded."""
    segment = volumes.find(ref.volume_id)
    segment.check_epoch(ref.epoch)
    return segment


class StorageLogService(storage_pb2_grpc.StorageLogServicer):
    """The log of every volume on this node."""

    def __init__(
        self,
        node: NodeName,
        volumes: Volumes,
        appends: AppendHandler,
        on_change: Callable[[], None],
    ) -> None:
        """`on_change` is called when volumes or lineages changed; it must not wait."""
        self._node = node
        self._volumes = volumes
        self._appends = appends
        self._on_change = on_change

    async def CreateVolume(
        self, request: storage_pb2.CreateVolumeRequest, _context: Context
    ) -> storage_pb2.Position:
        """Make a volume's segment."""
        facts = VolumeFacts(
            system_identifier=request.system_identifier, start=Lsn(request.start_lsn)
        )
        volume = check_volume_id(request.volume.volume_id)
        segment = self._volumes.create(volume, epoch_of(request.volume), facts)
        self._on_change()
        return position_of(self._node, segment)

    async def DropVolume(
        self, request: storage_pb2.DropVolumeRequest, _context: Context
    ) -> storage_pb2.DropVolumeResponse:
        """Remove a volume."""
        volume = check_volume_id(request.volume.volume_id)
        rest = self._volumes.drop(volume, epoch_of(request.volume))
        self._on_change()
        if rest is not None:
            await asyncio.to_thread(shutil.rmtree, rest)
        return storage_pb2.DropVolumeResponse()

    async def Fence(
        self, request: storage_pb2.FenceRequest, _context: Context
    ) -> storage_pb2.Position:
        """Promise an epoch."""
        segment = self._volumes.find(request.volume.volume_id)
        segment.fence(epoch_of(request.volume))
        position = position_of(self._node, segment)
        position.writer_silent_ms = int(segment.writer_silent_s * 1000)
        return position

    async def Adopt(
        self, request: storage_pb2.AdoptRequest, _context: Context
    ) -> storage_pb2.Position:
        """Take a lineage."""
        segment = self._volumes.find(request.volume.volume_id)
        segment.adopt(epoch_of(request.volume), lineage_from_wire(request.lineage))
        self._on_change()
        return position_of(self._node, segment)

    async def Append(
        self, request_iterator: AsyncIterator[storage_pb2.AppendRequest], _context: Context
    ) -> AsyncIterator[storage_pb2.AppendResponse]:
        """Append redo."""
        async for request in request_iterator:
            answers = self._appends.handle([request])
            if answers.delay_s:
                await asyncio.sleep(answers.delay_s)
            for response in answers.responses:
                yield response

    async def GetPosition(
        self, request: storage_pb2.GetPositionRequest, _context: Context
    ) -> storage_pb2.Position:
        """Where this segment stands."""
        return position_of(self._node, _find(self._volumes, request.volume))

    async def GetLog(
        self, request: storage_pb2.GetLogRequest, _context: Context
    ) -> AsyncIterator[storage_pb2.LogChunk]:
        """Read the log.

        The epoch is checked before each chunk: once a newer one is promised here, the bytes that
        follow may be another writer's.
        """
        segment = _find(self._volumes, request.volume)
        start, end = Lsn(request.start_lsn), Lsn(request.end_lsn or segment.state.scl)
        if end < start:
            raise BeyondLog(
                f"{format_lsn(start)} lies past {format_lsn(end)}", scl=segment.state.scl
            )
        while start < end:
            upto = Lsn(min(end, start + LOG_CHUNK_BYTES))
            data = _find(self._volumes, request.volume).reader.read(start, upto)
            yield storage_pb2.LogChunk(start_lsn=start, data=data)
            start = upto


class BundlesService(storage_pb2_grpc.BundlesServicer):
    """The bundles of every volume on this node. The disk work is done by worker threads."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes

    async def FindMissing(
        self, request: storage_pb2.FindMissingRequest, _context: Context
    ) -> storage_pb2.FindMissingResponse:
        """Which contents are not stored."""
        if len(request.sha256) > _MAX_HASHES:
            raise OversizeRequest(f"at most {_MAX_HASHES} hashes a call", limit_bytes=_MAX_HASHES)
        store = _find(self._volumes, request.volume).bundles
        missing = await asyncio.to_thread(store.missing, list(request.sha256))
        return storage_pb2.FindMissingResponse(sha256=missing)

    async def PutContent(
        self, request_iterator: AsyncIterator[storage_pb2.PutContentRequest], _context: Context
    ) -> storage_pb2.PutContentResponse:
        """Store one content."""
        incoming: IncomingContent | None = None
        async for request in request_iterator:
            if len(request.data) > MAX_APPEND_BYTES:
                raise OversizeRequest(
                    f"a chunk has at most {MAX_APPEND_BYTES} bytes", limit_bytes=MAX_APPEND_BYTES
                )
            if incoming is None:
                incoming = _find(self._volumes, request.volume).bundles.receive(request.sha256)
            incoming.add(request.data)
        if incoming is None:
            raise MalformedRequest("a content comes in at least one message")
        await asyncio.to_thread(incoming.finish)
        return storage_pb2.PutContentResponse()

    async def PutManifest(
        self, request: storage_pb2.PutManifestRequest, _context: Context
    ) -> storage_pb2.PutManifestResponse:
        """Make a bundle known."""
        store = _find(self._volumes, request.volume).bundles
        await asyncio.to_thread(store.put_manifest, request.manifest)
        return storage_pb2.PutManifestResponse()

    async def GetManifest(
        self, request: storage_pb2.GetManifestRequest, _context: Context
    ) -> storage_pb2.BundleManifest:
        """The newest bundle."""
        store = _find(self._volumes, request.volume).bundles
        return await asyncio.to_thread(store.manifest, Lsn(request.max_end_lsn))

    async def GetContent(
        self, request: storage_pb2.GetContentRequest, _context: Context
    ) -> AsyncIterator[storage_pb2.ContentChunk]:
        """One content."""
        store = _find(self._volumes, request.volume).bundles
        data = await asyncio.to_thread(store.read, request.sha256)
        for at in range(0, max(len(data), 1), _CONTENT_CHUNK_BYTES):
            yield storage_pb2.ContentChunk(data=data[at : at + _CONTENT_CHUNK_BYTES])
