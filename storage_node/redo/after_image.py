"""Redo of GIN and SP-GiST: take the page as the record itself carries it.

The writer has both resource managers in `wal_consistency_checking`: PostgreSQL then adds to each of
their records an image of every block *after* the change (xloginsert.c, XLogRecordAssemble). Its own
redo uses such an image only to check its result; here it is the result, once it has the page's LSN,
which is known only after the record has been inserted.
"""

from __future__ import annotations

from boreal.errors import IngestStopped
from boreal.pages.layout import is_zero, set_page_lsn
from boreal.types import format_lsn
from boreal.wal import BlockRef, WalRecord
from storage_node.redo import Step


class AfterImageRedo:
    """Implements `Redo` by the images in the records alone."""

    def step(self, record: WalRecord, block: BlockRef) -> Step:
        """See `Redo.step`."""
        if block.has_image:
            # A compressed one is only met if a superuser turned wal_compression on.
            return Step.UNKNOWN if block.compressed else Step.BASE
        raise IngestStopped(
            f"the {record.rmgr.name} record {record.info:#04x} at {format_lsn(record.start)} lacks "
            f"the image of {block.page}. The writer must run with wal_consistency_checking for its "
            "resource manager",
            lsn=record.start,
        )

    def apply(self, page: bytearray, record: WalRecord, block: BlockRef) -> None:
        """See `Redo.apply`. Never stamps an all-zero page (xlogutils.c: PageIsNew)."""
        page[:] = block.restore_image()
        if not is_zero(page):
            set_page_lsn(page, record.end)
