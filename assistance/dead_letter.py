"""
Dead letters: what was not delivered, or could not even be read, and what was decided about it.

    origin       written by                     _id
    delivery     the worker's record            delivery/{request_id}/{destination}
    message      the dead-letter consumer       message/{digest of queue, message id and body}

A letter that is seen again keeps its document: `count` and `last_seen_at` grow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from typing import Any, NotRequired, TypedDict

#: The record of a failed delivery.
FROM_DELIVERY = "delivery"

#: A message that the broker dead-lettered.
FROM_BROKER = "message"

#: Enough to recognise a message; a whole one may have 16 MiB, as much as a document.
BODY_LIMIT_BYTES = 16 * 1024


class Decision(StrEnum):
    """
    What was decided about a dead letter; a failed delivery has None until an operator decides.

    `requeued` and `ignored` were stored as `given_back` and `nothing_owed` by older versions.
    """

    PARKED = "parked"
    REQUEUED = "requeued"
    IGNORED = "ignored"
    REDRIVEN = "redriven"
    DISCARDED = "discarded"


#: Letters that need an operator's decision; None is that of a failed delivery.
UNDECIDED: tuple[str | None, ...] = (None, Decision.PARKED.value)

#: Decisions that an operator made. A redriven letter whose delivery fails again is undecided again.
FINAL = (Decision.DISCARDED.value, Decision.REDRIVEN.value)


class DecisionRecord(TypedDict):
    """One entry in a letter's history. operation: the ID of the operation that decided."""

    decision: str
    at: datetime
    who: str
    why: str
    operation: str


class DeadLetter(TypedDict):
    """
    reason: the class of failure: `permanent`, `attempts_used_up`, or the broker's `rejected`,
    `delivery_limit`.
    code, excerpt: the third party's answer (origin `delivery`).
    queue ... problem: the message as it came, its body cut; problem: why it is not a hint (origin
    `message`).
    """

    _id: str
    origin: str
    request_id: str | None
    destination: str | None
    reason: str
    decision: str | None
    decisions: NotRequired[list[DecisionRecord]]
    first_seen_at: datetime
    last_seen_at: datetime
    count: int
    code: NotRequired[str]
    excerpt: NotRequired[str]
    queue: NotRequired[str]
    exchange: NotRequired[str]
    routing_key: NotRequired[str]
    message_id: NotRequired[str | None]
    body: NotRequired[str]
    body_bytes: NotRequired[int]
    problem: NotRequired[str]


@dataclass(frozen=True, slots=True)
class Sighting:
    """
    A letter as it is seen once more, or for the first time.

    fields: what replaces the stored fields; `count` and `first_seen_at` are not among them.
    """

    id: str
    fields: Mapping[str, Any]


def from_delivery(
    *,
    request_id: str,
    destination: str,
    reason: str,
    code: str,
    excerpt: str,
    seen_at: datetime,
) -> Sighting:
    return Sighting(
        f"delivery/{request_id}/{destination}",
        {
            "origin": FROM_DELIVERY,
            "request_id": request_id,
            "destination": destination,
            "reason": reason,
            "code": code,
            "excerpt": excerpt,
            # a decision about an earlier failure does not apply to this one
            "decision": None,
            "last_seen_at": seen_at,
        },
    )


def upsert_of_delivery(sighting: Sighting) -> dict[str, Any]:
    """The MongoDB update that stores a sighting of origin `delivery`."""
    return {
        "$set": sighting.fields,
        "$setOnInsert": {"first_seen_at": sighting.fields["last_seen_at"]},
        "$inc": {"count": 1},
    }


def from_message(
    *,
    queue: str,
    reason: str,
    exchange: str,
    routing_key: str,
    message_id: str | None,
    body: bytes,
    problem: str,
    request_id: str | None,
    destination: str | None,
) -> Sighting:
    """
    The same message from the same queue has the same ID, so it is stored once.

    `decision`, `count` and the dates are the dead-letter consumer's to set.
    """
    digest = sha256("\0".join([queue, message_id or "", ""]).encode() + body).hexdigest()
    return Sighting(
        f"message/{digest}",
        {
            "origin": FROM_BROKER,
            "queue": queue,
            "reason": reason,
            "exchange": exchange,
            "routing_key": routing_key,
            "message_id": message_id,
            "body": body[:BODY_LIMIT_BYTES].decode("utf-8", "replace"),
            "body_bytes": len(body),
            "problem": problem,
            "request_id": request_id,
            "destination": destination,
        },
    )
