"""Which bits of a visibility map page were cleared by which record, for the log in memory.

Nearly every update of a freshly vacuumed table clears some, so map pages have the longest chains of
all. To fetch and parse each of those records again, for two bits of it, was half of a busy page
process's work.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence

from boreal.pages import visibility
from storage_node.entries import Kind, start_of


class MapClears:
    """The plain records (boreal.wal.touches) that clear bits of one map page. Only grows.

    Invariant: whatever a record that is in here clears on this page is in here. One that is not has
    to be read from the log. A record takes 13 bytes.
    """

    __slots__ = ("_bits", "_heap_blocks", "_starts")

    def __init__(self) -> None:
        self._starts = array("Q")
        self._heap_blocks = array("I")
        self._bits = bytearray()

    def note(self, start: int, heap_block: int, bits: int) -> None:
        """The record at `start`, the newest so far, clears `bits` of `heap_block`."""
        self._starts.append(start)
        self._heap_blocks.append(heap_block)
        self._bits.append(bits)

    def apply(self, content: bytearray, entries: Sequence[int], begin: int, end: int) -> int:
        """Do to the map page what its entries from `begin` on do, short of `end`, as far as they
        are in here; return the first that is not done."""
        if begin >= end:
            return begin
        starts, count = self._starts, len(self._starts)
        at = bisect_left(starts, start_of(entries[begin]))
        for number in range(begin, end):
            start = entries[number] ^ Kind.MAP_CLEAR  # of any other kind it is no start at all
            if at == count or starts[at] != start:
                return number
            while at < count and starts[at] == start:  # an update may clear bits of two blocks
                visibility.clear(content, self._heap_blocks[at], self._bits[at])
                at += 1
        return end
