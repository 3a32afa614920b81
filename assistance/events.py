"""
The two kinds of event that the system appends to its own outbox.

Facts say what happened to a request. Any number of queues may be bound to them, or none.
Hints wake one worker for one delivery. Each is routed to exactly one queue.

Both carry the trace headers of their request, where it has any.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class EventContext:
    """
    What the events of one change of a request have in common.

    cause: the event that led to the change, where one did.
    trace: the headers of the trace that the request came with.
    """

    request_id: str
    now: datetime
    cause: str | None = None
    trace: Mapping[str, str] | None = None


def fact(type: str, context: EventContext, *, topic: str, status: str, seq: int) -> dict[str, Any]:
    """The outbox document of a change of status; routed by type and topic."""
    return _document(
        type,
        context,
        seq=seq,
        routing_key=f"{type}.{topic}",
        must_route=False,
        data={"request_id": context.request_id, "topic": topic, "status": status},
    )


def hint(context: EventContext, *, destination: str, seq: int) -> dict[str, Any]:
    """The outbox document that wakes a worker of one destination for one request."""
    return _document(
        HINT,
        context,
        seq=seq,
        routing_key=hint_routing_key(destination),
        must_route=True,
        data={"request_id": context.request_id, "destination": destination},
    )


def read_hint(body: bytes) -> tuple[str, str, str]:
    """
    (event id, request id, destination) of a hint's message body.

    Raises UndecodableBody for a body that is not a hint.
    """
    event = envelope.decode(body)
    request_id, destination = event.data.get("request_id"), event.data.get("destination")
    if event.type != HINT or not isinstance(request_id, str) or not isinstance(destination, str):
        raise UndecodableBody(f"an event of type {event.type!r} is not a hint for a delivery")
    if not all(_is_unicode(text) for text in (event.id, request_id, destination)):
        raise UndecodableBody("an id holds half a surrogate pair, which MongoDB cannot store")
    return event.id, request_id, destination


def _is_unicode(text: str) -> bool:
    return text.encode(errors="replace").decode() == text


def _document(
    type: str,
    context: EventContext,
    *,
    seq: int,
    routing_key: str,
    must_route: bool,
    data: dict[str, Any],
) -> dict[str, Any]:
    event_id = str(uuid4())
    payload = envelope.encode(
        event_id=event_id,
        type=type,
        source=SOURCE,
        subject=context.request_id,
        time=context.now,
        data=data,
        causation_id=context.cause,
    )
    return pending_document(
        event_id=event_id,
        type=type,
        key=context.request_id,
        seq=seq,
        routing_key=routing_key,
        must_route=must_route,
        payload=payload,
        headers=context.trace or {},
        created_at=context.now,
    )
