"""A sealed layer: the entries of one stretch of log, by page, in an immutable file.

    head     magic, begin, end, counts, where the rest is; CRC
    blocks   up to 64 pages each: CRC, their keys, where each one's entries end, the entries
    index    the first key of each block and where the block begins; a filter; CRC

Pages are in key order. Looking a page up is a probe of the filter in memory (one page in ten or
so passes that is not there), a bisection in memory, and one read of about 2 KiB, which is checked
against its CRC. In memory a layer takes about 250 KiB besides an open file.
"""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import google_crc32c

from boreal.errors import CorruptData
from boreal.types import Lsn
from storage_node.disk import sync_directory
from storage_node.entries import (
    PAGE_KEY_BYTES,
    fork_key,
    fork_of_part,
    raw_key_of,
)
from storage_node.layer import OpenLayer

_MAGIC = b"BORLAYR1"
_HEAD = struct.Struct("<8sQQIIIII")
"""Magic, begin, end, pages, entries, blocks, bytes of all blocks, bytes of the filter."""
_CRC = struct.Struct("<I")
_BLOCK_HEAD = struct.Struct("<II")
"""CRC of what follows, pages."""
_PAGES_A_BLOCK: Final = 64
_FILTER_BITS_A_PAGE = 8
_PAGES_A_TURN: Final = 1024
"""About a millisecond's work."""
_SORTED_AT_ONCE: Final = 14
"""Blocks of a fork are sorted 16,384 numbers wide at a time, which takes a millisecond or two."""
SUFFIX: Final = ".layer"


class PageEntries(NamedTuple):
    """One page of a layer."""

    key: bytes
    """storage_node.entries.page_key."""
    entries: tuple[int, ...]


def layer_path(directory: Path, begin: Lsn, end: Lsn) -> Path:
    """Where the layer of [begin, end) is."""
    return directory / f"{begin:016X}-{end:016X}{SUFFIX}"


def in_order(layer: OpenLayer) -> Iterator[tuple[bytes, bytes]]:
    """Each page's key on disk and in memory, in the order of the former.

    Not to be gone on with once something was added to the layer.
    """
    forks = [(fork_key(fork_of_part(part)), part, blocks) for part, blocks in layer.forks()]
    for prefix, part, blocks in sorted(forks):
        ranges: dict[int, list[int]] = {}
        for block in blocks:
            ranges.setdefault(block >> _SORTED_AT_ONCE, []).append(block)
        for number in sorted(ranges):
            for block in sorted(ranges[number]):
                yield prefix + block.to_bytes(4, "big"), raw_key_of(part, block)


class LayerImage:
    """Makes a layer's file out of a frozen layer, in steps of a millisecond or so."""

    def __init__(self, layer: OpenLayer) -> None:
        self._layer = layer
        self._pieces: list[bytes] = []
        self._firsts: list[bytes] = []
        self._offsets = array("I")
        self._size = 0
        self._pages = 0
        self._entries = 0
        bits = max(len(layer.pages) * _FILTER_BITS_A_PAGE, 64)
        size = 1 << bits.bit_length()
        self._filter = bytearray(size // 8)

    def steps(self) -> Iterator[None]:
        """Do the work; yields between steps."""
        keys: list[bytes] = []
        ends = array("I")
        entries = array("Q")
        mask = len(self._filter) * 8 - 1
        turn = 0
        for key, raw in in_order(self._layer):
            history = self._layer.entries(raw)
            keys.append(key)
            entries.extend(history)
            ends.append(len(entries))
            bit = google_crc32c.value(key) & mask
            self._filter[bit >> 3] |= 1 << (bit & 7)
            if len(keys) == _PAGES_A_BLOCK:
                self._add_block(keys, ends, entries)
                keys, ends, entries = [], array("I"), array("Q")
            turn += 1
            if turn == _PAGES_A_TURN:
                turn = 0
                yield
        if keys:
            self._add_block(keys, ends, entries)

    def write(self, directory: Path) -> Path:
        """Write it durably. OSError: it is not there, or not complete; nobody knows of it yet."""
        layer = self._layer
        head = _HEAD.pack(
            _MAGIC,
            layer.begin,
            layer.end,
            self._pages,
            self._entries,
            len(self._firsts),
            self._size,
            len(self._filter),
        )
        index = b"".join(self._firsts) + self._offsets.tobytes() + self._filter
        path = layer_path(directory, layer.begin, layer.end)
        with path.open("wb") as file:
            file.write(_CRC.pack(google_crc32c.value(head)) + head)
            file.writelines(self._pieces)
            file.write(_CRC.pack(google_crc32c.value(index)) + index)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(directory)
        return path

    def _add_block(self, keys: list[bytes], ends: array[int], entries: array[int]) -> None:
        body = b"".join(keys) + ends.tobytes() + entries.tobytes()
        head = len(keys).to_bytes(4, "little")
        crc = google_crc32c.extend(google_crc32c.value(head), body)
        self._firsts.append(keys[0])
        self._offsets.append(self._size)
        self._pieces += (_CRC.pack(crc), head, body)
        self._size += _BLOCK_HEAD.size + len(body)
        self._pages += len(keys)
        self._entries += len(entries)


class SealedLayer:
    """A layer's file, open for reading. It never changes."""

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        """CorruptData if it is damaged or incomplete; `verify` reads all of it."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._read_index()
            self._cached = (-1, b"")
            if verify:
                for number in range(len(self._firsts)):
                    self._block(number)
        except CorruptData:
            self.close()
            raise

    def entries(self, key: bytes, crc: int) -> tuple[int, ...]:
        """A page's entries, ascending; none if it has none. `crc`: CRC-32C of the key.

        CorruptData if the part of the file that would tell is damaged.
        """
        bit = crc & self._filter_mask
        if not self._filter[bit >> 3] >> (bit & 7) & 1:
            return ()
        number = bisect_right(self._firsts, key) - 1
        if number < 0:
            return ()
        block = self._block(number)
        count = int.from_bytes(block[4:8], "little")
        keys_end = _BLOCK_HEAD.size + count * PAGE_KEY_BYTES
        at = block.find(key, _BLOCK_HEAD.size, keys_end)
        while at >= 0 and (at - _BLOCK_HEAD.size) % PAGE_KEY_BYTES:
            at = block.find(key, at + 1, keys_end)
        if at < 0:
            return ()
        return _entries_of(block, count, (at - _BLOCK_HEAD.size) // PAGE_KEY_BYTES)

    def all(self) -> Iterator[PageEntries]:
        """Every page, in key order."""
        for number in range(len(self._firsts)):
            block = self._block(number)
            count = int.from_bytes(block[4:8], "little")
            for place in range(count):
                at = _BLOCK_HEAD.size + place * PAGE_KEY_BYTES
                key = block[at : at + PAGE_KEY_BYTES]
                yield PageEntries(key, _entries_of(block, count, place))

    def counts(self) -> Iterator[tuple[bytes, int]]:
        """Every page's key, in order, and how many entries it has."""
        for number in range(len(self._firsts)):
            block = self._block(number)
            count = int.from_bytes(block[4:8], "little")
            keys_end = _BLOCK_HEAD.size + count * PAGE_KEY_BYTES
            before = 0
            for place, end in enumerate(struct.unpack_from(f"<{count}I", block, keys_end)):
                at = _BLOCK_HEAD.size + place * PAGE_KEY_BYTES
                yield block[at : at + PAGE_KEY_BYTES], end - before
                before = end

    def close(self) -> None:
        """Release the file."""
        os.close(self._descriptor)

    def _read_index(self) -> None:
        size = os.fstat(self._descriptor).st_size
        head = self._read(0, _CRC.size + _HEAD.size)
        magic, begin, end, self.pages, self.entry_count, blocks, data_bytes, filter_bytes = (
            _HEAD.unpack_from(head, _CRC.size)
        )
        if magic != _MAGIC or google_crc32c.value(head[4:]) != _CRC.unpack_from(head)[0]:
            raise self._damaged("its head")
        self.begin, self.end = Lsn(begin), Lsn(end)
        self._data_at = len(head)
        index_at = len(head) + data_bytes
        index = self._read(index_at, max(size - index_at, 0))
        if len(index) != _CRC.size + blocks * (PAGE_KEY_BYTES + 4) + filter_bytes or (
            google_crc32c.value(index[4:]) != _CRC.unpack_from(index)[0]
        ):
            raise self._damaged("its index")
        keys_end = _CRC.size + blocks * PAGE_KEY_BYTES
        self._firsts = [
            index[at : at + PAGE_KEY_BYTES] for at in range(_CRC.size, keys_end, PAGE_KEY_BYTES)
        ]
        self._offsets = array("I", index[keys_end : keys_end + 4 * blocks])
        self._offsets.append(data_bytes)
        self._filter = index[keys_end + 4 * blocks :]
        self._filter_mask = filter_bytes * 8 - 1

    def _block(self, number: int) -> bytes:
        cached, block = self._cached
        if cached == number:
            return block
        begin, end = self._offsets[number], self._offsets[number + 1]
        block = self._read(self._data_at + begin, end - begin)
        if google_crc32c.value(block[4:]) != _CRC.unpack_from(block)[0]:
            raise self._damaged(f"block {number}")
        self._cached = (number, block)
        return block

    def _read(self, at: int, length: int) -> bytes:
        data = os.pread(self._descriptor, length, at)
        if len(data) != length:
            raise self._damaged(f"its end: it has fewer than {at + length} bytes")
        return data

    def _damaged(self, what: str) -> CorruptData:
        return CorruptData(
            f"the page index in {self.path} is damaged at {what}; restart the storage node to have "
            "it made again from the log"
        )


def _entries_of(block: bytes, count: int, place: int) -> tuple[int, ...]:
    ends_at = _BLOCK_HEAD.size + count * PAGE_KEY_BYTES
    begin = int.from_bytes(block[ends_at + 4 * place - 4 : ends_at + 4 * place], "little")
    end = int.from_bytes(block[ends_at + 4 * place : ends_at + 4 * place + 4], "little")
    if place == 0:
        begin = 0
    return struct.unpack_from(f"<{end - begin}Q", block, ends_at + 4 * count + 8 * begin)
