"""The visibility map: two bits for each heap block.

The rules are those of access/heap/visibilitymap.c and access/visibilitymapdefs.h.
"""

from __future__ import annotations

from boreal.pages.layout import HEADER_BYTES
from boreal.types import PAGE_BYTES, BlockNumber

ALL_VISIBLE = 0x01
ALL_FROZEN = 0x02
VALID_BITS = ALL_VISIBLE | ALL_FROZEN

_BITS_PER_BLOCK = 2
_BLOCKS_PER_BYTE = 8 // _BITS_PER_BLOCK
HEAP_BLOCKS_PER_PAGE = (PAGE_BYTES - HEADER_BYTES) * _BLOCKS_PER_BYTE


def map_block(heap_block: int) -> BlockNumber:
    """The map's block that holds the bits of `heap_block`."""
    return BlockNumber(heap_block // HEAP_BLOCKS_PER_PAGE)


def clear(page: bytearray, heap_block: int, bits: int) -> None:
    """Clear `bits` of `heap_block` on the map page that holds them. The page's LSN stays."""
    byte, shift = _place(heap_block)
    page[byte] &= ~(bits << shift) & 0xFF


def set_bits(page: bytearray, heap_block: int, bits: int) -> bool:
    """Set `bits` of `heap_block` on the map page that holds them; False if it had just these.

    (visibilitymap_set: only a page that changes gets the record's LSN.)
    """
    byte, shift = _place(heap_block)
    if page[byte] >> shift & VALID_BITS == bits:
        return False
    page[byte] |= bits << shift
    return True


def truncated_blocks(heap_blocks: int) -> int:
    """How many map blocks remain at most when the heap is cut to `heap_blocks` blocks.

    (visibilitymap_prepare_truncate.) Unless the cut falls between two map pages, the last page that
    remains must lose the bits of the heap blocks past the cut: `truncate`.
    """
    return -(-heap_blocks // HEAP_BLOCKS_PER_PAGE)


def truncate(page: bytearray, heap_blocks: int) -> None:
    """On the map's last remaining page, clear the bits of every heap block at or past the cut."""
    if heap_blocks % HEAP_BLOCKS_PER_PAGE == 0:
        return
    byte, shift = _place(heap_blocks)
    page[byte] &= (1 << shift) - 1
    page[byte + 1 :] = bytes(PAGE_BYTES - byte - 1)


def _place(heap_block: int) -> tuple[int, int]:
    in_page = heap_block % HEAP_BLOCKS_PER_PAGE
    byte, slot = divmod(in_page, _BLOCKS_PER_BYTE)
    return HEADER_BYTES + byte, slot * _BITS_PER_BLOCK
