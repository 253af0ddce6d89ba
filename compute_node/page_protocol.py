"""What the page shim and the agent say to each other, over a unix socket.

Each PostgreSQL process has a connection of its own. Both messages are C structs of the machine's
byte order (`boreal_shim.c` has the same two):

    request, 40 bytes   magic u32 · operation u8 · fork u8 · in_recovery u8 · count u8
                        · tablespace u32 · database u32 · relation u32 · block u32
                        · losses u64 · lsn u64
    answer, 16 bytes    magic u32 · outcome u16 · count u16 · present u64

GET_PAGES asks for `count` pages from `block` on, 1 to MAX_WINDOW, and is answered with PAGES or
FAILED. PAGES gives as many of them as `count` in the answer says, at least one; bit i of `present`
is set if the 8192 bytes of page i follow, clear if it is zeros (the fork has no such block). CUT
(the fork loses every block from `block` on) is answered with DONE or FAILED. FAILED becomes EIO;
our log says why. One such request is under way on a connection at a time.

PREFETCH says that the block will be asked for soon. It is not answered, and may come at any time.

`losses` is the count of `compute_node.losses`, read before `lsn` was: pages fetched because of this
request are void once the count is another.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from boreal.errors import Internal, MalformedRequest
from boreal.types import PAGE_BYTES, BlockNumber, Fork, Lsn, PageKey, RelationFork

MAX_WINDOW = 64
"""WINDOW_BLOCKS of the shim: the most pages of one answer, one for each bit of `present`."""

_MAGIC = 0x32534742
_REQUEST = struct.Struct("=IBBBBIIIIQQ")
_ANSWER = struct.Struct("=IHHQ")
_ALL_PRESENT = [(1 << count) - 1 for count in range(MAX_WINDOW + 1)]

REQUEST_BYTES = _REQUEST.size


class Operation(IntEnum):
    """What a PostgreSQL process asks for."""

    GET_PAGES = 1
    CUT = 2
    PREFETCH = 3


class Outcome(IntEnum):
    """What it is answered."""

    FAILED = 0
    PAGES = 1
    DONE = 2


_FORKS = {fork.value: fork for fork in Fork}
_OPERATIONS = {operation.value: operation for operation in Operation}


class ShimRequest(NamedTuple):
    """One request of the shim. `lsn` is the replay LSN in recovery, the insert LSN past it."""

    operation: Operation
    key: PageKey
    in_recovery: bool
    lsn: Lsn
    window: int = 1
    """How many pages are asked for."""
    losses: int = 0

    def pack(self) -> bytes:
        """As it travels."""
        relation, block = self.key
        tablespace, database, number, fork = relation
        return _REQUEST.pack(
            _MAGIC,
            self.operation,
            fork,
            self.in_recovery,
            self.window,
            tablespace,
            database,
            number,
            block,
            self.losses,
            self.lsn,
        )

    @classmethod
    def unpack(cls, data: bytes, at: int = 0) -> ShimRequest:
        """Read the one at `at`; MalformedRequest if it is none."""
        magic, operation, fork, in_recovery, count, *key, losses, lsn = _REQUEST.unpack_from(
            data, at
        )
        if magic != _MAGIC:
            raise MalformedRequest("the peer does not speak the page shim's protocol")
        if operation not in _OPERATIONS or fork not in _FORKS:
            raise MalformedRequest(f"not a request of the page shim: {operation} of fork {fork}")
        if operation == Operation.GET_PAGES and not 1 <= count <= MAX_WINDOW:
            raise MalformedRequest(f"{count} pages asked for; 1 to {MAX_WINDOW} are given")
        tablespace, database, relation, block = key
        page = PageKey(RelationFork(tablespace, database, relation, _FORKS[fork]), block)
        return cls(_OPERATIONS[operation], page, bool(in_recovery), Lsn(lsn), count, losses)


class Run(NamedTuple):
    """Consecutive blocks of a fork."""

    fork: RelationFork
    first: BlockNumber
    blocks: int

    def __str__(self) -> str:
        return f"{self.fork}:{self.first}+{self.blocks}"


def answer(outcome: Outcome) -> bytes:
    """An answer without pages."""
    return _ANSWER.pack(_MAGIC, outcome, 0, 0)


def answer_pages(pages: Sequence[bytes | None]) -> bytes:
    """The answer that carries these pages, at least one; None for one of zeros."""
    count = len(pages)
    there = [page for page in pages if page is not None]
    present = (
        _ALL_PRESENT[count]
        if len(there) == count
        else sum(1 << position for position, page in enumerate(pages) if page is not None)
    )
    packed = b"".join((_ANSWER.pack(_MAGIC, Outcome.PAGES, count, present), *there))
    if count == 0 or len(packed) != _ANSWER.size + len(there) * PAGE_BYTES:
        raise Internal(f"{len(packed)} bytes are no answer of {len(there)} whole pages")
    return packed
