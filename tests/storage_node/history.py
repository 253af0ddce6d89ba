"""Random histories of a volume, by seed: a log, and what every page must be at many LSNs.

The records have the form of PostgreSQL's, but their redo is a stand-in: a page's first 32 bytes
become a hash of what they were and of the record. So a page is right only if exactly the right
records were applied to the right base in the right order.
"""

from __future__ import annotations

import hashlib
import random
import struct
from dataclasses import dataclass, field

from boreal.pages import visibility
from boreal.types import PAGE_BYTES, BlockNumber, Fork, Lsn, PageKey, RelationFork
from boreal.wal import BlockRef, DbaseInfo, Heap2Info, HeapInfo, Rmgr, SmgrInfo, WalRecord, XactInfo
from boreal.wal.rmgr import XACT_HAS_INFO
from storage_node.redo import Step
from tests.support.wal_builder import WalBuilder, body

TABLESPACE = 1663
IMPORTED_DATABASE, TEMPLATE = 5, 1
_SAME_RELATION, _WILL_INIT, _HAS_DATA = 0x80, 0x40, 0x20
_MAP_BIT = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class State:
    """The volume at an LSN.

    `pages` has what is not zeros: 32 bytes of a main fork's page, all of a map's, None for a page
    that nobody can make.
    """

    lsn: Lsn
    sizes: dict[RelationFork, int]
    pages: dict[PageKey, bytes | None]

    def page(self, page: PageKey) -> bytes | None:
        """All 8 KiB; None if it cannot be made."""
        content = self.pages.get(page, b"")
        return None if content is None else content.ljust(PAGE_BYTES, b"\0")


class HistoryRedo:
    """The stand-in, as a `Redo`."""

    def step(self, record: WalRecord, block: BlockRef) -> Step:
        if record.rmgr is Rmgr.HASH:
            return Step.UNKNOWN
        return Step.BASE if block.will_init else Step.CHANGE

    def apply(self, page: bytearray, record: WalRecord, block: BlockRef) -> None:
        if block.page.relation.fork is Fork.VM:
            heap_block = _MAP_BIT.unpack(record.main_data)[0]
            visibility.set_bits(page, heap_block, visibility.VALID_BITS)
            return
        if block.will_init:
            page[:] = bytes(PAGE_BYTES)
        page[:32] = mixed(bytes(page[:32]), record.start, block.id)


def mixed(before: bytes, start: int, block_id: int) -> bytes:
    """A page after a record."""
    before = before.ljust(32, b"\0")
    return hashlib.sha256(before + start.to_bytes(8, "little") + bytes((block_id,))).digest()


@dataclass
class History:
    """A growing log with its states. `step` adds something at random."""

    seed: int
    calm: bool = False
    """Nothing is truncated, dropped, or beyond redo."""
    states: list[State] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.wal = WalBuilder()
        self.start = self.wal.start
        self.wal.add(Rmgr.XLOG, 0x20, body(b"\0" * 8))
        self.import_lsn = self.wal.end
        self.imported: dict[RelationFork, bytes] = {}
        self.sizes: dict[RelationFork, int] = {}
        self.pages: dict[PageKey, bytes | None] = {}
        for database in (IMPORTED_DATABASE, TEMPLATE):
            for number in (1, 2, 3):
                self._import(RelationFork(TABLESPACE, database, number, Fork.MAIN))
        self.remember()

    def remember(self) -> None:
        """Keep the present state."""
        self.states.append(State(self.wal.end, dict(self.sizes), dict(self.pages)))

    def step(self) -> None:
        """Add a record or a few."""
        chances = {
            self._change: 500,
            self._visible: 30,
            self._grow: 40,
            self._truncate: 6,
            self._drop: 4,
            self._create: 6,
            self._copy_database: 1,
            self._drop_database: 1,
            self._unknown: 1,
            self._bystander: 20,
        }
        if self.calm:
            for unsettling in (self._truncate, self._drop, self._drop_database, self._unknown):
                del chances[unsettling]
        (what,) = self.random.choices(list(chances), list(chances.values()))
        what()

    # -------------------------------------------------------------------------------------------

    def _import(self, fork: RelationFork) -> None:
        blocks = self.random.randrange(1, 12)
        content = b""
        for number in range(blocks):
            data = self.random.randbytes(32) if self.random.random() < 0.9 else b""
            content += data.ljust(PAGE_BYTES, b"\0")
            if data:
                self.pages[PageKey(fork, BlockNumber(number))] = data
        self.imported[fork] = content
        self.sizes[fork] = blocks

    def _heaps(self) -> list[RelationFork]:
        return [fork for fork in self.sizes if fork.fork is Fork.MAIN]

    def _heap(self) -> RelationFork:
        heaps = self._heaps()
        # A few relations get most of the work.
        return heaps[int(len(heaps) * self.random.random() ** 3)]

    def _change(self) -> None:
        fork = self._heap()
        size = self.sizes[fork]
        if size == 0:
            return
        blocks = [min(int(self.random.expovariate(0.3)), size - 1)]
        if self.random.random() < 0.4 and size > 1:
            other = self.random.randrange(size)
            blocks += [other] if other != blocks[0] else []
        self._write(fork, blocks)

    def _grow(self) -> None:
        fork = self._heap()
        gap = self.random.choice((0, 0, 0, 1, 5))
        self._write(fork, [self.sizes[fork] + gap], init=self.random.random() < 0.5)

    def _write(self, fork: RelationFork, blocks: list[int], *, init: bool = False) -> None:
        update = len(blocks) > 1 or self.random.random() < 0.3
        old, new = (self.random.random() < 0.1 for _ in "..")
        headers, data = b"", b""
        for number, block in enumerate(blocks):
            payload = self.random.randbytes(self.random.choice((0, 8, 60)))
            flags = (_HAS_DATA if payload else 0) | (_WILL_INIT if init else 0)
            headers += _header(number, fork, block, flags, len(payload), same=number > 0)
            data += payload
        info = HeapInfo.UPDATE if update else HeapInfo.INSERT
        if update:
            main = struct.pack("<IHBBIH", 700, 1, 0, old | new << 1, 0, 1)
        else:
            main = struct.pack("<HB", 1, old)
        start, _ = self.wal.add(Rmgr.HEAP, info | (0x80 if init else 0), body(main, headers, data))
        for number, block in enumerate(blocks):
            page = PageKey(fork, BlockNumber(block))
            before = b"" if init else self.pages.get(page, b"")
            self.pages[page] = None if before is None else mixed(before, start, number)
            self.sizes[fork] = max(self.sizes[fork], block + 1)
        if old:
            self._clear(fork, blocks[-1])
        if update and new:
            self._clear(fork, blocks[0])

    def _clear(self, heap: RelationFork, block: int) -> None:
        page = PageKey(heap._replace(fork=Fork.VM), visibility.map_block(block))
        content = self.pages.get(page)
        if content:
            changed = bytearray(content)
            visibility.clear(changed, block, visibility.VALID_BITS)
            self.pages[page] = bytes(changed)

    def _visible(self) -> None:
        fork = self._heap()
        if not self.sizes[fork]:
            return
        block = self.random.randrange(self.sizes[fork])
        map_fork = fork._replace(fork=Fork.VM)
        page = PageKey(map_fork, visibility.map_block(block))
        headers = _header(0, map_fork, page.block, 0, 0)
        self.wal.add(Rmgr.HEAP2, Heap2Info.VISIBLE, body(_MAP_BIT.pack(block), headers))
        changed = bytearray(self.pages.get(page) or bytes(PAGE_BYTES))
        visibility.set_bits(changed, block, visibility.VALID_BITS)
        self.pages[page] = bytes(changed)
        self.sizes[map_fork] = max(self.sizes.get(map_fork, 0), page.block + 1)

    def _truncate(self) -> None:
        fork = self._heap()
        blocks = self.random.randrange(self.sizes[fork] + 1)
        main = struct.pack("<IIIIi", blocks, *fork[:3], 7)
        self.wal.add(Rmgr.SMGR, SmgrInfo.TRUNCATE, body(main))
        self._cut(fork, blocks)
        map_fork = fork._replace(fork=Fork.VM)
        if map_fork not in self.sizes:
            return
        page = PageKey(map_fork, visibility.map_block(blocks))
        content = self.pages.get(page)
        if content and blocks % visibility.HEAP_BLOCKS_PER_PAGE:
            changed = bytearray(content)
            visibility.truncate(changed, blocks)
            self.pages[page] = bytes(changed)
        self._cut(map_fork, visibility.truncated_blocks(blocks))

    def _cut(self, fork: RelationFork, blocks: int) -> None:
        self.sizes[fork] = min(self.sizes[fork], blocks)
        for page in [page for page in self.pages if page.relation == fork]:
            if page.block >= blocks:
                del self.pages[page]

    def _drop(self) -> None:
        heaps = [fork for fork in self._heaps() if fork.relation > 3 or self.random.random() < 0.1]
        if len(heaps) < 3:
            return
        fork = self.random.choice(heaps)
        main = bytes(8) + struct.pack("<IiIII", 4, 1, *fork[:3])
        kind = self.random.choice((XactInfo.COMMIT, XactInfo.ABORT))
        self.wal.add(Rmgr.XACT, kind | XACT_HAS_INFO, body(main))
        for one in (fork, fork._replace(fork=Fork.VM)):
            if one in self.sizes:
                self._cut(one, 0)
                del self.sizes[one]

    def _create(self) -> None:
        # Numbers come again, as PostgreSQL's do.
        number = self.random.choice((1, 2, 3, *range(100, 108)))
        database = self.random.choice([*self._known_databases()])
        fork = RelationFork(TABLESPACE, database, number, Fork.MAIN)
        main = struct.pack("<IIIi", *fork[:3], 0)
        self.wal.add(Rmgr.SMGR, SmgrInfo.CREATE, body(main))
        self.sizes.setdefault(fork, 0)

    def _known_databases(self) -> set[int]:
        return {fork.database for fork in self.sizes} | {IMPORTED_DATABASE}

    def _copy_database(self) -> None:
        source = self.random.choice([*self._known_databases()])
        database = self.random.choice(
            [n for n in range(10, 20) if n not in self._known_databases()] or [0]
        )
        if not database:
            return
        main = struct.pack("<IIII", database, TABLESPACE, source, TABLESPACE)
        self.wal.add(Rmgr.DBASE, DbaseInfo.CREATE_FILE_COPY, body(main))
        for fork, size in list(self.sizes.items()):
            if fork.database == source:
                self.sizes[fork._replace(database=database)] = size
        for page, content in list(self.pages.items()):
            if page.relation.database == source:
                copy = PageKey(page.relation._replace(database=database), page.block)
                self.pages[copy] = content

    def _drop_database(self) -> None:
        known = [database for database in self._known_databases() if database >= 10]
        if not known:
            return
        database = self.random.choice(known)
        main = struct.pack("<IiI", database, 1, TABLESPACE)
        self.wal.add(Rmgr.DBASE, DbaseInfo.DROP, body(main))
        for fork in [fork for fork in self.sizes if fork.database == database]:
            self._cut(fork, 0)
            del self.sizes[fork]

    def _unknown(self) -> None:
        fork = self._heap()
        if self.sizes[fork]:
            block = self.random.randrange(self.sizes[fork])
            headers = _header(0, fork, block, 0, 0)
            self.wal.add(Rmgr.HASH, 0x20, body(b"\0" * 2, headers))
            self.pages[PageKey(fork, BlockNumber(block))] = None

    def _bystander(self) -> None:
        if self.random.random() < 0.05:
            self.wal.fill_page(self.random.choice((0, 8, 16, 24, 48)))
        else:
            self.wal.add(Rmgr.XACT, XactInfo.COMMIT, body(bytes(8)))


def _header(
    number: int, fork: RelationFork, block: int, flags: int, length: int, *, same: bool = False
) -> bytes:
    if same:
        return struct.pack("<BBHI", number, fork.fork | flags | _SAME_RELATION, length, block)
    return struct.pack("<BBHIIII", number, fork.fork | flags, length, *fork[:3], block)


def make_history(seed: int, log_bytes: int, *, states: int = 40, calm: bool = False) -> History:
    """A history of so much log, with about so many states to compare with."""
    history = History(seed, calm)
    every = log_bytes // states
    while len(history.wal.data) < log_bytes:
        history.step()
        if history.wal.end - history.states[-1].lsn >= every:
            history.remember()
    history.remember()
    return history
