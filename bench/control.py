"""What the experiments ask of a cluster's control plane, one question at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from boreal import cluster
from boreal.command.remote import Remote, connect, if_reachable
from boreal.rpc import compute_pb2, control_pb2

_T = TypeVar("_T")


class Control:
    """The control plane of the cluster in `directory`. Each call raises what the service raises."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def try_status(self) -> control_pb2.ClusterStatus | None:
        """Everybody's standing; None if the control plane does not answer."""
        return self._ask(lambda remote: if_reachable(remote.cluster_status()))

    def events(self, after: int = 0) -> Sequence[control_pb2.Event]:
        """What happened since event `after`."""
        return self._ask(lambda remote: remote.events(after))

    def fail_over(self, target: str = "") -> control_pb2.FailoverResponse:
        """A planned failover, to whoever would be chosen if no target is named."""
        return self._ask(lambda remote: remote.failover(target))

    def _ask(self, question: Callable[[Remote], Awaitable[_T]]) -> _T:
        async def ask() -> _T:
            async with connect(cluster.load(self._directory)) as remote:
                return await question(remote)

        return asyncio.run(ask())


def instance(status: control_pb2.ClusterStatus, name: str) -> control_pb2.InstanceStatus | None:
    """The instance of that name."""
    return next((each for each in status.instances if each.status.instance == name), None)


def is_reader(status: control_pb2.ClusterStatus, name: str) -> bool:
    """Whether that instance is a reader that takes clients."""
    found = instance(status, name)
    return (
        found is not None
        and found.alive
        and found.status.state == compute_pb2.READER
        and found.status.takes_clients
    )


def serving_writer(status: control_pb2.ClusterStatus) -> str | None:
    """The appointed writer's name, if it writes under the newest epoch."""
    found = instance(status, status.writer)
    if found is None or not found.alive or found.status.state != compute_pb2.WRITER:
        return None
    return status.writer if found.status.volume.epoch == status.volume.epoch else None
