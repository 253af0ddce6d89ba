"""Generic records, by which extensions log their pages (access/transam/generic_xlog.c).

A block's data is a row of patches: offset, length, bytes. Nothing is said of the room between
pd_lower and pd_upper; both the writer and redo zero it, so that their copies stay the same.
"""

from __future__ import annotations

import struct

from boreal.types import PAGE_BYTES
from boreal.wal import BlockRef, WalRecord
from storage_node.redo.items import RedoMismatch

_PATCH = struct.Struct("<HH")
_BOUNDS = struct.Struct("<HH")
_LOWER_AT = 12


def apply(page: bytearray, _record: WalRecord, block: BlockRef) -> None:
    """Patch the page (applyPageRedo), then zero its hole. RedoMismatch if a patch leaves it."""
    data = block.data
    at = 0
    while at < len(data):
        offset, length = _PATCH.unpack_from(data, at)
        at += _PATCH.size
        if offset + length > PAGE_BYTES or at + length > len(data):
            raise RedoMismatch(f"a patch of {length} bytes at {offset} is not within its page")
        page[offset : offset + length] = data[at : at + length]
        at += length
    lower, upper = _BOUNDS.unpack_from(page, _LOWER_AT)
    if not lower <= upper <= PAGE_BYTES:
        raise RedoMismatch(f"the page's free space is said to be at {lower} to {upper}")
    page[lower:upper] = bytes(upper - lower)
