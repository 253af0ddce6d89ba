"""Whether our page is PostgreSQL's, where it must be.

What may differ is what PostgreSQL's own check allows (boreal.pages.masks), but less: its heap mask
hides which kind of lock a tuple is under, and whether the page claims to be all-visible.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from boreal.errors import CorruptData
from boreal.pages import HEADER_BYTES, PageHeader, PageKind, is_zero, mask_page, page_lsn
from boreal.types import PAGE_BYTES, PageKey, format_lsn

_ALL_VISIBLE = 0x0004
"""PD_ALL_VISIBLE (storage/bufpage.h)."""
_LOGGED_INFOMASK = 0x10 | 0x40 | 0x80 | 0x1000 | 0x2000 | 0xC000
"""KEYSHR_LOCK, EXCL_LOCK, LOCK_ONLY, IS_MULTI, UPDATED, MOVED (access/htup_details.h)."""
_HINT_INFOMASK = 0x0F00
"""XMIN_COMMITTED to XMAX_INVALID. Redo may lack one; one too many makes a wrong answer."""
_FREE_SPACE_IS_FREE = frozenset((PageKind.HEAP, PageKind.BTREE, PageKind.HASH, PageKind.GIST))
_UNLOGGED_INFOMASK = _HINT_INFOMASK | 0x20
"""And COMBOCID."""
_SEQUENCE_COUNTS = slice(8160, 8177)
"""last_value, log_cnt and is_called: the WAL runs up to 32 values ahead of the page at rest."""
_SPGIST_CACHE = slice(28, 92)
"""SpGistLUPCache on the meta page: hints that are never logged."""
_GIST_BUILD_LSN = 1


class Comparison:
    """Compares pages, and remembers what it found not to matter.

    Masks are slow, and hints stay: a page that differs from PostgreSQL's in exactly the bits it
    differed in when it was last looked at is as good as then.
    """

    def __init__(self) -> None:
        self._known: dict[PageKey, int] = {}

    def in_record(
        self, ours: bytearray, theirs: bytearray, kind: PageKind, page: PageKey
    ) -> str | None:
        """Say how our page differs from an after-image where it must not. LSNs do differ."""
        if kind is PageKind.VISIBILITY_MAP:
            # Sessions clear a bit before they log the record that tells of it.
            return "lacks map bits" if _map_bits(theirs) & ~_map_bits(ours) else None
        return self._compare(ours, theirs, kind, page, at_rest=False)

    def at_rest(
        self,
        ours: bytes,
        theirs: bytes,
        kind: PageKind | None,
        page: PageKey,
        *,
        may_lack_bits: bool = False,
    ) -> str | None:
        """Say how our page differs from the one in PostgreSQL's file where it must not.

        `may_lack_bits`: it is a visibility map that need not have every bit.
        """
        if may_lack_bits:
            return "has map bits too many" if _map_bits(ours) & ~_map_bits(theirs) else None
        if kind is PageKind.HEAP and is_zero(ours):
            # Bulk extension initializes pages without a record.
            return None if PageHeader.of(theirs).lower <= HEADER_BYTES else "is missing"
        lsn = page_lsn(theirs)
        if page_lsn(ours) != lsn != _GIST_BUILD_LSN and kind is not PageKind.VISIBILITY_MAP:
            return f"LSN {format_lsn(page_lsn(ours))} instead of {format_lsn(lsn)}"
        if kind is None:
            return "differs where nobody can tell its kind"
        if kind is PageKind.GIST and _gist_split(ours) != _gist_split(theirs):
            return f"split state {_gist_split(ours)} instead of {_gist_split(theirs)}"
        return self._compare(ours, theirs, kind, page, at_rest=True)

    def _compare(
        self,
        ours: bytes | bytearray,
        theirs: bytes | bytearray,
        kind: PageKind,
        page: PageKey,
        *,
        at_rest: bool,
    ) -> str | None:
        unlike = _unlike(ours, theirs, kind)
        if not unlike or self._known.get(page) == unlike:
            return None
        if kind is PageKind.HEAP and _only_hints_differ(ours, theirs):
            self._known[page] = unlike
            return None
        one, other = bytearray(ours), bytearray(theirs)
        try:
            for copy in (one, other):
                mask_page(copy, kind, page.block)
        except CorruptData as error:
            return str(error)
        if at_rest and kind is PageKind.SEQUENCE:
            one[_SEQUENCE_COUNTS] = other[_SEQUENCE_COUNTS]
        if at_rest and kind is PageKind.SPGIST and page.block == 0:
            one[_SPGIST_CACHE] = other[_SPGIST_CACHE]
        if one != other:
            return _describe(one, other)
        found = _compare_heap(ours, theirs) if kind is PageKind.HEAP else None
        if found is None:
            self._known[page] = unlike
        return found


def _unlike(ours: bytes | bytearray, theirs: bytes | bytearray, kind: PageKind) -> int:
    """The bits that differ, but for the LSN, the checksum, and free space where it is masked."""
    one, other = bytearray(ours), bytearray(theirs)
    one[:10] = other[:10]
    header = PageHeader.of(one)
    if kind in _FREE_SPACE_IS_FREE and header.lower <= header.upper <= PAGE_BYTES:
        one[header.lower : header.upper] = other[header.lower : header.upper]
    return int.from_bytes(one) ^ int.from_bytes(other)


def _only_hints_differ(ours: bytes | bytearray, theirs: bytes | bytearray) -> bool:
    """Whether hints and command ids explain all differences. False: let the masks tell.

    They would find the same, but mask tuple by tuple, which takes most of a long run's time.
    """
    one, other = bytearray(ours), bytearray(theirs)
    lower, upper = PageHeader.of(other)[3:5]
    one[:10] = other[:10]
    one[10] = one[10] & _ALL_VISIBLE | other[10] & ~_ALL_VISIBLE
    one[20:24] = other[20:24]  # pd_prune_xid
    if one[:lower] != other[:lower]:
        return False
    one[lower:upper] = other[lower:upper]
    for pointer in struct.unpack_from(f"<{(lower - HEADER_BYTES) // 4}I", other, HEADER_BYTES):
        start = pointer & 0x7FFF
        if (pointer >> 15) & 3 != 1 or one[start : start + 22] == other[start : start + 22]:
            continue
        mine, yours = _infomask(one, start), _infomask(other, start)
        if (mine ^ yours) & ~_UNLOGGED_INFOMASK or mine & ~yours & _HINT_INFOMASK:
            return False
        one[start + 8 : start + 12] = other[start + 8 : start + 12]  # t_cid
        one[start + 20 : start + 22] = other[start + 20 : start + 22]
    return one == other


def _infomask(page: bytearray, start: int) -> int:
    return page[start + 20] | page[start + 21] << 8


def _compare_heap(ours: bytes | bytearray, theirs: bytes | bytearray) -> str | None:
    """What PostgreSQL's mask hides, but must be right.

    A page wrongly said to be all-visible hides deletions from index-only scans; a wrong kind of
    xmax makes a lock a deletion.
    """
    if (ours[10] ^ theirs[10]) & _ALL_VISIBLE:
        return f"all-visible is {ours[10] & _ALL_VISIBLE:#x}, not {theirs[10] & _ALL_VISIBLE:#x}"
    for number, mine, yours in _infomasks(ours, theirs):
        if (mine ^ yours) & _LOGGED_INFOMASK or mine & ~yours & _HINT_INFOMASK:
            return f"tuple {number} has infomask {mine:#06x}, not {yours:#06x}"
    return None


def _infomasks(
    ours: bytes | bytearray, theirs: bytes | bytearray
) -> Iterator[tuple[int, int, int]]:
    """Number and both infomasks of every tuple; the pages' line pointers are equal."""
    for at in range(HEADER_BYTES, PageHeader.of(ours).lower - 3, 4):
        (pointer,) = struct.unpack_from("<I", ours, at)
        if (pointer >> 15) & 3 == 1:
            place = (pointer & 0x7FFF) + 20
            (mine,) = struct.unpack_from("<H", ours, place)
            (yours,) = struct.unpack_from("<H", theirs, place)
            yield (at - HEADER_BYTES) // 4 + 1, mine, yours


def _map_bits(page: bytes | bytearray) -> int:
    return int.from_bytes(page[HEADER_BYTES:])


def _describe(one: bytearray, other: bytearray) -> str:
    at = next(n for n in range(PAGE_BYTES) if one[n] != other[n])
    many = sum(a != b for a, b in zip(one, other, strict=True))
    mine, yours = one[at : at + 8].hex(" ", 4), other[at : at + 8].hex(" ", 4)
    bounds = struct.unpack_from("<HHH", one, 12), struct.unpack_from("<HHH", other, 12)
    where = f"differs in {many} bytes, first at {at}: {mine} instead of {yours}"
    return f"{where}; lower, upper, special {bounds[0]} and {bounds[1]}"


def _gist_split(page: bytes) -> tuple[int, int, int]:
    """NSN and F_FOLLOW_RIGHT. The masks blank them: an image has them as they were before."""
    high, low, _, flags = struct.unpack_from("<IIIH", page, PageHeader.of(page).special)
    return high, low, flags & 8
