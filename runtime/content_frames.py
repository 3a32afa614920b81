"""
A persistent message encoded as AMQP 0-9-1 frames, in one piece.

pika makes an object for each frame and a list for each field, which took half of the relay's CPU
time per message. Parts that messages share are encoded once and cached.

https://www.rabbitmq.com/resources/specs/amqp0-9-1.pdf, sections 2.3.5 and 4.2
"""

from collections.abc import Mapping
from functools import lru_cache
from struct import Struct

from outbox.event import SHORT_STRING_LIMIT_BYTES

_FRAME_HEAD = Struct(">BHI")
_FRAME_END = b"\xce"
_METHOD, _HEADER, _BODY = 1, 2, 3

_BASIC = 60
_PUBLISH = 40
_PERSISTENT = b"\x02"

_METHOD_HEAD = Struct(">HHH")
_HEADER_HEAD = Struct(">HHQH")
_TABLE_LENGTH = Struct(">I")
_LONG_STRING_HEAD = Struct(">cI")
_TIMESTAMP = Struct(">Q")

_CONTENT_TYPE, _HEADERS, _DELIVERY_MODE = 1 << 15, 1 << 13, 1 << 12
_MESSAGE_ID, _TIMESTAMPED, _TYPE = 1 << 7, 1 << 6, 1 << 5
_ALWAYS = _CONTENT_TYPE | _DELIVERY_MODE | _MESSAGE_ID | _TYPE

#: A frame's type, channel and length before its payload, and the end octet after it.
FRAME_OVERHEAD_BYTES = 8

#: Cached exchanges, routing keys, types and content types, which are few; IDs are not cached.
_CACHED_COUNT = 4096


def encode_message(
    channel_number: int,
    frame_limit_bytes: int,
    *,
    exchange: str,
    routing_key: str,
    must_route: bool,
    content_type: str,
    headers: Mapping[str, str],
    message_id: str,
    timestamp_seconds: int | None,
    type: str,
    body: bytes,
) -> bytes:
    """
    `basic.publish`, the content header and the body.

    frame_limit_bytes: as negotiated with the broker; a longer body is split.

    Raises ValueError or struct.error if AMQP cannot represent a value, and ValueError if the
    properties and headers exceed a frame: AMQP cannot split them, and the broker would close the
    connection (501).
    """
    flags = _ALWAYS
    pieces = [_cached_short_string(content_type)]
    if headers:
        flags |= _HEADERS
        pieces.append(_table(headers))
    pieces += (_PERSISTENT, _short_string(message_id))
    if timestamp_seconds is not None:
        flags |= _TIMESTAMPED
        pieces.append(_TIMESTAMP.pack(timestamp_seconds))
    pieces.append(_cached_short_string(type))
    properties = b"".join(pieces)
    size_bytes = len(body)
    length = _HEADER_HEAD.size + len(properties)
    if length + FRAME_OVERHEAD_BYTES > frame_limit_bytes:
        raise ValueError(
            f"properties and headers take {length + FRAME_OVERHEAD_BYTES} bytes; "
            f"the broker's frame_max is {frame_limit_bytes}"
        )
    frames = [
        _publish_frame(channel_number, exchange, routing_key, must_route),
        _FRAME_HEAD.pack(_HEADER, channel_number, length),
        _HEADER_HEAD.pack(_BASIC, 0, size_bytes, flags),
        properties,
        _FRAME_END,
    ]
    part_bytes = frame_limit_bytes - FRAME_OVERHEAD_BYTES
    for start in range(0, size_bytes, part_bytes):
        part = body[start : start + part_bytes]
        frames += (_FRAME_HEAD.pack(_BODY, channel_number, len(part)), part, _FRAME_END)
    return b"".join(frames)


@lru_cache(_CACHED_COUNT)
def _publish_frame(channel_number: int, exchange: str, routing_key: str, must_route: bool) -> bytes:
    payload = b"".join(
        (
            _METHOD_HEAD.pack(_BASIC, _PUBLISH, 0),
            _short_string(exchange),
            _short_string(routing_key),
            b"\x01" if must_route else b"\x00",
        )
    )
    return _FRAME_HEAD.pack(_METHOD, channel_number, len(payload)) + payload + _FRAME_END


def _table(headers: Mapping[str, str]) -> bytes:
    pieces: list[bytes] = []
    for name, value in headers.items():
        encoded = value.encode()
        pieces += (_short_string(name), _LONG_STRING_HEAD.pack(b"S", len(encoded)), encoded)
    table = b"".join(pieces)
    return _TABLE_LENGTH.pack(len(table)) + table


def _short_string(text: str) -> bytes:
    encoded = text.encode()
    if len(encoded) > SHORT_STRING_LIMIT_BYTES:
        raise ValueError(f"{len(encoded)} bytes are too many for an AMQP short string")
    return bytes((len(encoded),)) + encoded


_cached_short_string = lru_cache(_CACHED_COUNT)(_short_string)
