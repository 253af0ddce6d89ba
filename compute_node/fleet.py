"""The volume's six storage nodes as one: pages and log from whichever node serves best, everything
that must outlive a failure on a quorum.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from boreal.errors import (
    BorealError,
    MalformedRequest,
    NoBundle,
    OversizeRequest,
    QuorumUnavailable,
    StaleEpoch,
    Unreachable,
)
from boreal.quorum import SIX_WAY, Lineage, QuorumRule
from boreal.rpc import control_pb2
from boreal.types import (
    BlockNumber,
    Epoch,
    Lsn,
    NodeName,
    RelationFork,
    VolumeId,
    format_lsn,
)
from compute_node.page_protocol import Run
from compute_node.read_path import Ask, Hedging, Patience, ReadPath
from compute_node.storage_client import (
    MAX_PAGES_PER_CALL,
    Addresses,
    BundleManifest,
    Deadlines,
    IndexState,
    PageRun,
    SegmentPosition,
    StorageClient,
    VolumeEpoch,
)

MAX_READ_LOG_BYTES = 16 * 1024 * 1024
"""One `read_log` holds its answer in memory."""

ANY_END = Lsn(0)
"""No bound on a bundle's end."""

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")
_Call = Callable[[StorageClient], Coroutine[Any, Any, _T]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetLimits:
    """How long a fleet waits for its nodes."""

    pages: Patience
    """Reads that hold up a query: a page."""
    windows: Patience
    """Many pages at once. Fetched ahead in most cases: a hedge costs much and hurries nobody."""
    bulk: Patience
    """Other reads that one node serves: log, relation sizes, contents of bundles."""
    changes: Deadlines


@dataclass(frozen=True, slots=True, kw_only=True)
class BundlePut:
    """What storing a bundle took. Bytes and files count every copy sent to the nodes named."""

    nodes: tuple[NodeName, ...]
    bytes_sent: int
    files_sent: int


DEFAULT_LIMITS = FleetLimits(
    pages=Patience(attempt_s=1.0, total_s=30.0, hedging=Hedging()),
    windows=Patience(
        attempt_s=2.0, total_s=30.0, hedging=Hedging(first_s=0.1, least_s=0.03, share=0.05)
    ),
    bulk=Patience(attempt_s=10.0, total_s=60.0),
    changes=Deadlines(),
)


class Fleet:
    """The client side of one volume's storage nodes, acting under one epoch.

    Reads raise StaleEpoch (a reader may `raise_epoch` to its `promised_epoch` and ask again; a
    writer must stop), NotMaterializable, or QuorumUnavailable with each node's reason once no node
    served within the deadline. Quorum calls return as soon as enough nodes succeeded; the rest go
    on, bounded by their own deadlines. Use from one event loop; `close()` when done.
    """

    def __init__(
        self,
        volume: VolumeId,
        epoch: Epoch,
        *,
        rule: QuorumRule = SIX_WAY,
        limits: FleetLimits = DEFAULT_LIMITS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on = VolumeEpoch(volume, epoch)
        self._rule = rule
        self._limits = limits
        self._nodes: tuple[control_pb2.StorageNode, ...] = ()
        self._clients: dict[NodeName, StorageClient] = {}
        self._lineage_epoch = Epoch(0)
        self.page_reads = ReadPath(limits.pages, clock)
        # Apart: a window's latency says nothing about a page's.
        self.window_reads = ReadPath(limits.windows, clock)
        self.bulk_reads = ReadPath(limits.bulk, clock)
        self._background: set[asyncio.Task[Any]] = set()

    # --- who is there ------------------------------------------------------------------------

    @property
    def volume(self) -> VolumeId:
        """The volume every call names."""
        return self._on.volume

    @property
    def epoch(self) -> Epoch:
        """The epoch every call carries."""
        return self._on.epoch

    @property
    def members(self) -> Mapping[NodeName, Addresses]:
        """The storage nodes known, with their addresses."""
        return {name: client.addresses for name, client in self._clients.items()}

    @property
    def nodes(self) -> Sequence[control_pb2.StorageNode]:
        """The same as the control plane told it last."""
        return self._nodes

    def raise_epoch(self, epoch: Epoch) -> None:
        """Act under `epoch` from now on, if it is newer."""
        if epoch > self._on.epoch:
            self._on = self._on._replace(epoch=epoch)

    async def set_members(self, nodes: Iterable[control_pb2.StorageNode]) -> None:
        """Take the fleet as the control plane tells it. A node that stays keeps its channels."""
        self._nodes = tuple(nodes)
        wanted = {
            NodeName(node.name): Addresses(
                log=node.addresses.log,
                frames=node.addresses.frames,
                pages=node.addresses.pages,
                page_frames=node.addresses.page_frames,
            )
            for node in self._nodes
        }
        for name, client in list(self._clients.items()):
            if wanted.get(name) != client.addresses:
                del self._clients[name]
                # Not at once: calls under way may still be answered.
                self._spawn(client.close(grace_s=self._limits.changes.call_s))
        for name, addresses in wanted.items():
            if name not in self._clients:
                self._clients[name] = StorageClient(name, addresses, self._limits.changes)

    async def close(self) -> None:
        """Cancel what is under way and let the connections go."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        clients = list(self._clients.values())
        self._clients.clear()
        await asyncio.gather(*(client.close() for client in clients))

    # --- reads: any one node -----------------------------------------------------------------

    def follow_lineage(self, epoch: Epoch) -> None:
        """From now on, what is read is durable under the lineage that ends with `epoch`.

        A storage node of that lineage, or a newer one, then serves it though it has not heard of
        the VDL itself.
        """
        self._lineage_epoch = max(self._lineage_epoch, epoch)

    async def get_pages(
        self,
        relation: RelationFork,
        first: BlockNumber,
        count: int,
        lsn: Lsn,
        *,
        node: NodeName | None = None,
    ) -> list[bytes | None]:
        """`count` consecutive pages as of `lsn`, None for each block the fork did not have then.

        `lsn` must be durable. `node` asks that node alone, once, as in every read here.
        """
        if not 1 <= count <= MAX_PAGES_PER_CALL:
            raise MalformedRequest(f"{count} pages asked for; 1 to {MAX_PAGES_PER_CALL} are given")

        def ask(client: StorageClient, within_s: float) -> Awaitable[list[bytes | None]]:
            return client.get_pages(
                self._on,
                relation,
                first,
                count,
                lsn=lsn,
                lineage_epoch=self._lineage_epoch,
                within_s=within_s,
            )

        path = self.page_reads if count == 1 else self.window_reads
        return await self._read(path, Run(relation, first, count), ask, node)

    async def list_relations(
        self, lsn: Lsn, *, node: NodeName | None = None
    ) -> dict[RelationFork, int]:
        """Every relation fork that exists at `lsn`, which must be durable, with its blocks."""

        def ask(
            client: StorageClient, within_s: float
        ) -> Coroutine[Any, Any, dict[RelationFork, int]]:
            return client.list_relations(
                self._on, lsn=lsn, lineage_epoch=self._lineage_epoch, within_s=within_s
            )

        return await self._read(self.bulk_reads, "the list of relations", ask, node)

    async def read_log(self, start: Lsn, end: Lsn, *, node: NodeName | None = None) -> bytes:
        """Log bytes [start, end), at most MAX_READ_LOG_BYTES."""
        if not 0 < end - start <= MAX_READ_LOG_BYTES:
            raise OversizeRequest(
                f"{end - start} bytes of log asked for; 1 to {MAX_READ_LOG_BYTES} are read at once",
                limit_bytes=MAX_READ_LOG_BYTES,
            )

        def ask(client: StorageClient, within_s: float) -> Coroutine[Any, Any, bytes]:
            return client.read_log(self._on, start, end, within_s=within_s)

        return await self._read(self.bulk_reads, f"log from {format_lsn(start)}", ask, node)

    async def get_content(self, sha256: bytes) -> bytes:
        """One content of a bundle, checked against its hash."""

        def ask(client: StorageClient, within_s: float) -> Coroutine[Any, Any, bytes]:
            return client.get_content(self._on, sha256, within_s=within_s)

        return await self._read(self.bulk_reads, f"content {sha256.hex()}", ask, None)

    # --- asking all --------------------------------------------------------------------------

    async def positions(self, *, within_s: float = 1.0) -> dict[NodeName, SegmentPosition]:
        """Where the segment of each node stands that answers in time, be it none."""
        return await self._ask_all(
            "GetPosition",
            lambda node: node.position(self._on, within_s=within_s),
            needed=0,
        )

    async def index_states(self, *, within_s: float = 1.0) -> dict[NodeName, IndexState]:
        """How far the page index has come on each node that answers in time, be it none."""
        return await self._ask_all(
            "GetIndexState",
            lambda node: node.index_state(self._on, within_s=within_s),
            needed=0,
        )

    async def create_volume(
        self, *, system_identifier: int, start: Lsn
    ) -> dict[NodeName, SegmentPosition]:
        """Make the segments of a new volume whose log starts at `start`, a WAL segment boundary.

        Returns once every node did it or failed, and a write quorum did.
        """
        return await self._ask_all(
            "CreateVolume",
            lambda node: node.create_volume(
                self._on,
                system_identifier=system_identifier,
                start=start,
            ),
            needed=self._rule.write,
        )

    async def import_pages(
        self, lsn: Lsn, runs: Callable[[], Iterable[PageRun]]
    ) -> dict[NodeName, int]:
        """Give a new volume its pages as of `lsn`; return how many each node took.

        `runs` is called once for each node. Returns once every node took them or failed (one
        without the base can never serve a page), and a write quorum did.
        """
        return await self._ask_all(
            "ImportPages",
            lambda node: node.import_pages(self._on, lsn, runs()),
            needed=self._rule.write,
        )

    async def drop_volume(self) -> None:
        """Remove the volume's segments, wherever a node answers; a write quorum must."""
        await self._ask_all(
            "DropVolume",
            lambda node: node.drop_volume(self._on),
            needed=self._rule.write,
        )

    # --- on a quorum ---------------------------------------------------------------------------

    async def fence(self, epoch: Epoch) -> dict[NodeName, SegmentPosition]:
        """Recovery step 1: act under `epoch`, and have a write quorum refuse every older one."""
        self.raise_epoch(epoch)
        self._check_epoch(epoch)
        return await self._quorum("Fence", lambda node: node.fence(self._on), self._rule.write)

    async def adopt(self, lineage: Lineage) -> dict[NodeName, SegmentPosition]:
        """Recovery step 4: a write quorum takes `lineage`, which ends with this fleet's epoch."""
        self._check_epoch(lineage.last.epoch)
        return await self._quorum(
            "Adopt", lambda node: node.adopt(self._on, lineage), self._rule.write
        )

    def _check_epoch(self, epoch: Epoch) -> None:
        """What is done to the log is done under the caller's own epoch.

        A reader takes over any newer epoch it hears of; that one is another writer's.
        """
        if self.epoch != epoch:
            raise StaleEpoch(
                f"epoch {epoch} was superseded by {self.epoch}", promised_epoch=self.epoch
            )

    async def put_bundle(
        self, manifest: BundleManifest, content: Callable[[bytes], bytes]
    ) -> BundlePut:
        """Store a bundle on a write quorum; `content(sha256)` gives the bytes a node lacks."""
        hashes = sorted({file.sha256 for file in manifest.files if file.sha256})

        async def put(node: StorageClient) -> list[int]:
            sent_bytes = []
            for sha256 in await node.find_missing(self._on, hashes):
                data = content(sha256)
                await node.put_content(self._on, sha256, data)
                sent_bytes.append(len(data))
            await node.put_manifest(self._on, manifest)
            return sent_bytes

        answers = await self._quorum("PutBundle", put, self._rule.write)
        return BundlePut(
            nodes=tuple(sorted(answers)),
            bytes_sent=sum(sum(sent) for sent in answers.values()),
            files_sent=sum(len(sent) for sent in answers.values()),
        )

    async def latest_bundle(self, max_end: Lsn = ANY_END) -> BundleManifest:
        """The newest bundle that ends at or below `max_end`; NoBundle if there is none.

        A read quorum is asked: it shares a node with the write quorum of every bundle stored.
        """
        within_s = self._limits.changes.call_s

        async def newest(node: StorageClient) -> BundleManifest | None:
            try:
                return await node.get_manifest(self._on, max_end, within_s=within_s)
            except NoBundle:
                return None

        answers = await self._quorum("GetManifest", newest, self._rule.read)
        found = [manifest for manifest in answers.values() if manifest is not None]
        if not found:
            raise NoBundle(f"{', '.join(sorted(answers))} hold no bundle of volume {self.volume}")
        return max(found, key=lambda manifest: (manifest.end, manifest.epoch))

    # --- how -----------------------------------------------------------------------------------

    async def _read(self, path: ReadPath, what: object, ask: Ask[_T], node: NodeName | None) -> _T:
        if node is None:
            return await path.read(self._clients, what, ask)
        client = self._clients.get(node)
        if client is None:
            raise Unreachable(f"{node} is not one of the fleet: {', '.join(self._clients)}")
        return await ask(client, self._limits.bulk.total_s)

    async def _ask_all(self, what: str, call: _Call[_T], *, needed: int) -> dict[NodeName, _T]:
        return await self._quorum(what, call, needed, enough=len(self._clients))

    async def _quorum(
        self, what: str, call: _Call[_T], needed: int, *, enough: int | None = None
    ) -> dict[NodeName, _T]:
        """Call every node at once; return the answers once there are `enough` (else `needed`).

        Raises StaleEpoch as soon as any node does, for then a newer writer owns the volume, and
        QuorumUnavailable as soon as `needed` answers cannot be had any more. Nodes that are not
        waited for go on in the background: each has its deadline, and what it does is of use.
        """
        running = {self._spawn(call(client)): name for name, client in self._clients.items()}
        answers: dict[NodeName, _T] = {}
        reasons: dict[NodeName, BorealError] = {}
        goal = needed if enough is None else max(enough, needed)
        while running and len(answers) < goal and len(answers) + len(running) >= needed:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                name = running.pop(task)
                try:
                    answers[name] = task.result()
                except StaleEpoch:
                    raise
                except BorealError as error:
                    reasons[name] = error
        if len(answers) < needed:
            raise QuorumUnavailable(
                f"{what}: {len(answers)} of {self._rule.copies} storage nodes answered; {needed} "
                "are needed. " + "; ".join(f"{name}: {error}" for name, error in reasons.items()),
                answered=len(answers),
                needed=needed,
            )
        return answers

    def _spawn(self, call: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Run `call` as a task that `close` ends, whoever stops waiting for it."""
        task = asyncio.create_task(call)
        self._background.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.debug("a storage call failed", error=str(error))
