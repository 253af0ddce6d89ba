"""The pages a volume began with.

Kept in an LMDB of its own. While an import runs it is scratch; the import counts from the moment a
small seal file is durable beside it, and nothing is written there afterwards. Each page is stored
under a CRC-32C of its key and its bytes, which every read checks.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import lmdb

from boreal.errors import CorruptData, Internal, MalformedRequest
from boreal.pages.layout import PageHeader, is_zero
from boreal.types import PAGE_BYTES, BlockNumber, Lsn, PageKey, RelationFork
from storage_node.disk import sync_directory
from storage_node.entries import fork_key, fork_of_key, page_key

_PAGE_HEAD = struct.Struct("<IHH")
"""CRC, hole offset, hole length."""
_FORK_VALUE = struct.Struct("<II")
"""CRC, size in blocks."""
_SEAL = struct.Struct("<IQQQ")
"""CRC, import LSN, forks, pages."""


MAP_BYTES = 1 << 40
"""Address space for an LMDB file, not disk: the file grows as it is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What the volume began with: indexing starts at `lsn`, with forks of these sizes."""

    lsn: Lsn
    forks: tuple[tuple[RelationFork, int], ...]


class PageStore:
    """The imported pages of one volume, in `directory`.

    Invariant: `imported` is None until `seal` made the import durable; from then on it is fixed.
    """

    def __init__(self, directory: Path) -> None:
        """Open the store; whatever an unfinished import left behind is dropped."""
        self._path = directory / "imports"
        self._seal_path = directory / "imports.seal"
        self._environment: Any = None
        self._closed = False
        self._sizes: dict[RelationFork, int] = {}
        self._page_count = 0
        self._imported: Imported | None = None
        if self._seal_path.exists():
            self._open_environment()
            self._imported = self._read_sealed()

    @property
    def imported(self) -> Imported | None:
        """What the volume began with, once the import is complete."""
        return self._imported

    @property
    def open(self) -> bool:
        """Whether it can be read. A store of no pages yet is, too."""
        return not self._closed

    @property
    def page_count(self) -> int:
        """Pages imported so far."""
        return self._page_count

    def begin(self) -> None:
        """Start an import, dropping what an earlier, unfinished one left."""
        if self._imported is not None:
            raise Internal("a complete import is never begun again")
        self._close_environment()
        shutil.rmtree(self._path, ignore_errors=True)
        self._sizes, self._page_count = {}, 0
        self._open_environment()

    def add(self, fork: RelationFork, first_block: int, pages: bytes) -> None:
        """Take whole pages of a fork. No page at all still makes the fork exist."""
        count = len(pages) // PAGE_BYTES
        with self._environment.begin(write=True) as transaction:
            for n in range(count):
                key = page_key(PageKey(fork, BlockNumber(first_block + n)))
                page = pages[n * PAGE_BYTES : (n + 1) * PAGE_BYTES]
                transaction.put(key, pack_page(key, page), db=self._pages)
            self._sizes[fork] = max(self._sizes.get(fork, 0), first_block + count)
            key = fork_key(fork)
            size = _FORK_VALUE.pack(_crc(key, self._sizes[fork]), self._sizes[fork])
            transaction.put(key, size, db=self._forks)
        self._page_count += count

    def seal(self, lsn: Lsn) -> Imported:
        """Make the import durable: its pages count as of `lsn`. MalformedRequest if it has gaps."""
        with self._environment.begin() as transaction:
            stored = transaction.stat(self._pages)["entries"]
        if stored != sum(self._sizes.values()):
            raise MalformedRequest(
                f"the import has {stored} pages where its forks have {sum(self._sizes.values())}"
            )
        self._environment.sync(True)
        sync_directory(self._path)
        body = _SEAL.pack(0, lsn, len(self._sizes), self._page_count)[4:]
        scratch = self._seal_path.with_suffix(".new")
        with scratch.open("wb") as file:
            file.write(struct.pack("<I", google_crc32c.value(body)) + body)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self._seal_path)
        sync_directory(self._seal_path.parent)
        self._imported = Imported(lsn=lsn, forks=tuple(self._sizes.items()))
        return self._imported

    def page(self, page: PageKey) -> bytes | None:
        """An imported page, verified; None past the imported size. CorruptData if it is damaged."""
        if page.block >= self._sizes.get(page.relation, 0):
            return None
        key = page_key(page)
        with self._environment.begin(db=self._pages) as transaction:
            stored = transaction.get(key)
        if stored is None:
            raise CorruptData(f"the imported page {page} is missing")
        return unpack_page(key, stored, f"the imported page {page}")

    def close(self) -> None:
        """Release the files, for good."""
        self._closed = True
        self._close_environment()

    def _close_environment(self) -> None:
        if self._environment is not None:
            self._environment.close()
            self._environment = None

    def _open_environment(self) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        try:
            # Synced once, by `seal`: before that a crash loses nothing that counts.
            self._environment = lmdb.open(
                str(self._path), map_size=MAP_BYTES, max_dbs=2, sync=False, readahead=False
            )
            self._pages = self._environment.open_db(b"pages")
            self._forks = self._environment.open_db(b"forks")
        except lmdb.Error as error:
            raise CorruptData(f"the imported pages in {self._path} do not open: {error}") from error

    def _read_sealed(self) -> Imported:
        sealed = self._seal_path.read_bytes()
        if len(sealed) != _SEAL.size or google_crc32c.value(sealed[4:]) != _SEAL.unpack(sealed)[0]:
            raise CorruptData(f"{self._seal_path} is damaged")
        _, lsn, fork_count, self._page_count = _SEAL.unpack(sealed)
        with self._environment.begin(db=self._forks) as transaction:
            forks = tuple(_read_forks(transaction.cursor()))
        if len(forks) != fork_count:
            raise CorruptData(f"{self._path} holds {len(forks)} forks of {fork_count}")
        self._sizes = dict(forks)
        return Imported(lsn=Lsn(lsn), forks=forks)


def _read_forks(items: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[RelationFork, int]]:
    for key, value in items:
        crc, blocks = _FORK_VALUE.unpack(value)
        if crc != _crc(key, blocks):
            raise CorruptData(f"the imported size under {key.hex()} is damaged")
        yield fork_of_key(key), blocks


def _crc(key: bytes, blocks: int) -> int:
    return int(google_crc32c.value(key + blocks.to_bytes(4, "little")))


def pack_page(key: bytes, page: bytes) -> bytes:
    """How a page is stored under `key`: behind a CRC of both, without the zeros of its hole.

    Most pages then fit into two LMDB pages instead of three.
    """
    crc = google_crc32c.value(key + page)
    if is_zero(page):
        return _PAGE_HEAD.pack(crc, 0, PAGE_BYTES)
    header = PageHeader.of(page)
    hole = header.upper - header.lower
    if 0 < header.lower < header.upper <= PAGE_BYTES and (
        page[header.lower : header.upper] == bytes(hole)
    ):
        head = _PAGE_HEAD.pack(crc, header.lower, hole)
        return head + page[: header.lower] + page[header.upper :]
    return _PAGE_HEAD.pack(crc, 0, 0) + page


def unpack_page(key: bytes, stored: bytes, what: str) -> bytes:
    """The page `pack_page` stored; CorruptData, which calls it `what`, if it is not that."""
    page = sound_page(key, stored)
    if page is None:
        raise CorruptData(f"{what} does not match its checksum")
    return page


def sound_page(key: bytes, stored: bytes) -> bytes | None:
    """The page `pack_page` stored; None if it is not that."""
    if len(stored) < _PAGE_HEAD.size:
        return None
    crc, hole_offset, hole_length = _PAGE_HEAD.unpack_from(stored)
    split = _PAGE_HEAD.size + hole_offset
    page = b"".join((stored[_PAGE_HEAD.size : split], bytes(hole_length), stored[split:]))
    if len(page) != PAGE_BYTES:
        return None
    return page if google_crc32c.extend(google_crc32c.value(key), page) == crc else None
