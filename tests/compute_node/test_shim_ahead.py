"""The page shim ahead of its reader: pages that wait in the process, and hints to the agent.

Goal: who reads on gets windows of pages, who reads at random gets pages; none that waited is used
once pages were lost; and eviction goes on beside reads and writes. Method: a small program that
looks like PostgreSQL to the shim.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from collections.abc import Iterator

import pytest

from boreal.engine import Account
from boreal.types import PAGE_BYTES
from compute_node import shim
from compute_node.losses import Losses
from compute_node.page_protocol import Operation, Outcome, ShimRequest, answer, answer_pages
from tests.compute_node.shim_driver import Driver, agent, give_page, page_of


@pytest.fixture
def counted(driver: Driver) -> Iterator[Losses]:
    """The file of losses, without which the shim reads nothing ahead."""
    losses = Losses(driver.socket_path, Account.current())
    yield losses
    losses.close()


def runs(requests: list[ShimRequest]) -> list[tuple[int, int]]:
    return [(request.key.block, request.window) for request in requests]


_SCAN = """
fd = opened('base/5/100', {flags})
page = lambda b: (b + 1).to_bytes(4, 'little').hex() * 2048
right = lambda b: pread(fd, 8192, b * 8192) == page(b)
result = all([right(b) for b in {blocks}])
"""


@pytest.mark.parametrize("flags", ["os.O_RDWR", "os.O_RDONLY"])
async def test_a_sequential_reader_gets_growing_windows_up_to_the_end(
    driver: Driver, counted: Losses, flags: str
) -> None:
    path = driver.relation("base/5/100", 300)
    async with agent(driver.socket_path) as requests:
        assert await driver.run(_SCAN.format(flags=flags, blocks="range(300)"))
    assert runs(requests) == [
        *((0, 1), (1, 2), (3, 4), (7, 8), (15, 16), (31, 32), (63, 64), (127, 64), (191, 64)),
        (255, 45),
    ]
    stored = b"".join(page_of(block) for block in range(300))
    assert path.read_bytes() == (stored if flags == "os.O_RDWR" else bytes(len(stored)))


async def test_pages_that_wait_are_not_in_the_file(driver: Driver, counted: Losses) -> None:
    path = driver.relation("base/5/100", 20)
    async with agent(driver.socket_path) as requests:
        assert await driver.run(_SCAN.format(flags="os.O_RDWR", blocks="range(8)"))
    assert runs(requests)[-1] == (7, 8)
    assert path.read_bytes() == b"".join(map(page_of, range(8))) + bytes(12 * PAGE_BYTES)


async def test_a_random_reader_gets_single_pages(driver: Driver, counted: Losses) -> None:
    driver.relation("base/5/100", 5000)
    async with agent(driver.socket_path) as requests:
        blocks = "[n * 1237 % 5000 for n in range(100)]"
        assert await driver.run(_SCAN.format(flags="os.O_RDWR", blocks=blocks))
    assert {window for _block, window in runs(requests)} == {1}


async def test_a_worker_of_a_parallel_scan_gets_its_chunks(driver: Driver, counted: Losses) -> None:
    """It reads eight blocks and jumps over those of two fellows (table_block_parallelscan)."""
    driver.relation("base/5/100", 480)
    async with agent(driver.socket_path) as requests:
        blocks = "[c * 24 + n for c in range(20) for n in range(8)]"
        assert await driver.run(_SCAN.format(flags="os.O_RDWR", blocks=blocks))
    assert runs(requests)[4:] == [(chunk * 24, 8) for chunk in range(1, 20)]


async def test_readers_of_several_files_are_told_apart(driver: Driver, counted: Losses) -> None:
    for number in (100, 101, 102):
        driver.relation(f"base/5/{number}", 64)
    async with agent(driver.socket_path) as requests:
        assert await driver.run(
            "fds = [opened(f'base/5/{number}') for number in (100, 101, 102)]\n"
            "page = lambda b: (b + 1).to_bytes(4, 'little').hex() * 2048\n"
            "result = all([pread(fd, 8192, b * 8192) == page(b) for b in range(64) for fd in fds])"
        )
    assert len(requests) == 3 * 7


async def test_a_window_ends_where_pages_are_here(driver: Driver, counted: Losses) -> None:
    path = driver.relation("base/5/100", 64)
    with path.open("r+b") as file:
        file.seek(10 * PAGE_BYTES)
        file.write(page_of(10) + page_of(11))
    async with agent(driver.socket_path) as requests:
        assert await driver.run(_SCAN.format(flags="os.O_RDWR", blocks="range(64)"))
    assert runs(requests)[:5] == [(0, 1), (1, 2), (3, 4), (7, 3), (12, 6)]


async def test_a_window_may_come_short_and_with_zeros(driver: Driver, counted: Losses) -> None:
    driver.relation("base/5/100", 64)

    async def reply(request: ShimRequest) -> bytes:
        first = request.key.block
        blocks = range(first, first + (request.window + 1) // 2)
        return answer_pages([page_of(block) if block % 3 else None for block in blocks])

    async with agent(driver.socket_path, reply):
        pages = await driver.run(
            "fd = opened('base/5/100'); result = [pread(fd, 8192, b * 8192) for b in range(64)]"
        )
    assert [bytes.fromhex(page) for page in pages] == [
        page_of(block) if block % 3 else bytes(PAGE_BYTES) for block in range(64)
    ]


_LOSSES = {
    # A block that was cut off and is there again must not get its old page ...
    "truncation": "libc.ftruncate(fd, 8 * 8192); os.truncate('base/5/100', 40 * 8192)",
    "drop": "libc.unlink(b'base/5/200')",
    # ... nor one that was changed and then evicted the page from before (see `reply`).
    "eviction": "pread(opened('base/5/200'), 8192, 0)",
}


@pytest.mark.parametrize("loss", _LOSSES)
async def test_waiting_pages_are_void_after_a_loss(
    driver: Driver, counted: Losses, loss: str
) -> None:
    driver.relation("base/5/100", 40)
    driver.relation("base/5/200", 1)
    lost = False

    async def reply(request: ShimRequest) -> bytes:
        nonlocal lost
        lost = lost or request.key.relation.relation == 200
        if request.operation is Operation.CUT:
            lost = True
            return answer(Outcome.DONE)
        if loss == "eviction" and request.key.relation.relation == 200:
            with counted.evicting():
                pass
        return answer_pages([None] * request.window) if lost else await give_page(request)

    async with agent(driver.socket_path, reply) as requests:
        pages = await driver.run(
            "fd = opened('base/5/100')\n"
            "before = [pread(fd, 8192, b * 8192) for b in range(9)]\n"
            f"{_LOSSES[loss]}\n"
            "result = [pread(fd, 8192, b * 8192) for b in range(9, 20)]"
        )
    assert runs(requests)[:4] == [(0, 1), (1, 2), (3, 4), (7, 8)]
    assert requests[-1].losses == counted.count() > 0
    assert {bytes.fromhex(page) for page in pages} == {bytes(PAGE_BYTES)}


async def test_hints_are_passed_on_for_blocks_that_are_not_here(
    driver: Driver, counted: Losses
) -> None:
    path = driver.relation("base/5/100", 10)
    driver.relation("plain", 10)
    with path.open("r+b") as file:
        file.write(page_of(0))
    async with agent(driver.socket_path) as requests:
        page = await driver.run(
            "libc.posix_fadvise.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_long,"
            " ctypes.c_int]\n"
            "hint = lambda fd, b: libc.posix_fadvise(fd, b * 8192, 8192, os.POSIX_FADV_WILLNEED)\n"
            "fd = opened('base/5/100'); plain = opened('plain')\n"
            "assert [hint(fd, b) for b in (0, 7, 3, 10, 99)] == [0] * 5 and hint(plain, 1) == 0\n"
            "result = pread(fd, 8192, 7 * 8192)"
        )
    assert bytes.fromhex(page) == page_of(7)
    assert [(request.operation, request.key.block) for request in requests] == [
        (Operation.PREFETCH, 7),
        (Operation.PREFETCH, 3),
        (Operation.GET_PAGES, 7),
    ]


async def test_a_lost_agent_costs_hints_and_nothing_else(driver: Driver, counted: Losses) -> None:
    driver.relation("base/5/100", 10)
    assert (
        await driver.run(
            "fd = opened('base/5/100')\n"
            "result = [libc.posix_fadvise(fd, 0, 8192, os.POSIX_FADV_WILLNEED) for _ in range(9)]"
        )
        == [0] * 9
    )


async def test_writes_and_reads_respect_the_lock_of_an_eviction(
    driver: Driver, counted: Losses
) -> None:
    """While the agent holds the range and counts oddly, nobody reads or writes it."""
    path = driver.relation("base/5/100", 4)
    path.write_bytes(b"".join(map(page_of, range(4))))
    driver.variables[shim.LIMITED_VARIABLE] = "1"
    code = (
        "libc.pwrite.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_long]\n"
        "fd = opened('base/5/100')\n"
        "result = [pread(fd, 8192, 3 * 8192), libc.pwrite(fd, b'n' * 8192, 8192, 0)]\n"
        "result.append(pread(fd, 8192, 8192))"
    )
    with path.open("r+b") as file, counted.evicting():
        held = struct.pack("@hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 2 * PAGE_BYTES, 0)
        fcntl.fcntl(file, 37, held)  # F_OFD_SETLK
        async with agent(driver.socket_path):
            running = asyncio.create_task(driver.run(code))
            assert await asyncio.wait([running], timeout=1.5) == (set(), {running})
            assert path.read_bytes()[:PAGE_BYTES] == page_of(0)
            free = struct.pack("@hhqqi4x", fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0)
            fcntl.fcntl(file, 37, free)
            other, written, read = await running
    assert bytes.fromhex(other) == page_of(3)
    assert written == PAGE_BYTES
    assert bytes.fromhex(read) == page_of(1)
    assert path.read_bytes()[:PAGE_BYTES] == b"n" * PAGE_BYTES
