"""Redo of the SEQ resource manager (seq_redo, commands/sequence.c): one page, built anew."""

from __future__ import annotations

import struct
from typing import Final

from boreal.wal import BlockRef, WalRecord
from storage_node.redo.items import RedoMismatch, add_item, init_page, special_at

_LOG = 0x00
_LOCATOR_BYTES: Final = 12
"""xl_seq_rec: the relation; its only tuple follows."""
_MAGIC = struct.Struct("<I")
_SEQUENCE_MAGIC = 0x1717
"""What the special area of a sequence's page holds (sequence_magic)."""


def apply(page: bytearray, record: WalRecord, _block: BlockRef) -> None:
    """Build `page` whole, all but its LSN. Raises RedoMismatch if the record cannot be one."""
    if record.info != _LOG:
        raise RedoMismatch(f"there is no operation {record.info:#04x} on sequences")
    if len(record.main_data) <= _LOCATOR_BYTES:
        raise RedoMismatch("the record has no tuple")
    init_page(page, _MAGIC.size)
    _MAGIC.pack_into(page, special_at(page), _SEQUENCE_MAGIC)
    add_item(page, record.main_data[_LOCATOR_BYTES:], 1)
