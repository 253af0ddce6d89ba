"""Goal: GiST's redo, block by block; a record that does not fit its page is refused.

Method: PostgreSQL judges a GiST workload (`oracle`) while every kind of block is collected with the
page it was applied to. Then records meet other pages than their own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from boreal.errors import CorruptWal
from boreal.pages import PageHeader
from boreal.types import PAGE_BYTES
from boreal.wal import BlockRef, Rmgr, WalRecord
from storage_node.redo.items import init_page
from storage_node.redo.native import NativeRedo
from tests.storage_node.redo.oracle import oracle
from tests.storage_node.redo.workload_index import gist_indexes

_UPDATE, _DELETE, _SPLIT, _PAGE_DELETE = 0x00, 0x10, 0x30, 0x60
_FOLLOW_RIGHT = 8


class Change(NamedTuple):
    """A record, a block of it, and the page before."""

    before: bytes
    record: WalRecord
    block: BlockRef

    def apply(self) -> bytearray:
        """The page after."""
        after = bytearray(self.before)
        NativeRedo().apply(after, self.record, self.block)
        return after

    def with_data(self, data: bytes) -> Change:
        """The same, but the block's data."""
        return self._replace(block=self.block._replace(data=data))

    def with_main_data(self, main_data: bytes) -> Change:
        """The same, but the record's main data."""
        return self._replace(record=self.record._replace(main_data=main_data))


class _Collecting(NativeRedo):
    """Keeps the last change of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: dict[tuple[int, int], Change] = {}

    def apply(self, page: bytearray, record: WalRecord, block: BlockRef) -> None:
        if record.rmgr is Rmgr.GIST:
            self.changes[record.info, block.id] = Change(bytes(page), record, block)
        super().apply(page, record, block)


@pytest.fixture(scope="module")
def changes() -> Iterator[dict[tuple[int, int], Change]]:
    redo = _Collecting()
    with oracle({"wal_consistency_checking": "gist,gin,spgist"}, redo) as run:
        gist_indexes(run.server)
        assert run.check() == []
        yield redo.changes


def _opaque(page: bytes | bytearray) -> tuple[int, int]:
    """NSN and flags."""
    high, low, _, flags = struct.unpack_from("<IIIH", page, PageHeader.of(page).special)
    return high << 32 | low, flags


def test_every_kind_of_block_was_met(changes: dict[tuple[int, int], Change]) -> None:
    assert set(changes) >= {
        (_UPDATE, 0),
        (_UPDATE, 1),
        (_DELETE, 0),
        (_SPLIT, 0),
        (_SPLIT, 1),
        (_SPLIT, 2),
        (_SPLIT, 3),
        (_PAGE_DELETE, 0),
        (_PAGE_DELETE, 1),
    }


@pytest.mark.parametrize("kind", [(_UPDATE, 1), (_SPLIT, 0)])
def test_a_left_child_gets_the_records_lsn_as_nsn(
    changes: dict[tuple[int, int], Change], kind: tuple[int, int]
) -> None:
    change = changes[kind]
    assert _opaque(change.before)[1] & _FOLLOW_RIGHT
    nsn, flags = _opaque(change.apply())
    assert (nsn, flags & _FOLLOW_RIGHT) == (change.record.end, 0)
    # The same if the page comes as an image, which shows it as it was.
    image = change.block._replace(
        image=change.before, apply_image=True, hole_offset=0, hole_length=0
    )
    page = bytearray(PAGE_BYTES)
    NativeRedo().apply(page, change.record, image)
    assert _opaque(page) == (nsn, flags)


def test_a_page_that_is_not_gists_is_refused(changes: dict[tuple[int, int], Change]) -> None:
    other = bytearray(PAGE_BYTES)
    init_page(other, 16)
    for change in changes.values():
        if not change.block.will_init:
            for page in (bytes(PAGE_BYTES), bytes(other)):
                with pytest.raises(CorruptWal, match=r"GIST record .* does not fit its block"):
                    change._replace(before=page).apply()


@pytest.mark.parametrize("kind", [(_UPDATE, 0), (_DELETE, 0), (_PAGE_DELETE, 1)])
def test_items_that_are_not_there_are_refused(
    changes: dict[tuple[int, int], Change], kind: tuple[int, int]
) -> None:
    change = changes[kind]
    main_data = change.record.main_data
    if kind == (_UPDATE, 0):
        wrong = change.with_main_data(struct.pack("<HH", 1, 0)).with_data(struct.pack("<H", 400))
    elif kind == (_DELETE, 0):
        wrong = change.with_main_data(main_data[:4] + struct.pack("<HxxH", 1, 400))
    else:
        wrong = change.with_main_data(main_data[:8] + struct.pack("<H", 400))
    with pytest.raises(CorruptWal) as caught:
        wrong.apply()
    assert caught.value.details == {"lsn": change.record.start}


@pytest.mark.parametrize("kind", [(_UPDATE, 0), (_SPLIT, 1)])
def test_tuples_cut_short_are_refused(
    changes: dict[tuple[int, int], Change], kind: tuple[int, int]
) -> None:
    change = changes[kind]
    for length in (1, 4, len(change.block.data) - 8):
        with pytest.raises(CorruptWal):
            change.with_data(change.block.data[:length]).apply()


def test_a_record_gist_does_not_have_is_refused(changes: dict[tuple[int, int], Change]) -> None:
    change = changes[_UPDATE, 0]
    unknown = change.record._replace(info=0x50)
    with pytest.raises(CorruptWal):
        NativeRedo().apply(bytearray(change.before), unknown, change.block)
