"""
The envelope on the wire: CloudEvents 1.0, JSON, structured mode.

Structured mode, because CloudEvents' AMQP binding covers AMQP 1.0 only, and we use AMQP 0-9-1.
https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cloudevents.core.base import BaseCloudEvent
from cloudevents.core.exceptions import CloudEventValidationError
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from outbox.errors import UndecodableBody

_JSON = JSONFormat()

#: Raised by the JSON parser and the CloudEvents library for invalid input; thousands of nested
#: brackets end in a RecursionError. A `time` that is an object is sliced like text by the library,
#: which is a KeyError from Python 3.12 on, and a TypeError before.
_UNDECODABLE = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    RecursionError,
    CloudEventValidationError,
)


@dataclass(frozen=True, slots=True)
class Envelope:
    id: str
    type: str
    subject: str | None
    data: Mapping[str, Any]


def encode(
    *,
    event_id: str,
    type: str,
    source: str,
    subject: str,
    time: datetime,
    data: Mapping[str, Any],
    causation_id: str | None = None,
) -> str:
    """
    One event as JSON text.

    causation_id: the event that led to this one; travels as the extension `causationid`.
    """
    attributes: dict[str, Any] = {
        "id": event_id,
        "type": type,
        "source": source,
        "subject": subject,
        "time": time,
        "datacontenttype": "application/json",
    }
    if causation_id is not None:
        attributes["causationid"] = causation_id
    return _JSON.write(CloudEvent(attributes, dict(data))).decode()


def decode(body: bytes) -> Envelope:
    """
    The event in a message's body.

    Raises UndecodableBody for anything that is not a CloudEvents 1.0 JSON event with an object
    as its data.
    """
    try:
        event: BaseCloudEvent = _JSON.read(CloudEvent, body)
    except _UNDECODABLE as error:
        raise UndecodableBody(f"not a CloudEvents 1.0 JSON event: {_first_line(error)}") from error
    data = event.get_data()
    if not isinstance(data, Mapping):
        raise UndecodableBody("the event's data is not a JSON object")
    return Envelope(event.get_id(), event.get_type(), event.get_subject(), data)


def _first_line(error: Exception) -> str:
    if isinstance(error, KeyError):
        return "an attribute has the wrong type"
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
