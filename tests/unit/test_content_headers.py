"""Whatever a publisher wrote into a message's properties, the message arrives."""

import struct
from typing import Any

import pika
from hypothesis import given
from hypothesis import strategies as st

from runtime.content_headers import read_properties
from runtime.rabbit import _JoiningConnection

MESSAGE_ID = b"\x09message-1"
FIRST_DEATH = b"\x13x-first-death-queueS\0\0\0\x05queue"
FLAG_HEADERS, FLAG_MESSAGE_ID = 1 << 13, 1 << 7

field_types = st.sampled_from([bytes([kind]) for kind in b"tbBUuIiLlfdDsSxATFVZ\0\xff"])
short_strings = st.binary(max_size=20).map(lambda text: bytes([len(text)]) + text)
fields = st.builds(
    lambda *parts: b"".join(parts), short_strings, field_types, st.binary(max_size=40)
)


def table(*entries: bytes) -> bytes:
    encoded = b"".join(entries)
    return struct.pack(">I", len(encoded)) + encoded


def header_frame(properties: bytes, body_size: int = 3) -> bytes:
    payload = struct.pack(">HHQ", 60, 0, body_size) + properties
    return struct.pack(">BHI", 2, 1, len(payload)) + payload + b"\xce"


def decoded(frame: bytes) -> tuple[int, Any]:
    """As a connection does it, with the beginning of the next frame in its buffer."""
    connection = _JoiningConnection.__new__(_JoiningConnection)
    connection._frame_buffer = frame + b"\x03\0\x01"
    result: tuple[int, Any] = connection._read_frame()
    return result


def check_arrives(frame: bytes) -> Any:
    consumed, header = decoded(frame)
    assert consumed == len(frame)
    assert isinstance(header, pika.frame.Header)
    assert (header.channel_number, header.body_size) == (1, 3)
    return header.properties


@given(st.lists(fields, max_size=6), st.binary(max_size=30))
def test_any_fields(entries: list[bytes], rest: bytes) -> None:
    flags = struct.pack(">H", FLAG_HEADERS | FLAG_MESSAGE_ID)
    check_arrives(header_frame(flags + table(*entries) + rest))


@given(st.binary(max_size=200))
def test_any_properties(encoded: bytes) -> None:
    check_arrives(header_frame(encoded))


@given(st.integers(0, 2**64 - 1))
def test_any_timestamp_leaves_the_rest_readable(seconds: int) -> None:
    when = b"\x04whenT" + struct.pack(">Q", seconds)
    flags = struct.pack(">H", FLAG_HEADERS | FLAG_MESSAGE_ID)
    properties = check_arrives(header_frame(flags + table(when, FIRST_DEATH) + MESSAGE_ID))
    assert properties.message_id == "message-1"
    assert properties.headers["x-first-death-queue"] == "queue"


def test_a_float_that_is_not_a_number_and_a_table_too_deep() -> None:
    nan = b"\x01ad" + struct.pack(">d", float("nan"))
    deep = b""
    for _ in range(2000):
        deep = b"A" + struct.pack(">I", len(deep)) + deep
    flags = struct.pack(">H", FLAG_HEADERS | FLAG_MESSAGE_ID)
    for entry in (nan, b"\x01a" + deep):
        properties = check_arrives(header_frame(flags + table(entry, FIRST_DEATH) + MESSAGE_ID))
        assert "cannot be decoded" in properties.undecodable
        assert properties.message_id == "message-1"
        assert properties.headers == {"x-first-death-queue": "queue"}


def test_what_decodes_is_not_marked() -> None:
    flags = struct.pack(">H", FLAG_HEADERS | FLAG_MESSAGE_ID)
    properties = check_arrives(header_frame(flags + table(FIRST_DEATH) + MESSAGE_ID))
    assert not hasattr(properties, "undecodable")
    assert properties.message_id == "message-1"


def test_properties_behind_the_headers_are_found() -> None:
    flags = struct.pack(">H", 0b1111111111111100)
    encoded = (
        flags
        + b"\x01t\x01e"
        + table(FIRST_DEATH)
        + b"\2\0"
        + b"\x01c\x01r\x01x"
        + MESSAGE_ID
        + b"\0" * 8
        + b"\0" * 4
    )
    found = read_properties(encoded)
    assert found.message_id == "message-1"
    assert found.headers == {"x-first-death-queue": "queue"}
