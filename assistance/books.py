"""
The books: accepted = succeeded + failed + waiting, with a reason for each waiting request, and a
list of those that do not add up.

A request must agree with itself and with its events in the outbox. Published events are removed
after a retention time, so an event may be missing once it is old enough, but not before.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import chain
from typing import Any

from assistance import events
from assistance.delivery import is_open
from assistance.request import Request, Status, next_due_at, status_of
from assistance.waiting import OVERDUE_AFTER_SECONDS, Reason, why_waiting
from outbox.collection import PUBLISHED_RETENTION_DAYS

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

#: The clocks that dated a request and its events may differ by this much.
CLOCK_SLACK = timedelta(hours=1)

#: How many unexplained requests are listed; all of them are counted.
LISTED_LIMIT = 20


@dataclass(frozen=True, slots=True)
class Place:
    """
    A request's place in the books.

    reason: the most worrying reason of its open deliveries; None if it is closed.
    discrepancies: what does not add up, one sentence each; none in a sound system.
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
    unavailable: Collection[str] = (),
) -> Place:
    """
    outbox_documents: all events of this request; `_id`, `type`, `seq` and `state` are read.
    unavailable: the destinations that are suspended or whose circuit breaker is open.
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
                unavailable=unavailable,
            )
        )
    ]
    return Place(
        status=Status(request["status"]),
        reason=min(reasons, key=list(Reason).index, default=None),
        discrepancies=tuple(
            chain(
                _contradictions_in(request),
                _contradictions_with_events(request, outbox_documents, now=now),
            )
        ),
    )


def seq_of(document: Mapping[str, Any]) -> int | None:
    """Its number among the request's events; None if another application wrote an invalid one."""
    seq = document.get("seq")
    if isinstance(seq, bool) or not isinstance(seq, int):
        return None
    return seq if seq > 0 else None


def events_by_id(outbox_documents: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Our IDs are strings; the ID of another application's event may have any type."""
    return {
        document["_id"]: document
        for document in outbox_documents
        if isinstance(document["_id"], str)
    }


def _contradictions_in(request: Request) -> Iterator[str]:
    states = [delivery["state"] for delivery in request["deliveries"]]
    expected = status_of(states)
    if request["status"] != expected:
        given = ", ".join(states)
        yield f"it is {request['status']}, but its deliveries ({given}) imply {expected}"
    look_at = next_due_at(request["deliveries"])
    if request["next_due_at"] != look_at:
        yield (
            f"next_due_at is {_date(request['next_due_at'])}, "
            f"but its deliveries imply {_date(look_at)}"
        )


def _contradictions_with_events(
    request: Request, outbox_documents: Sequence[Mapping[str, Any]], *, now: datetime
) -> Iterator[str]:
    oldest_expected = now - timedelta(days=PUBLISHED_RETENTION_DAYS) + CLOCK_SLACK

    numbered = {seq: document for document in outbox_documents if (seq := seq_of(document))}
    foreign = [document for document in outbox_documents if seq_of(document) is None]
    if foreign:
        types = ", ".join(sorted({document["type"] for document in foreign}))
        yield (
            f"{len(foreign)} of its events have no valid `seq`, "
            f"so another application wrote them: {types}"
        )

    facts = [seq for seq, document in numbered.items() if document["type"] in _STATUS_OF_FACT]
    newest = numbered[max(facts)] if facts else None
    status = None if newest is None else _STATUS_OF_FACT[newest["type"]]
    if status != request["status"] and request["updated_at"] > oldest_expected:
        yield f"it is {request['status']}, but its newest fact in the outbox is {status}"

    if request["created_at"] <= oldest_expected:
        return
    found = sorted(filter(None, map(seq_of, outbox_documents)))
    if found != list(range(1, request["version"] + 1)):
        yield (
            f"it has appended {request['version']} events, "
            f"but the outbox holds numbers {', '.join(map(str, found)) or 'none'}"
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
class ClosedBalance:
    """The requests that were closed at `until`, by status; every one of them was checked."""

    until: datetime
    succeeded: int
    failed: int

    def can_be_continued(self, now: datetime) -> bool:
        """Whether the outbox still holds every fact that was appended since."""
        return self.until > now - timedelta(days=PUBLISHED_RETENTION_DAYS) + CLOCK_SLACK


def status_closed_at(
    request: Request, outbox_documents: Sequence[Mapping[str, Any]], moment: datetime
) -> Status | None:
    """
    The status of a request that was closed at that moment; None if it was open, or not there yet.

    outbox_documents: every event that was appended to it since.
    """
    later = {
        seq: document["type"]
        for document in outbox_documents
        if (seq := seq_of(document))
        and document["type"] in _STATUS_OF_FACT
        and document["created_at"] > moment
    }
    if later:
        # only failed requests are redriven, and only a redrive opens a closed request
        return Status.FAILED if later[min(later)] == events.REDRIVEN else None
    status = Status(request["status"])
    return status if status is not Status.ACCEPTED and request["updated_at"] <= moment else None


@dataclass(frozen=True, slots=True)
class Unexplained:
    request_id: str
    why: tuple[str, ...]


@dataclass(slots=True)
class Books:
    """
    waiting: the number of waiting requests per reason.
    unexplained: the number of requests that do not add up; each also counts under its status.
    listed: the first 20 of these.
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
            self.add_unexplained(request_id, place.discrepancies)

    def add_unexplained(self, request_id: str, why: tuple[str, ...]) -> None:
        self.unexplained += 1
        if len(self.listed) < LISTED_LIMIT:
            self.listed.append(Unexplained(request_id, why))

    @property
    def accepted(self) -> int:
        return self.succeeded + self.failed + self.waiting.total()

    @property
    def overdue(self) -> int:
        """Requests that the reconciler should have handled by now; it may not be running."""
        return self.waiting[Reason.OVERDUE] + self.waiting[Reason.NONE]

    @property
    def balanced(self) -> bool:
        return self.unexplained == 0 and self.overdue == 0

    def __str__(self) -> str:
        return (
            f"accepted {self.accepted} = succeeded {self.succeeded} + failed {self.failed} "
            f"+ waiting {self.waiting.total()}, unexplained {self.unexplained}"
        )
