"""Stored versions: pages as of the end of a record, made in the background.

In LMDB under `page key, LSN` (big-endian): "the newest version at or below this LSN" is one seek.
A version holds every record of the page that ends at or below its LSN. Once the log it was made
from is dropped it is the only copy, so each is stored with a CRC-32C of its key and its bytes,
checked by every read.

Where a page cannot be made (a record nobody here can redo, or damage) there is a refusal instead of
a version: what rests on it is refused for the same reason, until the page's next base.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any, NamedTuple

import google_crc32c

from boreal.errors import CorruptData, NotMaterializable
from boreal.types import Lsn, PageKey, format_lsn
from storage_node.entries import PAGE_KEY_BYTES
from storage_node.facts import seek_last
from storage_node.page_store import pack_page, sound_page

_LSN = struct.Struct(">Q")
_REFUSAL = struct.Struct("<IHHQ")
"""CRC of key and the rest, 0xFFFF where a page has its hole, the reason, the LSN it is about."""
_NO_PAGE = 0xFFFF


class Refusal(IntEnum):
    """Why there is no page. Stored."""

    UNKNOWN_RECORD = 1
    DAMAGED = 2


class Version(NamedTuple):
    """A version as it is stored."""

    key: bytes
    lsn: Lsn
    stored: bytes

    @property
    def sound(self) -> bool:
        """Whether it is what was stored, be it a page or a refusal."""
        return self.intact() is not None or self._refusal() is not None

    def intact(self) -> bytes | None:
        """The page; None if there is none, for which `content` has the reason."""
        return sound_page(self.key, self.stored)

    def content(self, page: PageKey) -> bytes:
        """The page. CorruptData if it is damaged, or if it was when the version was made.

        NotMaterializable if it rests on a record that cannot be redone.
        """
        content = self.intact()
        if content is not None:
            return content
        refusal = self._refusal()
        if refusal is None:
            raise CorruptData(
                f"the stored version of {page} at {format_lsn(self.lsn)} does not match its "
                "checksum"
            )
        reason, lsn = refusal
        if reason is Refusal.UNKNOWN_RECORD:
            raise NotMaterializable(
                f"{page} depends on the record at {format_lsn(lsn)}, which storage cannot redo",
                lsn=lsn,
            )
        raise CorruptData(
            f"{page} could not be stored when log was dropped: it, or the log, was damaged here. "
            "Read it from another storage node"
        )

    def _refusal(self) -> tuple[Refusal, int] | None:
        if len(self.stored) != _REFUSAL.size:
            return None
        crc, mark, reason, lsn = _REFUSAL.unpack(self.stored)
        if mark != _NO_PAGE or crc != google_crc32c.value(self.key + self.stored[4:]):
            return None
        return Refusal(reason), lsn


def version_row(page_key: bytes, lsn: int, content: bytes) -> tuple[bytes, bytes]:
    """Key and value of a version."""
    key = page_key + _LSN.pack(lsn)
    return key, pack_page(key, content)


def refusal_row(page_key: bytes, lsn: int, reason: Refusal, about: int) -> tuple[bytes, bytes]:
    """Key and value of a refusal."""
    key = page_key + _LSN.pack(lsn)
    rest = _REFUSAL.pack(0, _NO_PAGE, reason, about)[4:]
    return key, google_crc32c.value(key + rest).to_bytes(4, "little") + rest


def last_version(cursor: Any, page_key: bytes, lsn: int) -> Version | None:
    """The page's newest version at or below `lsn`."""
    found = seek_last(cursor, page_key + _LSN.pack(lsn), PAGE_KEY_BYTES)
    if found is None:
        return None
    key, stored = found
    return Version(key, Lsn(_LSN.unpack_from(key, PAGE_KEY_BYTES)[0]), stored)


def lsn_of_row(key: bytes) -> int:
    """The LSN in the key of a version."""
    lsn: int = _LSN.unpack_from(key, PAGE_KEY_BYTES)[0]
    return lsn


def delete_older(cursor: Any, page_key: bytes, lsn: int) -> None:
    """Delete a page's versions below `lsn`."""
    found = cursor.set_range(page_key)
    while found and cursor.key()[:PAGE_KEY_BYTES] == page_key and lsn_of_row(cursor.key()) < lsn:
        found = cursor.delete()
