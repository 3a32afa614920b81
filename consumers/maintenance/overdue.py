"""Requests that are still accepted past their target time, found by an index."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from assistance.collection import ASSISTANCES
from assistance.delivery import OPEN_STATES
from assistance.request import Request, Status
from consumers.database import server_time
from outbox.collection import OUTBOX
from runtime.mongo import Database, aggregate
from runtime.monitoring import Monitor

#: The count stops here: an alert needs no more, and the query stays short.
COUNTED_LIMIT = 10_000

POLL_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Overdue:
    """Open deliveries of one destination; oldest_age_seconds counts from acceptance."""

    count: int
    oldest_age_seconds: float


async def overdue(database: Database, target_seconds: float) -> dict[str, Overdue]:
    """By destination, for up to ten thousand of the oldest requests."""
    now = await server_time(database)
    pipeline: list[dict[str, Any]] = [
        {"$match": _past_target(now, target_seconds)},
        {"$sort": {"created_at": 1}},
        {"$limit": COUNTED_LIMIT},
        {"$unwind": "$deliveries"},
        {"$match": {"deliveries.state": {"$in": list(OPEN_STATES)}}},
        {
            "$group": {
                "_id": "$deliveries.destination",
                "count": {"$sum": 1},
                "oldest": {"$min": "$created_at"},
            }
        },
        {"$sort": {"_id": 1}},
    ]
    return {
        found["_id"]: Overdue(found["count"], (now - found["oldest"]).total_seconds())
        async for found in aggregate(database[ASSISTANCES], pipeline)
    }


@dataclass(frozen=True, slots=True)
class Late:
    """hints: the outbox documents of its newest hints by event id, those that have not expired."""

    request: Request
    age_seconds: float
    hints: Mapping[str, Mapping[str, Any]]


async def oldest(database: Database, target_seconds: float, *, limit: int) -> list[Late]:
    """Without descriptions."""
    now = await server_time(database)
    cursor = database[ASSISTANCES].find(
        _past_target(now, target_seconds), {"description": False}, sort=[("created_at", 1)]
    )
    found: list[Request] = await cursor.limit(limit).to_list(limit)
    ids = [delivery["hint_event"] for request in found for delivery in request["deliveries"]]
    kept = database[OUTBOX].find({"_id": {"$in": ids}}, {"payload": False})
    hints = {hint["_id"]: hint async for hint in kept}
    return [
        Late(request, (now - request["created_at"]).total_seconds(), hints) for request in found
    ]


def _past_target(now: datetime, target_seconds: float) -> dict[str, Any]:
    # in the order of the index on status and created_at
    return {
        "status": Status.ACCEPTED.value,
        "created_at": {"$lte": now - timedelta(seconds=target_seconds)},
    }


def show_overdue(monitor: Monitor, database: Database, target_seconds: float) -> None:
    """As metrics; absent while unknown, and for destinations without overdue deliveries."""
    latest = monitor.poll(
        "what is overdue",
        lambda: overdue(database, target_seconds),
        every_seconds=POLL_SECONDS,
    )
    monitor.gauges(
        "deliveries_overdue",
        f"open deliveries of requests past their target time, up to {COUNTED_LIMIT} requests",
        lambda: {name: one.count for name, one in (latest.value or {}).items()},
        label="destination",
    )
    monitor.gauges(
        "deliveries_overdue_oldest_age_seconds",
        "age of the oldest request with such a delivery",
        lambda: {name: one.oldest_age_seconds for name, one in (latest.value or {}).items()},
        label="destination",
    )
