"""
The books: accepted = succeeded + failed + waiting, each waiting one with its reason, and nothing
that does not add up.

A request is held against itself and against its events in the outbox. What is published is removed
in time, so an event may be missing once it is old enough; until then it must be there.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import chain
from typing import Any

from assistance import events
from assistance.delivery import Delivery, DeliveryState, is_open, next_look_at
from assistance.request import Request, Status, next_due_at, status_of
from outbox.collection import PUBLISHED_RETENTION_DAYS
from outbox.state import State

#: Events in the outbox that belong to a request; other writers may use the same outbox.
EVENT_TYPES = (
    events.CREATED,
    events.SUCCEEDED,
    events.FAILED,
    events.REDRIVEN,
    events.HINT,
)

_STATUS_OF_FACT = {
    events.CREATED: Status.ACCEPTED,
    events.REDRIVEN: Status.ACCEPTED,
    events.SUCCEEDED: Status.SUCCEEDED,
    events.FAILED: Status.FAILED,
}

#: The clocks that wrote a request's dates and its events' may differ by this much.
CLOCK_SLACK = timedelta(hours=1)

#: The reconciler looks every few seconds; who waits this long beyond his date was overlooked.
OVERDUE_AFTER_SECONDS = 300.0

#: A list of thousands helps nobody; the count is exact all the same.
LISTED_LIMIT = 20


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
    PAUSED = "destination paused or down"
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
    resting: Collection[str] = (),
) -> Reason | None:
    """
    Where an open delivery stands; None for one that is closed.

    hint: the outbox document of its newest hint, or None where that has been removed.
    resting: the destinations that are paused or down: what waits for them is seen to by nobody.
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
    if delivery["destination"] in resting:
        return Reason.PAUSED
    if now > look_at + timedelta(seconds=overdue_after_seconds):
        return Reason.OVERDUE
    if lease_until is not None:
        return Reason.CLAIM_EXPIRED
    if delivery["due_at"] > now:
        return Reason.DUE_LATER
    return Reason.QUEUED if look_at > now else Reason.DUE


@dataclass(frozen=True, slots=True)
class Place:
    """
    A request's place in the books.

    reason: the most worrying one of its open deliveries; None when it is closed.
    discrepancies: what does not add up, a sentence each; none in a sound system.
    """

    status: Status
    reason: Reason | None
    discrepancies: tuple[str, ...]


def place_of(
    request: Request,
    outbox_documents: Sequence[Mapping[str, Any]],
    *,
    now: datetime,
    overdue_after_seconds: float = OVERDUE_AFTER_SECONDS,
    resting: Collection[str] = (),
) -> Place:
    """
    outbox_documents: all of this request's; `_id`, `type`, `seq` and `state` are looked at.
    resting: the destinations that are paused or down.
    """
    hints = events_by_id(outbox_documents)
    reasons = [
        reason
        for delivery in request["deliveries"]
        if (
            reason := why_waiting(
                delivery,
                hints.get(delivery["hint_event"]),
                now=now,
                overdue_after_seconds=overdue_after_seconds,
                resting=resting,
            )
        )
    ]
    return Place(
        status=Status(request["status"]),
        reason=min(reasons, key=list(Reason).index, default=None),
        discrepancies=tuple(
            chain(
                _against_itself(request),
                _against_its_events(request, outbox_documents, now=now),
            )
        ),
    )


def seq_of(document: Mapping[str, Any]) -> int | None:
    """Its number among the request's events; None where a foreign hand wrote none that counts."""
    seq = document.get("seq")
    if isinstance(seq, bool) or not isinstance(seq, int):
        return None
    return seq if seq > 0 else None


def events_by_id(outbox_documents: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Ours have text for an id; a foreign one may be of any type."""
    return {
        document["_id"]: document
        for document in outbox_documents
        if isinstance(document["_id"], str)
    }


def _against_itself(request: Request) -> Iterator[str]:
    states = [delivery["state"] for delivery in request["deliveries"]]
    expected = status_of(states)
    if request["status"] != expected:
        yield f"it is {request['status']}, its deliveries ({', '.join(states)}) say {expected}"
    look_at = next_due_at(request["deliveries"])
    if request["next_due_at"] != look_at:
        yield (
            f"next_due_at is {_date(request['next_due_at'])}, its deliveries say {_date(look_at)}"
        )


def _against_its_events(
    request: Request, outbox_documents: Sequence[Mapping[str, Any]], *, now: datetime
) -> Iterator[str]:
    oldest_to_be_there = now - timedelta(days=PUBLISHED_RETENTION_DAYS) + CLOCK_SLACK

    numbered = {seq: document for document in outbox_documents if (seq := seq_of(document))}
    strangers = [document for document in outbox_documents if seq_of(document) is None]
    if strangers:
        types = ", ".join(sorted({document["type"] for document in strangers}))
        yield (
            f"{len(strangers)} of its events have no number in `seq`, "
            f"so a foreign hand wrote them: {types}"
        )

    facts = [seq for seq, document in numbered.items() if document["type"] in _STATUS_OF_FACT]
    newest = numbered[max(facts)] if facts else None
    told = None if newest is None else _STATUS_OF_FACT[newest["type"]]
    if told != request["status"] and request["updated_at"] > oldest_to_be_there:
        yield f"it is {request['status']}, but its newest fact in the outbox tells {told}"

    if request["created_at"] <= oldest_to_be_there:
        return
    found = sorted(filter(None, map(seq_of, outbox_documents)))
    if found != list(range(1, request["version"] + 1)):
        yield (
            f"it has appended {request['version']} events, "
            f"but those in the outbox are number {', '.join(map(str, found)) or 'none'}"
        )
    ids = events_by_id(outbox_documents)
    for delivery in request["deliveries"]:
        if is_open(delivery) and delivery["hint_event"] not in ids:
            yield (
                f"the delivery to {delivery['destination']} is open, "
                f"but its hint {delivery['hint_event']} is not in the outbox"
            )


def _date(moment: datetime | None) -> str:
    return "none" if moment is None else moment.isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True)
class Unexplained:
    request_id: str
    why: tuple[str, ...]


@dataclass(slots=True)
class Books:
    """
    waiting: how many requests wait for which reason.
    unexplained: how many do not add up; each stands in the column of its status as well.
    listed: the first of these, at most twenty.
    """

    succeeded: int = 0
    failed: int = 0
    waiting: Counter[Reason] = field(default_factory=Counter)
    unexplained: int = 0
    listed: list[Unexplained] = field(default_factory=list)

    def enter(self, request_id: str, place: Place) -> None:
        match place.status:
            case Status.SUCCEEDED:
                self.succeeded += 1
            case Status.FAILED:
                self.failed += 1
            case Status.ACCEPTED:
                self.waiting[place.reason or Reason.NONE] += 1
        if place.discrepancies:
            self.doubt(request_id, place.discrepancies)

    def doubt(self, request_id: str, why: tuple[str, ...]) -> None:
        self.unexplained += 1
        if len(self.listed) < LISTED_LIMIT:
            self.listed.append(Unexplained(request_id, why))

    @property
    def accepted(self) -> int:
        return self.succeeded + self.failed + self.waiting.total()

    @property
    def overdue(self) -> int:
        """How many wait though nobody has seen to them; the reconciler may be dead."""
        return self.waiting[Reason.OVERDUE] + self.waiting[Reason.NONE]

    @property
    def balanced(self) -> bool:
        return self.unexplained == 0 and self.overdue == 0

    def __str__(self) -> str:
        return (
            f"accepted {self.accepted} = succeeded {self.succeeded} + failed {self.failed} "
            f"+ waiting {self.waiting.total()}, unexplained {self.unexplained}"
        )
