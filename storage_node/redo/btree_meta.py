"""The metapage, block 0 of every B-tree: where its root is. Always written as a whole."""

from __future__ import annotations

import struct

from boreal.pages.layout import HEADER_BYTES
from boreal.wal import BlockRef, WalRecord
from storage_node.redo.btree_page import NO_PAGE, Flag, Opaque, make_page
from storage_node.redo.items import RedoMismatch, set_bounds, special_at

_LOGGED = struct.Struct("<6IB")
"""xl_btree_metadata: version, root, level, fastroot, fastlevel, last_cleanup_num_delpages,
allequalimage."""
_META = struct.Struct("<7I4xdB7x")
"""BTMetaPageData: magic, then what is logged, with the deprecated
btm_last_cleanup_num_heap_tuples before the last field."""
_MAGIC = 0x053162
_METAPAGE = 0
_NO_HEAP_TUPLES = -1.0


def restore_meta(page: bytearray, _record: WalRecord, block: BlockRef) -> None:
    """Make the metapage from the block's data (_bt_restore_meta, nbtxlog.c)."""
    if block.page.block != _METAPAGE:
        raise RedoMismatch(f"block {block.page.block} cannot be a metapage")
    *fields, all_equal_image = _LOGGED.unpack_from(block.data)
    make_page(page, Opaque(NO_PAGE, NO_PAGE, 0, Flag.META))
    _META.pack_into(page, HEADER_BYTES, _MAGIC, *fields, _NO_HEAP_TUPLES, all_equal_image)
    # Else the contents would pass for free space.
    set_bounds(page, lower=HEADER_BYTES + _META.size, upper=special_at(page))
