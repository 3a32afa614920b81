"""`python -m service audit`: every request compared with its events, in one consistent view."""

from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from assistance.books import (
    CLOCK_SLACK,
    EVENT_TYPES,
    Books,
    ClosedBalance,
    place_of,
    status_closed_at,
)
from assistance.breaker import DestinationState, accepts_calls
from assistance.collection import ASSISTANCES, CLOSED_BALANCE, DESTINATIONS
from assistance.request import Request, Status
from assistance.waiting import OVERDUE_AFTER_SECONDS, Reason
from outbox.collection import OUTBOX, PUBLISHED_RETENTION_DAYS
from outbox.state import State
from runtime import clock
from runtime.mongo import Database, Session, snapshot_session

OutboxDocuments = list[Mapping[str, Any]]

#: A request and its events are written together, so this should never happen.
ORPHANED = "the outbox holds its events, but the request itself does not exist"


#: Requests of a full audit that are read in one snapshot. The server keeps a snapshot for five
#: minutes (minSnapshotHistoryWindowInSeconds).
PART_COUNT = 100_000

#: Requests whose events are read together.
BATCH_COUNT = 500

EVENT_FIELDS = ("key", "type", "seq", "state", "created_at")

OURS = {"key": {"$type": "string"}, "type": {"$in": EVENT_TYPES}}

CLOSED = [Status.SUCCEEDED.value, Status.FAILED.value]

#: What is listed in the place of a request when the stored balance is wrong.
STORED_BALANCE = "stored balance"


class _Reading:
    """
    The books of the requests that are read, and how many of these were closed at two moments: at
    the end of the verified balance, and at `until`, where the next one ends.
    """

    def __init__(
        self,
        unavailable: Collection[str],
        overdue_after_seconds: float,
        verified: ClosedBalance | None,
    ) -> None:
        self.books = Books()
        self.now = clock.now()
        self.until = self.now - CLOCK_SLACK
        self.verified = verified
        self.closed_before: Counter[Status] = Counter()
        self.closed: Counter[Status] = Counter()
        self._unavailable = unavailable
        self._overdue_after_seconds = overdue_after_seconds

    def enter(self, request_id: str, request: Request | None, its_events: OutboxDocuments) -> None:
        if request is None:
            self.books.add_unexplained(request_id, (ORPHANED,))
            return
        place = place_of(
            request,
            its_events,
            now=self.now,
            overdue_after_seconds=self._overdue_after_seconds,
            unavailable=self._unavailable,
        )
        self.books.enter(request_id, place)
        if status := status_closed_at(request, its_events, self.until):
            self.closed[status] += 1
        if self.verified is None:
            return
        if status := status_closed_at(request, its_events, self.verified.until):
            self.closed_before[status] += 1


async def balance(
    database: Database,
    *,
    overdue_after_seconds: float = OVERDUE_AFTER_SECONDS,
    part_count: int = PART_COUNT,
) -> Books:
    """
    The books of all requests, each read and checked, and the stored balance compared with them.

    Both collections are read once, side by side, in request ID order; memory holds one request at
    a time. Every `part_count` requests are one consistent view.

    Raises PyMongoError; with code 239 when a part takes longer than the server keeps a snapshot.
    """
    verified = await _stored_balance(database)
    reading = _Reading(await _unavailable(database), overdue_after_seconds, verified)
    first: str | None = ""
    while first is not None:
        async with snapshot_session(database.client) as session:
            found = await (
                database[ASSISTANCES]
                .find({"_id": {"$gte": first}}, {"_id": True}, session=session)
                .sort("_id", 1)
                .skip(part_count)
                .limit(1)
                .to_list(1)
            )
            end: str | None = found[0]["_id"] if found else None
            ids = {"$gte": first} if end is None else {"$gte": first, "$lt": end}
            requests = database[ASSISTANCES].find(
                {"_id": ids},
                {"topic": False, "description": False},
                sort=[("_id", 1)],
                session=session,
            )
            events = database[OUTBOX].find(
                {"key": ids, "type": {"$in": EVENT_TYPES}},
                dict.fromkeys(EVENT_FIELDS, True),
                sort=[("key", 1)],
                session=session,
            )
            async for request_id, request, its_events in _side_by_side(requests, events):
                reading.enter(request_id, request, its_events)
        first = end
    await _store_balance(database, reading, reading.closed)
    if verified is not None and (wrong := _difference(verified, reading.closed_before)):
        # reported once: the balance that was just stored is right
        reading.books.add_unexplained(STORED_BALANCE, (wrong,))
    return reading.books


async def balance_since(
    database: Database, *, overdue_after_seconds: float = OVERDUE_AFTER_SECONDS
) -> Books | None:
    """
    The books, of which only the requests that are open or changed since the stored balance are
    read and checked, in one consistent view; the others are counted as that balance has them.

    None if there is no stored balance that can be continued. Raises PyMongoError.
    """
    verified = await _stored_balance(database)
    if verified is None:
        return None
    reading = _Reading(await _unavailable(database), overdue_after_seconds, verified)
    chosen = (
        {"status": Status.ACCEPTED.value},
        {"status": {"$in": CLOSED}, "updated_at": {"$gt": verified.until}},
    )
    read: set[str] = set()
    async with snapshot_session(database.client) as session:
        for query in chosen:
            requests = database[ASSISTANCES].find(
                query, {"topic": False, "description": False}, session=session
            )
            async for request, its_events in _with_their_events(database, requests, session):
                read.add(request["_id"])
                reading.enter(request["_id"], request, its_events)
        for request_id in await _orphaned_since(database, verified, read, session):
            reading.enter(request_id, None, [])
    before = reading.closed_before
    succeeded = verified.succeeded - before[Status.SUCCEEDED]
    failed = verified.failed - before[Status.FAILED]
    reading.books.succeeded += succeeded
    reading.books.failed += failed
    unread = Counter({Status.SUCCEEDED: succeeded, Status.FAILED: failed})
    await _store_balance(database, reading, reading.closed + unread)
    return reading.books


def _difference(stored: ClosedBalance, counted: Mapping[Status, int]) -> str | None:
    succeeded, failed = counted[Status.SUCCEEDED], counted[Status.FAILED]
    if (stored.succeeded, stored.failed) == (succeeded, failed):
        return None
    return (
        f"until {stored.until.isoformat(timespec='seconds')} it has {stored.succeeded} succeeded "
        f"and {stored.failed} failed, but {succeeded} and {failed} were counted"
    )


async def _unavailable(database: Database) -> set[str]:
    # outside the snapshot, which cannot read a collection that was created after it began
    states: list[DestinationState] = await database[DESTINATIONS].find().to_list(None)
    return {state["_id"] for state in states if not accepts_calls(state)}


async def _stored_balance(database: Database) -> ClosedBalance | None:
    stored = await database[CLOSED_BALANCE].find_one({"_id": CLOSED_BALANCE}, {"_id": False})
    balance = None if stored is None else ClosedBalance(**stored)
    return balance if balance and balance.can_be_continued(clock.now()) else None


async def _store_balance(
    database: Database, reading: _Reading, closed: Mapping[Status, int]
) -> None:
    """Only if all was explained: what was not is read again by the next audit."""
    if reading.books.unexplained:
        return
    new = ClosedBalance(reading.until, closed[Status.SUCCEEDED], closed[Status.FAILED])
    await database[CLOSED_BALANCE].replace_one({"_id": CLOSED_BALANCE}, asdict(new), upsert=True)


async def _with_their_events(
    database: Database, requests: AsyncIterator[Request], session: Session
) -> AsyncIterator[tuple[Request, OutboxDocuments]]:
    batch: list[Request] = []
    async for request in requests:
        batch.append(request)
        if len(batch) == BATCH_COUNT:
            for one in await _joined(database, batch, session):
                yield one
            batch = []
    for one in await _joined(database, batch, session):
        yield one


async def _joined(
    database: Database, requests: Sequence[Request], session: Session
) -> list[tuple[Request, OutboxDocuments]]:
    its_events: dict[str, OutboxDocuments] = {request["_id"]: [] for request in requests}
    async for event in database[OUTBOX].find(
        {"key": {"$in": list(its_events)}, "type": {"$in": EVENT_TYPES}},
        dict.fromkeys(EVENT_FIELDS, True),
        session=session,
    ):
        its_events[event["key"]].append(event)
    return [(request, its_events[request["_id"]]) for request in requests]


async def _orphaned_since(
    database: Database, verified: ClosedBalance, read: Collection[str], session: Session
) -> list[str]:
    """The keys of events that were published since, or are not published, without a request."""
    removed_after = verified.until + timedelta(days=PUBLISHED_RETENTION_DAYS)
    recent: tuple[tuple[Mapping[str, Any], list[tuple[str, int]]], ...] = (
        ({"expire_at": {"$gt": removed_after}}, [("expire_at", 1)]),
        ({"state": {"$in": [None, State.PENDING.value]}}, [("state", 1), ("seq", 1)]),
        (
            {"state": {"$in": [State.HELD.value, State.PARKED.value]}},
            [("held_key", 1), ("ordinal", 1)],
        ),
    )
    keys: set[str] = set()
    for query, order in recent:
        events = database[OUTBOX].find(
            {**query, **OURS}, {"key": True}, sort=order, session=session
        )
        keys |= {event["key"] async for event in events if event["key"] not in read}
    orphaned: list[str] = []
    unread = sorted(keys)
    for start in range(0, len(unread), BATCH_COUNT):
        some = unread[start : start + BATCH_COUNT]
        known = database[ASSISTANCES].find({"_id": {"$in": some}}, {"_id": True}, session=session)
        there = {request["_id"] async for request in known}
        orphaned += [key for key in some if key not in there]
    return orphaned


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
