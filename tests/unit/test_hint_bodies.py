"""No message body whatsoever gets past the reading of hints but as a hint or as undecodable."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assistance.events import EventContext, hint, read_hint
from outbox.errors import UndecodableBody
from tests.support.deliveries import NOW

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
NAMES = ("specversion", "id", "source", "type", "time", "subject", "datacontenttype", "data")


def a_hint(**changes: Any) -> bytes:
    document = hint(EventContext("r", NOW), destination="slack", seq=2)
    return json.dumps(json.loads(document["payload"]) | changes).encode()


def test_a_hint_is_read_as_it_was_written() -> None:
    document = hint(EventContext("r", NOW, "before"), destination="slack", seq=2)
    assert read_hint(document["payload"].encode()) == (document["_id"], "r", "slack")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not an event",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 10_000,
        a_hint(type="assistance_request_created"),
        a_hint(specversion="9"),
        a_hint(data="text"),
        a_hint(data={"request_id": 1, "destination": "slack"}),
        a_hint(data={"request_id": "r"}),
        a_hint(data={"request_id": "\ud800", "destination": "slack"}),
        a_hint(time="nonsense"),
        a_hint(time={"a": 1, "b": 2, "c": 3, "d": 4}),
        a_hint(id=""),
    ],
)
def test_what_is_no_hint_says_why(body: bytes) -> None:
    with pytest.raises(UndecodableBody) as refused:
        read_hint(body)
    assert str(refused.value)


@given(st.binary(max_size=300))
def test_no_bytes_break_the_reading(body: bytes) -> None:
    with pytest.raises(UndecodableBody):
        read_hint(body)


@given(st.sampled_from(NAMES), JSON)
def test_no_value_in_a_hint_breaks_the_reading(name: str, value: Any) -> None:
    try:
        event_id, request_id, destination = read_hint(a_hint(**{name: value}))
    except UndecodableBody:
        return
    assert (request_id, destination) == ("r", "slack")
    assert event_id
