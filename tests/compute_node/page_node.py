"""`python -m tests.compute_node.page_node`: a process that serves pages, to be stopped or killed.

Prints its port. Every page it gives consists of the low byte of its block number plus one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from boreal.rpc import storage_pb2, storage_pb2_grpc
from boreal.rpc.edge import make_server
from boreal.types import PAGE_BYTES
from tests.compute_node.fleet_node import FleetNode


class PageNode(FleetNode):
    """Has every page of every relation."""

    async def GetPages(  # noqa: N802 - the call's name
        self, request: Any, context: Any
    ) -> AsyncIterator[storage_pb2.PageImages]:
        blocks = range(request.first_block, request.first_block + request.count)
        yield storage_pb2.PageImages(
            first_block=blocks.start,
            pages=b"".join(bytes([block % 255 + 1]) * PAGE_BYTES for block in blocks),
            exists=[True] * len(blocks),
        )


async def main() -> None:
    """Serve until killed."""
    server = make_server()
    storage_pb2_grpc.add_StoragePagesServicer_to_server(PageNode("alone"), server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
