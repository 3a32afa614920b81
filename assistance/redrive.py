"""
The rules of a redrive, in which an operator reopens failed deliveries.

    why_skipped   whether a delivery may be reopened, and why not
    reopen        what one transaction writes
    outcome_of    its result so far

Only a `failed` delivery is reopened, and only once. It keeps its idempotency key, so that a third
party that did get the message can recognise it. It keeps its attempts, but none of them counts any
more. Its fence grows.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from assistance import events
from assistance.dead_letter import FROM_DELIVERY, DeadLetter, Decision
from assistance.delivery import (
    HINT_PATIENCE_SECONDS,
    Delivery,
    DeliveryState,
)
from assistance.request import Request, Status, delivery_to, event_context, status_of


class Skip(StrEnum):
    """Why a letter is not redriven, as shown to operators."""

    NO_DELIVERY = "a message, not a failed delivery: nothing to send"
    DISCARDED = "discarded"
    REDRIVEN = "already redriven and not failed since"
    NO_REQUEST = "its request does not exist"
    NOT_FAILED = "its delivery is no longer failed"
    NOT_CONFIGURED = "its destination is no longer configured"
    UNAVAILABLE = "its destination is suspended or its breaker is open"
    CANCELLED = "the redrive was cancelled"


def why_skipped(
    letter: DeadLetter,
    request: Request | None,
    *,
    configured: Collection[str],
    unavailable: Collection[str],
) -> Skip | None:
    """
    None if it may be reopened.

    configured: the names of all destinations; unavailable: those that are suspended or whose
    circuit breaker is open.
    """
    if letter["origin"] != FROM_DELIVERY:
        return Skip.NO_DELIVERY
    match letter.get("decision"):
        case Decision.DISCARDED:
            return Skip.DISCARDED
        case Decision.REDRIVEN:
            return Skip.REDRIVEN
    destination = letter["destination"]
    delivery = delivery_to(request, destination) if request and destination else None
    if delivery is None:
        return Skip.NO_REQUEST
    if delivery["state"] != DeliveryState.FAILED:
        return Skip.NOT_FAILED
    if destination not in configured:
        return Skip.NOT_CONFIGURED
    if destination in unavailable:
        return Skip.UNAVAILABLE
    return None


@dataclass(frozen=True, slots=True)
class Reopening:
    """
    What one transaction writes, given the request as it was read: all of it or nothing.

    delivery_fields: the changed fields of the delivery; request_fields: those of the request,
    except `next_due_at`.
    """

    delivery_fields: Mapping[str, Any]
    request_fields: Mapping[str, Any]
    outbox_documents: Sequence[Mapping[str, Any]]

    @property
    def hint_event(self) -> str:
        hint_event: str = self.delivery_fields["hint_event"]
        return hint_event


def reopen(request: Request, delivery: Delivery, *, redrive_id: str, now: datetime) -> Reopening:
    """
    The delivery waits again and is due at once. A failed request becomes accepted again, which is
    a fact; a request with another open delivery has been accepted all along.
    """
    states = [
        DeliveryState.WAITING.value if each is delivery else each["state"]
        for each in request["deliveries"]
    ]
    status = status_of(states)
    seq = request["version"]
    context = event_context(request, now, cause=delivery["hint_event"])
    documents: list[dict[str, Any]] = []
    if request["status"] != Status.ACCEPTED:
        seq += 1
        documents.append(
            events.fact(events.REDRIVEN, context, topic=request["topic"], status=status, seq=seq)
        )
    seq += 1
    hint = events.hint(context, destination=delivery["destination"], seq=seq)
    return Reopening(
        delivery_fields={
            "state": DeliveryState.WAITING.value,
            "fence": delivery["fence"] + 1,
            "attempts_counted": 0,
            "due_at": now,
            "lease_until": None,
            "hint_event": hint["_id"],
            "hint_until": now + timedelta(seconds=HINT_PATIENCE_SECONDS),
            "hints": 1,
            "redriven_by": redrive_id,
        },
        request_fields={"status": status.value, "version": seq, "updated_at": now},
        outbox_documents=[*documents, hint],
    )


class ItemState(StrEnum):
    """
    The states of a letter in a redrive.

        planned ─> sent ─> succeeded
           │        │ │        ^
           │        │ └> retrying ─┐
           v        v              v
        skipped    failed_again <──┘

    `retrying`: tried since, without success; the next attempt follows its schedule.
    """

    PLANNED = "planned"
    SKIPPED = "skipped"
    SENT = "sent"
    RETRYING = "retrying"
    SUCCEEDED = "succeeded"
    FAILED_AGAIN = "failed_again"


#: States that may still change.
UNFINISHED = (ItemState.SENT.value, ItemState.RETRYING.value)


def outcome_of(delivery: Delivery, *, redrive_id: str, attempts_before: int) -> ItemState:
    """The result so far of a delivery that had `attempts_before` attempts when it was reopened."""
    if delivery.get("redriven_by") != redrive_id:
        # only a failed delivery can have been reopened by another redrive
        return ItemState.FAILED_AGAIN
    match delivery["state"]:
        case DeliveryState.SUCCEEDED:
            return ItemState.SUCCEEDED
        case DeliveryState.FAILED:
            return ItemState.FAILED_AGAIN
    since = delivery["attempts"][attempts_before:]
    tried = any("ended_at" in attempt and attempt.get("counted", True) for attempt in since)
    return ItemState.RETRYING if tried else ItemState.SENT


#: How many of the newest outcomes a redrive is judged by, and how many it takes to judge at all.
JUDGED_COUNT = 20
MIN_JUDGED_COUNT = 10


def failures_return(outcomes: Sequence[ItemState], *, share: float) -> bool:
    """Whether at least this share of the newest outcomes are failures. outcomes: oldest first."""
    newest = outcomes[-JUDGED_COUNT:]
    if len(newest) < MIN_JUDGED_COUNT:
        return False
    failures = sum(outcome is not ItemState.SUCCEEDED for outcome in newest)
    return failures >= share * len(newest)
