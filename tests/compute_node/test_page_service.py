"""The agent's end of the page shim.

Goal: a reader gets pages at exactly its replay LSN, a writer at the read point unless it has cut
the page off since; whatever fails is answered FAILED, soon, and harms no other connection. Method:
real connections on the real socket, speaking the protocol byte by byte, over a source that
remembers what it was asked. (test_shim.py has PostgreSQL itself on the other end.)
"""

from __future__ import annotations

import asyncio
import os
import stat
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boreal.engine import Account
from boreal.errors import BadUsage, BorealError, Internal, NotMaterializable, StaleEpoch
from boreal.types import PAGE_BYTES, BlockNumber, Epoch, Fork, Lsn, PageKey, RelationFork
from compute_node.page_protocol import MAX_WINDOW, Operation, Outcome, Run, ShimRequest
from compute_node.page_service import AHEAD_PAGES, MAX_UNDER_WAY, Cuts, PageService
from compute_node.prefetch import MAX_FETCH

HEAP = RelationFork(1663, 5, 16384, Fork.MAIN)
OTHER = RelationFork(1664, 0, 1262, Fork.VM)
FIRST = Epoch(1)
MAGIC = 0x32534742
PAGE = b"p" * PAGE_BYTES


@dataclass(slots=True)
class Source:
    """Gives PAGE for every block below 100."""

    asked: list[tuple[PageKey, Lsn]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    failure: BaseException | None = None
    epoch: Epoch = FIRST
    promised: Epoch = FIRST
    hanging: asyncio.Event | None = None
    fail_below: int = 0
    bad_block: int = -1
    most_at_once: int = 0
    _at_once: int = 0

    async def get_pages(
        self, relation: RelationFork, first: BlockNumber, count: int, lsn: Lsn
    ) -> list[bytes | None]:
        self.asked.append((PageKey(relation, first), lsn))
        self.counts.append(count)
        if self.epoch < self.promised:
            raise StaleEpoch("stale", promised_epoch=self.promised)
        if self.failure is not None:
            raise self.failure
        if self.hanging is not None:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            await self.hanging.wait()
            self._at_once -= 1
        if lsn < self.fail_below or self.bad_block in range(first, first + count):
            raise NotMaterializable("no such version")
        return [PAGE if block < 100 else None for block in range(first, first + count)]

    def raise_epoch(self, epoch: Epoch) -> None:
        self.epoch = max(self.epoch, epoch)


@pytest.fixture
def path() -> Iterator[Path]:
    # Not tmp_path: a unix socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="boreal-pages-") as folder:
        yield Path(folder) / "pages"


@asynccontextmanager
async def serving(
    path: Path, source: Source, on_fenced: Callable[[StaleEpoch], None] | None = None
) -> AsyncIterator[PageService]:
    service = await PageService.start(
        source, socket=path, account=Account.current(), on_fenced=on_fenced
    )
    try:
        yield service
    finally:
        await service.close()


class Backend:
    """A PostgreSQL process as the service sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, path: Path) -> Backend:
        return cls(*await asyncio.open_unix_connection(path))

    async def ask(
        self,
        block: int = 0,
        *,
        lsn: int = 1000,
        in_recovery: bool = True,
        cut: bool = False,
        relation: RelationFork = HEAP,
        window: int = 1,
    ) -> str:
        """What came: a letter for each page, P or 0 for zeros; or the outcome's name."""
        operation = Operation.CUT if cut else Operation.GET_PAGES
        self.send(
            operation, block, lsn=lsn, in_recovery=in_recovery, relation=relation, window=window
        )
        return await self.answer()

    def send(
        self,
        operation: Operation,
        block: int,
        *,
        lsn: int = 1000,
        in_recovery: bool = True,
        relation: RelationFork = HEAP,
        window: int = 1,
        losses: int = 0,
    ) -> None:
        key = PageKey(relation, BlockNumber(block))
        request = ShimRequest(operation, key, in_recovery, Lsn(lsn), window, losses)
        self.writer.write(request.pack())

    async def answer(self) -> str:
        magic, outcome, count, present = struct.unpack("=IHHQ", await self.reader.readexactly(16))
        assert magic == MAGIC
        if outcome != Outcome.PAGES:
            assert (count, present) == (0, 0)
            return Outcome(outcome).name
        assert present < 1 << count
        there = [bool(present >> position & 1) for position in range(count)]
        size = sum(there) * PAGE_BYTES
        assert await self.reader.readexactly(size) == b"p" * size
        return "".join("P" if one else "0" for one in there)

    async def is_dropped(self) -> bool:
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True
        finally:
            self.writer.close()

    def close(self) -> None:
        self.writer.close()


# --- readers and writers --------------------------------------------------------------------------


async def test_a_reader_is_served_at_its_replay_lsn(path: Path) -> None:
    source = Source()
    async with serving(path, source) as service:
        backend = await Backend.connect(path)
        assert await backend.ask(7, lsn=1000) == "P"
        assert await backend.ask(100, lsn=2000, relation=OTHER) == "0"
        assert source.asked == [
            (PageKey(HEAP, BlockNumber(7)), 1000),
            (PageKey(OTHER, BlockNumber(100)), 2000),
        ]
        assert (service.counters.pages, service.counters.zeros) == (1, 1)
        backend.close()


async def test_a_writer_is_served_at_the_read_point(path: Path) -> None:
    source = Source()
    async with serving(path, source) as service:
        backend = await Backend.connect(path)
        assert await backend.ask(in_recovery=False) == "FAILED"  # nobody made it a writer
        service.become_writer(Lsn(500))
        assert await backend.ask(lsn=900, in_recovery=False) == "P"
        assert await backend.ask(lsn=480, in_recovery=True) == "P"  # being promoted
        service.advance_read_point(Lsn(700))
        assert await backend.ask(lsn=900, in_recovery=False) == "P"
        assert [lsn for _key, lsn in source.asked] == [500, 500, 700]
        with pytest.raises(Internal):
            service.become_writer(Lsn(800))
        service.advance_read_point(Lsn(600))  # several move it; it only ever grows
        assert service.read_point == service.oldest_read == 700
        backend.close()


async def test_what_a_writer_cut_off_is_zeros(path: Path) -> None:
    source = Source()
    async with serving(path, source) as service:
        backend = await Backend.connect(path)
        # Replayed before the promotion: the read point shows it.
        assert await backend.ask(2, cut=True) == "DONE"
        service.become_writer(Lsn(500))
        assert await backend.ask(50, lsn=600, in_recovery=False, cut=True) == "DONE"
        assert await backend.ask(49, in_recovery=False) == "P"
        assert await backend.ask(50, in_recovery=False) == "0"
        assert await backend.ask(50, in_recovery=False, relation=OTHER) == "P"
        # Storage, read at an LSN past the cut, knows.
        service.advance_read_point(Lsn(600))
        assert await backend.ask(50, in_recovery=False) == "P"
        # Local recovery replays a cut: how far its record goes is not known.
        assert await backend.ask(0, lsn=650, cut=True) == "DONE"
        service.advance_read_point(Lsn(10**9))
        assert await backend.ask(50, in_recovery=False) == "0"
        assert service.counters.cuts == 2
        backend.close()


async def test_the_read_point_moves_past_reads_under_way(path: Path) -> None:
    source = Source(hanging=asyncio.Event())
    async with serving(path, source) as service:
        service.become_writer(Lsn(500))
        backend = await Backend.connect(path)
        asking = asyncio.create_task(backend.ask(in_recovery=False))
        async with asyncio.timeout(5):
            while not source.asked:
                await asyncio.sleep(0.005)
        service.advance_read_point(Lsn(700))
        # What is under way may still ask for the older version; if that is gone, for the newer.
        assert (service.read_point, service.oldest_read) == (700, 500)
        assert source.hanging is not None
        source.fail_below = 600
        source.hanging.set()
        assert await asking == "P"
        assert [lsn for _key, lsn in source.asked] == [500, 700]
        assert service.oldest_read == 700
        backend.close()


# --- runs, and what is fetched ahead --------------------------------------------------------------


async def test_a_run_is_answered_with_its_gaps(path: Path) -> None:
    async with serving(path, Source()) as service:
        service.become_writer(Lsn(500))
        backend = await Backend.connect(path)
        assert await backend.ask(97, window=5, in_recovery=False) == "PPP00"
        assert await backend.ask(20, cut=True, lsn=600, in_recovery=False) == "DONE"
        assert await backend.ask(18, window=4, in_recovery=False) == "PP00"
        assert await backend.ask(20, window=3, in_recovery=False) == "000"
        assert (service.counters.pages, service.counters.zeros) == (5, 7)
        backend.close()


async def test_the_window_after_the_next_is_fetched_meanwhile(path: Path) -> None:
    source = Source()
    async with serving(path, source) as service:
        backend = await Backend.connect(path)
        assert await backend.ask(0) == "P"
        assert source.counts == [1]  # who reads one page may read any other next
        assert await backend.ask(1, window=2) == "PP"
        assert await backend.ask(3, window=4) == "PPPP"
        asked = [
            (key.block, count)
            for (key, _lsn), count in zip(source.asked, source.counts, strict=True)
        ]
        assert set(asked) == {(0, 1), (1, 2), (3, 4), (7, 8)}
        assert service.counters.ahead == 1
        backend.close()


async def test_at_most_so_much_is_fetched_ahead(path: Path) -> None:
    source = Source()
    async with serving(path, source):
        backend = await Backend.connect(path)
        for block in range(0, 640, MAX_WINDOW):
            await backend.ask(block, window=MAX_WINDOW)
        assert sum(source.counts) <= 640 + AHEAD_PAGES
        assert max(source.counts) == MAX_FETCH
        # Steady reading asks in whole fetches only: the first window, what is left of its fetch.
        assert [count for count in source.counts if count != MAX_FETCH] == [MAX_WINDOW, MAX_WINDOW]
        backend.close()


async def test_who_has_not_read_much_yet_is_fetched_little_for(path: Path) -> None:
    source = Source()
    async with serving(path, source):
        backend = await Backend.connect(path)
        await backend.ask(10, window=16)
        assert sorted(source.counts) == [16, 32]
        backend.close()


async def test_what_was_fetched_before_a_loss_is_not_given(path: Path) -> None:
    source = Source()
    async with serving(path, source) as service:
        backend = await Backend.connect(path)
        assert await backend.ask(1, window=2) == "PP"  # fetches 3 to 6 as well
        with service.losses.evicting():
            pass
        source.asked.clear()
        assert await backend.ask(3, window=4) == "PPPP"
        assert 3 in {key.block for key, _lsn in source.asked}
        assert service.counters.ahead == 0
        backend.close()


async def test_pages_hinted_at_are_fetched_together_and_once(path: Path) -> None:
    source = Source()
    async with serving(path, source) as service:
        backend = await Backend.connect(path)
        for block in (7, 5, 6, 40, 7, 99, 103):
            backend.send(Operation.PREFETCH, block)
        async with asyncio.timeout(5):
            while len(source.asked) < 3:
                await asyncio.sleep(0.005)
        fetched = [
            (key.block, count)
            for (key, _lsn), count in zip(source.asked, source.counts, strict=True)
        ]
        assert fetched == [(5, 3), (40, 1), (99, 5)]
        assert await backend.ask(6) == "P"
        assert await backend.ask(103) == "0"
        assert len(source.asked) == 3
        assert service.counters.ahead == 2
        backend.close()


async def test_a_hint_from_before_a_loss_is_of_no_use(path: Path) -> None:
    source = Source()
    async with serving(path, source) as service:
        with service.losses.evicting():
            pass
        backend = await Backend.connect(path)
        backend.send(Operation.PREFETCH, 5, losses=0)  # counted before
        assert await backend.ask(5) == "P"
        assert service.counters.ahead == 0
        backend.close()


async def test_one_page_that_cannot_be_had_spoils_no_other(path: Path) -> None:
    source = Source(bad_block=3)
    async with serving(path, source):
        backend = await Backend.connect(path)
        assert await backend.ask(1, window=4) == "P"  # one at least
        assert await backend.ask(2) == "P"
        assert await backend.ask(3) == "FAILED"
        backend.close()


# --- epochs ---------------------------------------------------------------------------------------


async def test_a_reader_follows_to_a_newer_epoch(path: Path) -> None:
    source = Source(promised=Epoch(7))
    async with serving(path, source):
        backend = await Backend.connect(path)
        assert await backend.ask() == "P"
        assert source.epoch == 7
        backend.close()


async def test_a_superseded_writer_is_told(path: Path) -> None:
    source, fenced = Source(promised=Epoch(7)), list[StaleEpoch]()
    async with serving(path, source, fenced.append) as service:
        service.become_writer(Lsn(500))
        backend = await Backend.connect(path)
        assert await backend.ask(in_recovery=False) == "FAILED"
        assert [error.details["promised_epoch"] for error in fenced] == [7]
        assert source.epoch == 1
        backend.close()


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [NotMaterializable("no redo"), BorealError("other"), TimeoutError(), ZeroDivisionError("bug")],
    ids=lambda failure: type(failure).__name__,
)
async def test_a_failure_is_answered_and_the_connection_goes_on(
    path: Path, failure: Exception
) -> None:
    source = Source(failure=failure)
    async with serving(path, source) as service:
        backend = await Backend.connect(path)
        assert await backend.ask() == "FAILED"
        source.failure = None
        assert await backend.ask() == "P"
        assert service.counters.failures == 1
        backend.close()


async def test_a_page_needs_an_lsn(path: Path) -> None:
    async with serving(path, Source()):
        backend = await Backend.connect(path)
        assert await backend.ask(lsn=0) == "FAILED"
        backend.close()


GOOD = ShimRequest(Operation.GET_PAGES, PageKey(HEAP, BlockNumber(0)), True, Lsn(1000)).pack()


@pytest.mark.parametrize(
    "garbage",
    [
        b"G" * 40,
        GOOD[:4] + b"\x09" + GOOD[5:],
        GOOD[:5] + b"\x09" + GOOD[6:],
        GOOD[:7] + b"\x00" + GOOD[8:],
        GOOD[:7] + b"\x41" + GOOD[8:],
        GOOD + GOOD,
        b"GET / HTTP/1.1\r\n" * 10,
    ],
    ids=["magic", "operation", "fork", "no page", "too many", "two at once", "http"],
)
async def test_garbage_costs_its_sender_the_connection_and_nobody_else(
    path: Path, garbage: bytes
) -> None:
    async with serving(path, Source()):
        good, bad = await Backend.connect(path), await Backend.connect(path)
        bad.writer.write(garbage)
        assert await bad.is_dropped()
        assert await good.ask() == "P"
        good.close()


async def test_a_request_may_come_in_pieces(path: Path) -> None:
    async with serving(path, Source()):
        backend = await Backend.connect(path)
        for piece in (GOOD[:3], GOOD[3:39]):
            backend.writer.write(piece)
            await backend.writer.drain()
            await asyncio.sleep(0)
        backend.writer.write(GOOD[39:])
        assert await backend.answer() == "P"
        backend.close()


# --- many at once ---------------------------------------------------------------------------------


async def test_storage_is_asked_for_a_bounded_number_of_pages_at_a_time(path: Path) -> None:
    source = Source(hanging=asyncio.Event())
    async with serving(path, source):
        backends = [await Backend.connect(path) for _ in range(MAX_UNDER_WAY + 20)]
        asking = [asyncio.create_task(backend.ask()) for backend in backends]
        async with asyncio.timeout(5):
            while source.most_at_once < MAX_UNDER_WAY:
                await asyncio.sleep(0.005)
        assert source.hanging is not None
        source.hanging.set()
        assert set(await asyncio.gather(*asking)) == {"P"}
        assert source.most_at_once == MAX_UNDER_WAY
        for backend in backends:
            backend.close()


async def test_a_backend_that_dies_leaves_no_request_behind(path: Path) -> None:
    source = Source(hanging=asyncio.Event())
    async with serving(path, source):
        backend = await Backend.connect(path)
        backend.writer.write(GOOD)
        tasks = len(asyncio.all_tasks())
        async with asyncio.timeout(5):
            while not source.asked:
                await asyncio.sleep(0.005)
            backend.writer.transport.abort()
            while len(asyncio.all_tasks()) > tasks:
                await asyncio.sleep(0.005)


async def test_closing_ends_what_is_under_way(path: Path) -> None:
    source = Source(hanging=asyncio.Event())
    async with serving(path, source) as service:
        backend = await Backend.connect(path)
        backend.writer.write(GOOD)
        async with asyncio.timeout(5):
            while not source.asked:
                await asyncio.sleep(0.005)
            await service.close()
            assert await backend.is_dropped()
        with pytest.raises(ConnectionError):
            await Backend.connect(path)


# --- the socket -----------------------------------------------------------------------------------


async def test_only_the_account_may_connect_and_a_leftover_is_replaced(path: Path) -> None:
    os.mkfifo(path, 0o666)  # stands for what a killed agent left
    async with serving(path, Source()):
        assert os.stat(path).st_mode == stat.S_IFSOCK | 0o600  # noqa: PTH116
        backend = await Backend.connect(path)
        assert await backend.ask() == "P"
        backend.close()


async def test_a_path_too_long_for_a_socket_is_told(path: Path) -> None:
    with pytest.raises(BadUsage, match="shorter"):
        await PageService.start(Source(), socket=path / ("x" * 108), account=Account.current())


# --- values ---------------------------------------------------------------------------------------

relations = st.builds(RelationFork, *[st.integers(0, 2**32 - 1)] * 3, st.sampled_from(list(Fork)))
pages = st.builds(PageKey, relations, st.integers(0, 2**32 - 1))
requests = st.builds(
    ShimRequest,
    st.sampled_from(list(Operation)),
    pages,
    st.booleans(),
    st.integers(0, 2**64 - 1),
    st.integers(1, MAX_WINDOW),
    st.integers(0, 2**64 - 1),
)


@given(requests)
def test_a_request_survives_its_way(request: ShimRequest) -> None:
    assert ShimRequest.unpack(request.pack()) == request


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20))), st.integers(0, 20))
def test_a_cut_hides_pages_until_the_read_point_has_passed_it(
    made: list[tuple[int, int]], read_point: int
) -> None:
    cuts = Cuts()
    for block, lsn in made:
        cuts.record(PageKey(HEAP, BlockNumber(block)), Lsn(lsn))
    cuts.forget(Lsn(read_point))
    left = cuts.left(Run(HEAP, BlockNumber(0), 10))
    # Every cut that the read point does not show must hide; no block below all cuts may.
    assert left <= min((first for first, lsn in made if lsn > read_point), default=10)
    assert left >= min((first for first, _lsn in made), default=10)
    for first in range(10):
        assert cuts.left(Run(HEAP, BlockNumber(first), 10 - first)) == max(left - first, 0)
    if all(lsn <= read_point for _first, lsn in made):
        assert len(cuts) == 0
