"""Posting list tuples: one key with the addresses (TIDs) of all rows that have it (nbtdedup.c).

The key comes first, then, aligned, the TIDs in ascending order. The tuple's own t_tid tells where
they begin and how many they are.
"""

from __future__ import annotations

import struct

from storage_node.redo.btree_page import ALTERNATIVE_TID, SIZE_MASK, TUPLE_HEADER_BYTES
from storage_node.redo.items import RedoMismatch

TID_BYTES = 6

_HEADER = struct.Struct("<HHHH")
"""IndexTupleData: t_tid (block number high, low; offset number), t_info."""
_U16 = struct.Struct("<H")
_IS_POSTING = 0x2000
"""BT_IS_POSTING, in t_tid's offset number."""
_COUNT_MASK = 0x0FFF
"""BT_OFFSET_MASK: the number of TIDs, beside the status bits."""
_MAX_ITEM_BYTES = 2704
"""BTMaxItemSize of a page of 8 KiB: a third of it, less one TID."""


def swap_posting(new: bytes, posting: bytes, split_at: int) -> tuple[bytes, bytes]:
    """Put a new tuple's TID into the list at index `split_at`, push the last TID out of it.

    Returns the tuple to insert after the list, which is the new one with the TID pushed out, and
    the list's tuple; both keep their sizes (_bt_swap_posting). RedoMismatch if `split_at` is not
    within the list, past its first TID.
    """
    begin, end = _list_of(posting)
    at = begin + split_at * TID_BYTES
    last = end - TID_BYTES
    if not begin < at <= last or _is_special(new):
        raise RedoMismatch(f"the posting list cannot be split at {split_at}")
    swapped = b"".join((posting[:at], new[:TID_BYTES], posting[at:last], posting[end:]))
    return posting[last:end] + new[TID_BYTES:], swapped


def without(posting: bytes, indexes: tuple[int, ...]) -> bytes:
    """The tuple that is left when TIDs, by ascending index, are removed (_bt_update_posting).

    An ordinary one if only one TID is left. RedoMismatch if that leaves none, or the indexes are
    not those of TIDs in the list.
    """
    begin, end = _list_of(posting)
    count = (end - begin) // TID_BYTES
    doomed = set(indexes)
    if not doomed or len(doomed) != len(indexes) or max(doomed) >= count or len(doomed) == count:
        raise RedoMismatch(f"a posting list of {count} cannot lose {indexes}")
    kept = b"".join(
        posting[begin + index * TID_BYTES : begin + (index + 1) * TID_BYTES]
        for index in range(count)
        if index not in doomed
    )
    return _form(posting[:begin], kept)


def merge(tuples: list[bytes]) -> bytes:
    """One posting list tuple of several with equal keys (_bt_dedup_*, _bt_form_posting).

    RedoMismatch if one of them does not point into the table, or the outcome is too large.
    """
    base = tuples[0]
    key = base[: _list_of(base)[0]] if _is_special(base) else base
    merged = _form(key, b"".join(map(_tids_of, tuples)))
    if len(merged) > _MAX_ITEM_BYTES:
        raise RedoMismatch(f"a posting list of {len(merged)} bytes is too large")
    return merged


def _form(key: bytes, tids: bytes) -> bytes:
    """A tuple of that header and key, with these TIDs: a posting list if there are several."""
    info = _info_of(key) & ~(SIZE_MASK | ALTERNATIVE_TID)
    key_size, count = len(key), len(tids) // TID_BYTES
    if count == 1:
        return b"".join((tids, _U16.pack(info | key_size), key[TUPLE_HEADER_BYTES:]))
    padding = -(key_size + len(tids)) % 8
    size = key_size + len(tids) + padding
    header = _HEADER.pack(
        key_size >> 16, key_size & 0xFFFF, count | _IS_POSTING, info | ALTERNATIVE_TID | size
    )
    return b"".join((header, key[TUPLE_HEADER_BYTES:], tids, bytes(padding)))


def _tids_of(stored: bytes) -> bytes:
    if not _is_special(stored):
        return stored[:TID_BYTES]
    begin, end = _list_of(stored)
    return stored[begin:end]


def _is_special(stored: bytes) -> bool:
    """Whether its t_tid is something else: it is a posting list's, or a pivot tuple's."""
    return _info_of(stored) & ALTERNATIVE_TID != 0


def _info_of(stored: bytes) -> int:
    """The t_info of a tuple."""
    info: int = _U16.unpack_from(stored, TID_BYTES)[0]
    return info


def _list_of(stored: bytes) -> tuple[int, int]:
    """Where the TIDs of a posting list tuple begin and end. RedoMismatch if it is none."""
    high, low, offset, info = _HEADER.unpack_from(stored)
    begin = high << 16 | low
    end = begin + (offset & _COUNT_MASK) * TID_BYTES
    if not (info & ALTERNATIVE_TID and offset & _IS_POSTING):
        raise RedoMismatch("the tuple is not a posting list")
    if begin < TUPLE_HEADER_BYTES or end - begin < 2 * TID_BYTES or end > len(stored):
        raise RedoMismatch("the posting list is larger than its tuple")
    return begin, end
