"""The framing of framed lanes: a 4-byte big-endian length, then one serialized message.

Which messages a lane carries each way is in proto/storage.proto. Pure: bytes in, bytes out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from boreal.errors import OversizeRequest

MAX_FRAME_BYTES = 2 * 1024 * 1024
"""An append carries at most 1 MiB of log, an answer at most 128 pages, 1 MiB too: whatever claims
more is neither."""
MAX_APPEND_BYTES = 1024 * 1024

_LENGTH = struct.Struct(">I")


def frame(body: bytes) -> bytes:
    """One message, ready to send."""
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into messages. Holds at most one unfinished frame of `limit_bytes`."""

    def __init__(self, lane: str, limit_bytes: int = MAX_FRAME_BYTES) -> None:
        """`lane` names what is spoken here, for who speaks something else."""
        self._lane = lane
        self._limit_bytes = limit_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield each message completed by `data`; OversizeRequest on a length we never send."""
        if not self._buffer and len(data) > _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data)
            if length == len(data) - _LENGTH.size <= self._limit_bytes:  # as most come
                yield data[_LENGTH.size :]
                return
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, start)
                if length > self._limit_bytes:
                    raise OversizeRequest(
                        f"a frame of {length} bytes was announced; the limit is "
                        f"{self._limit_bytes}. This port speaks Boreal's {self._lane} lane only",
                        limit_bytes=self._limit_bytes,
                    )
                end = start + _LENGTH.size + length
                if len(self._buffer) < end:
                    break
                yield bytes(memoryview(self._buffer)[start + _LENGTH.size : end])
                start = end
        finally:
            del self._buffer[:start]
