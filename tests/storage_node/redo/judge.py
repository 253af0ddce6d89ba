"""Replays a log by our redo, and finds where the result is not PostgreSQL's."""

from __future__ import annotations

from dataclasses import dataclass

from boreal.errors import BorealError
from boreal.pages import PageKind, is_zero, set_page_lsn
from boreal.types import PAGE_BYTES, BlockNumber, Fork, PageKey, RelationFork, format_lsn
from boreal.wal import BlockRef, Rmgr, WalRecord, effects
from storage_node.redo import Redo, Step
from tests.storage_node.redo.page_comparison import Comparison
from tests.storage_node.redo.record_types import Coverage, RecordType
from tests.storage_node.redo.relation_files import RelationFiles
from tests.storage_node.redo.replayed_pages import ReplayedPages
from tests.support.page_kinds import KIND_OF_RMGR


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A page of ours that is not PostgreSQL's."""

    where: str
    page: PageKey
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.page}: {self.what}"


class Judge:
    """Replays a log onto pages and collects what is wrong.

    After a difference the page goes on as PostgreSQL has it: each fault is told once.
    """

    def __init__(self, files: RelationFiles, redo: Redo) -> None:
        """`files` are those of a stopped cluster; records from there on must be fed."""
        self.pages = ReplayedPages(files)
        self.differences: list[Difference] = []
        self.coverage = Coverage()
        self._redo = redo
        self._comparison = Comparison()
        self._maps_without_bits: set[RelationFork] = set()
        """CREATE DATABASE (WAL_LOG) logs maps as if they had the standard layout: the bits are in
        the hole, and PostgreSQL's own redo makes empty maps of them."""
        self._settled: dict[PageKey, tuple[bytes, bytes]] = {}
        """Pages found equal: what was compared, ours and theirs."""

    # --- records --------------------------------------------------------------------------------

    def feed(self, record: WalRecord) -> None:
        """Apply the record and compare."""
        kind = self.coverage.count(record)
        for block in record.blocks:
            self._apply(record, block, kind)
        for effect in effects(record):
            self.pages.take(effect)

    def _apply(self, record: WalRecord, block: BlockRef, kind: RecordType) -> None:
        before = self.pages.get(block.page)
        page = bytearray(before) if before is not None else bytearray(PAGE_BYTES)
        try:
            step = self._redo.step(record, block)
            self._note(record, block, step)
            if step in {Step.BASE, Step.CHANGE}:
                self._redo.apply(page, record, block)
                self.pages.put(block.page, page)
            elif step is Step.UNKNOWN:
                self._differ(record, block, "redo cannot tell the page after")
        except BorealError as error:
            self._differ(record, block, str(error))
        except Exception as error:  # noqa: BLE001 - a bug in redo is a finding like others
            self._differ(record, block, f"{type(error).__name__}: {error}")
        if not block.has_image or block.apply_image:
            return
        self.coverage.compared[kind] += 1
        theirs = block.restore_image()
        page_kind = _record_kind(record, block)
        found = self._comparison.in_record(page, theirs, page_kind, block.page)
        if found is not None:
            self._differ(record, block, found)

    def _note(self, record: WalRecord, block: BlockRef, step: Step) -> None:
        """Remember where PostgreSQL's own redo would leave another page than its writer did."""
        if step is Step.BASE and record.rmgr is Rmgr.XLOG:
            if block.page.relation.fork is Fork.VM and block.hole_length:
                self._maps_without_bits.add(block.page.relation)
        elif step is Step.NOTHING and record.rmgr is Rmgr.XLOG:
            # A hint moves the page's LSN (MarkBufferDirtyHint); redo without an image does not.
            page = bytearray(self.pages.get(block.page) or bytes(PAGE_BYTES))
            set_page_lsn(page, record.end)
            self.pages.put(block.page, page)

    def _differ(self, record: WalRecord, block: BlockRef, what: str) -> None:
        where = f"{format_lsn(record.start)} {RecordType.of(record)} block {block.id}"
        self.differences.append(Difference(where=where, page=block.page, what=what))
        if block.has_image:
            page = block.restore_image()
            if not is_zero(page):
                set_page_lsn(page, record.end)
            self.pages.put(block.page, page)

    # --- files ----------------------------------------------------------------------------------

    def check_files(self, files: RelationFiles, kinds: dict[RelationFork, PageKind | None]) -> None:
        """Compare every page with PostgreSQL's files, right after a checkpoint, in quiet.

        `kinds` says how to read each main fork: None if nobody can; one that is not there (an
        unlogged relation's) is not looked at.
        """
        logged = {fork for fork in files.forks if fork._replace(fork=Fork.MAIN) in kinds}
        for fork in self.pages.sizes:
            if fork not in files.forks:
                self._differ_at_rest(PageKey(fork, BlockNumber(0)), "there is no such file")
        for fork in sorted(logged):
            if fork.fork is not Fork.FSM:
                self._check_fork(files, fork, kinds[fork._replace(fork=Fork.MAIN)])

    def _check_fork(self, files: RelationFiles, fork: RelationFork, kind: PageKind | None) -> None:
        kind = PageKind.VISIBILITY_MAP if fork.fork is Fork.VM else kind
        size = self.pages.sizes.get(fork)
        blocks = files.blocks(fork)
        if size is None and kind is PageKind.VISIBILITY_MAP:
            size = 0  # a map is made without a record as soon as somebody looks for it
        if size is None or size > blocks:
            page = PageKey(fork, BlockNumber(0))
            self._differ_at_rest(page, f"has {size} blocks, not {blocks}")
            return
        unread = self.pages.changed(fork)
        for block, theirs in files.pages(fork):
            unread.discard(block)
            self._check_page(PageKey(fork, BlockNumber(block)), theirs, kind)
        for block in unread:
            self._check_page(PageKey(fork, BlockNumber(block)), bytes(PAGE_BYTES), kind)

    def _check_page(self, page: PageKey, theirs: bytes, kind: PageKind | None) -> None:
        ours = bytes(self.pages.get(page) or bytes(PAGE_BYTES))
        if ours == theirs or self._settled.get(page) == (ours, theirs):
            return
        lacks = page.relation in self._maps_without_bits
        found = self._comparison.at_rest(ours, theirs, kind, page, may_lack_bits=lacks)
        if found is None:
            self._settled[page] = (ours, theirs)
        else:
            self._differ_at_rest(page, f"{found} ({kind.value if kind else 'unknown'})")
            self.pages.put(page, bytearray(theirs))

    def _differ_at_rest(self, page: PageKey, what: str) -> None:
        self.differences.append(Difference(where="file", page=page, what=what))


def _record_kind(record: WalRecord, block: BlockRef) -> PageKind:
    if block.page.relation.fork is Fork.VM:
        return PageKind.VISIBILITY_MAP
    return KIND_OF_RMGR[record.rmgr]
