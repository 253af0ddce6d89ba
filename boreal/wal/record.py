"""One WAL record: its parts, parsed from its bytes (access/xlogrecord.h).

The bytes are those of the record alone: page headers already taken out, CRC already verified.
Records and block references are named tuples, not frozen dataclasses: every byte of the log passes
here, and a tuple is built about five times faster.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

from boreal.errors import CorruptWal, IngestStopped, NotMaterializable
from boreal.types import PAGE_BYTES, Fork, Lsn, PageKey, RelationFork, format_lsn
from boreal.wal.rmgr import FIRST_CUSTOM_RMGR, Rmgr

RECORD_HEADER = struct.Struct("<IIQBB2xI")
"""XLogRecord: xl_tot_len, xl_xid, xl_prev, xl_info, xl_rmid, xl_crc."""
INFO_MASK = 0xF0
"""XLR_RMGR_INFO_MASK: the part of xl_info that belongs to the resource manager."""

_BLOCK_HEADER = struct.Struct("<BBH")
_IMAGE_HEADER = struct.Struct("<HHB")
_LOCATOR = struct.Struct("<IIII")  # RelFileLocator and the block number behind it
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")

_MAX_BLOCK_ID = 32
_ID_TOPLEVEL_XID = 252
_ID_ORIGIN = 253
_ID_MAIN_DATA_LONG = 254
_ID_MAIN_DATA_SHORT = 255

_FORK_MASK = 0x0F
_HAS_IMAGE = 0x10
_HAS_DATA = 0x20
_WILL_INIT = 0x40
_SAME_RELATION = 0x80

_IMAGE_HAS_HOLE = 0x01
_IMAGE_APPLY = 0x02
_IMAGE_COMPRESSED = 0x04 | 0x08 | 0x10  # pglz, lz4, zstd

_RMGRS = tuple(Rmgr)
_FORKS = tuple(Fork)


class BlockRef(NamedTuple):
    """A page the record registered, with what the record holds for it."""

    id: int
    page: PageKey
    will_init: bool
    """Redo builds the page anew: what was there before does not matter."""
    data: bytes
    """The resource manager's data for this block; empty if it has none."""
    image: bytes | None
    """The page as stored, without its hole; see `restore_image`."""
    apply_image: bool
    """The image is the page's new state. If not, it is there for a consistency check only."""
    compressed: bool
    hole_offset: int
    hole_length: int

    @property
    def has_image(self) -> bool:
        """Whether the record carries an image of the page, to be applied or not."""
        return self.image is not None

    @property
    def has_data(self) -> bool:
        """Whether the resource manager attached data (never of length zero)."""
        return bool(self.data)

    def restore_image(self) -> bytearray:
        """The page of the image, its hole zeroed, its LSN as it was *before* the record.

        Raises NotMaterializable if there is no image or it is compressed: the engine runs with
        `wal_compression=off`, which only a superuser could change.
        """
        image = self.image
        if image is None or self.compressed:
            what = "no image" if image is None else "a compressed image"
            raise NotMaterializable(f"the record has {what} of {self.page}")
        hole = self.hole_offset
        return bytearray(b"".join((image[:hole], bytes(self.hole_length), image[hole:])))


class WalRecord(NamedTuple):
    """A complete, verified record. It occupies [start, end) of the log."""

    start: Lsn
    end: Lsn
    """Aligned, as a page's LSN has it; the segment's end for XLOG_SWITCH."""
    xid: int
    rmgr: Rmgr
    info: int
    """The resource manager's bits of xl_info (the upper four)."""
    prev: Lsn
    main_data: bytes
    blocks: tuple[BlockRef, ...]
    flags: int
    """The lower bits of xl_info: RecordFlag."""

    def block(self, block_id: int) -> BlockRef | None:
        """The block reference of that id, if the record has it."""
        for block in self.blocks:
            if block.id == block_id:
                return block
        return None


class _Image(NamedTuple):
    length: int
    hole_offset: int
    hole_length: int
    apply: bool
    compressed: bool


_BlockHeader = tuple[int, PageKey, bool, int, _Image | None]
"""Block id, page, will_init, length of the data, image."""


def parse_record(raw: bytes, start: Lsn, end: Lsn) -> WalRecord:
    """Take apart the verified bytes of the record at [start, end) (DecodeXLogRecord, xlogreader.c).

    Raises CorruptWal if its parts do not add up, IngestStopped if it belongs to a custom resource
    manager.
    """
    _, xid, prev, info, rmgr_id, _ = RECORD_HEADER.unpack_from(raw)
    if rmgr_id >= len(_RMGRS):
        raise _unknown_rmgr(rmgr_id, start)
    try:
        headers, main_length, position = _parse_headers(raw, start)
        blocks = []
        for header in headers:
            block, position = _take_block(raw, position, header)
            blocks.append(block)
    except (struct.error, IndexError) as error:
        raise _corrupt(start, "ends inside its headers") from error
    if position + main_length != len(raw):
        raise _corrupt(start, "has parts that do not add up to its length")
    return WalRecord(
        start,
        end,
        xid,
        _RMGRS[rmgr_id],
        info & INFO_MASK,
        prev,
        raw[position:],
        tuple(blocks),
        info & ~INFO_MASK,
    )


def _parse_headers(raw: bytes, start: Lsn) -> tuple[list[_BlockHeader], int, int]:
    """Read the headers; return the blocks', the length of the main data, and where data begins."""
    headers: list[_BlockHeader] = []
    position = RECORD_HEADER.size
    data_length = 0
    # As in PostgreSQL, what is left beyond the data announced so far must be another header.
    while position + data_length < len(raw):
        block_id = raw[position]
        if block_id <= _MAX_BLOCK_ID:
            before = headers[-1] if headers else None
            if before is not None and block_id <= before[0]:
                raise _corrupt(start, f"has block {block_id} out of order")
            header, position = _parse_block_header(raw, position, before, start)
            headers.append(header)
            data_length += header[3]
            if header[4] is not None:
                data_length += header[4].length
        elif block_id == _ID_MAIN_DATA_SHORT:
            return headers, raw[position + 1], position + 2
        elif block_id == _ID_MAIN_DATA_LONG:
            return headers, _U32.unpack_from(raw, position + 1)[0], position + 5
        elif block_id == _ID_ORIGIN:
            position += 3
        elif block_id == _ID_TOPLEVEL_XID:
            position += 5
        else:
            raise _corrupt(start, f"has a part of unknown id {block_id}")
    return headers, 0, position


def _parse_block_header(
    raw: bytes, position: int, before: _BlockHeader | None, start: Lsn
) -> tuple[_BlockHeader, int]:
    block_id, flags, data_length = _BLOCK_HEADER.unpack_from(raw, position)
    position += _BLOCK_HEADER.size
    if (data_length != 0) != (flags & _HAS_DATA != 0):
        raise _corrupt(start, f"contradicts itself about the data of block {block_id}")
    image = None
    if flags & _HAS_IMAGE:
        image, position = _parse_image_header(raw, position, start)
    fork = flags & _FORK_MASK
    if fork >= len(_FORKS):
        raise _corrupt(start, f"names fork {fork}")
    if flags & _SAME_RELATION:
        if before is None:
            raise _corrupt(start, "refers to the relation of a block before the first")
        (block,) = _U32.unpack_from(raw, position)
        position += _U32.size
        relation = before[1].relation
        if relation.fork != fork:
            relation = relation._replace(fork=_FORKS[fork])
    else:
        tablespace, database, number, block = _LOCATOR.unpack_from(raw, position)
        position += _LOCATOR.size
        relation = _relation(tablespace, database, number, fork)
    page = PageKey(relation, block)
    return (block_id, page, flags & _WILL_INIT != 0, data_length, image), position


@lru_cache(maxsize=4096)
def _relation(tablespace: int, database: int, number: int, fork: int) -> RelationFork:
    """The same few relations come again and again: hand out the same values."""
    return RelationFork(tablespace, database, number, _FORKS[fork])


def _parse_image_header(raw: bytes, position: int, start: Lsn) -> tuple[_Image, int]:
    length, hole_offset, info = _IMAGE_HEADER.unpack_from(raw, position)
    position += _IMAGE_HEADER.size
    compressed = info & _IMAGE_COMPRESSED != 0
    has_hole = info & _IMAGE_HAS_HOLE != 0
    if not compressed:
        hole_length = PAGE_BYTES - length
    elif has_hole:
        (hole_length,) = _U16.unpack_from(raw, position)
        position += _U16.size
    else:
        hole_length = 0
    sound = (
        hole_offset > 0 and 0 < hole_length <= PAGE_BYTES - hole_offset
        if has_hole
        else hole_offset == 0 and hole_length == 0
    )
    if not sound or (compressed and length >= PAGE_BYTES):
        raise _corrupt(start, "has a page image whose hole is impossible")
    image = _Image(length, hole_offset, hole_length, info & _IMAGE_APPLY != 0, compressed)
    return image, position


def _take_block(raw: bytes, position: int, header: _BlockHeader) -> tuple[BlockRef, int]:
    """Cut a block's image and data out of the record; they follow each other in that order."""
    block_id, page, will_init, data_length, image = header
    if image is None:
        end = position + data_length
        data = raw[position:end]
        return BlockRef(block_id, page, will_init, data, None, False, False, 0, 0), end
    image_end = position + image.length
    end = image_end + data_length
    block = BlockRef(
        block_id,
        page,
        will_init,
        raw[image_end:end],
        raw[position:image_end],
        image.apply,
        image.compressed,
        image.hole_offset,
        image.hole_length,
    )
    return block, end


def _unknown_rmgr(rmgr_id: int, start: Lsn) -> CorruptWal | IngestStopped:
    if rmgr_id >= FIRST_CUSTOM_RMGR:
        return IngestStopped(
            f"the record at {format_lsn(start)} belongs to custom resource manager {rmgr_id}: "
            "remove the extension that writes it; storage cannot apply its records",
            lsn=start,
        )
    return _corrupt(start, f"names resource manager {rmgr_id}, which does not exist")


def _corrupt(start: Lsn, what: str) -> CorruptWal:
    return CorruptWal(f"the record at {format_lsn(start)} {what}", lsn=start)
