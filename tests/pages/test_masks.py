"""Goal: masks hide what PostgreSQL may change without logging it, and nothing else.

Method: in a log whose records carry after-images, replay by images and effects alone; every page
must then equal the file the engine left, masked. Then single bytes of such pages are changed: what
counts must show, what is a hint must not.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator

import pytest

from boreal.errors import CorruptData
from boreal.pages import (
    HEADER_BYTES,
    PageHeader,
    PageKind,
    is_zero,
    mask_page,
    same_page,
    visibility,
)
from boreal.types import PAGE_BYTES, BlockNumber, Fork, PageKey
from boreal.wal import (
    DatabaseDropped,
    Effect,
    RelationDropped,
    RelationTruncated,
    VisibilityCleared,
    WalRecord,
    effects,
)
from tests.support.exercised import ExercisedLog, exercised_log
from tests.support.page_kinds import KIND_OF_RMGR


class Replay:
    """The pages of one database, by images and effects. A page it cannot know it forgets."""

    def __init__(self, database: int) -> None:
        self.pages: dict[PageKey, bytearray] = {}
        self.kinds: dict[PageKey, PageKind] = {}
        self._database = database

    def apply(self, record: WalRecord) -> None:
        for block in record.blocks:
            if block.page.relation.database != self._database:
                continue
            if block.has_image:
                self.pages[block.page] = block.restore_image()
            else:
                self.pages.pop(block.page, None)
            if block.page.relation.fork is Fork.VM:
                self.kinds[block.page] = PageKind.VISIBILITY_MAP
            elif kind := KIND_OF_RMGR.get(record.rmgr):
                self.kinds[block.page] = kind
        for effect in effects(record):
            self._apply_effect(effect)

    def _apply_effect(self, effect: Effect) -> None:
        match effect:
            case VisibilityCleared(page=key, heap_block=block, bits=bits):
                if key in self.pages:
                    visibility.clear(self.pages[key], block, bits)
            case RelationTruncated(relation=relation, blocks=blocks):
                self._forget(lambda key: key.relation == relation and key.block >= blocks)
                maps = relation._replace(fork=Fork.VM)
                kept = visibility.truncated_blocks(blocks)
                self._forget(lambda key: key.relation == maps and key.block >= kept)
                if last := self.pages.get(PageKey(maps, BlockNumber(kept - 1))):
                    visibility.truncate(last, blocks)
            case RelationDropped(database=database, relation=number):
                self._forget(
                    lambda key: (key.relation.database, key.relation.relation) == (database, number)
                )
            case DatabaseDropped(database=database):
                self._forget(lambda key: key.relation.database == database)
            case _:
                pass  # what comes into being has no page yet

    def _forget(self, gone: object) -> None:
        assert callable(gone)
        for key in [key for key in self.pages if gone(key)]:
            del self.pages[key]


class Pair:
    """A page as replayed and as the engine left it on disk."""

    def __init__(self, key: PageKey, kind: PageKind, replayed: bytes, on_disk: bytes) -> None:
        self.key = key
        self.kind = kind
        self.replayed = replayed
        self.on_disk = on_disk


def _masked(page: bytes, kind: PageKind, block: int) -> bytearray:
    masked = bytearray(page)
    mask_page(masked, kind, block)
    assert len(masked) == PAGE_BYTES
    return masked


def _pairs(log: ExercisedLog) -> Iterator[Pair]:
    replay = Replay(log.checked_database)
    for record in log.records:
        replay.apply(record)
    for key, page in replay.pages.items():
        kind = replay.kinds.get(key)
        on_disk = log.page(key.relation, key.block)
        # Pages only ever imaged as a whole (copies at CREATE DATABASE, builds) have no kind here.
        if kind is not None and on_disk is not None:
            yield Pair(key, kind, bytes(page), on_disk)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return list(_pairs(exercised_log()))


def test_replayed_pages_equal_the_engines_once_masked(pairs: list[Pair]) -> None:
    different = [
        str(pair.key)
        for pair in pairs
        if not same_page(pair.replayed, pair.on_disk, pair.kind, pair.key.block)
    ]
    assert not different
    assert {pair.kind for pair in pairs} == set(PageKind)


def test_visibility_maps_of_tables_not_copied_equal_the_engines_to_the_bit(
    pairs: list[Pair],
) -> None:
    first_normal_oid = 16384
    maps = [
        pair
        for pair in pairs
        if pair.kind is PageKind.VISIBILITY_MAP
        and pair.key.relation.relation >= first_normal_oid
        and any(pair.on_disk[HEADER_BYTES:])
    ]
    assert len(maps) >= 2
    assert all(pair.replayed[HEADER_BYTES:] == pair.on_disk[HEADER_BYTES:] for pair in maps)


def test_the_masks_are_needed(pairs: list[Pair]) -> None:
    differ_raw = Counter(pair.kind for pair in pairs if pair.replayed[8:] != pair.on_disk[8:])
    assert {PageKind.HEAP, PageKind.BTREE} <= set(differ_raw)


def test_masking_twice_is_masking_once(pairs: list[Pair]) -> None:
    for pair in pairs:
        once = _masked(pair.on_disk, pair.kind, pair.key.block)
        assert _masked(bytes(once), pair.kind, pair.key.block) == once


# --- one byte at a time --------------------------------------------------------------------------


def _one(pairs: list[Pair], kind: PageKind) -> Pair:
    """The page of that kind with the most tuples."""
    return max((pair for pair in pairs if pair.kind is kind), key=lambda pair: _used(pair.on_disk))


def _used(page: bytes) -> int:
    header = PageHeader.of(page)
    return header.special - header.upper


@pytest.mark.parametrize("kind", list(PageKind), ids=lambda kind: kind.value)
def test_changed_contents_show(pairs: list[Pair], kind: PageKind) -> None:
    pair = _one(pairs, kind)
    header = PageHeader.of(pair.on_disk)
    at = HEADER_BYTES if kind is PageKind.VISIBILITY_MAP else header.upper
    changed = bytearray(pair.on_disk)
    changed[at] ^= 0x10
    block = pair.key.block
    assert _masked(bytes(changed), kind, block) != _masked(pair.on_disk, kind, block)


@pytest.mark.parametrize("kind", list(PageKind), ids=lambda kind: kind.value)
def test_the_lsn_and_the_checksum_do_not_show(pairs: list[Pair], kind: PageKind) -> None:
    pair = _one(pairs, kind)
    changed = b"\x5a" * 10 + pair.on_disk[10:]
    block = pair.key.block
    assert _masked(changed, kind, block) == _masked(pair.on_disk, kind, block)


def _heap_page(infomask: int, *, cid: int = 0, ctid: tuple[int, int] = (70000, 1)) -> bytearray:
    """A heap page with one tuple of 27 bytes, padded to 32, at its end."""
    page = bytearray(PAGE_BYTES)
    start = PAGE_BYTES - 32
    struct.pack_into("<IIHHHHHHI", page, 0, 1, 2, 3, 0, 28, start, PAGE_BYTES, 0x2004, 0)
    struct.pack_into("<I", page, HEADER_BYTES, start | 1 << 15 | 27 << 17)
    block, offset = ctid
    tuple_header = (700, 0, cid, block >> 16, block & 0xFFFF, offset, 1, infomask, 24)
    struct.pack_into("<IIIHHHHHB", page, start, *tuple_header)
    return page


def _equal(one: bytearray, other: bytearray) -> bool:
    heap = PageKind.HEAP
    return _masked(bytes(one), heap, 70000) == _masked(bytes(other), heap, 70000)


def test_heap_hint_bits_do_not_show() -> None:
    plain = _heap_page(0x0002)
    assert _equal(plain, _heap_page(0x0002 | 0x0100 | 0x0800))  # xmin committed, xmax invalid
    assert not _equal(plain, _heap_page(0x0003))  # HASNULL is no hint
    frozen = _heap_page(0x0302)
    assert _equal(frozen, _heap_page(0x0302 | 0x0800))
    assert not _equal(frozen, plain)
    assert not _equal(frozen, _heap_page(0x0302 | 0x1000))  # XMAX_IS_MULTI of a frozen tuple


def test_heap_command_ids_padding_and_free_space_do_not_show() -> None:
    plain = _heap_page(0x0002)
    assert _equal(plain, _heap_page(0x0002, cid=9))
    for at in (PAGE_BYTES - 1, 4000):
        changed = bytearray(plain)
        changed[at] = 1
        assert _equal(plain, changed)
    changed[PAGE_BYTES - 6] = 1  # the tuple's last byte
    assert not _equal(plain, changed)


def test_a_speculative_token_counts_as_a_self_pointer() -> None:
    itself = _heap_page(0x0002, ctid=(70000, 1))
    assert _equal(itself, _heap_page(0x0002, ctid=(12345, 0xFFFE)))
    assert not _equal(itself, _heap_page(0x0002, ctid=(70000, 2)))
    # A tuple moved to another partition is no hint.
    assert not _equal(itself, _heap_page(0x0002, ctid=(0xFFFFFFFF, 0xFFFD)))


# --- pages at rest -------------------------------------------------------------------------------


def test_a_map_may_lack_bits_but_never_claim_one() -> None:
    none, some, more = (bytes(24) + bytes([bits]) + bytes(8167) for bits in (0, 0b0001, 0b1101))
    kind = PageKind.VISIBILITY_MAP
    assert same_page(some, more, kind, 0)
    assert same_page(none, some, kind, 0)
    assert not same_page(more, some, kind, 0)
    assert not same_page(some, none, kind, 0)


def test_a_heap_page_without_tuples_may_be_missing() -> None:
    empty = bytearray(PAGE_BYTES)
    struct.pack_into("<IIHHHHHHI", empty, 0, 0, 0, 0, 0, 24, PAGE_BYTES, PAGE_BYTES, 0x2004, 0)
    missing = bytes(PAGE_BYTES)
    assert same_page(missing, bytes(empty), PageKind.HEAP, 0)
    assert same_page(missing, missing, PageKind.HEAP, 0)
    assert not same_page(missing, bytes(_heap_page(0x0002)), PageKind.HEAP, 0)
    assert not same_page(bytes(empty), missing, PageKind.HEAP, 0)
    assert not same_page(missing, bytes(empty), PageKind.GENERIC, 0)


def test_an_spgist_metapage_may_know_other_pages_with_room() -> None:
    meta = bytearray(PAGE_BYTES)
    struct.pack_into("<IIHHHHHHI", meta, 0, 0, 0, 0, 0, 92, 8184, 8184, 0x2004, 0)
    struct.pack_into("<I", meta, 24, 0xBA0BABEE)
    for at, may_differ in ((24, False), (28, True), (91, True), (8190, False)):
        changed = bytearray(meta)
        changed[at] ^= 1
        assert same_page(bytes(meta), bytes(changed), PageKind.SPGIST, 0) == may_differ
        assert not same_page(bytes(meta), bytes(changed), PageKind.SPGIST, 1)


# --- pages that are none -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(PageKind), ids=lambda kind: kind.value)
def test_a_zero_page_stays_zero(kind: PageKind) -> None:
    assert is_zero(_masked(bytes(PAGE_BYTES), kind, 0))


@pytest.mark.parametrize("kind", [kind for kind in PageKind if kind is not PageKind.VISIBILITY_MAP])
def test_garbage_is_corrupt(kind: PageKind) -> None:
    page = bytearray(b"\xff" * PAGE_BYTES)
    if kind is PageKind.BRIN:
        struct.pack_into("<H", page, PAGE_BYTES - 2, 0xF093)
    with pytest.raises(CorruptData):
        mask_page(page, kind, 0)


def test_a_tuple_outside_of_its_page_is_corrupt() -> None:
    page = _heap_page(0x0002)
    struct.pack_into("<I", page, HEADER_BYTES, 8180 | 1 << 15 | 27 << 17)
    with pytest.raises(CorruptData, match="outside"):
        mask_page(page, PageKind.HEAP, 0)


def test_a_page_of_another_size_is_corrupt() -> None:
    with pytest.raises(CorruptData, match="8192"):
        mask_page(bytearray(100), PageKind.HEAP, 0)
