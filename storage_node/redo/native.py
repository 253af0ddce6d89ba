"""Redo as PostgreSQL does it: the resource manager's own rules, or the image the record carries.

GIN and SP-GiST alone go by after-images (`after_image`): the writer adds them for those two, whose
records are rare and whose redo is large. For all others an after-image is what it is to PostgreSQL,
a means to check the result, and is not looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, NamedTuple

from boreal.errors import CorruptWal, IngestStopped
from boreal.pages.layout import is_zero
from boreal.types import PAGE_BYTES, format_lsn
from boreal.wal import BlockRef, Rmgr, WalRecord, XlogInfo
from storage_node.redo import Step, brin, btree, generic, gist, heap, heap2, seq
from storage_node.redo import hash as hash_index
from storage_node.redo.after_image import AfterImageRedo
from storage_node.redo.items import RedoMismatch

_LSN = struct.Struct("<II")
_BY_AFTER_IMAGE: Final = frozenset((Rmgr.GIN, Rmgr.SPGIST))
_MISFITS: Final = (RedoMismatch, struct.error, LookupError, ValueError)
"""What applying a record to a page it was not made for ends in."""


class _Manager(NamedTuple):
    """The redo of one resource manager: functions of its module."""

    apply: Callable[[bytearray, WalRecord, BlockRef], object]
    touches: Callable[[WalRecord, BlockRef], bool] | None = None
    """Whether the record changes the block; if not, the block was only locked."""
    keeps_lsn: Callable[[WalRecord, BlockRef], bool] | None = None
    after_image: Callable[[bytearray, WalRecord, BlockRef], object] | None = None
    """What PostgreSQL's redo still does to a page it restored from an image."""


_MANAGERS: Final[dict[Rmgr, _Manager]] = {
    Rmgr.HEAP2: _Manager(heap2.apply, keeps_lsn=heap2.keeps_lsn),
    Rmgr.HEAP: _Manager(heap.apply),
    Rmgr.BTREE: _Manager(btree.apply),
    Rmgr.HASH: _Manager(hash_index.apply, touches=hash_index.touches),
    Rmgr.GIST: _Manager(gist.apply, after_image=gist.after_image),
    Rmgr.SEQ: _Manager(seq.apply),
    Rmgr.BRIN: _Manager(brin.apply),
    Rmgr.GENERIC: _Manager(generic.apply),
}


class NativeRedo:
    """Implements `Redo`."""

    def __init__(self) -> None:
        self._by_after_image = AfterImageRedo()

    def step(self, record: WalRecord, block: BlockRef) -> Step:
        """See `Redo.step`."""
        if block.apply_image:
            # A compressed one is only met if a superuser turned wal_compression on.
            return Step.UNKNOWN if block.compressed else Step.BASE
        manager = _MANAGERS.get(record.rmgr)
        if manager is None:
            return self._step_by_image(record, block)
        if block.will_init:
            return Step.BASE
        if manager.touches is not None and not manager.touches(record, block):
            return Step.NOTHING
        return Step.CHANGE

    def _step_by_image(self, record: WalRecord, block: BlockRef) -> Step:
        """A block of a record without redo of its own, and without an image to apply."""
        if record.rmgr in _BY_AFTER_IMAGE:
            return self._by_after_image.step(record, block)
        if record.rmgr == Rmgr.XLOG and record.info == XlogInfo.FPI_FOR_HINT:
            # Nothing but hint bits: the writer leaves the image out when it is not needed.
            return Step.NOTHING
        raise IngestStopped(
            f"the {record.rmgr.name} record {record.info:#04x} at {format_lsn(record.start)} names "
            f"{block.page}, which such a record does not do",
            lsn=record.start,
        )

    def apply(self, page: bytearray, record: WalRecord, block: BlockRef) -> None:
        """See `Redo.apply`.

        Raises CorruptWal where the record does not fit the page; `page` is then of no use.
        """
        if record.rmgr in _BY_AFTER_IMAGE:
            self._by_after_image.apply(page, record, block)
        elif block.apply_image:
            _restore(page, record, block)
        else:
            _redo(page, record, block)
        if len(page) != PAGE_BYTES:
            raise _misfit(record, block, f"the page got {len(page)} bytes long")


def _restore(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    """Never stamps an all-zero page (XLogReadBufferForRedoExtended, xlogutils.c: PageIsNew)."""
    page[:] = block.restore_image()
    if is_zero(page):
        return
    _LSN.pack_into(page, 0, record.end >> 32, record.end & 0xFFFFFFFF)
    manager = _MANAGERS.get(record.rmgr)
    if manager is not None and manager.after_image is not None:
        manager.after_image(page, record, block)


def _redo(page: bytearray, record: WalRecord, block: BlockRef) -> None:
    manager = _MANAGERS.get(record.rmgr)
    if manager is None:
        raise _misfit(record, block, "such a record does not change pages")
    try:
        manager.apply(page, record, block)
    except _MISFITS as error:
        raise _misfit(record, block, str(error)) from error
    if manager.keeps_lsn is None or not manager.keeps_lsn(record, block):
        _LSN.pack_into(page, 0, record.end >> 32, record.end & 0xFFFFFFFF)


def _misfit(record: WalRecord, block: BlockRef, why: str) -> CorruptWal:
    return CorruptWal(
        f"the {record.rmgr.name} record {record.info:#04x} at {format_lsn(record.start)} does not "
        f"fit its block {block.id}, {block.page}: {why}",
        lsn=record.start,
    )
