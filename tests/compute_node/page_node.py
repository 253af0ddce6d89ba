"""`python -m tests.compute_node.page_node`: a process that serves pages, to be stopped or killed.

Prints its port. Every page it gives consists of the low byte of its block number plus one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from boreal.rpc import storage_pb2
from boreal.types import PAGE_BYTES
from tests.compute_node.fake_lane import FakeLane


async def every_page(
    request: storage_pb2.GetPagesRequest,
) -> AsyncIterator[storage_pb2.PageImages]:
    """Has every page of every relation."""
    blocks = range(request.first_block, request.first_block + request.count)
    yield storage_pb2.PageImages(
        first_block=blocks.start,
        pages=b"".join(bytes([block % 255 + 1]) * PAGE_BYTES for block in blocks),
        exists=[True] * len(blocks),
    )


async def main() -> None:
    """Serve until killed."""
    lane = FakeLane(every_page)
    await lane.start()
    print(lane.port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
