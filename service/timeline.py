"""One request's history, from its document and its events: what happened, and what comes next."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from assistance import events
from assistance.books import EVENT_TYPES, events_by_id, seq_of
from assistance.collection import ASSISTANCES
from assistance.delivery import Delivery, next_look_at
from assistance.request import Request
from assistance.waiting import Reason, why_waiting
from outbox.collection import OUTBOX
from outbox.state import State
from runtime import clock
from runtime.mongo import Database


@dataclass(frozen=True, slots=True)
class Entry:
    """
    at: the time, or None if unknown.
    what: one word (`accepted`, `appended`, `published`, `held`, `started`, `ended`, `next`, ...).
    subject: the destination or event concerned.
    detail: further information in words.
    """

    at: datetime | None
    what: str
    subject: str
    detail: str


@dataclass(frozen=True, slots=True)
class RequestHistory:
    request: Request
    entries: Sequence[Entry]


async def find_history(
    database: Database, request_id: str, projection: Mapping[str, Any] | None = None
) -> RequestHistory | None:
    """
    projection: fields of the request to exclude from the read, and so from the result.

    Raises PyMongoError.
    """
    request: Request | None = await database[ASSISTANCES].find_one({"_id": request_id}, projection)
    if request is None:
        return None
    its_events = await database[OUTBOX].find({"key": request_id}, {"payload": False}).to_list(None)
    return RequestHistory(request, timeline(request, its_events, now=clock.now()))


def timeline(
    request: Request, outbox_documents: Sequence[Mapping[str, Any]], *, now: datetime
) -> list[Entry]:
    """
    Causes before their effects, otherwise in order of time; the next steps come last.

    The times may be those of several machines' clocks, so they alone do not decide the order.

    Events of other applications, which may use the same key, are left out. An event that has one of
    our types but no sequence number was written by another application; it is shown and marked.
    """
    ours = [document for document in outbox_documents if document.get("type") in EVENT_TYPES]
    in_order = sorted(ours, key=lambda document: seq_of(document) or 0)
    accepted = _accepted(request)
    chains = [list(_event(document)) for document in in_order]
    # each event was appended after the one before
    chains.append([appended for appended, *_ in chains])
    chains += [list(_attempts(delivery)) for delivery in request["deliveries"]]
    return [
        *_removed(request, sum(seq_of(document) is not None for document in ours)),
        *_merged(accepted, chains, now),
        *_next(request, events_by_id(in_order), now),
    ]


def _merged(first: Entry, chains: Sequence[Sequence[Entry]], now: datetime) -> Iterator[Entry]:
    """
    The order of time, in which an entry counts as no earlier than those before it in its chains.

    Entries are compared by identity: several chains may share one.
    """
    start = first.at or now
    counted = {id(first): start}
    entries = {id(first): first}
    # twice: an entry that one chain moves may move those behind it in an earlier chain
    for chain in (*chains, *chains):
        latest = start
        for entry in chain:
            entries[id(entry)] = entry
            latest = max(latest, counted.get(id(entry), entry.at or now))
            counted[id(entry)] = latest
    yield from sorted(entries.values(), key=lambda entry: counted[id(entry)])


def _accepted(request: Request) -> Entry:
    destinations = ", ".join(delivery["destination"] for delivery in request["deliveries"])
    return Entry(request["created_at"], "accepted", request["topic"], f"goes to {destinations}")


def _removed(request: Request, found: int) -> Iterator[Entry]:
    count = request["version"] - found
    if count > 0:
        detail = f"{count} of {request['version']} were published long ago and are not kept"
        yield Entry(None, "removed", "events", detail)


def _event(document: Mapping[str, Any]) -> Iterator[Entry]:
    subject = _subject(document)
    seq = seq_of(document)
    which = (
        "event without a number, written by another application" if seq is None else f"event {seq}"
    )
    created_at = document.get("created_at")
    at = created_at if isinstance(created_at, datetime) else None
    yield Entry(at, "appended", subject, which)
    match document.get("state"):
        case State.PUBLISHED:
            yield Entry(document.get("published_at"), "published", subject, "")
        case State.HELD:
            detail = f"{document.get('reason')}; tried again {_at(document.get('retry_at'))}"
            yield Entry(document.get("settled_at"), "held", subject, detail)
        case State.PARKED | State.DISCARDED as state:
            yield Entry(
                document.get("settled_at"), str(state), subject, str(document.get("reason"))
            )


def _subject(document: Mapping[str, Any]) -> str:
    type, routing_key = str(document["type"]), str(document.get("routing_key"))
    return routing_key if type == events.HINT else type


def _attempts(delivery: Delivery) -> Iterator[Entry]:
    for attempt in delivery["attempts"]:
        subject = f"{delivery['destination']}, attempt {attempt['number']}"
        # absent when the history is read for the API, which does not show hosts
        worker = attempt.get("worker")
        by = f"by worker {worker}" if worker else ""
        yield Entry(attempt["started_at"], "started", subject, by)
        if "ended_at" in attempt:
            said = (
                attempt.get("verdict"),
                attempt.get("code"),
                f"after {attempt['calls']} calls" if attempt.get("calls", 1) > 1 else None,
                attempt.get("excerpt"),
            )
            detail = ", ".join(str(part) for part in said if part)
            yield Entry(attempt["ended_at"], "ended", subject, detail)


def _next(
    request: Request, hints: Mapping[str, Mapping[str, Any]], now: datetime
) -> Iterator[Entry]:
    for delivery in request["deliveries"]:
        hint = hints.get(delivery["hint_event"], {})
        reason = why_waiting(delivery, hint or None, now=now)
        if reason is not None:
            at, detail = _what_comes(reason, delivery, hint)
            yield Entry(at, "next", delivery["destination"], f"{reason}: {detail}")


_WITHOUT_A_DATE = {
    Reason.TO_BE_PUBLISHED: "the relay publishes it",
    Reason.UNAVAILABLE: "it goes on as soon as its destination does",
    Reason.NEEDS_DECISION: "it is not known whether it arrived; an operator decides",
}


def _what_comes(
    reason: Reason, delivery: Delivery, hint: Mapping[str, Any]
) -> tuple[datetime | None, str]:
    look_at = next_look_at(delivery)
    match reason:
        case Reason.QUEUED:
            return None, f"a worker takes it; if none does, a new hint follows {_at(look_at)}"
        case Reason.IN_FLIGHT:
            return None, f"a worker is delivering it; its claim ends {_at(delivery['lease_until'])}"
        case Reason.DUE_LATER:
            return delivery["due_at"], "the reconciler wakes a worker then"
        case Reason.DUE:
            return look_at, "the reconciler wakes a worker"
        case Reason.CLAIM_EXPIRED:
            return look_at, "its worker is gone; the reconciler wakes another"
        case Reason.TO_BE_PUBLISHED | Reason.UNAVAILABLE | Reason.NEEDS_DECISION:
            return None, _WITHOUT_A_DATE[reason]
        case Reason.HELD:
            return hint.get("retry_at"), f"the relay tries it again ({hint.get('reason')})"
        case Reason.PARKED | Reason.DISCARDED:
            return None, f"an operator decides ({hint.get('reason')})"
        case Reason.OVERDUE | Reason.NONE:
            return look_at, "it was not picked up: check that the reconciler is running"


def _at(moment: datetime | None) -> str:
    return "at an unknown time" if moment is None else f"at {moment:%Y-%m-%d %H:%M:%S}"
