"""
An event, as a writer appends it and as the relay reads it back.

Only `_id`, `type`, `routing_key` and `payload` are required, so that an application in any language
can write one with its MongoDB driver alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from bson import Binary, DatetimeMS, ObjectId

from outbox.errors import (
    UNFIT_ID,
    UNFIT_LENGTH,
    UNFIT_MISSING,
    UNFIT_PAYLOAD_SIZE,
    UNFIT_TYPE,
    UnfitEvent,
)
from outbox.state import State

#: RabbitMQ 4 refuses messages above 16 MiB and a change event may not exceed 16 MB; one MiB leaves
#: room for both and keeps a window of a thousand events in memory.
PAYLOAD_LIMIT_BYTES = 1024 * 1024

#: AMQP 0-9-1 short strings: routing key, type, message id, content type.
SHORT_STRING_LIMIT_BYTES = 255

#: Headers are part of every message; they are for a trace, not for a payload.
HEADERS_LIMIT_BYTES = 8 * 1024

#: RabbitMQ's sender-selected distribution: https://www.rabbitmq.com/docs/sender-selected
ROUTING_HEADERS = frozenset({"CC", "BCC"})

#: AMQP's timestamp counts seconds from 1970 and has no sign.
FIRST_TIMESTAMP_YEAR = 1970

#: Beyond it, a double does not hold every integer.
MAX_WHOLE_DOUBLE = 2**53

ID_KINDS = (str, ObjectId, UUID)

UUID_SUBTYPES = frozenset({3, 4})
UUID_BYTES = 16

CLOUDEVENTS_CONTENT_TYPE = "application/cloudevents+json"


@dataclass(frozen=True, slots=True)
class Event:
    """
    One event, ready to be published.

    id: the document's `_id` as MongoDB returned it, for queries; message_id: the same as text.
    key: order is kept within it; a document without a key has its message_id as key.
    seq: position within the key if the writer numbers its events, else None.
    must_route: AMQP's `mandatory`: the broker returns the message if no queue takes it.
    body: sent unchanged; the writer has encoded it.
    """

    id: Any
    message_id: str
    type: str
    key: str
    seq: int | None
    routing_key: str
    must_route: bool
    body: bytes
    content_type: str
    headers: dict[str, str]
    created_at: datetime | None


def pending_document(
    *,
    event_id: str,
    type: str,
    key: str,
    seq: int,
    routing_key: str,
    must_route: bool,
    payload: str,
    headers: Mapping[str, str],
    created_at: datetime,
) -> dict[str, Any]:
    """
    The document that appends an event, to be inserted in the transaction that changes the data.

    Raises UnfitEvent, before anything is written, if the relay would have to park the event.
    """
    document: dict[str, Any] = {
        "_id": event_id,
        "type": type,
        "key": key,
        "seq": seq,
        "routing_key": routing_key,
        "must_route": must_route,
        "payload": payload,
        "headers": dict(headers),
        "created_at": created_at,
        "state": State.PENDING.value,
    }
    read_event(document)
    return document


def read_event(document: Mapping[str, Any]) -> Event:
    """
    The event in a document of any writer.

    Raises UnfitEvent, naming the first field that does not fit, and UnicodeEncodeError if text that
    is sent or written back to MongoDB is not valid UTF-8.
    """
    document_id = document.get("_id")
    message_id = _message_id(document_id)
    key = _optional(document, "key", str)
    if key is not None:
        key.encode()
    must_route = _optional(document, "must_route", bool)
    return Event(
        id=document_id,
        message_id=message_id,
        type=_short_text(document, "type"),
        key=message_id if key is None else key,
        seq=_seq(document),
        routing_key=_short_text(document, "routing_key"),
        must_route=True if must_route is None else must_route,
        body=_body(document),
        content_type=_content_type(document),
        headers=_headers(document),
        created_at=_created_at(document),
    )


def key_of(document: Mapping[str, Any]) -> str:
    """The key of a document that may be unfit; an unfit event holds back its key."""
    key = document.get("key")
    return key if isinstance(key, str) else str(document.get("_id"))


def _message_id(document_id: Any) -> str:
    if isinstance(document_id, Binary) and document_id.subtype in UUID_SUBTYPES:
        if len(document_id) != UUID_BYTES:
            raise UnfitEvent(UNFIT_ID, f"_id is a UUID of {len(document_id)} bytes")
        document_id = UUID(bytes=bytes(document_id))
    if not isinstance(document_id, ID_KINDS) or not str(document_id):
        kind = type(document_id).__name__
        raise UnfitEvent(UNFIT_ID, f"_id is {kind}; it must be a string, an ObjectId or a UUID")
    message_id = str(document_id)
    _check_length("_id", message_id)
    return message_id


def _short_text(document: Mapping[str, Any], name: str) -> str:
    value: str | None = _optional(document, name, str)
    if not value:
        raise UnfitEvent(UNFIT_MISSING, f"{name} is missing or empty")
    _check_length(name, value)
    return value


def _check_length(name: str, value: str) -> None:
    length_bytes = len(value) if value.isascii() else len(value.encode())
    if length_bytes > SHORT_STRING_LIMIT_BYTES:
        detail = f"{name} is {length_bytes} bytes long; at most {SHORT_STRING_LIMIT_BYTES}"
        raise UnfitEvent(UNFIT_LENGTH, detail)


def _optional(document: Mapping[str, Any], name: str, kind: type) -> Any:
    value = document.get(name)
    if value is None or type(value) is kind:
        return value
    # bool is a subclass of int in Python; in the contract they differ
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    raise UnfitEvent(UNFIT_TYPE, f"{name} is {type(value).__name__}; it must be {kind.__name__}")


def _seq(document: Mapping[str, Any]) -> int | None:
    """Drivers of some languages write every number as a double; a whole one is an integer."""
    seq = document.get("seq")
    if isinstance(seq, float) and seq.is_integer() and abs(seq) <= MAX_WHOLE_DOUBLE:
        return int(seq)
    number: int | None = _optional(document, "seq", int)
    return number


def _content_type(document: Mapping[str, Any]) -> str:
    content_type: str | None = _optional(document, "content_type", str)
    if content_type is None:
        return CLOUDEVENTS_CONTENT_TYPE
    _check_length("content_type", content_type)
    return content_type


def _created_at(document: Mapping[str, Any]) -> datetime | None:
    """None for a date that AMQP's timestamp cannot hold, such as another language's zero time."""
    created_at = document.get("created_at")
    if isinstance(created_at, DatetimeMS):
        return None
    created_at = _optional(document, "created_at", datetime)
    if created_at is not None and created_at.year < FIRST_TIMESTAMP_YEAR:
        return None
    return created_at  # type: ignore[no-any-return]  # checked above


def _body(document: Mapping[str, Any]) -> bytes:
    payload = document.get("payload")
    if payload is None:
        raise UnfitEvent(UNFIT_MISSING, "payload is missing")
    if isinstance(payload, str):
        body = payload.encode()
    elif isinstance(payload, bytes):
        body = bytes(payload)
    else:
        kind = type(payload).__name__
        detail = f"payload is {kind}; it must be encoded once, as a string or as binary"
        raise UnfitEvent(UNFIT_TYPE, detail)
    if len(body) > PAYLOAD_LIMIT_BYTES:
        detail = f"payload is {len(body)} bytes; at most {PAYLOAD_LIMIT_BYTES}"
        raise UnfitEvent(UNFIT_PAYLOAD_SIZE, detail)
    return body


def _headers(document: Mapping[str, Any]) -> dict[str, str]:
    headers = document.get("headers")
    if headers is None:
        return {}
    if not isinstance(headers, Mapping):
        raise UnfitEvent(UNFIT_TYPE, f"headers is {type(headers).__name__}; it must be an object")
    size_bytes = 0
    for name, value in headers.items():
        if not isinstance(value, str):
            kind = type(value).__name__
            raise UnfitEvent(UNFIT_TYPE, f"header {name!r} is {kind}; it must be a string")
        _check_length(f"the name of header {name!r}", name)
        if name in ROUTING_HEADERS:
            detail = f"header {name!r} would send copies elsewhere; use routing_key alone"
            raise UnfitEvent(UNFIT_TYPE, detail)
        size_bytes += len(name.encode()) + len(value.encode())
    if size_bytes > HEADERS_LIMIT_BYTES:
        detail = f"headers are {size_bytes} bytes; at most {HEADERS_LIMIT_BYTES}"
        raise UnfitEvent(UNFIT_LENGTH, detail)
    return dict(headers)
