"""The frames of a published message are the very bytes that pika would send."""

from collections.abc import Mapping

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import frame, spec

from outbox.event import SHORT_STRING_LIMIT_BYTES
from runtime.content_frames import FRAME_OVERHEAD_BYTES, encode_message

FRAME_LIMIT_BYTES = 4096

short_text = st.text(max_size=80).filter(
    lambda text: len(text.encode()) <= SHORT_STRING_LIMIT_BYTES
)


@given(
    channel_number=st.integers(1, 2047),
    exchange=short_text,
    routing_key=short_text,
    must_route=st.booleans(),
    content_type=short_text,
    headers=st.dictionaries(short_text, st.text(max_size=300), max_size=4),
    message_id=short_text,
    timestamp_seconds=st.none() | st.integers(0, 2**64 - 1),
    type=short_text,
    size_bytes=st.integers(0, 3 * FRAME_LIMIT_BYTES)
    | st.just(FRAME_LIMIT_BYTES - FRAME_OVERHEAD_BYTES),
)
def test_the_frames_are_what_pika_itself_would_send(
    *,
    channel_number: int,
    exchange: str,
    routing_key: str,
    must_route: bool,
    content_type: str,
    headers: Mapping[str, str],
    message_id: str,
    timestamp_seconds: int | None,
    type: str,
    size_bytes: int,
) -> None:
    body = bytes(number % 251 for number in range(size_bytes))
    properties = pika.BasicProperties(
        content_type=content_type,
        headers=dict(headers) or None,
        delivery_mode=2,
        message_id=message_id,
        timestamp=timestamp_seconds,
        type=type,
    )
    publish = spec.Basic.Publish(exchange=exchange, routing_key=routing_key, mandatory=must_route)
    part_bytes = FRAME_LIMIT_BYTES - FRAME_OVERHEAD_BYTES
    frames = [
        frame.Method(channel_number, publish),
        frame.Header(channel_number, len(body), properties),
    ]
    frames += [
        frame.Body(channel_number, body[start : start + part_bytes])
        for start in range(0, len(body), part_bytes)
    ]
    assert encode_message(
        channel_number,
        FRAME_LIMIT_BYTES,
        exchange=exchange,
        routing_key=routing_key,
        must_route=must_route,
        content_type=content_type,
        headers=headers,
        message_id=message_id,
        timestamp_seconds=timestamp_seconds,
        type=type,
        body=body,
    ) == b"".join(one.marshal() for one in frames)


@pytest.mark.parametrize("spare_bytes", [0, -1])
def test_properties_and_headers_fit_into_one_frame_or_are_refused(spare_bytes: int) -> None:
    def encode(value: str) -> bytes:
        return encode_message(
            1,
            FRAME_LIMIT_BYTES,
            exchange="events",
            routing_key="a",
            must_route=True,
            content_type="c",
            headers={"x": value},
            message_id="b",
            timestamp_seconds=None,
            type="t",
            body=b"",
        )

    method = len(frame.Method(1, spec.Basic.Publish(exchange="events", routing_key="a")).marshal())
    empty = len(encode("")) - method
    value = "v" * (FRAME_LIMIT_BYTES - empty - spare_bytes)
    if spare_bytes == 0:
        assert len(encode(value)) - method == FRAME_LIMIT_BYTES
    else:
        with pytest.raises(ValueError, match="frame_max is 4096"):
            encode(value)


@pytest.mark.parametrize("field", ["routing_key", "message_id", "type", "content_type"])
@pytest.mark.parametrize("text", ["x" * 256, "\ud800"])
def test_what_amqp_has_no_place_for_is_refused(field: str, text: str) -> None:
    fields = {"routing_key": "a", "message_id": "b", "type": "c", "content_type": "d"}
    with pytest.raises(ValueError):  # noqa: PT011 - the words differ
        encode_message(
            1,
            FRAME_LIMIT_BYTES,
            exchange="events",
            must_route=True,
            headers={},
            timestamp_seconds=None,
            body=b"",
            **(fields | {field: text}),
        )
