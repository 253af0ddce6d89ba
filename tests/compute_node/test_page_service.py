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
from compute_node.page_service import (
    MAX_UNDER_WAY,
    Cuts,
    Operation,
    Outcome,
    PageService,
    ShimRequest,
)

HEAP = RelationFork(1663, 5, 16384, Fork.MAIN)
OTHER = RelationFork(1664, 0, 1262, Fork.VM)
FIRST = Epoch(1)
MAGIC = 0x31534742
PAGE = b"p" * PAGE_BYTES


@dataclass(slots=True)
class Source:
    """Gives PAGE for every block below 100."""

    asked: list[tuple[PageKey, Lsn]] = field(default_factory=list)
    failure: BaseException | None = None
    epoch: Epoch = FIRST
    promised: Epoch = FIRST
    hanging: asyncio.Event | None = None
    most_at_once: int = 0
    _at_once: int = 0

    async def get_page(self, key: PageKey, lsn: Lsn) -> bytes | None:
        self.asked.append((key, lsn))
        if self.epoch < self.promised:
            raise StaleEpoch("stale", promised_epoch=self.promised)
        if self.failure is not None:
            raise self.failure
        if self.hanging is not None:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            await self.hanging.wait()
            self._at_once -= 1
        return PAGE if key.block < 100 else None

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
    ) -> Outcome:
        request = ShimRequest(
            Operation.CUT if cut else Operation.GET_PAGE,
            PageKey(relation, BlockNumber(block)),
            in_recovery,
            Lsn(lsn),
        )
        self.writer.write(request.pack())
        return await self.answer()

    async def answer(self) -> Outcome:
        magic, outcome = struct.unpack("=II", await self.reader.readexactly(8))
        assert magic == MAGIC
        if outcome == Outcome.PAGE:
            assert await self.reader.readexactly(PAGE_BYTES) == PAGE
        return Outcome(outcome)

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
        assert await backend.ask(7, lsn=1000) is Outcome.PAGE
        assert await backend.ask(100, lsn=2000, relation=OTHER) is Outcome.ZEROS
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
        assert await backend.ask(in_recovery=False) is Outcome.FAILED  # nobody made it a writer
        service.become_writer(Lsn(500))
        assert await backend.ask(lsn=900, in_recovery=False) is Outcome.PAGE
        assert await backend.ask(lsn=480, in_recovery=True) is Outcome.PAGE  # being promoted
        service.advance_read_point(Lsn(700))
        assert await backend.ask(lsn=900, in_recovery=False) is Outcome.PAGE
        assert [lsn for _key, lsn in source.asked] == [500, 500, 700]
        with pytest.raises(Internal):
            service.become_writer(Lsn(800))
        with pytest.raises(Internal):
            service.advance_read_point(Lsn(600))
        backend.close()


async def test_what_a_writer_cut_off_is_zeros(path: Path) -> None:
    source = Source()
    async with serving(path, source) as service:
        backend = await Backend.connect(path)
        # Replayed before the promotion: the read point shows it.
        assert await backend.ask(2, cut=True) is Outcome.DONE
        service.become_writer(Lsn(500))
        assert await backend.ask(50, lsn=600, in_recovery=False, cut=True) is Outcome.DONE
        assert await backend.ask(49, in_recovery=False) is Outcome.PAGE
        assert await backend.ask(50, in_recovery=False) is Outcome.ZEROS
        assert await backend.ask(50, in_recovery=False, relation=OTHER) is Outcome.PAGE
        # Storage, read at an LSN past the cut, knows.
        service.advance_read_point(Lsn(600))
        assert await backend.ask(50, in_recovery=False) is Outcome.PAGE
        # Local recovery replays a cut: how far its record goes is not known.
        assert await backend.ask(0, lsn=650, cut=True) is Outcome.DONE
        service.advance_read_point(Lsn(10**9))
        assert await backend.ask(50, in_recovery=False) is Outcome.ZEROS
        assert service.counters.cuts == 2
        backend.close()


# --- epochs ---------------------------------------------------------------------------------------


async def test_a_reader_follows_to_a_newer_epoch(path: Path) -> None:
    source = Source(promised=Epoch(7))
    async with serving(path, source):
        backend = await Backend.connect(path)
        assert await backend.ask() is Outcome.PAGE
        assert source.epoch == 7
        backend.close()


async def test_a_superseded_writer_is_told(path: Path) -> None:
    source, fenced = Source(promised=Epoch(7)), list[StaleEpoch]()
    async with serving(path, source, fenced.append) as service:
        service.become_writer(Lsn(500))
        backend = await Backend.connect(path)
        assert await backend.ask(in_recovery=False) is Outcome.FAILED
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
        assert await backend.ask() is Outcome.FAILED
        source.failure = None
        assert await backend.ask() is Outcome.PAGE
        assert service.counters.failures == 1
        backend.close()


async def test_a_page_needs_an_lsn(path: Path) -> None:
    async with serving(path, Source()):
        backend = await Backend.connect(path)
        assert await backend.ask(lsn=0) is Outcome.FAILED
        backend.close()


GOOD = ShimRequest(Operation.GET_PAGE, PageKey(HEAP, BlockNumber(0)), True, Lsn(1000)).pack()


@pytest.mark.parametrize(
    "garbage",
    [
        b"G" * 32,
        GOOD[:4] + b"\x09" + GOOD[5:],
        GOOD[:5] + b"\x09" + GOOD[6:],
        GOOD + b"x",
        GOOD + GOOD,
        b"GET / HTTP/1.1\r\n" * 10,
    ],
    ids=["magic", "operation", "fork", "trailing", "two at once", "http"],
)
async def test_garbage_costs_its_sender_the_connection_and_nobody_else(
    path: Path, garbage: bytes
) -> None:
    async with serving(path, Source()):
        good, bad = await Backend.connect(path), await Backend.connect(path)
        bad.writer.write(garbage)
        assert await bad.is_dropped()
        assert await good.ask() is Outcome.PAGE
        good.close()


async def test_a_request_may_come_in_pieces(path: Path) -> None:
    async with serving(path, Source()):
        backend = await Backend.connect(path)
        for piece in (GOOD[:3], GOOD[3:31]):
            backend.writer.write(piece)
            await backend.writer.drain()
            await asyncio.sleep(0)
        backend.writer.write(GOOD[31:])
        assert await backend.answer() is Outcome.PAGE
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
        assert set(await asyncio.gather(*asking)) == {Outcome.PAGE}
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
        assert await backend.ask() is Outcome.PAGE
        backend.close()


async def test_a_path_too_long_for_a_socket_is_told(path: Path) -> None:
    with pytest.raises(BadUsage, match="shorter"):
        await PageService.start(Source(), socket=path / ("x" * 108), account=Account.current())


# --- values ---------------------------------------------------------------------------------------

relations = st.builds(RelationFork, *[st.integers(0, 2**32 - 1)] * 3, st.sampled_from(list(Fork)))
pages = st.builds(PageKey, relations, st.integers(0, 2**32 - 1))
requests = st.builds(
    ShimRequest, st.sampled_from(list(Operation)), pages, st.booleans(), st.integers(0, 2**64 - 1)
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
    for block in range(10):
        # Every cut that the read point does not show must hide; no block below all cuts may.
        hidden = cuts.hide(PageKey(HEAP, BlockNumber(block)))
        if any(first <= block and lsn > read_point for first, lsn in made):
            assert hidden
        if not any(first <= block for first, _lsn in made):
            assert not hidden
    if all(lsn <= read_point for _first, lsn in made):
        assert len(cuts) == 0
