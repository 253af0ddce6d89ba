"""`boreal wait`: until SQL is served."""

from __future__ import annotations

import asyncio

from boreal.command.remote import Place, connect, if_reachable
from boreal.command.roster import listed
from boreal.errors import ProcessFailed
from boreal.rpc import compute_pb2, control_pb2

_POLL_S = 0.2


async def await_served(place: Place, readers: int, within_s: float) -> str:
    """Wait for a writer and so many readers that take clients; who they are, in a line.

    ProcessFailed, with what is missing, if there are none in time.
    """
    missing = "the control plane does not answer"
    try:
        async with asyncio.timeout(within_s), connect(place) as remote:
            while True:
                status = await if_reachable(remote.cluster_status())
                if status is not None:
                    writer, found = _serving(status)
                    if writer and len(found) >= readers:
                        return f"{writer} is the writer; readers: {listed(found) or 'none'}"
                    missing = f"writer: {writer or 'none'}; readers: {listed(found) or 'none'}"
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise ProcessFailed(
            f"SQL is not served after {within_s:g} s: {missing}; `boreal status` and the logs of "
            "the processes tell more"
        ) from None


def _serving(status: control_pb2.ClusterStatus) -> tuple[str, list[str]]:
    """The writer, empty if there is none, and the readers that take clients."""
    serving = [each.status for each in status.instances if each.alive and each.status.takes_clients]
    writers = [each.instance for each in serving if each.state == compute_pb2.WRITER]
    readers = [each.instance for each in serving if each.state == compute_pb2.READER]
    return (status.writer if status.writer in writers else ""), readers
