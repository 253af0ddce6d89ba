"""The newest part of the log, kept in memory for the storage nodes that lack it."""

from __future__ import annotations

import mmap

from boreal.errors import BelowLogStart, CorruptWal, Internal
from boreal.types import Lsn, format_lsn


class LogWindow:
    """A ring over the log's last bytes.

    Invariant: it holds exactly [start, end); `end - start` never exceeds its capacity; nothing at
    or above the floor is ever dropped: past the VDL there may be no other copy to catch up from.

    The memory is mapped, not allocated: what was never written costs nothing.
    """

    def __init__(self, start: Lsn, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._ring = mmap.mmap(-1, capacity_bytes)
        self._floor = start
        self.start = start
        """The oldest byte here. Read only."""
        self.end = start
        """One past the newest byte: the next one wanted. Read only."""

    @property
    def pending_bytes(self) -> int:
        """How much may not be dropped."""
        return self.end - self._floor

    def raise_floor(self, lsn: Lsn) -> None:
        """What is below `lsn` may be dropped."""
        self._floor = max(self._floor, min(lsn, self.end))

    def push(self, start: Lsn, data: bytes) -> None:
        """Add what of `data` is new.

        CorruptWal: what is not new differs from what was pushed before. Internal: it leaves a gap,
        or does not fit above the floor.
        """
        if start > self.end:
            raise Internal(
                f"WAL at {format_lsn(start)} leaves a gap: {format_lsn(self.end)} comes next"
            )
        if start < self.end:
            self._compare(start, data)
            data = data[self.end - start :]
        size = len(data)
        if self.pending_bytes + size > self._capacity_bytes:
            raise Internal(
                f"{size} bytes pushed onto {self.pending_bytes} without a quorum; "
                f"{self._capacity_bytes} is the limit. Await room first"
            )
        at = self.end % self._capacity_bytes
        until_wrap = self._capacity_bytes - at
        if size <= until_wrap:
            self._ring[at : at + size] = data
        else:
            self._ring[at:] = data[:until_wrap]
            self._ring[: size - until_wrap] = data[until_wrap:]
        self.end = Lsn(self.end + size)
        self.start = max(self.start, Lsn(self.end - self._capacity_bytes))

    def _compare(self, start: Lsn, data: bytes) -> None:
        first = max(start, self.start)
        last = Lsn(min(start + len(data), self.end))
        if first < last and self.read(Lsn(first), last) != data[first - start : last - start]:
            raise CorruptWal(
                f"other bytes than before were pushed at {format_lsn(first)}; the log is never "
                "rewritten by the writer that wrote it",
                lsn=first,
            )

    def read(self, start: Lsn, end: Lsn) -> bytes:
        """The bytes [start, end), a copy. BelowLogStart: they were dropped."""
        if start < self.start:
            raise BelowLogStart(
                f"{format_lsn(start)} is below the window's start, {format_lsn(self.start)}",
                start_lsn=self.start,
            )
        if not start <= end <= self.end:
            raise Internal(f"the window ends at {format_lsn(self.end)}, not {format_lsn(end)}")
        at, until = start % self._capacity_bytes, start % self._capacity_bytes + end - start
        if until <= self._capacity_bytes:
            return self._ring[at:until]
        return self._ring[at:] + self._ring[: until - self._capacity_bytes]
