"""
A request for assistance: the document that holds the whole truth about it.

    accepted ──── all deliveries succeeded ───> succeeded
       │ ^
       │ └──────── an operator's redrive ────────┐
       └──── all closed, one or more failed ──> failed

`succeeded` and `failed` are final for the system. Each change appends an outbox event.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, NotRequired, TypedDict
from uuid import uuid4

from assistance import delivery as deliveries
from assistance import events
from assistance.delivery import Delivery, DeliveryState
from assistance.events import EventContext
from assistance.routing import Destination

#: The longest description that the first clients may send.
DESCRIPTION_LIMIT_CHARACTERS = 300


#: Letters and symbols that are drawn as nothing: Hangul fillers, and the empty Braille pattern.
_BLANKS = frozenset("\u115f\u1160\u3164\uffa0\u2800")


def is_blank(description: str) -> bool:
    """
    Whether a reader would see nothing: only white space, control, format or combining characters.
    """
    return not any(map(_is_visible, description))


def _is_visible(character: str) -> bool:
    category = unicodedata.category(character)
    # private and unassigned code points may be drawn: this Python may not know the newest emoji
    return character not in _BLANKS and (category[0] in "LNPS" or category in ("Co", "Cn"))


class Status(StrEnum):
    ACCEPTED = "accepted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class Request(TypedDict):
    """
    version: how many events it has appended; the newest event's `seq`.
    next_due_at: the first moment at which the reconciler should look; None when closed.
    trace: the headers of the trace that it came with; every event of it carries them.
    """

    _id: str
    topic: str
    description: str
    status: str
    version: int
    created_at: datetime
    updated_at: datetime
    next_due_at: datetime | None
    deliveries: list[Delivery]
    trace: NotRequired[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What one transaction inserts: the request and its events, both or neither."""

    request: Request
    outbox_documents: list[dict[str, Any]]


def accept(
    *,
    request_id: str,
    topic: str,
    description: str,
    destinations: Sequence[Destination],
    now: datetime,
    trace: Mapping[str, str] | None = None,
) -> Acceptance:
    """
    A new request, its deliveries and its events: the fact, then one hint a delivery.

    Called once per request, outside the transaction's callback, which may run twice: so the ids
    are made once.
    """
    context = EventContext(request_id, now, trace=trace)
    fact = events.fact(events.CREATED, context, topic=topic, status=Status.ACCEPTED, seq=1)
    born: list[Delivery] = []
    hints: list[dict[str, Any]] = []
    for seq, destination in enumerate(destinations, start=2):
        hint = events.hint(context, destination=destination.name, seq=seq)
        hints.append(hint)
        born.append(
            deliveries.birth(
                destination=destination.name,
                channel=destination.channel,
                idempotency_key=str(uuid4()),
                hint_event=hint["_id"],
                now=now,
            )
        )
    request: Request = {
        "_id": request_id,
        "topic": topic,
        "description": description,
        "status": Status.ACCEPTED.value,
        "version": 1 + len(hints),
        "created_at": now,
        "updated_at": now,
        "next_due_at": next_due_at(born),
        "deliveries": born,
    }
    if trace:
        request["trace"] = dict(trace)
    return Acceptance(request, [fact, *hints])


def next_due_at(request_deliveries: Sequence[Delivery]) -> datetime | None:
    looks = [
        look
        for look in (deliveries.next_look_at(delivery) for delivery in request_deliveries)
        if look is not None
    ]
    return min(looks, default=None)


def status_of(delivery_states: Sequence[str]) -> Status:
    """The status that these deliveries add up to."""
    if any(state in deliveries.OPEN_STATES for state in delivery_states):
        return Status.ACCEPTED
    if all(state == DeliveryState.SUCCEEDED for state in delivery_states):
        return Status.SUCCEEDED
    return Status.FAILED


def status_after(request: Request, destination: str, state: DeliveryState) -> Status:
    """The request's status once its delivery to this destination is in that state."""
    return status_of(
        [
            state.value if delivery["destination"] == destination else delivery["state"]
            for delivery in request["deliveries"]
        ]
    )


def event_context(request: Request, now: datetime, *, cause: str | None = None) -> EventContext:
    return EventContext(request["_id"], now, cause, request.get("trace"))


def closing_facts(request: Request, status: Status, now: datetime) -> list[dict[str, Any]]:
    """The fact that the request was closed with this status; none while it stays open."""
    if status is Status.ACCEPTED:
        return []
    return [
        events.fact(
            events.FACT_OF_STATUS[status],
            event_context(request, now),
            topic=request["topic"],
            status=status,
            seq=request["version"] + 1,
        )
    ]


def delivery_to(request: Request, destination: str) -> Delivery | None:
    for delivery in request["deliveries"]:
        if delivery["destination"] == destination:
            return delivery
    return None
