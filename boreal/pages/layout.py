"""The layout every page of a relation shares (storage/bufpage.h)."""

from __future__ import annotations

import struct
from typing import NamedTuple

from boreal.types import PAGE_BYTES, Lsn

_HEADER = struct.Struct("<IIHHHHHHI")
_LSN = struct.Struct("<II")
_ZERO_PAGE = bytes(PAGE_BYTES)

HEADER_BYTES = _HEADER.size
"""SizeOfPageHeaderData; line pointers or contents begin here."""


class PageHeader(NamedTuple):
    """PageHeaderData. Offsets are from the page's start."""

    lsn: Lsn
    checksum: int
    flags: int
    lower: int
    """Where free space begins (the end of the line pointers)."""
    upper: int
    """Where free space ends."""
    special: int
    """Where the access method's own area begins."""
    size_and_version: int
    prune_xid: int

    @classmethod
    def of(cls, page: bytes | bytearray) -> PageHeader:
        """Read it; nothing is checked."""
        high, low, *rest = _HEADER.unpack_from(page)
        return cls(Lsn(high << 32 | low), *rest)


def page_lsn(page: bytes | bytearray) -> Lsn:
    """The end of the last record applied to the page."""
    high, low = _LSN.unpack_from(page)
    return Lsn(high << 32 | low)


def set_page_lsn(page: bytearray, lsn: int) -> None:
    """Stamp the page. Never do it to an all-zero page: that would make it look initialized."""
    _LSN.pack_into(page, 0, lsn >> 32, lsn & 0xFFFFFFFF)


def is_zero(page: bytes | bytearray) -> bool:
    """Whether the page is all zeros: PostgreSQL's new page, never initialized."""
    return page == _ZERO_PAGE
