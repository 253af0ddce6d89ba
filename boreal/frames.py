"""The framed lane's framing: a 4-byte big-endian length, then one serialized message.

The lane carries AppendRequest one way and AppendResponse the other, nothing else. Pure: bytes in,
bytes out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from boreal.errors import OversizeRequest

MAX_FRAME_BYTES = 2 * 1024 * 1024
"""An append carries at most 1 MiB of log; whatever claims more is not an append."""
MAX_APPEND_BYTES = 1024 * 1024

_LENGTH = struct.Struct(">I")


def frame(body: bytes) -> bytes:
    """One message, ready to send."""
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into messages. Holds at most one unfinished frame (MAX_FRAME_BYTES)."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield each message completed by `data`; OversizeRequest on a length we never send."""
        if not self._buffer and len(data) > _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data)
            if length == len(data) - _LENGTH.size <= MAX_FRAME_BYTES:  # as most come
                yield data[_LENGTH.size :]
                return
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, start)
                if length > MAX_FRAME_BYTES:
                    raise OversizeRequest(
                        f"a frame of {length} bytes was announced; the limit is {MAX_FRAME_BYTES}. "
                        "This port speaks Boreal's framed Append lane only",
                        limit_bytes=MAX_FRAME_BYTES,
                    )
                end = start + _LENGTH.size + length
                if len(self._buffer) < end:
                    break
                yield bytes(memoryview(self._buffer)[start + _LENGTH.size : end])
                start = end
        finally:
            del self._buffer[:start]
