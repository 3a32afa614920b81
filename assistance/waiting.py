"""Why an open delivery waits: one set of words for the audit, the timeline and every command."""

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from assistance.delivery import Delivery, DeliveryState, next_look_at
from outbox.state import State

#: The reconciler looks every few seconds; a delivery this long past its due date was missed.
OVERDUE_AFTER_SECONDS = 300.0


class Reason(StrEnum):
    """Why a delivery waits; the most worrying first."""

    NONE = "no reason"
    OVERDUE = "overdue"
    PARKED = "hint parked"
    DISCARDED = "hint discarded"
    HELD = "hint held"
    TO_BE_PUBLISHED = "hint to be published"
    CLAIM_EXPIRED = "claim expired"
    DUE = "due"
    NEEDS_DECISION = "needs a decision"
    UNAVAILABLE = "destination suspended or breaker open"
    DUE_LATER = "due later"
    IN_FLIGHT = "in flight"
    QUEUED = "queued"


_REASON_OF_HINT_STATE = {
    None: Reason.TO_BE_PUBLISHED,
    State.PENDING.value: Reason.TO_BE_PUBLISHED,
    State.HELD.value: Reason.HELD,
    State.PARKED.value: Reason.PARKED,
    State.DISCARDED.value: Reason.DISCARDED,
}


def why_waiting(
    delivery: Delivery,
    hint: Mapping[str, Any] | None,
    *,
    now: datetime,
    overdue_after_seconds: float = OVERDUE_AFTER_SECONDS,
    unavailable: Collection[str] = (),
) -> Reason | None:
    """
    Why an open delivery waits; None for a closed one.

    hint: the outbox document of its newest hint, or None if it has been removed.
    unavailable: the destinations that are suspended or whose circuit breaker is open; the
    reconciler leaves their deliveries alone.
    """
    if delivery["state"] == DeliveryState.NEEDS_DECISION:
        return Reason.NEEDS_DECISION
    look_at = next_look_at(delivery)
    if look_at is None:
        return None
    lease_until = delivery["lease_until"]
    if lease_until is not None and lease_until > now:
        return Reason.IN_FLIGHT
    if hint is not None and hint.get("state") != State.PUBLISHED:
        return _REASON_OF_HINT_STATE[hint.get("state")]
    if delivery["destination"] in unavailable:
        return Reason.UNAVAILABLE
    if now > look_at + timedelta(seconds=overdue_after_seconds):
        return Reason.OVERDUE
    if lease_until is not None:
        return Reason.CLAIM_EXPIRED
    if delivery["due_at"] > now:
        return Reason.DUE_LATER
    return Reason.QUEUED if look_at > now else Reason.DUE


def why_not_resent(
    delivery: Delivery,
    *,
    now: datetime,
    unavailable: Collection[str],
    unsettled: Collection[str],
) -> Reason | None:
    """
    Why a resend leaves an open delivery alone; None if a new hint is to be sent for it.

    A resend does not trust a published hint, as `why_waiting` does: the broker may have lost it.

    unsettled: the IDs of the events that the relay has yet to publish, held and parked ones too.
    """
    if delivery["state"] == DeliveryState.NEEDS_DECISION:
        return Reason.NEEDS_DECISION
    lease_until = delivery["lease_until"]
    if lease_until is not None and lease_until > now:
        return Reason.IN_FLIGHT
    if delivery["due_at"] > now:
        return Reason.DUE_LATER
    if delivery["destination"] in unavailable:
        return Reason.UNAVAILABLE
    if delivery["hint_event"] in unsettled:
        return Reason.TO_BE_PUBLISHED
    return None
