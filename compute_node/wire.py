"""PostgreSQL's frontend/backend protocol 3.0, as far as streaming replication needs it.

Pure: bytes in, values out, and back; both sides of each message, because the agent is a client of
its own PostgreSQL (`replication_client`) and a server to it (`feed`). Source: PostgreSQL
documentation, "Message Formats" and "Streaming Replication Protocol".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from boreal.errors import EngineError, MalformedRequest, OversizeRequest
from boreal.types import Lsn

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
"""A walsender's data message holds at most 128 KiB of WAL; a command or history file is smaller."""
MAX_STARTUP_BYTES = 10_000
"""PostgreSQL's own bound for a startup packet (MAX_STARTUP_PACKET_LENGTH)."""

PROTOCOL_3 = 3 << 16
SSL_REQUEST = 80877103
GSS_REQUEST = 80877104
CANCEL_REQUEST = 80877102

# Message types, by who sends them. COPY_DATA and COPY_DONE go both ways.
AUTHENTICATION = ord("R")
PARAMETER_STATUS = ord("S")
BACKEND_KEY_DATA = ord("K")
READY_FOR_QUERY = ord("Z")
ROW_DESCRIPTION = ord("T")
DATA_ROW = ord("D")
COMMAND_COMPLETE = ord("C")
COPY_BOTH = ord("W")
ERROR_RESPONSE = ord("E")
NOTICE_RESPONSE = ord("N")
COPY_DATA = ord("d")
COPY_DONE = ord("c")
COPY_FAIL = ord("f")
QUERY = ord("Q")
TERMINATE = ord("X")

# What a COPY_DATA of a replication stream begins with.
XLOG_DATA = ord("w")
KEEPALIVE = ord("k")
STANDBY_STATUS = ord("r")
HOT_STANDBY_FEEDBACK = ord("h")

DUPLICATE_OBJECT = "42710"
PROTOCOL_VIOLATION = "08P01"
UNDEFINED_OBJECT = "42704"
FEATURE_NOT_SUPPORTED = "0A000"
SYNTAX_ERROR = "42601"
CONNECTION_FAILURE = "08006"

_HEADER = struct.Struct(">BI")
_XLOG_DATA = struct.Struct(">BQQq")
_KEEPALIVE = struct.Struct(">BQqB")
_STATUS = struct.Struct(">BQQQqB")
_FEEDBACK = struct.Struct(">BqIIII")
_UNIX_TO_POSTGRES_S = 946_684_800
"""From 1970 to 2000, where PostgreSQL's timestamps begin."""


class XLogData(NamedTuple):
    """WAL bytes on their way to a standby."""

    start: Lsn
    data: memoryview


class Keepalive(NamedTuple):
    """The sender is alive and its log ends at `end`."""

    end: Lsn
    reply_requested: bool


class StandbyStatus(NamedTuple):
    """How far a standby has come."""

    written: Lsn
    flushed: Lsn
    applied: Lsn
    reply_requested: bool


class HotStandbyFeedback(NamedTuple):
    """The oldest transactions a standby's queries still see, and their epochs; 0 for none."""

    xmin: int
    xmin_epoch: int
    catalog_xmin: int
    catalog_xmin_epoch: int


def postgres_time_us(unix_s: float) -> int:
    """A point in time as the protocol writes it."""
    return int((unix_s - _UNIX_TO_POSTGRES_S) * 1_000_000)


# --- framing -----------------------------------------------------------------------------------


def message(kind: int, body: bytes = b"") -> bytes:
    """One message, ready to send."""
    return _HEADER.pack(kind, len(body) + 4) + body


class MessageReader:
    """Cuts a byte stream into messages. Holds at most one unfinished message."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, memoryview]]:
        """Yield (type, body) of each message completed by `data`; consume it all.

        Raises MalformedRequest or OversizeRequest when the peer does not speak the protocol.
        """
        if self._rest:
            data = self._rest + data
            self._rest = b""
        view, at, size = memoryview(data), 0, len(data)
        while size - at >= _HEADER.size:
            kind, length = _HEADER.unpack_from(data, at)
            end = at + 1 + length
            check_length(length)
            if end > size:
                break
            yield kind, view[at + _HEADER.size : end]
            at = end
        self._rest = data[at:]


def check_length(length: int) -> None:
    """Refuse a message length that no PostgreSQL sends."""
    if length < 4:
        raise MalformedRequest(f"a message of length {length}: not PostgreSQL's protocol")
    if length > MAX_MESSAGE_BYTES:
        raise OversizeRequest(
            f"a message of {length} bytes was announced; the limit is {MAX_MESSAGE_BYTES}",
            limit_bytes=MAX_MESSAGE_BYTES,
        )


def _text(text: str) -> bytes:
    return text.encode() + b"\0"


# --- what a client sends -----------------------------------------------------------------------


def startup(parameters: Mapping[str, str]) -> bytes:
    """The first message on a connection."""
    body = b"".join(_text(name) + _text(value) for name, value in parameters.items()) + b"\0"
    return struct.pack(">II", len(body) + 8, PROTOCOL_3) + body


def query(sql: str) -> bytes:
    """A simple query, or a replication command."""
    return message(QUERY, _text(sql))


def standby_status(durable: Lsn, now_us: int) -> bytes:
    """Report `durable` as written, flushed and applied."""
    return message(COPY_DATA, _STATUS.pack(STANDBY_STATUS, durable, durable, durable, now_us, 0))


def hot_standby_feedback(oldest_xmin: int, now_us: int) -> bytes:
    """Report the oldest transaction some standby's query sees, as a 64-bit id; 0: there is none."""
    epoch, xmin = divmod(oldest_xmin, 1 << 32)
    return message(COPY_DATA, _FEEDBACK.pack(HOT_STANDBY_FEEDBACK, now_us, xmin, epoch, 0, 0))


# --- what a client reads -----------------------------------------------------------------------


def read_xlog_data(body: memoryview) -> XLogData:
    """Read the body of a COPY_DATA that begins with XLOG_DATA."""
    start = _unpack(_XLOG_DATA, body)[1]
    return XLogData(Lsn(start), body[_XLOG_DATA.size :])


def read_keepalive(body: memoryview) -> Keepalive:
    """Read the body of a COPY_DATA that begins with KEEPALIVE."""
    _, end, _, reply = _unpack(_KEEPALIVE, body)
    return Keepalive(Lsn(end), bool(reply))


def read_data_row(body: memoryview) -> tuple[str | None, ...]:
    """The values of one row in text format."""
    (count,) = _unpack(struct.Struct(">H"), body)
    values: list[str | None] = []
    at = 2
    for _ in range(count):
        (length,) = _unpack(struct.Struct(">i"), body[at:])
        at += 4
        values.append(None if length < 0 else str(body[at : at + length], "utf-8"))
        at += max(length, 0)
    if at != len(body):
        raise MalformedRequest("a data row does not end where its values do")
    return tuple(values)


def read_error(body: memoryview) -> EngineError:
    """The error an ERROR_RESPONSE tells of."""
    fields = {
        field[:1]: field[1:].decode("utf-8", "replace")
        for field in bytes(body).split(b"\0")
        if field
    }
    text = fields.get(b"M", "unknown error")
    if b"D" in fields:
        text += f" ({fields[b'D']})"
    return EngineError(f"PostgreSQL: {text}", sqlstate=fields.get(b"C", ""))


def authentication_done(body: memoryview) -> bool:
    """Whether an AUTHENTICATION message says: you're in. False: the server wants a secret."""
    return bytes(body[:4]) == b"\0\0\0\0"


# --- what a server reads -----------------------------------------------------------------------


def read_startup(body: bytes) -> Mapping[str, str]:
    """The parameters of a startup packet, given what follows its protocol number."""
    words = body.decode("utf-8", "replace").split("\0")
    return dict(zip(words[::2], words[1::2], strict=False))


def read_text(body: memoryview) -> str:
    """The body of a QUERY."""
    return bytes(body).rstrip(b"\0").decode("utf-8", "replace")


def read_standby_status(body: memoryview) -> StandbyStatus:
    """Read the body of a COPY_DATA that begins with STANDBY_STATUS."""
    _, written, flushed, applied, _, reply = _unpack(_STATUS, body)
    return StandbyStatus(Lsn(written), Lsn(flushed), Lsn(applied), bool(reply))


def read_hot_standby_feedback(body: memoryview) -> HotStandbyFeedback:
    """Read the body of a COPY_DATA that begins with HOT_STANDBY_FEEDBACK."""
    _, _, xmin, xmin_epoch, catalog_xmin, catalog_epoch = _unpack(_FEEDBACK, body)
    return HotStandbyFeedback(xmin, xmin_epoch, catalog_xmin, catalog_epoch)


# --- what a server sends -----------------------------------------------------------------------


def greeting(parameters: Mapping[str, str], *, process_id: int) -> bytes:
    """Authentication is done (by the socket directory's permissions); here is who we are."""
    told = b"".join(
        message(PARAMETER_STATUS, _text(name) + _text(value)) for name, value in parameters.items()
    )
    key = message(BACKEND_KEY_DATA, struct.pack(">II", process_id, 0))
    return message(AUTHENTICATION, b"\0\0\0\0") + told + key + ready_for_query()


def ready_for_query() -> bytes:
    """The next command may come."""
    return message(READY_FOR_QUERY, b"I")


def command_complete(tag: str) -> bytes:
    """A command ended well."""
    return message(COMMAND_COMPLETE, _text(tag))


def result_row(row: Mapping[str, str | None]) -> bytes:
    """A result set of one row, every column of type text (OID 25)."""
    columns = b"".join(_text(name) + struct.pack(">IHIhiH", 0, 0, 25, -1, -1, 0) for name in row)
    values = b"".join(_value(value) for value in row.values())
    count = struct.pack(">H", len(row))
    return message(ROW_DESCRIPTION, count + columns) + message(DATA_ROW, count + values)


def _value(value: str | None) -> bytes:
    if value is None:
        return struct.pack(">i", -1)
    raw = value.encode()
    return struct.pack(">i", len(raw)) + raw


def copy_both() -> bytes:
    """From here on, COPY_DATA flows both ways."""
    return message(COPY_BOTH, b"\0\0\0")


def xlog_data(start: Lsn, end: Lsn, now_us: int, data: bytes) -> bytes:
    """WAL from `start` on; the sender's log ends at `end`."""
    length = 4 + _XLOG_DATA.size + len(data)
    header = _XLOG_DATA.pack(XLOG_DATA, start, end, now_us)
    return b"".join((_HEADER.pack(COPY_DATA, length), header, data))


def keepalive(end: Lsn, now_us: int, *, reply_requested: bool) -> bytes:
    """Say that we live; optionally ask for a status."""
    return message(COPY_DATA, _KEEPALIVE.pack(KEEPALIVE, end, now_us, reply_requested))


def error_response(severity: str, sqlstate: str, text: str) -> bytes:
    """An error; FATAL when the connection ends with it."""
    fields: Sequence[tuple[str, str]] = (("S", severity), ("V", severity), ("C", sqlstate))
    body = b"".join(_text(code + value) for code, value in (*fields, ("M", text)))
    return message(ERROR_RESPONSE, body + b"\0")


def _unpack(layout: struct.Struct, body: memoryview) -> tuple[int, ...]:
    try:
        return layout.unpack_from(body)
    except struct.error as error:
        raise MalformedRequest(f"a message of {len(body)} bytes is cut short") from error
