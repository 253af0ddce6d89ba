"""How a segment that fell behind gets the rest of the log, from its peers, without the writer.

Two things may be missing: log (the writer went on while this node was away, or sent less to it),
and history (whole epochs passed; no writer greeted this node). A lineage that a peer follows is as
good as one the writer brings: only the writer of an epoch makes a lineage that ends with it, and it
makes one; the peer took it from there. So adopting it from a peer is that writer's Adopt, come by
post.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

import structlog
from grpc import aio

from boreal.errors import BorealError, StaleEpoch
from boreal.quorum import Lineage, SegmentState
from boreal.rpc import storage_pb2, storage_pb2_grpc
from boreal.rpc.edge import calling, lineage_from_wire, open_channel, volume_ref
from boreal.types import Epoch, Lsn, NodeName, VolumeId
from storage_node.heartbeat import Membership, Peer
from storage_node.segment import Segment
from storage_node.volumes import Volumes

TICK_SECONDS = 0.25
_IDLE_CHECK_SECONDS = 2.0
"""How often a segment that nothing is heard of asks around."""
_POSITION_TIMEOUT_SECONDS = 1.0
_PULL_TIMEOUT_SECONDS = 30.0
MAX_PULL_BYTES = 64 * 1024 * 1024
"""In one turn; then the other volumes have theirs."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerPosition:
    """Where a peer's segment of the same volume stands."""

    promised: Epoch
    lineage: Lineage
    start: Lsn
    """Its log is kept from here on."""
    scl: Lsn
    vdl: Lsn


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """Read [start, end) of the log from `peer`."""

    peer: NodeName
    start: Lsn
    end: Lsn


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeLineage:
    """Adopt the lineage `peer` follows."""

    peer: NodeName
    lineage: Lineage


@dataclass(frozen=True, slots=True, kw_only=True)
class Stranded:
    """Those that have more log keep it from `start` on only: what comes next here is nowhere."""

    start: Lsn


def decide(
    own: SegmentState,
    peers: Mapping[NodeName, PeerPosition],
    avoid: Collection[NodeName] = (),
) -> Pull | TakeLineage | Stranded | None:
    """What to do next about being behind. Pure.

    A newer lineage first. It must end with an epoch at or past the promised one: what was answered
    to a fence stays true until that fence's writer, or a later one, has its lineage followed.

    Then log, from a peer of the same lineage, if neither is fenced: a fenced peer may adopt another
    lineage, under the epoch it promised already, between its telling where it stands and its
    sending the bytes; one that is not fenced can't without promising a newer epoch, which it then
    holds against the reader.
    """
    followed = max(
        (
            name
            for name, peer in peers.items()
            if peer.lineage.last.epoch >= own.promised
            and peer.lineage.last.epoch > own.lineage.last.epoch
        ),
        key=lambda name: (peers[name].lineage.last.epoch, name),
        default=None,
    )
    if followed is not None:
        return TakeLineage(peer=followed, lineage=peers[followed].lineage)
    if own.fenced:
        return None
    ahead = [
        name
        for name, peer in peers.items()
        if peer.lineage == own.lineage
        and peer.promised == own.lineage.last.epoch
        and peer.scl > own.scl
    ]
    if not ahead:
        return None
    lowest = min(peers[name].start for name in ahead)
    if lowest > own.scl:
        return Stranded(start=lowest)
    ahead = [name for name in ahead if peers[name].start <= own.scl]
    source = max(ahead, key=lambda name: (name not in avoid, peers[name].scl, name))
    end = min(peers[source].scl, own.scl + MAX_PULL_BYTES)
    return Pull(peer=source, start=own.scl, end=Lsn(end))


@dataclass(slots=True)
class _Watch:
    """What is remembered about one segment between ticks."""

    checked_at: float = float("-inf")
    appends: int = -1
    avoid: set[NodeName] = field(default_factory=set)

    def due(self, segment: Segment, now: float) -> bool:
        """Whether to ask the peers: never while the writer feeds the segment."""
        fed = segment.appends != self.appends and self.appends >= 0
        self.appends = segment.appends
        if fed:
            self.checked_at = now
            return False
        return segment.behind or now - self.checked_at >= _IDLE_CHECK_SECONDS


class CatchUp:
    """Keeps every segment of this node up with its peers."""

    def __init__(
        self, volumes: Volumes, membership: Membership, on_advance: Callable[[], None]
    ) -> None:
        """`on_advance` is called when log was appended; it must not wait."""
        self._volumes = volumes
        self._membership = membership
        self._on_advance = on_advance
        self._watches: dict[VolumeId, _Watch] = {}
        self._peers = _Peers()
        self._awake = asyncio.Event()

    def wake(self) -> None:
        """Look at once: a lineage was adopted, a volume made."""
        self._awake.set()

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            while True:
                await self._tick()
                try:
                    await asyncio.wait_for(self._awake.wait(), TICK_SECONDS)
                except TimeoutError:
                    continue
                self._awake.clear()
        finally:
            await self._peers.close()

    async def _tick(self) -> None:
        peers = self._membership.peers
        await self._peers.keep(peers)
        segments = dict(self._volumes)
        self._watches = {volume: self._watches.get(volume, _Watch()) for volume in segments}
        if not peers:
            return
        now = asyncio.get_running_loop().time()
        for volume, segment in segments.items():
            watch = self._watches[volume]
            if watch.due(segment, now):
                watch.checked_at = now
                await self._catch_up(volume, segment, watch)

    async def _catch_up(self, volume: VolumeId, segment: Segment, watch: _Watch) -> None:
        positions = await self._peers.positions(volume, segment.state.promised)
        if segment.closed:
            return
        step = decide(segment.state, positions, watch.avoid)
        if step is None:
            if any(peer.lineage == segment.state.lineage for peer in positions.values()):
                segment.nothing_further()
            return
        if isinstance(step, Stranded):
            segment.stranded(step.start)
            return
        try:
            if isinstance(step, TakeLineage):
                segment.adopt(step.lineage.last.epoch, step.lineage)
                _log.info("lineage taken from a peer", volume=volume, step=str(step))
                self.wake()
            else:
                await self._pull(volume, segment, step, positions[step.peer])
                watch.avoid.clear()
        except (BorealError, OSError) as error:
            watch.avoid.add(step.peer)
            if watch.avoid.issuperset(positions):
                watch.avoid.clear()
            _log.warning("catching up failed", volume=volume, step=str(step), why=str(error))

    async def _pull(
        self, volume: VolumeId, segment: Segment, pull: Pull, peer: PeerPosition
    ) -> None:
        """Append what the peer sends, for as long as this segment is still the one to append to."""
        appends = segment.appends
        async with aclosing(self._peers.log(volume, peer.promised, pull)) as chunks:
            async for chunk in chunks:
                if segment.appends != appends or segment.closed:
                    return  # the writer is back at it, or the volume is gone
                segment.fill(peer.lineage, Lsn(chunk.start_lsn), chunk.data, peer.vdl)
                self._on_advance()
        if segment.behind:
            self.wake()


class _Peers:
    """Connections to the other storage nodes."""

    def __init__(self) -> None:
        self._addresses: dict[NodeName, str] = {}
        self._channels: dict[NodeName, aio.Channel] = {}

    async def keep(self, peers: Collection[Peer]) -> None:
        """Have a connection to each of these, and to no one else."""
        wanted = {peer.name: peer.log_address for peer in peers}
        if wanted == self._addresses:
            return
        for name, address in self._addresses.items():
            if wanted.get(name) != address:
                await self._channels.pop(name).close(None)
        for name, address in wanted.items():
            if name not in self._channels:
                self._channels[name] = open_channel(address)
        self._addresses = wanted

    async def close(self) -> None:
        """Close them all."""
        await self.keep(())

    async def positions(self, volume: VolumeId, epoch: Epoch) -> dict[NodeName, PeerPosition]:
        """Where those stand that answer and hold the volume."""
        names = list(self._channels)
        answers = await asyncio.gather(*(self._position(name, volume, epoch) for name in names))
        return {name: answer for name, answer in zip(names, answers, strict=True) if answer}

    async def _position(
        self, name: NodeName, volume: VolumeId, epoch: Epoch
    ) -> PeerPosition | None:
        try:
            try:
                return await self._ask(name, volume, epoch)
            except StaleEpoch as stale:
                # Epochs this node has missed: a question may be asked under the newer one.
                newer = Epoch(stale.details.get("promised_epoch", epoch))
                return await self._ask(name, volume, newer)
        except BorealError:
            return None  # away, or without the volume: not one to ask now

    async def _ask(self, name: NodeName, volume: VolumeId, epoch: Epoch) -> PeerPosition:
        request = storage_pb2.GetPositionRequest(volume=volume_ref(volume, epoch))
        with calling(name, "GetPosition"):
            answer = await self._stub(name).GetPosition(request, timeout=_POSITION_TIMEOUT_SECONDS)
        return PeerPosition(
            promised=Epoch(answer.promised_epoch),
            lineage=lineage_from_wire(answer.lineage),
            start=Lsn(answer.start_lsn),
            scl=Lsn(answer.scl),
            vdl=Lsn(answer.vdl),
        )

    async def log(
        self, volume: VolumeId, epoch: Epoch, pull: Pull
    ) -> AsyncGenerator[storage_pb2.LogChunk]:
        """The bytes of a pull, in order."""
        request = storage_pb2.GetLogRequest(
            volume=volume_ref(volume, epoch), start_lsn=pull.start, end_lsn=pull.end
        )
        with calling(pull.peer, "GetLog"):
            call = self._stub(pull.peer).GetLog(request, timeout=_PULL_TIMEOUT_SECONDS)
            try:
                async for chunk in call:
                    yield chunk
            finally:
                call.cancel()

    def _stub(self, name: NodeName) -> storage_pb2_grpc.StorageLogAsyncStub:
        return storage_pb2_grpc.StorageLogStub(self._channels[name])
