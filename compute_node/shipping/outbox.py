"""What all links of a shipper share: the window, the batches cut from it, and the VDL.

No I/O and no clock: the links do the sending and tell it what was acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from boreal.errors import StaleEpoch
from boreal.frames import MAX_APPEND_BYTES, frame
from boreal.histogram import Sizes
from boreal.quorum import DurabilityTracker, Lineage
from boreal.rpc import edge, storage_pb2
from boreal.types import Lsn, NodeName, VolumeId
from compute_node.shipping.window import LogWindow

SLACK_BYTES = MAX_APPEND_BYTES
"""Taken beyond `full`: whoever reads WAL can stop only after what is in its hands."""


_DATA_TAG = bytes([storage_pb2.AppendRequest.DATA_FIELD_NUMBER << 3 | 2])
"""Field number and wire type, length-delimited (protobuf.dev/programming-guides/encoding)."""


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


@dataclass(frozen=True, slots=True)
class Batch:
    """One AppendRequest, framed. The same object goes to every node that stands where it starts."""

    start: Lsn
    end: Lsn
    vdl: Lsn
    frame: bytes


class Outbox:
    """The log of one writer incarnation on its way out.

    It leaves in waves: what arrives while a wave is under way waits until a write quorum has that,
    and after a wave that carried several arrivals the next one gathers for a moment more. A commit
    waits for the fourth node in any case; without waves the quick nodes would be sent, and would
    sync, every commit by itself, and all six together keep a small machine busy with that.

    Invariants: the VDL grows only by the acknowledgements of a write quorum; what is above it is in
    the window; nothing is sent past `wave_end`, which never shrinks; once `fenced`, nothing goes in
    or out and the VDL stays.
    """

    def __init__(
        self,
        *,
        volume: VolumeId,
        lineage: Lineage,
        start: Lsn,
        tracker: DurabilityTracker,
        window_bytes: int,
        on_vdl: Callable[[Lsn], None],
    ) -> None:
        self.volume = volume
        self.lineage = lineage
        self.pgmrpl = Lsn(0)
        self.fenced: StaleEpoch | None = None
        self.window = LogWindow(start, window_bytes + SLACK_BYTES)
        """To read; only `push` adds to it."""
        self.batch_bytes = Sizes(8, 20)
        """Log in each append that was sent to a node."""
        self._window_bytes = window_bytes
        self._tracker = tracker
        self._on_vdl = on_vdl
        self._header = storage_pb2.AppendRequest(volume=edge.volume_ref(volume, lineage.last.epoch))
        self._newest: Batch | None = None
        self._wave_end = start
        self._arrivals = 0
        self._carried = 0

    @property
    def vdl(self) -> Lsn:
        """Durable on a write quorum up to here."""
        return self._tracker.vdl

    @property
    def held_everywhere(self) -> Lsn | None:
        """Every node of the volume has the log up to here; None: one has not been heard of."""
        return self._tracker.held_everywhere

    @property
    def full(self) -> bool:
        """Whether too much waits for a quorum to take more."""
        return self.window.pending_bytes >= self._window_bytes

    @property
    def roomy(self) -> bool:
        """Whether at most half of the window waits for a quorum."""
        return self.window.pending_bytes <= self._window_bytes // 2

    @property
    def wave_end(self) -> Lsn:
        """Send up to here."""
        return self._wave_end

    @property
    def gathering(self) -> bool:
        """Whether something waits for no more than company."""
        return self._wave_end <= self.vdl and self._wave_end < self.window.end

    def push(self, start: Lsn, data: bytes) -> None:
        """Take WAL. Raises StaleEpoch once fenced."""
        if self.fenced is not None:
            raise self.fenced
        self.window.push(start, data)
        self._arrivals += 1

    def begin_wave(self, *, patient: bool = True) -> bool:
        """Let go what has gathered, at once if there was no crowd; else only if not `patient`."""
        if not self.gathering or (patient and self._carried > 1):
            return False
        self._wave_end = self.window.end
        self._carried, self._arrivals = self._arrivals, 0
        return True

    def batch(self, at: Lsn) -> Batch:
        """What there is from `at` on, up to the limit of an append; at the end, the VDL alone."""
        end = min(max(self._wave_end, at), Lsn(at + MAX_APPEND_BYTES))
        newest = self._newest
        if newest is not None and newest.start == at and newest.end == end and at < end:
            return newest
        header, vdl = self._header, self.vdl
        header.start_lsn, header.vdl, header.pgmrpl = at, vdl, self.pgmrpl
        data = self.window.read(at, end)
        # The data is put behind the serialized rest by hand, as fields may come in any order: a
        # message object that is used again keeps every string it was ever given.
        body = b"".join((header.SerializeToString(), _DATA_TAG, _varint(len(data)), data))
        self._newest = Batch(at, end, vdl, frame(body))
        return self._newest

    def adopted(self, node: NodeName, scl: Lsn) -> None:
        """`node` follows our lineage and stands at `scl`."""
        if self.fenced is None:
            self._advance(self.vdl, self._tracker.adopted(node, scl))

    def acked(self, node: NodeName, scl: Lsn) -> None:
        """`node` has everything up to `scl` on disk."""
        if self.fenced is None:
            self._advance(self.vdl, self._tracker.acked(node, scl))

    def _advance(self, before: Lsn, vdl: Lsn) -> None:
        if vdl > before:
            self.window.raise_floor(vdl)
            self._on_vdl(vdl)
