"""Settling: once the log is quiet, pages it left behind records get versions.

A bulk load leaves every page some dozens of records from its base: too few for its chain to be
shortened, but whoever reads the page has to wait until they are redone. So when no log has come for
a while, and there is nothing else to do, the layers are gone through, the oldest first, each in the
order of its pages. A page that no later layer tells of gets a version; another is left to the last
layer that tells of it. The open layer is the last, once much has been added to it.

The version a page got when the log was quiet before goes, unless chains would get long without it:
a load that comes in bursts must not leave a version of each page for every burst.

Pages that came with the copy of a database and were not changed since are in no layer: they wait
for retirement, which carries out copies.

Nothing of this is kept on disk. After a restart every layer is gone through again, which costs a
look for the version of each page.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

import structlog

from boreal.errors import BorealError, CorruptData, NotMaterializable
from boreal.types import Lsn, PageKey
from storage_node.entries import page_key, page_of_key, start_of
from storage_node.index import IndexView, PageIndex
from storage_node.layer_file import SealedLayer, in_order
from storage_node.materialize import Materializer, Path
from storage_node.turns import Turns
from storage_node.versions import Version, version_row

QUIET_S: Final = 1.0
"""A volume is quiet when no log was indexed for so long."""
RECORDS_A_TURN: Final = 16
VERSIONS_A_COMMIT: Final = 256
"""2 MiB at most."""
_LOOKS_A_COMMIT: Final = 65_536
"""Other work in the background gets its turn when so many pages were looked at."""
_PARTS: Final = 16
"""The open layer is settled whenever such a part of what it can hold was added to it."""

_log = structlog.get_logger(__name__)


class _Sweep:
    """A layer on its way to being settled."""

    __slots__ = ("end", "layer", "pages", "path")

    def __init__(
        self, layer: SealedLayer | None, end: Lsn, pages: Iterator[tuple[bytes, int]]
    ) -> None:
        self.layer = layer
        """None: the open one, as far as `end`."""
        self.end = end
        self.pages = pages
        """Those still to be looked at, in order: key on disk, last entry in this layer."""
        self.path: Path | None = None
        """The way to the page being made."""


class Settling:
    """Settles the layers of one volume's index. One task uses it.

    Invariant: a page whose last record begins below `settled_to` has a version that holds it, or is
    gone, or could not be made.
    """

    def __init__(
        self,
        *,
        index: PageIndex,
        materializer: Materializer,
        chain_records: int,
        quiet_s: float = QUIET_S,
    ) -> None:
        """Versions that keep a chain below `chain_records` stay."""
        self._index = index
        self._materializer = materializer
        self._chain_records = chain_records
        self._quiet_s = quiet_s
        self._turns = Turns(lambda: materializer.reads)
        self._indexed = Lsn(0)
        self._since = 0.0
        """When the index was first seen to reach no further than `_indexed`."""
        self._sweep: _Sweep | None = None
        self._rows: list[tuple[bytes, bytes]] = []
        self._needless: list[bytes] = []
        self.settled_to = Lsn(0)

    @property
    def unsettled(self) -> int:
        """Layers there are to settle, the open one included."""
        sealed = sum(layer.end > self.settled_to for layer in self._index.layers)
        return sealed + (self._index.frozen is not None) + self._open_layer_counts()

    async def run(self) -> bool:
        """Settle some pages if the log is quiet; whether there is more to do at once.

        lmdb.Error, OSError: they could not be stored; they will be met again.
        """
        if not self.quiet:
            return False
        sweep = self._begin()
        if sweep is None:
            return False
        complete = await self._make_versions(sweep)
        rows, self._rows = self._rows, []
        needless, self._needless = self._needless, []
        if rows:
            self._sweep = None  # if this fails the layer is begun again
            await self._index.store(rows, needless=needless)
            self._sweep = sweep
        if complete:
            self.settled_to, self._sweep = sweep.end, None
        return not self._disturbed()

    # --- when ----------------------------------------------------------------------------------

    @property
    def quiet(self) -> bool:
        """Whether no log has come for a while."""
        if self._disturbed():
            self._indexed, self._since = self._index.indexed, time.monotonic()
        return self._index.frozen is None and time.monotonic() - self._since >= self._quiet_s

    def _disturbed(self) -> bool:
        return self._index.indexed != self._indexed

    # --- what ----------------------------------------------------------------------------------

    def _begin(self) -> _Sweep | None:
        """The layer to go on with."""
        sweep = self._sweep
        if sweep is not None:
            goes_on = (
                sweep.end == self._index.indexed
                if sweep.layer is None
                else sweep.layer in self._index.layers
            )
            if goes_on:
                return sweep
        self._sweep = self._next_sweep()
        return self._sweep

    def _next_sweep(self) -> _Sweep | None:
        for layer in self._index.layers:
            if layer.end > self.settled_to:
                pages = ((page.key, page.entries[-1]) for page in layer.all())
                return _Sweep(layer, layer.end, pages)
        if self._open_layer_counts():
            open_layer = self._index.layer
            ordered = in_order(open_layer)
            last = ((key, open_layer.entries(raw)[-1]) for key, raw in ordered)
            return _Sweep(None, open_layer.end, last)
        return None

    def _open_layer_counts(self) -> bool:
        layer = self._index.layer
        added = layer.end - max(layer.begin, self.settled_to)
        return added >= self._index.layer_bytes // _PARTS

    # --- how -----------------------------------------------------------------------------------

    async def _make_versions(self, sweep: _Sweep) -> bool:
        """Make what one commit takes, unless log comes; whether that was the layer's last."""
        looks = 0
        self._turns.begin()
        while len(self._rows) < VERSIONS_A_COMMIT and looks < _LOOKS_A_COMMIT:
            if self._disturbed():
                return False
            try:
                looked = self._turn(sweep)
            except CorruptData as error:
                _log.error("layer cannot be settled", error=error.message)
                return True
            if looked is None:
                return True
            looks += looked
            await self._turns.give_way()
        return False

    def _turn(self, sweep: _Sweep) -> int | None:
        """Work for one turn, a page at least; the pages looked at, None if there are no more.

        CorruptData if the layer is damaged.
        """
        looked = 0
        with self._index.view() as view:
            while len(self._rows) < VERSIONS_A_COMMIT:
                if sweep.path is None:
                    key, entry = next(sweep.pages, (b"", 0))
                    if not key:
                        return None
                    looked += 1
                    sweep.path = self._look(sweep, view, key, entry)
                if sweep.path is not None:
                    sweep.path = self._walk(view, sweep.path)
                if self._turns.over:
                    break
        return looked

    def _look(self, sweep: _Sweep, view: IndexView, key: bytes, entry: int) -> Path | None:
        """The way to a page that needs a version. `entry`: its last one in this layer."""
        start = start_of(entry)
        if start < self.settled_to:
            return None
        version = view.version(key, view.indexed)
        if version is not None and version.lsn > start:
            return None
        page = page_of_key(key)
        size = view.size(page.relation, view.indexed)
        if size is None or page.block >= size:
            return None
        try:
            if view.entries(page, sweep.end, view.indexed):
                return None
            path = self._materializer.path(view, page, view.indexed, cached=False)
        except (NotMaterializable, CorruptData):
            return None  # whoever asks for the page is told
        return path if path.length else None  # without: it was cut off and is there again

    def _walk(self, view: IndexView, path: Path) -> Path | None:
        """A few records on; None at the end."""
        try:
            self._materializer.walk(path, RECORDS_A_TURN)
        except BorealError as error:
            _log.error("page cannot be made", page=str(path.page), error=error.message)
            return None
        if not path.complete:
            return path
        self._rows.append(version_row(path.key, path.end, path.content))
        last = view.version(path.key, view.indexed)
        if last is not None and self._is_needless(view, path.page, last):
            self._needless.append(last.key)
        return None

    def _is_needless(self, view: IndexView, page: PageKey, last: Version) -> bool:
        """Whether the page's last version may go once it has a newer one.

        Above the lowest LSN that is served, a version only saves work: what it was made from is
        there (see PageIndex).
        """
        if last.lsn <= self._index.lowest:
            return False
        ground = view.ground(page, view.indexed)
        if last.lsn <= ground.since:
            return False  # of the page's former life
        before = view.version(page_key(page), last.lsn - 1)
        since = ground.since if before is None else max(before.lsn, ground.since)
        return len(view.entries(page, since, view.indexed)) <= self._chain_records
