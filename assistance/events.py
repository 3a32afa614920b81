"""
The two kinds of event that the system appends to its own outbox.

Facts tell what happened to a request: anyone may listen, or nobody.
Hints wake one worker for one delivery: exactly one queue takes them.

Both carry the headers of the trace that the request came with, where it came with one.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import uuid4

from outbox import envelope
from outbox.errors import UndecodableBody
from outbox.event import pending_document

SOURCE = "/assistances"

CREATED = "assistance_request_created"
SUCCEEDED = "assistance_request_succeeded"
FAILED = "assistance_request_failed"
REDRIVEN = "assistance_request_redriven"

HINT = "delivery_due"

FACT_OF_STATUS = {"accepted": CREATED, "succeeded": SUCCEEDED, "failed": FAILED}


def hint_routing_key(destination: str) -> str:
    return f"{HINT}.{destination}"


def fact(
    type: str,
    *,
    request_id: str,
    topic: str,
    status: str,
    seq: int,
    now: datetime,
    cause: str | None = None,
    trace: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """An outbox document that tells a change of status; routed by type and topic."""
    return _document(
        type,
        routing_key=f"{type}.{topic}",
        must_route=False,
        request_id=request_id,
        seq=seq,
        now=now,
        cause=cause,
        trace=trace,
        data={"request_id": request_id, "topic": topic, "status": status},
    )


def hint(
    *,
    request_id: str,
    destination: str,
    seq: int,
    now: datetime,
    cause: str | None,
    trace: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """An outbox document that wakes the worker of one destination for one request."""
    return _document(
        HINT,
        routing_key=hint_routing_key(destination),
        must_route=True,
        request_id=request_id,
        seq=seq,
        now=now,
        cause=cause,
        trace=trace,
        data={"request_id": request_id, "destination": destination},
    )


def read_hint(body: bytes) -> tuple[str, str, str]:
    """
    (event id, request id, destination) of a hint's message body.

    Raises UndecodableBody for whatever is not a hint.
    """
    event = envelope.decode(body)
    request_id, destination = event.data.get("request_id"), event.data.get("destination")
    if event.type != HINT or not isinstance(request_id, str) or not isinstance(destination, str):
        raise UndecodableBody(f"an event of type {event.type!r} is no hint for a delivery")
    if not all(_is_unicode(text) for text in (event.id, request_id, destination)):
        raise UndecodableBody("half a surrogate pair stands in an id, which no database can hold")
    return event.id, request_id, destination


def _is_unicode(text: str) -> bool:
    return text.encode(errors="replace").decode() == text


def _document(
    type: str,
    *,
    routing_key: str,
    must_route: bool,
    request_id: str,
    seq: int,
    now: datetime,
    cause: str | None,
    trace: Mapping[str, str] | None,
    data: dict[str, Any],
) -> dict[str, Any]:
    event_id = str(uuid4())
    payload = envelope.encode(
        event_id=event_id,
        type=type,
        source=SOURCE,
        subject=request_id,
        time=now,
        data=data,
        causation_id=cause,
    )
    return pending_document(
        event_id=event_id,
        type=type,
        key=request_id,
        seq=seq,
        routing_key=routing_key,
        must_route=must_route,
        payload=payload,
        headers=trace or {},
        created_at=now,
    )
