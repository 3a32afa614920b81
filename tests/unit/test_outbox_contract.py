"""The outbox document and the envelope: what fits, what does not, and that we say why."""

import json
from datetime import UTC, datetime
from importlib import resources
from typing import Any
from uuid import UUID, uuid4

import jsonschema
import pytest
from bson import Binary, ObjectId
from bson.json_util import RELAXED_JSON_OPTIONS, dumps
from hypothesis import example, given
from hypothesis import strategies as st

from outbox import envelope
from outbox.errors import (
    UNFIT_ID,
    UNFIT_LENGTH,
    UNFIT_MISSING,
    UNFIT_PAYLOAD_SIZE,
    UNFIT_TYPE,
    UndecodableBody,
    UnfitEvent,
)
from outbox.event import PAYLOAD_LIMIT_BYTES, key_of, pending_document, read_event

SCHEMA = json.loads(resources.files("outbox").joinpath("schema.json").read_text())

MINIMAL: dict[str, Any] = {"_id": "e1", "type": "t", "routing_key": "r", "payload": "{}"}

ANY_VALUE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.text("abc.", max_size=3),
    st.lists(st.integers(), max_size=1),
    st.dictionaries(st.sampled_from(["traceparent", "x"]), st.text("ab", max_size=2), max_size=1),
    st.just(datetime(2026, 1, 1, tzinfo=UTC)),
    st.builds(ObjectId),
    st.binary(max_size=3),
)


@example({"headers": datetime(2026, 1, 1, tzinfo=UTC)})
@example({"headers": None})
@example({"headers": {"CC": "r.b"}})
@example({"content_type": "x" * 256})
@given(st.fixed_dictionaries({}, optional=dict.fromkeys([*SCHEMA["properties"]], ANY_VALUE)))
def test_the_schema_and_the_relay_agree_on_what_fits(fields: dict[str, Any]) -> None:
    document = {**MINIMAL, **fields, "state": "pending"}
    extended = json.loads(dumps(document, json_options=RELAXED_JSON_OPTIONS))
    fits_schema = jsonschema.Draft202012Validator(SCHEMA).is_valid(extended)
    try:
        read_event(document)
    except UnfitEvent:
        assert not fits_schema
    else:
        assert fits_schema


def test_four_fields_make_an_event() -> None:
    event = read_event(MINIMAL)
    assert (event.message_id, event.key, event.must_route, event.body) == ("e1", "e1", True, b"{}")
    assert event.content_type == "application/cloudevents+json"


@pytest.mark.parametrize("document_id", ["e1", ObjectId(), uuid4(), Binary.from_uuid(UUID(int=7))])
def test_an_id_may_be_a_string_an_object_id_or_a_uuid(document_id: Any) -> None:
    event = read_event({**MINIMAL, "_id": document_id})
    assert event.id == document_id
    assert event.message_id in {str(document_id), str(UUID(int=7))}


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"_id": 7}, UNFIT_ID, "_id is int"),
        ({"_id": ""}, UNFIT_ID, "_id"),
        ({"type": None}, UNFIT_MISSING, "type"),
        ({"routing_key": ""}, UNFIT_MISSING, "routing_key"),
        ({"routing_key": "ü" * 128}, UNFIT_LENGTH, "256 bytes"),
        ({"payload": None}, UNFIT_MISSING, "payload"),
        ({"payload": {"a": 1}}, UNFIT_TYPE, "encoded once"),
        ({"payload": "x" * (PAYLOAD_LIMIT_BYTES + 1)}, UNFIT_PAYLOAD_SIZE, "1048577 bytes"),
        ({"key": 5}, UNFIT_TYPE, "key is int"),
        ({"seq": True}, UNFIT_TYPE, "seq is bool"),
        ({"must_route": "yes"}, UNFIT_TYPE, "must_route is str"),
        ({"headers": {"a": 1}}, UNFIT_TYPE, "header 'a' is int"),
        ({"headers": {"a": "x" * 9000}}, UNFIT_LENGTH, "headers are 9001 bytes"),
        ({"created_at": "today"}, UNFIT_TYPE, "created_at is str"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], code: str, named: str) -> None:
    with pytest.raises(UnfitEvent) as unfit:
        read_event({**MINIMAL, **change})
    assert unfit.value.code == code
    assert named in unfit.value.detail


def test_a_writer_is_told_at_once_that_a_payload_is_too_large() -> None:
    with pytest.raises(UnfitEvent, match=UNFIT_PAYLOAD_SIZE):
        pending_document(
            event_id="e",
            type="t",
            key="k",
            seq=1,
            routing_key="r",
            must_route=True,
            payload="x" * (PAYLOAD_LIMIT_BYTES + 1),
            headers={},
            created_at=datetime.now(UTC),
        )


def test_an_unfit_document_still_has_a_key_to_hold_back() -> None:
    assert key_of({"_id": 7, "key": "k"}) == "k"
    assert key_of({"_id": 7, "key": 8}) == "7"


def test_an_envelope_comes_back_as_it_went() -> None:
    body = envelope.encode(
        event_id="e1",
        type="order_placed",
        source="/shop",
        subject="42",
        time=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        data={"text": "Grüße \u2028 <b>"},
        causation_id="e0",
    )
    plain = json.loads(body)
    assert plain["specversion"] == "1.0"
    assert plain["time"] == "2026-01-02T03:04:05Z"
    assert plain["causationid"] == "e0"
    read = envelope.decode(body.encode())
    assert (read.id, read.type, read.subject) == ("e1", "order_placed", "42")
    assert read.data == {"text": "Grüße \u2028 <b>"}


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_a_body_that_is_no_event_is_refused_and_nothing_else_happens(body: bytes) -> None:
    with pytest.raises(UndecodableBody):
        envelope.decode(body)


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[]",
        b"null",
        b"7",
        b'"x"',
        b'{"specversion": "1.0", "id": "1", "type": "t", "source": "/s"}',
        b'{"specversion": "1.0", "id": "1", "type": "t", "source": "/s", "data": 7}',
        b'{"specversion": "1.0", "id": "1", "type": "t", "source": "/s", "time": 7, "data": {}}',
        b'{"specversion": "1.0", "id": 1, "type": ["t"], "source": "/s", "data": {}}',
        b'{"specversion": "9.9", "id": "1", "type": "t", "source": "/s", "data": {}}',
    ],
)
def test_json_that_is_no_event_is_refused(body: bytes) -> None:
    with pytest.raises(UndecodableBody):
        envelope.decode(body)
