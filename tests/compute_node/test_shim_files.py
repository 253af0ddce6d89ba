"""The page shim on files, by calls that stock PostgreSQL never makes like this.

Goal: whatever the calls are, what is read is what the volume holds; what the volume cannot give is
an error, never zeros; and nothing newer is ever overwritten.

Method: odd offsets, a hostile agent, forks and signals, driven through a small program that looks
like PostgreSQL to the shim.
"""

from __future__ import annotations

import asyncio
import errno
import struct

import pytest

from boreal.types import PAGE_BYTES
from compute_node.page_protocol import Outcome, ShimRequest, answer, answer_pages
from tests.compute_node.shim_driver import MAGIC, Driver, agent, give_page, page_of


async def test_any_part_of_a_file_can_be_read(driver: Driver) -> None:
    driver.relation("base/5/100", 4)
    volume = b"".join(page_of(block) for block in range(4))
    async with agent(driver.socket_path):
        parts = await driver.run(
            "fd = opened('base/5/100', os.O_RDONLY)\n"
            "result = [pread(fd, 100, 8150), pread(fd, 20000, 3), pread(fd, 9000, 30000),"
            "          pread(fd, 8192, 32768), read(fd, 10000), read(fd, 40000)]"
        )
    assert [bytes.fromhex(part) for part in parts] == [
        volume[8150:8250], volume[3:20003], volume[30000:], b"", volume[:10000], volume[10000:],
    ]  # fmt: skip
    assert driver.data.joinpath("base/5/100").read_bytes() == bytes(4 * PAGE_BYTES)


async def test_a_page_is_stored_through_a_writable_file_and_only_where_it_was_missing(
    driver: Driver,
) -> None:
    path = driver.relation("base/5/100", 3)
    with path.open("r+b") as file:
        file.seek(PAGE_BYTES)
        file.write(b"newer".ljust(PAGE_BYTES, b"."))
    async with agent(driver.socket_path) as requests:
        await driver.run("fd = opened('base/5/100')\nresult = pread(fd, 3 * 8192, 0)")
    assert [request.key.block for request in requests] == [0, 2]
    newer = b"newer".ljust(PAGE_BYTES, b".")
    assert path.read_bytes() == page_of(0) + newer + page_of(2)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("base/5/100", (1663, 5, 100, 0, 0)),
        ("./base/5/100", (1663, 5, 100, 0, 0)),
        ("base/5/100_vm", (1663, 5, 100, 2, 0)),
        ("base/5/100_init", (1663, 5, 100, 3, 0)),
        ("base/5/100.3", (1663, 5, 100, 0, 3 * 131072)),
        ("base/5/4294967295_vm.1", (1663, 5, 4294967295, 2, 131072)),
        ("global/1262", (1664, 0, 1262, 0, 0)),
        ("base/5/100_fsm", None),
        ("base/5/t3_100", None),
        ("base/5/100.", None),
        ("base/5/100x", None),
        ("base/5/4294967296", None),
        ("base/5/pg_filenode.map", None),
        ("global/pg_control", None),
        ("base/5", None),
    ],
)
async def test_relation_files_are_known_by_their_path(
    driver: Driver, name: str, key: tuple[int, ...] | None
) -> None:
    if name != "base/5":
        driver.relation(name, 1)
    async with agent(driver.socket_path) as requests:
        await driver.run(f"fd = opened({name!r}, os.O_RDONLY)\nresult = pread(fd, 8192, 0)")
    found = [(*request.key.relation, request.key.block) for request in requests]
    assert found == ([key] if key else [])
    assert all(request.in_recovery and request.lsn == 1000 for request in requests)


async def test_a_closed_file_is_forgotten(driver: Driver) -> None:
    driver.relation("base/5/100", 1)
    driver.relation("plain", 1)
    async with agent(driver.socket_path) as requests:
        same, zeros = await driver.run(
            "first = opened('base/5/100'); libc.close(first)\n"
            "second = opened('plain')\n"
            "result = [first == second, pread(second, 8192, 0)]"
        )
    assert (same, bytes.fromhex(zeros), requests) == (True, bytes(PAGE_BYTES), [])


async def test_cuts_are_reported_before_they_are_done(driver: Driver) -> None:
    path = driver.relation("base/5/100.1", 9)
    seen: list[tuple[int, int, int]] = []

    async def watch(request: ShimRequest) -> bytes:
        seen.append((request.key.block, request.lsn, path.stat().st_size // PAGE_BYTES))
        return await give_page(request)

    async with agent(driver.socket_path, watch):
        await driver.run(
            "fd = opened('base/5/100.1')\n"
            "result = [libc.ftruncate(fd, 8 * 8192)]\n"
            "become_writer()\n"
            "result += [libc.ftruncate(fd, 5 * 8192), libc.truncate(b'base/5/100.1', 0),"
            "           libc.unlink(b'base/5/100.1'), libc.unlink(b'base/5/none_fsm')]"
        )
    assert seen == [
        (131072 + 8, 1000, 9),
        (131072 + 5, 2000, 8),
        (131072, 2000, 5),
        (131072, 2000, 0),
    ]
    assert not path.exists()


async def test_without_an_agent_nothing_is_cut_and_nothing_is_read(driver: Driver) -> None:
    path = driver.relation("base/5/100", 2)
    result = await driver.run(
        "become_writer(); fd = opened('base/5/100')\n"
        "result = [pread(fd, 8192, 0), read(fd, 8192), libc.ftruncate(fd, 8192),"
        "          libc.truncate(b'base/5/100', 0), libc.unlink(b'base/5/100')]"
    )
    assert result == [errno.EIO, errno.EIO, -1, -1, -1]
    assert path.stat().st_size == 2 * PAGE_BYTES


@pytest.mark.parametrize(
    "given",
    [
        b"",
        answer(Outcome.FAILED),
        answer(Outcome.DONE),
        struct.pack("=IHHQ", MAGIC, 77, 1, 0),
        struct.pack("=IHHQ", 0xBAD, Outcome.PAGES, 1, 0),
        struct.pack("=IHHQ", MAGIC, Outcome.PAGES, 0, 0),
        struct.pack("=IHHQ", MAGIC, Outcome.PAGES, 2, 0),
        struct.pack("=IHHQ", MAGIC, Outcome.PAGES, 1, 2) + page_of(0),
        answer_pages([None]) + b"more",
    ],
    ids=["hangs up", "failed", "done", "unknown", "magic", "no page", "two pages", "bit", "long"],
)
async def test_no_other_answer_is_taken_for_a_page(driver: Driver, given: bytes) -> None:
    driver.relation("base/5/100", 1)

    async def reply(_request: ShimRequest) -> bytes:
        return given

    async with agent(driver.socket_path, reply):
        code = "fd = opened('base/5/100'); result = pread(fd, 8192, 0)"
        assert await driver.run(code) == errno.EIO


async def test_a_legitimate_zero_page_is_answered_but_not_written(driver: Driver) -> None:
    path = driver.relation("base/5/100", 1)

    async def reply(_request: ShimRequest) -> bytes:
        return answer_pages([None])

    async with agent(driver.socket_path, reply):
        page = await driver.run("fd = opened('base/5/100'); result = pread(fd, 8192, 0)")
    assert bytes.fromhex(page) == bytes(PAGE_BYTES)
    assert path.stat().st_blocks == 0


async def test_half_a_page_is_not_left_in_a_file(driver: Driver) -> None:
    path = driver.relation("base/5/100", 1)
    async with agent(driver.socket_path):
        page = await driver.run(
            "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            "fd = opened('base/5/100'); result = pread(fd, 8192, 0)"
        )
    assert bytes.fromhex(page) == page_of(0)
    assert path.read_bytes() == bytes(PAGE_BYTES)


async def test_forked_processes_have_connections_of_their_own(driver: Driver) -> None:
    driver.relation("base/5/100", 200)
    async with agent(driver.socket_path) as requests:
        ok = await driver.run(
            "fd = opened('base/5/100', os.O_RDONLY)\n"
            "page = lambda b: (b + 1).to_bytes(4, 'little').hex() * 2048\n"
            "right = lambda b: pread(fd, 8192, b * 8192) == page(b)\n"
            "result = right(0)\n"
            "children = []\n"
            "for child in range(4):\n"
            "    pid = os.fork()\n"
            "    if pid == 0:\n"
            "        os._exit(0 if all(right(b) for b in range(child, 200, 4)) else 1)\n"
            "    children.append(pid)\n"
            "result = result and right(7)\n"
            "result = result and all(os.waitpid(pid, 0)[1] == 0 for pid in children)"
        )
    assert ok
    assert len(requests) == 202


async def test_signals_do_not_disturb_a_wait(driver: Driver) -> None:
    driver.relation("base/5/100", 1)

    async def slowly(request: ShimRequest) -> bytes:
        await asyncio.sleep(0.02)
        return await give_page(request)

    async with agent(driver.socket_path, slowly) as requests:
        pages = await driver.run(
            "signal.signal(signal.SIGALRM, lambda *_: None)\n"
            "signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)\n"
            "fd = opened('base/5/100', os.O_RDONLY)\n"
            "result = [pread(fd, 8192, 0) for _ in range(20)]\n"
            "signal.setitimer(signal.ITIMER_REAL, 0)"
        )
    assert {bytes.fromhex(page) for page in pages} == {page_of(0)}
    assert len(requests) == 20
