"""`python -m service audit`: every request compared with its events, in one consistent view."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from assistance.books import EVENT_TYPES, Books, place_of
from assistance.breaker import DestinationState, accepts_calls
from assistance.collection import ASSISTANCES, DESTINATIONS
from assistance.request import Request
from assistance.waiting import OVERDUE_AFTER_SECONDS, Reason
from outbox.collection import OUTBOX
from runtime import clock
from runtime.mongo import Database, snapshot_session

OutboxDocuments = list[Mapping[str, Any]]

#: A request and its events are written together, so this should never happen.
ORPHANED = "the outbox holds its events, but the request itself does not exist"


async def balance(
    database: Database, *, overdue_after_seconds: float = OVERDUE_AFTER_SECONDS
) -> Books:
    """
    The books of all requests. Both collections are read once, side by side, in request ID order;
    memory holds one request at a time.

    Raises PyMongoError; with code 239 when the audit takes longer than the server keeps a snapshot
    (minSnapshotHistoryWindowInSeconds, five minutes).
    """
    books = Books()
    now = clock.now()
    # outside the snapshot, which cannot read a collection that was created after it began
    states: list[DestinationState] = await database[DESTINATIONS].find().to_list(None)
    unavailable = {state["_id"] for state in states if not accepts_calls(state)}
    async with snapshot_session(database.client) as session:
        requests = database[ASSISTANCES].find(
            {}, {"topic": False, "description": False}, sort=[("_id", 1)], session=session
        )
        events = database[OUTBOX].find(
            {"key": {"$type": "string"}, "type": {"$in": EVENT_TYPES}},
            {"key": True, "type": True, "seq": True, "state": True},
            sort=[("key", 1)],
            session=session,
        )
        async for request_id, request, its_events in _side_by_side(requests, events):
            if request is None:
                books.add_unexplained(request_id, (ORPHANED,))
                continue
            place = place_of(
                request,
                its_events,
                now=now,
                overdue_after_seconds=overdue_after_seconds,
                unavailable=unavailable,
            )
            books.enter(request_id, place)
    return books


async def _side_by_side(
    requests: AsyncIterator[Request], events: AsyncIterator[Mapping[str, Any]]
) -> AsyncIterator[tuple[str, Request | None, OutboxDocuments]]:
    """Both are sorted by request id; MongoDB orders strings as Python does."""
    request, event = await anext(requests, None), await anext(events, None)
    while request is not None or event is not None:
        request_id = min(
            found for found in (request and request["_id"], event and event["key"]) if found
        )
        its_events: OutboxDocuments = []
        while event is not None and event["key"] == request_id:
            its_events.append(event)
            event = await anext(events, None)
        if request is not None and request["_id"] == request_id:
            yield request_id, request, its_events
            request = await anext(requests, None)
        else:
            yield request_id, None, its_events


def books_as_document(books: Books) -> dict[str, Any]:
    return {
        "accepted": books.accepted,
        "succeeded": books.succeeded,
        "failed": books.failed,
        "waiting": books.waiting.total(),
        "waiting_for": _in_order(books),
        "overdue": books.overdue,
        "unexplained": books.unexplained,
        "listed": books.listed,
    }


def books_as_lines(books: Books) -> list[str]:
    """The last line is the balance; the lines above it list what does not add up."""
    lines = [f"waiting, {reason}: {count}" for reason, count in _in_order(books).items()]
    lines += [f"unexplained {found.request_id}: {'; '.join(found.why)}" for found in books.listed]
    if books.unexplained > len(books.listed):
        lines.append(f"and {books.unexplained - len(books.listed)} more unexplained")
    if books.overdue:
        lines.append(f"overdue {books.overdue}: check that the reconciler is running")
    return [*lines, str(books)]


def _in_order(books: Books) -> dict[str, int]:
    return {reason.value: books.waiting[reason] for reason in Reason if books.waiting[reason]}
