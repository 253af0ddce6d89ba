"""The first bytes of a connection, as PostgreSQL reads them. Pure.

Source: "Message Formats" in PostgreSQL's documentation (chapter 55), and libpq/pqcomm.h. Every
first message is its length, these four bytes included, and a code, both big-endian.
"""

from __future__ import annotations

import struct
from enum import Enum

HEAD_BYTES = 8
"""A first message has at least these: its length and its code."""
CANCEL_BYTES = 16
"""All of a cancel request: then come a process number and a key."""
GRANTED, DECLINED = b"S", b"N"
"""The answers to a request for encryption."""

_HEAD = struct.Struct("!II")
_CANCEL = 80877102
_TLS = 80877103
_GSSAPI = 80877104


class Greeting(Enum):
    """What a client's first message asks for."""

    TLS = "TLS"
    GSSAPI = "GSSAPI"
    CANCEL = "cancel"
    SESSION = "session"
    """A session, or something only PostgreSQL can answer properly."""


def greeting_of(first: bytes) -> Greeting:
    """What a message with these first bytes is. Fewer than HEAD_BYTES are not understood here."""
    if len(first) < HEAD_BYTES:
        return Greeting.SESSION
    length, code = _HEAD.unpack_from(first)
    if length == HEAD_BYTES and code == _TLS:
        return Greeting.TLS
    if length == HEAD_BYTES and code == _GSSAPI:
        return Greeting.GSSAPI
    if length == CANCEL_BYTES and code == _CANCEL:
        return Greeting.CANCEL
    return Greeting.SESSION


def refusal(sqlstate: str, message: str) -> bytes:
    """PostgreSQL's message for a session that does not come about (ErrorResponse, FATAL)."""
    fields = (("S", "FATAL"), ("V", "FATAL"), ("C", sqlstate), ("M", message))
    body = b"".join(f"{field}{value}".encode() + b"\0" for field, value in fields) + b"\0"
    return b"E" + struct.pack("!I", 4 + len(body)) + body
