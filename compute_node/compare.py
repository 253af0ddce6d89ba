"""PostgreSQL's own pages against storage's, in a process of its own.

Comparing two copies of a page means blanking, tuple by tuple, what need not be the same: hundreds
of microseconds of pure Python. The agent must not spend them: every commit passes through it.

`differences` is the comparison, `Comparer` the agent's handle of a process that makes it, `main`
what runs in that. A request is a line of JSON and the pages; an answer is a line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from boreal.errors import CorruptData, ProcessFailed
from boreal.pages import PageKind, is_zero, mask_page, page_lsn, same_page
from boreal.types import (
    PAGE_BYTES,
    RELATION_SEGMENT_BLOCKS,
    BlockNumber,
    Fork,
    RelationFork,
    format_lsn,
)
from compute_node import pgdata

_ZERO_PAGE = bytes(PAGE_BYTES)
_NICENESS = 5
"""Commits first."""
_STOP_S = 5.0
_MAX_ANSWER_BYTES = 4 * 1024 * 1024


class PageFault(NamedTuple):
    """A block that is not what it should be, and how."""

    block: BlockNumber
    reason: str


# --- the comparison: pure ------------------------------------------------------------------------


def differences(
    kind: PageKind, first: int, local: Sequence[bytes], stored: Sequence[bytes | None]
) -> list[PageFault]:
    """Which of a node's pages PostgreSQL would read otherwise than its own.

    `local` blocks that are short or all zero are not in the local file: nothing is known of them. A
    stored None is a block that storage does not have; zeros are its equal.
    """
    found = []
    for number, (mine, theirs) in enumerate(zip(local, stored, strict=True), start=first):
        if len(mine) == PAGE_BYTES and not is_zero(mine):
            reason = _difference(mine, theirs or _ZERO_PAGE, kind, number)
            if reason:
                found.append(PageFault(BlockNumber(number), reason))
    return found


def disagreements(
    first: int, agreed: Sequence[bytes | None], odd: Sequence[bytes | None]
) -> list[PageFault]:
    """Which of a node's pages are not, byte for byte, those the other nodes agree on."""
    return [
        PageFault(BlockNumber(number), _disagreement(theirs, mine))
        for number, (theirs, mine) in enumerate(zip(agreed, odd, strict=True), start=first)
        if theirs != mine
    ]


def _difference(expected: bytes, got: bytes, kind: PageKind, block: int) -> str:
    """What is wrong with `got`; empty if nothing is."""
    if expected == got:
        return ""
    try:
        same = same_page(got, expected, kind, block)
    except CorruptData as error:
        return error.message
    return "" if same else _describe(expected, got, kind, block)


def _describe(expected: bytes, got: bytes, kind: PageKind, block: int) -> str:
    if is_zero(got):
        return "storage has zeros"
    ours, theirs = bytearray(expected), bytearray(got)
    mask_page(ours, kind, block)
    mask_page(theirs, kind, block)
    lsns = f"PostgreSQL's LSN {format_lsn(page_lsn(expected))}, {format_lsn(page_lsn(got))} here"
    return f"{_where(ours, theirs)}; {lsns}"


def _disagreement(agreed: bytes | None, odd: bytes | None) -> str:
    if odd is None:
        return "does not exist here, but on the other nodes"
    if agreed is None:
        return "exists here, but not on the other nodes"
    lsns = f"their LSN {format_lsn(page_lsn(agreed))}, {format_lsn(page_lsn(odd))} here"
    return f"not what the other nodes have: {_where(agreed, odd)}; {lsns}"


def _where(one: bytes | bytearray, other: bytes | bytearray) -> str:
    at = [index for index in range(PAGE_BYTES) if one[index] != other[index]]
    return f"{len(at)} bytes differ, the first at offset {at[0]}" if at else "the maps differ"


# --- the agent's side ----------------------------------------------------------------------------


class Comparer:
    """A process that compares; one request at a time. Close it: it ends with its standard input."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is None or process.stdout is None:
            raise ProcessFailed("the comparing process was started without its pipes")
        self._process = process
        self._requests, self._answers = process.stdin, process.stdout

    @classmethod
    async def start(cls, path: Path) -> Self:
        """Start one for the files of the data directory `path`."""
        return cls(
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "compute_node.compare", str(path)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_MAX_ANSWER_BYTES,
            )
        )

    async def compare(
        self, kind: PageKind, fork: RelationFork, first: int, stored: Sequence[bytes | None]
    ) -> list[PageFault]:
        """`differences` between the local files and `stored`, blocks from `first` on."""
        exists = "".join("01"[page is not None] for page in stored)
        head = json.dumps({"kind": kind.value, "fork": fork, "first": first, "exists": exists})
        ended = ProcessFailed("the process that compares pages has ended")
        if self._requests.is_closing():
            raise ended
        self._requests.write(head.encode() + b"\n")
        self._requests.write(b"".join(page for page in stored if page is not None))
        try:
            await self._requests.drain()
            answer = await self._answers.readline()
        except ConnectionError as error:
            raise ended from error
        if not answer:
            raise ended
        return [PageFault(BlockNumber(block), reason) for block, reason in json.loads(answer)]

    async def close(self) -> None:
        """End it, and see it gone."""
        self._requests.close()
        try:
            async with asyncio.timeout(_STOP_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


# --- the process ---------------------------------------------------------------------------------


def read_local(path: Path, fork: RelationFork, first: int, count: int) -> list[bytes]:
    """Blocks [first, first + count) as they lie in the local files; empty where there is none."""
    blocks: list[bytes] = []
    while len(blocks) < count:
        segment, block = divmod(first + len(blocks), RELATION_SEGMENT_BLOCKS)
        wanted = min(count - len(blocks), RELATION_SEGMENT_BLOCKS - block)
        content = _read(path / pgdata.relation_path(fork, segment), block, wanted)
        blocks += (
            content[at : at + PAGE_BYTES] for at in range(0, wanted * PAGE_BYTES, PAGE_BYTES)
        )
    return blocks


def _read(file: Path, block: int, count: int) -> bytes:
    try:
        with file.open("rb") as pages:
            pages.seek(block * PAGE_BYTES)
            return pages.read(count * PAGE_BYTES)
    except FileNotFoundError:
        return b""  # dropped, or truncated, since it was listed


def _serve(path: Path, requests: BinaryIO, answers: BinaryIO) -> None:
    while line := requests.readline():
        head = json.loads(line)
        stored = [requests.read(PAGE_BYTES) if exists == "1" else None for exists in head["exists"]]
        tablespace, database, relation, number = head["fork"]
        fork = RelationFork(tablespace, database, relation, Fork(number))
        local = read_local(path, fork, head["first"], len(stored))
        found = differences(PageKind(head["kind"]), head["first"], local, stored)
        answers.write(json.dumps(found).encode() + b"\n")
        answers.flush()


def main() -> None:
    """The process's entry."""
    os.nice(_NICENESS)
    _serve(Path(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
