"""A storage node as a fleet sees it: services and lane over real sockets, all state in memory."""

# ruff: noqa: N802 - the methods are named as the calls are

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from boreal.errors import BorealError, CorruptData, NoBundle
from boreal.quorum import Lineage, SegmentState
from boreal.rpc import control_pb2, storage_pb2, storage_pb2_grpc
from boreal.rpc.edge import fork_from_wire, lineage_from_wire, lineage_to_wire, make_server
from boreal.types import PAGE_BYTES, Epoch, Lsn, RelationFork
from tests.compute_node.fake_lane import FakeLane

SYSTEM_IDENTIFIER = 7
LOG_START = Lsn(16 * 1024 * 1024)


class FleetNode(
    storage_pb2_grpc.StorageLogServicer,
    storage_pb2_grpc.StoragePagesServicer,
    storage_pb2_grpc.BundlesServicer,
):
    """Answers truthfully, unless told to fail or to hang."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.port = 0
        self.lane = FakeLane(self.get_pages)
        self.state = SegmentState(
            promised=Epoch(1),
            lineage=Lineage.of([(1, LOG_START)]),
            start=LOG_START,
            scl=LOG_START,
            vdl=LOG_START,
        )
        self.log = b""
        self.pages: dict[RelationFork, list[bytes]] = {}
        self.contents: dict[bytes, bytes] = {}
        self.manifests: list[storage_pb2.BundleManifest] = []
        self.created: storage_pb2.CreateVolumeRequest | None = None
        self.calls: list[str] = []
        self.failure: BorealError | None = None
        self.hanging = False
        self.writer_silent_ms = 0

    @property
    def member(self) -> control_pb2.StorageNode:
        address = f"127.0.0.1:{self.port}"
        return control_pb2.StorageNode(
            name=self.name,
            addresses=control_pb2.StorageAddresses(
                log=address,
                frames="-",
                pages=address,
                page_frames=f"127.0.0.1:{self.lane.port}",
            ),
        )

    async def _enter(self, call: str, volume: Any) -> None:
        self.calls.append(call)
        while self.hanging:
            await asyncio.sleep(0.01)
        if self.failure is not None:
            raise self.failure
        self.state.check_epoch(Epoch(volume.epoch))

    def _position(self) -> storage_pb2.Position:
        return storage_pb2.Position(
            node=self.name,
            promised_epoch=self.state.promised,
            lineage=lineage_to_wire(self.state.lineage),
            start_lsn=self.state.start,
            scl=self.state.scl,
            vdl=self.state.vdl,
            system_identifier=SYSTEM_IDENTIFIER,
        )

    # --- log -----------------------------------------------------------------------------------

    async def CreateVolume(self, request: Any, context: Any) -> storage_pb2.Position:
        await self._enter("CreateVolume", request.volume)
        self.created = request
        return self._position()

    async def DropVolume(self, request: Any, context: Any) -> storage_pb2.DropVolumeResponse:
        await self._enter("DropVolume", request.volume)
        return storage_pb2.DropVolumeResponse()

    async def Fence(self, request: Any, context: Any) -> storage_pb2.Position:
        await self._enter("Fence", request.volume)
        self.state = self.state.fence(Epoch(request.volume.epoch))
        position = self._position()
        position.writer_silent_ms = self.writer_silent_ms
        return position

    async def Adopt(self, request: Any, context: Any) -> storage_pb2.Position:
        await self._enter("Adopt", request.volume)
        lineage = lineage_from_wire(request.lineage)
        self.state = self.state.adopt(Epoch(request.volume.epoch), lineage)
        return self._position()

    async def GetPosition(self, request: Any, context: Any) -> storage_pb2.Position:
        await self._enter("GetPosition", request.volume)
        return self._position()

    async def Append(
        self, request_iterator: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[storage_pb2.AppendResponse]:
        raise AssertionError("a fleet does not append")
        yield  # makes it a stream

    async def GetLog(self, request: Any, context: Any) -> AsyncIterator[storage_pb2.LogChunk]:
        await self._enter("GetLog", request.volume)
        data = self.log[request.start_lsn - LOG_START : request.end_lsn - LOG_START]
        for at in range(0, len(data), 1000):
            yield storage_pb2.LogChunk(start_lsn=request.start_lsn + at, data=data[at : at + 1000])

    # --- pages ---------------------------------------------------------------------------------

    async def get_pages(
        self, request: storage_pb2.GetPagesRequest
    ) -> AsyncIterator[storage_pb2.PageImages]:
        await self._enter("GetPages", request.volume)
        known = self.pages.get(fork_from_wire(request.fork), [])
        wanted = range(request.first_block, request.first_block + request.count)
        for start in range(wanted.start, wanted.stop, 2):
            blocks = range(start, min(start + 2, wanted.stop))
            yield storage_pb2.PageImages(
                first_block=start,
                pages=b"".join(known[b] if b < len(known) else bytes(PAGE_BYTES) for b in blocks),
                exists=[b < len(known) for b in blocks],
            )

    async def DigestPages(self, request: Any, context: Any) -> storage_pb2.PageDigest:
        raise AssertionError("only `boreal verify` asks for digests")

    async def ListRelations(
        self, request: Any, context: Any
    ) -> AsyncIterator[storage_pb2.RelationSizes]:
        await self._enter("ListRelations", request.volume)
        for fork, pages in self.pages.items():
            size = storage_pb2.RelationSize(blocks=len(pages))
            size.fork.tablespace, size.fork.database = fork.tablespace, fork.database
            size.fork.relation, size.fork.fork = fork.relation, fork.fork
            yield storage_pb2.RelationSizes(relations=[size])

    async def GetIndexState(self, request: Any, context: Any) -> storage_pb2.IndexState:
        await self._enter("GetIndexState", request.volume)
        return storage_pb2.IndexState(indexed_lsn=LOG_START, log_scl=self.state.scl)

    async def ImportPages(
        self, request_iterator: AsyncIterator[Any], context: Any
    ) -> storage_pb2.ImportPagesResponse:
        taken, complete = 0, False
        async for request in request_iterator:
            if not taken:
                await self._enter("ImportPages", request.volume)
            complete = request.last
            if request.pages:
                known = self.pages.setdefault(fork_from_wire(request.fork), [])
                assert request.first_block == len(known)
                for at in range(0, len(request.pages), PAGE_BYTES):
                    known.append(request.pages[at : at + PAGE_BYTES])
                    taken += 1
        assert complete
        return storage_pb2.ImportPagesResponse(pages=taken)

    # --- bundles -------------------------------------------------------------------------------

    async def FindMissing(self, request: Any, context: Any) -> storage_pb2.FindMissingResponse:
        await self._enter("FindMissing", request.volume)
        missing = [sha256 for sha256 in request.sha256 if sha256 not in self.contents]
        return storage_pb2.FindMissingResponse(sha256=missing)

    async def PutContent(
        self, request_iterator: AsyncIterator[Any], context: Any
    ) -> storage_pb2.PutContentResponse:
        sha256, content = b"", b""
        async for request in request_iterator:
            sha256, content = request.sha256 or sha256, content + request.data
        assert hashlib.sha256(content).digest() == sha256
        self.contents[sha256] = content
        return storage_pb2.PutContentResponse()

    async def PutManifest(self, request: Any, context: Any) -> storage_pb2.PutManifestResponse:
        await self._enter("PutManifest", request.volume)
        assert all(f.sha256 in self.contents for f in request.manifest.files if f.sha256)
        self.manifests.append(request.manifest)
        return storage_pb2.PutManifestResponse()

    async def GetManifest(self, request: Any, context: Any) -> storage_pb2.BundleManifest:
        await self._enter("GetManifest", request.volume)
        bound = request.max_end_lsn or 2**64
        found = [manifest for manifest in self.manifests if manifest.end_lsn <= bound]
        if not found:
            raise NoBundle("none here")
        return max(found, key=lambda manifest: manifest.end_lsn)

    async def GetContent(
        self, request: Any, context: Any
    ) -> AsyncIterator[storage_pb2.ContentChunk]:
        await self._enter("GetContent", request.volume)
        if request.sha256 not in self.contents:
            raise CorruptData("no such content")
        content = self.contents[request.sha256]
        for at in range(0, len(content), 1000):
            yield storage_pb2.ContentChunk(data=content[at : at + 1000])


@asynccontextmanager
async def running(*nodes: FleetNode) -> AsyncIterator[list[control_pb2.StorageNode]]:
    """Serve them; yields them as the control plane would tell of them."""
    async with AsyncExitStack() as stack:
        for node in nodes:
            server = make_server()
            storage_pb2_grpc.add_StorageLogServicer_to_server(node, server)
            storage_pb2_grpc.add_StoragePagesServicer_to_server(node, server)
            storage_pb2_grpc.add_BundlesServicer_to_server(node, server)
            node.port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            stack.push_async_callback(server.stop, None)
            await node.lane.start()
            stack.push_async_callback(node.lane.stop)
        yield [node.member for node in nodes]
