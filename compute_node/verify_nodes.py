"""The storage nodes as `boreal verify` asks them: each by itself, none in another's place."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from boreal.errors import BorealError, NotIndexedYet, UnknownOutcome, Unreachable
from boreal.types import BlockNumber, Lsn, NodeName, RelationFork
from compute_node.fleet import Fleet
from compute_node.storage_client import Deadlines, StorageClient, VolumeEpoch

_T = TypeVar("_T")
_CALL_S = 60.0
_INDEX_S = 600.0
"""How long a node may take until its index has come to the LSN that is compared at."""


def split_by_majority(
    answers: Mapping[NodeName, _T], same: Callable[[_T], object] = lambda answer: answer
) -> tuple[list[NodeName], list[NodeName]]:
    """Those that give the answer most nodes give, and the odd ones. Pure.

    `same` is what answers are told apart by. On a tie the first node's side counts as the most.
    """
    counts = Counter(same(answer) for answer in answers.values())
    most = max(counts.values(), default=0)
    agreed = next((key for key, count in counts.items() if count == most), None)
    sides: tuple[list[NodeName], list[NodeName]] = ([], [])
    for name, answer in answers.items():
        sides[same(answer) != agreed].append(name)
    return sides


class VerifyNodes:
    """The nodes under comparison, over connections of their own: queries don't queue behind it.

    A node that cannot be reached is `lost`: it is not asked again, and the comparison has failed.
    """

    def __init__(self, fleet: Fleet, names: Iterable[NodeName]) -> None:
        self._on = VolumeEpoch(fleet.volume, fleet.epoch)
        members = fleet.members
        self._clients: dict[NodeName, StorageClient] = {}
        for name in list(names) or sorted(members):
            if name not in members:
                raise Unreachable(f"{name} is not one of the fleet: {', '.join(sorted(members))}")
            self._clients[name] = StorageClient(name, members[name], Deadlines())
        self.lost: dict[NodeName, BorealError] = {}

    @property
    def names(self) -> list[NodeName]:
        """Those that are not lost."""
        return [name for name in self._clients if name not in self.lost]

    async def close(self) -> None:
        """Let the connections go."""
        await asyncio.gather(*(client.close() for client in self._clients.values()))

    async def pages(
        self, name: NodeName, fork: RelationFork, first: int, count: int, lsn: Lsn
    ) -> list[bytes | None] | BorealError:
        """A node's pages as of `lsn`; or why it gave none."""
        client = self._clients[name]
        return await self._ask(
            name,
            lambda: client.get_pages(
                self._on,
                fork,
                BlockNumber(first),
                count,
                lsn=lsn,
                lineage_epoch=self._on.epoch,
                within_s=_CALL_S,
            ),
        )

    async def digest(
        self, name: NodeName, ranges: Sequence[tuple[RelationFork, int, int]], lsn: Lsn
    ) -> bytes | BorealError:
        """The digest of a node's pages of (fork, first block, count), one after the other."""
        client = self._clients[name]
        return await self._ask(
            name,
            lambda: client.digest_pages(
                self._on, ranges, lsn=lsn, lineage_epoch=self._on.epoch, within_s=_CALL_S
            ),
        )

    async def sizes(self, name: NodeName, lsn: Lsn) -> dict[RelationFork, int] | BorealError:
        """Every fork a node has as of `lsn`, with its blocks."""
        client = self._clients[name]
        return await self._ask(
            name,
            lambda: client.list_relations(
                self._on, lsn=lsn, lineage_epoch=self._on.epoch, within_s=_CALL_S
            ),
        )

    async def _ask(self, name: NodeName, call: Callable[[], Awaitable[_T]]) -> _T | BorealError:
        deadline = time.monotonic() + _INDEX_S
        while True:
            try:
                return await call()
            except NotIndexedYet as error:
                if time.monotonic() > deadline:
                    return error
            except (Unreachable, UnknownOutcome) as error:
                self.lost.setdefault(name, error)
                return error
            except BorealError as error:
                return error
