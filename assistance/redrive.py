"""
Redrive: an operator opens a failed delivery again.

    why_skipped   whether it may be opened, and why not
    reopen        what one transaction writes
    outcome_of    what has come of it since

Only a delivery that is `failed` is opened, and by whoever is first. It keeps its idempotency key,
so that a third party that has the message after all can tell; it keeps its attempts, but none of
them counts any more; its fence rises.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from assistance import events
from assistance.delivery import (
    HINT_PATIENCE_SECONDS,
    Delivery,
    DeliveryState,
)
from assistance.request import Request, Status, delivery_to, event_context, status_of


class Decision(StrEnum):
    """What became of a dead letter. Where it is missing, nobody has decided yet."""

    PARKED = "parked"
    GIVEN_BACK = "given_back"
    NOTHING_OWED = "nothing_owed"
    REDRIVEN = "redriven"
    DISCARDED = "discarded"


#: Those that wait for a person; None is a failed delivery's.
UNDECIDED: tuple[str | None, ...] = (None, Decision.PARKED.value)

#: Where a letter comes from: the ledger's record of a failed delivery, or the broker.
FROM_DELIVERY = "delivery"
FROM_BROKER = "message"


class Skip(StrEnum):
    """Why a letter is not redriven, in an operator's words."""

    NO_DELIVERY = "a message, not a failed delivery: there is nothing to send"
    DISCARDED = "discarded"
    REDRIVEN = "redriven already, and not failed since"
    NO_REQUEST = "its request is not there"
    NOT_FAILED = "its delivery is not failed any more"
    NOT_CONFIGURED = "its destination is not configured any more"
    RESTING = "its destination is paused or down"
    CANCELLED = "the redrive was cancelled"
    NO_LETTER = "there is no such letter"


def why_skipped(
    letter: Mapping[str, Any],
    request: Request | None,
    *,
    configured: Collection[str],
    resting: Collection[str],
) -> Skip | None:
    """
    None when it may be opened.

    configured: the names of all destinations; resting: those that are paused or down.
    """
    if letter["origin"] != FROM_DELIVERY:
        return Skip.NO_DELIVERY
    match letter.get("decision"):
        case Decision.DISCARDED:
            return Skip.DISCARDED
        case Decision.REDRIVEN:
            return Skip.REDRIVEN
    delivery = delivery_to(request, letter["destination"]) if request else None
    if delivery is None:
        return Skip.NO_REQUEST
    if delivery["state"] != DeliveryState.FAILED:
        return Skip.NOT_FAILED
    if letter["destination"] not in configured:
        return Skip.NOT_CONFIGURED
    if letter["destination"] in resting:
        return Skip.RESTING
    return None


@dataclass(frozen=True, slots=True)
class Reopening:
    """
    What one transaction writes, for the request as it was read: all of it or nothing.

    delivery_fields: the changed ones of the delivery; request_fields: those of the request, its
    `next_due_at` aside.
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
    The delivery waits again, due at once. A failed request is accepted again, which is a fact; one
    of which another delivery is open was accepted all the while.
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
    A letter's way through a redrive.

        planned ─> sent ─> succeeded
           │        │ │        ^
           │        │ └> retrying ─┐
           v        v              v
        skipped    failed_again <──┘

    `retrying`: tried since, without success, and to be tried again by its schedule.
    """

    PLANNED = "planned"
    SKIPPED = "skipped"
    SENT = "sent"
    RETRYING = "retrying"
    SUCCEEDED = "succeeded"
    FAILED_AGAIN = "failed_again"


#: What the ledger may still change.
UNFINISHED = (ItemState.SENT.value, ItemState.RETRYING.value)


def outcome_of(delivery: Delivery, *, redrive_id: str, attempts_before: int) -> ItemState:
    """What has come of a delivery that was opened when it had so many attempts."""
    if delivery.get("redriven_by") != redrive_id:
        return ItemState.FAILED_AGAIN  # or it could not have been opened once more
    match delivery["state"]:
        case DeliveryState.SUCCEEDED:
            return ItemState.SUCCEEDED
        case DeliveryState.FAILED:
            return ItemState.FAILED_AGAIN
    since = delivery["attempts"][attempts_before:]
    tried = any("ended_at" in attempt and attempt.get("counted", True) for attempt in since)
    return ItemState.RETRYING if tried else ItemState.SENT


#: A redrive looks at so many outcomes back, and at no fewer than so many, before it judges.
JUDGED_COUNT = 20
JUDGED_LEAST_COUNT = 10


def failures_return(outcomes: Sequence[ItemState], *, share: float) -> bool:
    """Whether so large a share of the newest outcomes are no successes. Oldest first."""
    newest = outcomes[-JUDGED_COUNT:]
    if len(newest) < JUDGED_LEAST_COUNT:
        return False
    failures = sum(outcome is not ItemState.SUCCEEDED for outcome in newest)
    return failures >= share * len(newest)
