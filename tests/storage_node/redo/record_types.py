"""The record types that touch relation pages, by name, and how often a run met each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from boreal.wal import HEAP_OPERATION_MASK, Rmgr, WalRecord

_INIT_PAGE = 0x80
"""The bit of HEAP, HEAP2 and BRIN records whose redo builds the page anew."""
_WITH_INIT_PAGE = frozenset((Rmgr.HEAP, Rmgr.HEAP2, Rmgr.BRIN))

NAMES: dict[Rmgr, dict[int, str]] = {
    Rmgr.XLOG: {0xA0: "FPI_FOR_HINT", 0xB0: "FPI"},
    Rmgr.SMGR: {0x10: "CREATE", 0x20: "TRUNCATE"},
    Rmgr.SEQ: {0x00: "LOG"},
    Rmgr.HEAP: {
        0x00: "INSERT",
        0x10: "DELETE",
        0x20: "UPDATE",
        0x30: "TRUNCATE",
        0x40: "HOT_UPDATE",
        0x50: "CONFIRM",
        0x60: "LOCK",
        0x70: "INPLACE",
    },
    Rmgr.HEAP2: {
        0x00: "REWRITE",
        0x10: "PRUNE",
        0x20: "VACUUM",
        0x30: "FREEZE_PAGE",
        0x40: "VISIBLE",
        0x50: "MULTI_INSERT",
        0x60: "LOCK_UPDATED",
        0x70: "NEW_CID",
    },
    Rmgr.BTREE: {
        0x00: "INSERT_LEAF",
        0x10: "INSERT_UPPER",
        0x20: "INSERT_META",
        0x30: "SPLIT_L",
        0x40: "SPLIT_R",
        0x50: "INSERT_POST",
        0x60: "DEDUP",
        0x70: "DELETE",
        0x80: "UNLINK_PAGE",
        0x90: "UNLINK_PAGE_META",
        0xA0: "NEWROOT",
        0xB0: "MARK_PAGE_HALFDEAD",
        0xC0: "VACUUM",
        0xD0: "REUSE_PAGE",
        0xE0: "META_CLEANUP",
    },
    Rmgr.HASH: {
        0x00: "INIT_META_PAGE",
        0x10: "INIT_BITMAP_PAGE",
        0x20: "INSERT",
        0x30: "ADD_OVFL_PAGE",
        0x40: "SPLIT_ALLOCATE_PAGE",
        0x50: "SPLIT_PAGE",
        0x60: "SPLIT_COMPLETE",
        0x70: "MOVE_PAGE_CONTENTS",
        0x80: "SQUEEZE_PAGE",
        0x90: "DELETE",
        0xA0: "SPLIT_CLEANUP",
        0xB0: "UPDATE_META_PAGE",
        0xC0: "VACUUM_ONE_PAGE",
    },
    Rmgr.GIN: {
        0x10: "CREATE_PTREE",
        0x20: "INSERT",
        0x30: "SPLIT",
        0x40: "VACUUM_PAGE",
        0x50: "DELETE_PAGE",
        0x60: "UPDATE_META_PAGE",
        0x70: "INSERT_LISTPAGE",
        0x80: "DELETE_LISTPAGE",
        0x90: "VACUUM_DATA_LEAF_PAGE",
    },
    Rmgr.GIST: {
        0x00: "PAGE_UPDATE",
        0x10: "DELETE",
        0x20: "PAGE_REUSE",
        0x30: "PAGE_SPLIT",
        0x60: "PAGE_DELETE",
        0x70: "ASSIGN_LSN",
    },
    Rmgr.SPGIST: {
        0x10: "ADD_LEAF",
        0x20: "MOVE_LEAFS",
        0x30: "ADD_NODE",
        0x40: "SPLIT_TUPLE",
        0x50: "PICKSPLIT",
        0x60: "VACUUM_LEAF",
        0x70: "VACUUM_ROOT",
        0x80: "VACUUM_REDIRECT",
    },
    Rmgr.BRIN: {
        0x00: "CREATE_INDEX",
        0x10: "INSERT",
        0x20: "UPDATE",
        0x30: "SAMEPAGE_UPDATE",
        0x40: "REVMAP_EXTEND",
        0x50: "DESUMMARIZE",
    },
    Rmgr.GENERIC: {0x00: "GENERIC"},
}
"""As in access/*xlog*.h, catalog/pg_control.h and catalog/storage_xlog.h of PostgreSQL 16."""

UNREACHABLE: dict[tuple[Rmgr, int], str] = {
    (Rmgr.GIST, 0x70): "only with wal_level=minimal (gistGetFakeLSN)",
}
"""What no SQL makes a Boreal writer log, and why."""


class RecordType(NamedTuple):
    """A kind of record."""

    rmgr: Rmgr
    operation: int

    @classmethod
    def of(cls, record: WalRecord) -> RecordType:
        """The record's, without its INIT_PAGE bit."""
        masked = record.info & HEAP_OPERATION_MASK
        return cls(record.rmgr, masked if record.rmgr in _WITH_INIT_PAGE else record.info)

    def __str__(self) -> str:
        name = NAMES.get(self.rmgr, {}).get(self.operation, f"{self.operation:#04x}")
        return f"{self.rmgr.name} {name}"


def _flag(at: int, bit: int) -> Callable[[WalRecord], bool]:
    """Whether the byte of main data at `at` has the bit."""
    return lambda record: record.main_data[at] & bit != 0


def _count(at: int) -> Callable[[WalRecord], bool]:
    """Whether the half-word of main data at `at` is not zero."""
    return lambda record: any(record.main_data[at : at + 2])


def _has_block(number: int) -> Callable[[WalRecord], bool]:
    return lambda record: record.block(number) is not None


VARIANTS: dict[tuple[Rmgr, int], dict[str, Callable[[WalRecord], bool]]] = {
    (Rmgr.HEAP, 0x00): {
        "clears all-visible": _flag(2, 0x01),
        "speculative": _flag(2, 0x04),
        "new page": lambda record: record.info & _INIT_PAGE != 0,
    },
    (Rmgr.HEAP, 0x10): {
        "clears all-visible": _flag(7, 0x01),
        "old tuple": _flag(7, 0x02),
        "old key": _flag(7, 0x04),
        "super": _flag(7, 0x08),
        "partition move": _flag(7, 0x10),
    },
    (Rmgr.HEAP, 0x20): {
        "clears the old's all-visible": _flag(7, 0x01),
        "clears the new's all-visible": _flag(7, 0x02),
        "old tuple": _flag(7, 0x04),
        "old key": _flag(7, 0x08),
        "prefix": _flag(7, 0x20),
        "suffix": _flag(7, 0x40),
        "two pages": _has_block(1),
        "new page": lambda record: record.info & _INIT_PAGE != 0,
    },
    (Rmgr.HEAP, 0x40): {
        "clears all-visible": _flag(7, 0x01),
        "old tuple": _flag(7, 0x04),
        "prefix": _flag(7, 0x20),
        "suffix": _flag(7, 0x40),
    },
    (Rmgr.HEAP, 0x60): {"clears all-frozen": _flag(7, 0x01)},
    (Rmgr.HEAP2, 0x10): {"redirects": _count(4), "dead": _count(6)},
    (Rmgr.HEAP2, 0x50): {
        "clears all-visible": _flag(0, 0x01),
        "all frozen": _flag(0, 0x20),
        "new page": lambda record: record.info & _INIT_PAGE != 0,
        "old page": lambda record: record.info & _INIT_PAGE == 0,
    },
    (Rmgr.BTREE, 0x30): {"upper level": _has_block(3)},
    (Rmgr.BTREE, 0x40): {"upper level": _has_block(3)},
    (Rmgr.BTREE, 0x70): {"posting lists": _count(6)},
    (Rmgr.BTREE, 0xC0): {"posting lists": _count(2)},
    (Rmgr.GIST, 0x00): {"left child": _has_block(1)},
    (Rmgr.GIST, 0x30): {
        "left child": _has_block(0),
        "three pages": _has_block(3),
        "the root": lambda record: record.blocks[0].page.block == 0,
    },
}
"""Forms of a record that redo must treat each in its own way."""


class Coverage:
    """How often each record type came, and what was compared of it."""

    def __init__(self) -> None:
        self.records: Counter[RecordType] = Counter()
        self.with_init: Counter[RecordType] = Counter()
        """Of these, those with INIT_PAGE."""
        self.compared: Counter[RecordType] = Counter()
        """Pages our redo changed and PostgreSQL's after-image was compared with."""
        self.variants: Counter[tuple[RecordType, str]] = Counter()

    def count(self, record: WalRecord) -> RecordType:
        """Note that the record came."""
        kind = RecordType.of(record)
        self.records[kind] += 1
        if record.rmgr in _WITH_INIT_PAGE and record.info & _INIT_PAGE:
            self.with_init[kind] += 1
        for name, is_it in VARIANTS.get(kind, {}).items():
            self.variants[kind, name] += is_it(record)
        return kind

    def missing(self) -> list[RecordType]:
        """The types of the table that never came, but could have."""
        return [kind for kind in _table() if not self.records[kind] and kind not in UNREACHABLE]

    def missing_variants(self) -> list[str]:
        """The forms of records that never came."""
        return [
            f"{RecordType(*kind)}, {name}"
            for kind, names in VARIANTS.items()
            for name in names
            if not self.variants[RecordType(*kind), name]
        ]

    def listing(self) -> list[str]:
        """A line for each record type of the table, zero counts included."""
        lines = [f"{'record type':<28}{'records':>9}{'init':>7}{'images':>9}"]
        for kind in _table():
            line = f"{kind!s:<28}{self.records[kind]:>9}"
            line += f"{self.with_init[kind] or '':>7}{self.compared[kind]:>9}"
            reason = UNREACHABLE.get(kind)
            lines.append(f"{line}   {reason}" if reason else line)
            lines += [
                f"    {name:<24}{self.variants[kind, name]:>9}" for name in VARIANTS.get(kind, {})
            ]
        return lines


def _table() -> Iterator[RecordType]:
    for rmgr, operations in NAMES.items():
        for operation in operations:
            yield RecordType(rmgr, operation)
