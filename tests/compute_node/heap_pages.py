"""Heap pages made byte by byte."""

from __future__ import annotations

import struct

from boreal.pages import HEADER_BYTES
from boreal.types import PAGE_BYTES


def heap_page(*, infomask: int = 0x0002, data: bytes = b"abc", lsn: int = 0x100) -> bytes:
    """One tuple of 27 bytes, padded to 32, at the page's end."""
    page = bytearray(PAGE_BYTES)
    start = PAGE_BYTES - 32
    struct.pack_into("<IIHHHHHHI", page, 0, 0, lsn, 0, 0, 28, start, PAGE_BYTES, 0x2004, 0)
    struct.pack_into("<I", page, HEADER_BYTES, start | 1 << 15 | 27 << 17)
    struct.pack_into("<IIIHHHHHB", page, start, 700, 0, 0, 0, 70, 1, 1, infomask, 24)
    page[start + 24 : start + 27] = data
    return bytes(page)
