"""PostgreSQL's control file, as far as a bundle must look into it. Pure.

Layout: ControlFileData in catalog/pg_control.h, PG_CONTROL_VERSION 1300 (PostgreSQL 13 to 16).
"""

from __future__ import annotations

import struct

import google_crc32c

from boreal.errors import CorruptData, Internal
from boreal.types import Lsn, Timeline

PATH = "global/pg_control"

_VERSION = 1300
_IN_ARCHIVE_RECOVERY = 5
_VERSION_AT, _STATE_AT, _REDO_AT, _TIMELINE_AT, _MINIMUM_AT, _CRC_AT = 8, 16, 40, 48, 136, 288
_CRC = struct.Struct("<I")


def redo_of(content: bytes) -> tuple[Lsn, Timeline]:
    """Where replay from its last checkpoint begins."""
    _check(content)
    (redo,) = struct.unpack_from("<Q", content, _REDO_AT)
    (timeline,) = struct.unpack_from("<I", content, _TIMELINE_AT)
    return Lsn(redo), Timeline(timeline)


def as_standby(content: bytes, consistent: Lsn) -> bytes:
    """The control file of a standby that was stopped after a restartpoint at the same checkpoint.

    PostgreSQL then replays from there, as any restarted standby does, and takes itself for
    consistent once it has passed `consistent`.
    """
    _check(content)
    _, timeline = redo_of(content)
    changed = bytearray(content)
    struct.pack_into("<I", changed, _STATE_AT, _IN_ARCHIVE_RECOVERY)
    struct.pack_into("<QI", changed, _MINIMUM_AT, consistent, timeline)
    _CRC.pack_into(changed, _CRC_AT, google_crc32c.value(bytes(changed[:_CRC_AT])))
    return bytes(changed)


def _check(content: bytes) -> None:
    if len(content) < _CRC_AT + _CRC.size:
        raise CorruptData(f"a control file of {len(content)} bytes is too short")
    (version,) = struct.unpack_from("<I", content, _VERSION_AT)
    if version != _VERSION:
        raise Internal(f"control file version {version}; this is made for {_VERSION}")
    if _CRC.unpack_from(content, _CRC_AT)[0] != google_crc32c.value(content[:_CRC_AT]):
        raise CorruptData("the control file's checksum does not hold")
