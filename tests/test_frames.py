"""Goal: the framed lane gives the same messages however the network cuts the stream, and no peer
makes it hold more than one frame.

Method: property tests over messages and cuts; the limit from both sides.
"""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from boreal.errors import OversizeRequest
from boreal.frames import MAX_APPEND_BYTES, MAX_FRAME_BYTES, FrameReader, frame

_MESSAGES = st.lists(st.binary(max_size=300), max_size=8)


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    """The stream, cut wherever `cuts` say (modulo its length)."""
    places = sorted({cut % (len(stream) + 1) for cut in cuts})
    bounds = [0, *places, len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(bounds)]


def read_all(reader: FrameReader, chunks: list[bytes]) -> list[bytes]:
    return [body for chunk in chunks for body in reader.feed(chunk)]


@given(messages=_MESSAGES, cuts=st.lists(st.integers(min_value=0, max_value=4000), max_size=30))
@example(messages=[b"", b"", b"x"], cuts=list(range(20)))
def test_any_cuts_give_the_same_messages(messages: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(frame(message) for message in messages)
    assert read_all(FrameReader("Append"), pieces(stream, cuts)) == messages


@given(messages=_MESSAGES, cut=st.integers(min_value=0, max_value=3000))
def test_a_message_comes_as_soon_as_its_last_byte_is_there(messages: list[bytes], cut: int) -> None:
    stream = b"".join(frame(message) for message in messages)
    cut %= len(stream) + 1
    reader = FrameReader("Append")
    got = list(reader.feed(stream[:cut]))
    whole = got + list(reader.feed(stream[cut:]))
    assert whole == messages
    assert sum(len(frame(message)) for message in got) <= cut
    if len(got) < len(messages):
        assert sum(len(frame(message)) for message in messages[: len(got) + 1]) > cut


def test_a_frame_is_its_length_big_endian_and_its_body() -> None:
    assert frame(b"boreal") == b"\x00\x00\x00\x06boreal"
    assert frame(b"") == bytes(4)


def test_the_largest_frame_passes_byte_for_byte() -> None:
    body = bytes(range(256)) * (MAX_FRAME_BYTES // 256)
    stream = frame(body)
    chunks = [stream[at : at + 65536] for at in range(0, len(stream), 65536)]
    assert read_all(FrameReader("Append"), chunks) == [body]
    assert MAX_APPEND_BYTES < MAX_FRAME_BYTES


@pytest.mark.parametrize("length", [MAX_FRAME_BYTES + 1, 2**31, 2**32 - 1])
def test_an_oversize_frame_is_refused_by_its_length_alone(length: int) -> None:
    reader = FrameReader("Append")
    with pytest.raises(OversizeRequest) as raised:
        list(reader.feed(struct.pack(">I", length)))
    assert raised.value.details == {"limit_bytes": MAX_FRAME_BYTES}


def test_another_protocol_is_refused_at_once() -> None:
    with pytest.raises(OversizeRequest):
        list(FrameReader("Append").feed(b"GET / HTTP/1.1\r\n\r\n"))


def test_frames_before_an_oversize_one_are_given_and_nothing_after_it() -> None:
    reader = FrameReader("Append")
    bodies = reader.feed(frame(b"one") + frame(b"two") + b"\xff" * 8 + frame(b"three"))
    assert [next(bodies), next(bodies)] == [b"one", b"two"]
    with pytest.raises(OversizeRequest):
        next(bodies)
    with pytest.raises(OversizeRequest):
        list(reader.feed(frame(b"four")))


@given(messages=_MESSAGES, step=st.integers(min_value=1, max_value=64))
def test_only_an_unfinished_frame_is_held(messages: list[bytes], step: int) -> None:
    stream = b"".join(frame(message) for message in messages)
    reader = FrameReader("Append")
    for at in range(0, len(stream), step):
        list(reader.feed(stream[at : at + step]))
        assert len(reader._buffer) < 4 + 300
    assert not reader._buffer


def test_what_is_held_never_passes_the_frame_limit() -> None:
    reader = FrameReader("Append")
    stream = frame(bytes(MAX_FRAME_BYTES)) * 2
    for at in range(0, len(stream), 1 << 18):
        list(reader.feed(stream[at : at + (1 << 18)]))
        assert len(reader._buffer) <= 4 + MAX_FRAME_BYTES
    assert not reader._buffer
