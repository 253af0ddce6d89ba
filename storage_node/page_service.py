"""gRPC StoragePages: all but reads of pages, which come by a lane (storage_node.page_lane)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from grpc import aio

from boreal.errors import MalformedRequest
from boreal.pages import PagesDigest
from boreal.rpc import storage_pb2, storage_pb2_grpc
from boreal.rpc.edge import epoch_of, fork_from_wire, fork_to_wire
from boreal.types import PAGE_BYTES, Epoch, Fork, Lsn
from storage_node.page_reads import (
    MAX_BLOCKS,
    MAX_PAGES_A_MESSAGE,
    MAX_WAIT_S,
    message_runs,
    patience_s,
    read_pages,
)
from storage_node.page_volume import PageVolume, PageVolumes

_RELATIONS_A_MESSAGE = 2000

_Context = aio.ServicerContext[Any, Any]


class PageService(storage_pb2_grpc.StoragePagesServicer):
    """See proto/storage.proto for the contract; errors are those of boreal/errors.py."""

    def __init__(self, volumes: PageVolumes) -> None:
        self._volumes = volumes

    async def ImportPages(
        self,
        request_iterator: AsyncIterator[storage_pb2.ImportPagesRequest],
        context: _Context,
    ) -> storage_pb2.ImportPagesResponse:
        """Take the pages a volume begins with. Repeating a complete import changes nothing."""
        first = await anext(aiter(request_iterator), None)
        if first is None:
            raise MalformedRequest("the import names no volume")
        volume = await self._volumes.get(first.volume.volume_id, epoch_of(first.volume))
        async with volume.importing:
            if volume.store.imported is None:
                await _import(volume, first, request_iterator)
            volume.check_same_import(Lsn(first.lsn))
            return storage_pb2.ImportPagesResponse(pages=volume.store.page_count)

    async def DigestPages(
        self, request: storage_pb2.DigestPagesRequest, context: _Context
    ) -> storage_pb2.PageDigest:
        """A hash of what GetPages would answer."""
        runs = message_runs((r.fork, r.first_block, r.count) for r in request.ranges)
        volume = await self._volumes.get(request.volume.volume_id, epoch_of(request.volume))
        await volume.wait_for(Lsn(request.lsn), Epoch(request.lineage_epoch), _time_left(context))
        digest = PagesDigest()
        for fork, blocks in runs:
            digest.add(await read_pages(volume, fork, blocks, Lsn(request.lsn)))
            await asyncio.sleep(0)
        return storage_pb2.PageDigest(sha256=digest.result())

    async def ListRelations(
        self, request: storage_pb2.ListRelationsRequest, context: _Context
    ) -> AsyncIterator[storage_pb2.RelationSizes]:
        """Every fork but free space maps, as of an LSN, waiting for the index to get there."""
        volume = await self._volumes.get(request.volume.volume_id, epoch_of(request.volume))
        await volume.wait_for(Lsn(request.lsn), Epoch(request.lineage_epoch), _time_left(context))
        sizes = [
            storage_pb2.RelationSize(fork=fork_to_wire(fork), blocks=blocks)
            for fork, blocks in sorted(volume.relations(Lsn(request.lsn)).items())
        ]
        for begin in range(0, len(sizes), _RELATIONS_A_MESSAGE):
            yield storage_pb2.RelationSizes(relations=sizes[begin : begin + _RELATIONS_A_MESSAGE])

    async def GetIndexState(
        self,
        request: storage_pb2.GetIndexStateRequest,
        context: _Context,
    ) -> storage_pb2.IndexState:
        """How far the index has come."""
        volume = await self._volumes.get(request.volume.volume_id, epoch_of(request.volume))
        state = storage_pb2.IndexState(
            indexed_lsn=volume.indexed, log_scl=volume.shared.scl, failure=volume.failure
        )
        gauges = volume.gauges
        if gauges is not None:
            state.lag_bytes = gauges.lag_bytes
            state.retired_lsn = gauges.retired
            state.lowest_lsn = gauges.lowest
            state.layers = gauges.layers
            state.unsettled = gauges.unsettled
            state.versions = gauges.versions
            state.longest_chain = gauges.longest_chain
            state.refused_pages = gauges.refused_pages
            state.held = gauges.held
        return state


async def _import(
    volume: PageVolume,
    message: storage_pb2.ImportPagesRequest | None,
    rest: AsyncIterator[storage_pb2.ImportPagesRequest],
) -> None:
    """Store the stream's pages, seal them at the last message."""
    first = message
    volume.store.begin()
    while message is not None and first is not None:
        volume.check_epoch(Epoch(message.volume.epoch))
        if (message.volume.volume_id, message.lsn) != (volume.volume, first.lsn):
            raise MalformedRequest("one import is about one volume and one LSN")
        _store(volume, message)
        if message.last:
            await volume.seal_import(Lsn(message.lsn))
            return
        message = await anext(rest, None)
    raise MalformedRequest("the import ended without its last message; nothing was kept")


def _store(volume: PageVolume, message: storage_pb2.ImportPagesRequest) -> None:
    """Store one message's pages. The last message need not carry any."""
    if message.last and not message.HasField("fork"):
        return
    fork, size = fork_from_wire(message.fork), len(message.pages)
    count, rest = divmod(size, PAGE_BYTES)
    if rest or count > MAX_PAGES_A_MESSAGE or message.first_block + count > MAX_BLOCKS:
        raise MalformedRequest(
            f"{size} bytes from block {message.first_block} of {fork} are not whole pages, "
            f"{MAX_PAGES_A_MESSAGE} at most"
        )
    if fork.fork is not Fork.FSM:  # free space maps come with the bundle
        volume.store.add(fork, message.first_block, message.pages)


def _time_left(context: _Context) -> float:
    remaining = context.time_remaining()
    return MAX_WAIT_S if remaining is None else patience_s(remaining)
