"""
The state that all workers of a destination share: one document in the collection `destinations`.

It holds the breaker, the suspension, the right to probe and the time of the next call. Each worker
reads it about once a second; it is written only when it changes, and once per call where the
destination has a rate. All times are by the server's clock.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from pymongo import ReturnDocument

from assistance.breaker import BreakerState, DestinationState, Suspension, accepts_calls
from assistance.collection import ASSISTANCES, DESTINATIONS
from assistance.delivery import OPEN_STATES
from consumers.delivery.updates import NOW, from_now, given
from runtime.mongo import Database, Session, aggregate, in_transaction
from runtime.operations import Operator, record_done

#: A worker whose probe takes longer renews its right, which it does about once a second.
PROBE_SECONDS = 10.0

_CLOSED: Mapping[str, Any] = {
    "state": BreakerState.CLOSED.value,
    "openings": 0,
    "open_until": None,
    "probe_by": None,
    "probe_until": None,
}


@dataclass(frozen=True, slots=True)
class Seen:
    """now: by the server's clock."""

    state: DestinationState
    now: datetime


@dataclass(frozen=True, slots=True)
class Waiting:
    """Open deliveries; oldest_age_seconds counts from when the request was accepted."""

    count: int
    oldest_age_seconds: float


class Destinations:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._destinations = database[DESTINATIONS]

    async def look(self, name: str) -> Seen:
        """Its state. Creates a missing document, which the updates below rely on."""
        found = await self._read({"_id": name})
        if not found:
            unwritten = {**_CLOSED, "since": None, "reason": ""}
            await self._destinations.update_one(
                {"_id": name}, {"$setOnInsert": unwritten}, upsert=True
            )
            found = await self._read({"_id": name})
        return _seen(found[0])

    async def all(self) -> dict[str, Seen]:
        found = await self._read({})
        return {state["_id"]: _seen(state) for state in found}

    async def unavailable(self) -> dict[str, Seen]:
        """Destinations that are suspended, open or half-open."""
        seen = await self.all()
        return {name: one for name, one in seen.items() if not accepts_calls(one.state)}

    async def open(
        self, name: str, reason: str, wait_seconds: float, *, probe_by: str | None
    ) -> None:
        """
        Open the breaker for `wait_seconds`.

        probe_by: the worker whose probe failed; nothing changes if it lost the right to probe.
        Without it, an open breaker only changes where its wait would end sooner.
        """
        until = from_now(wait_seconds)
        mine = (
            {"probe_by": probe_by}
            if probe_by
            else {"$expr": {"$lt": [{"$ifNull": ["$open_until", given(None)]}, until]}}
        )
        first = {"$ne": ["$state", BreakerState.OPEN.value]}
        openings = {"$add": ["$openings", 1]} if probe_by else "$openings"
        await self._destinations.update_one(
            {"_id": name, **mine},
            [
                {
                    "$set": {
                        "state": BreakerState.OPEN.value,
                        "since": {"$cond": [first, NOW, "$since"]},
                        "reason": given(reason),
                        "openings": {"$cond": [first, 1, openings]},
                        "open_until": until,
                        "probe_by": None,
                        "probe_until": None,
                    }
                }
            ],
        )

    async def close(self, name: str, *, probe_by: str) -> bool:
        """Close the breaker after an answered probe; false if the right to probe was lost."""
        answer = await self._destinations.update_one(
            {"_id": name, "probe_by": probe_by},
            [{"$set": {**_CLOSED, "since": NOW, "reason": ""}}],
        )
        return bool(answer.matched_count)

    async def take_probe(self, name: str, worker: str) -> bool:
        """Take or renew the right to probe, which one worker has at a time; false if refused."""
        free = {"$lte": [{"$ifNull": ["$probe_until", NOW]}, NOW]}
        answer = await self._destinations.update_one(
            {
                "_id": name,
                "state": BreakerState.OPEN.value,
                "paused": None,
                "$expr": {
                    "$and": [
                        {"$lte": ["$open_until", NOW]},
                        {"$or": [free, {"$eq": ["$probe_by", given(worker)]}]},
                    ]
                },
            },
            [{"$set": {"probe_by": given(worker), "probe_until": from_now(PROBE_SECONDS)}}],
        )
        return bool(answer.matched_count)

    async def next_slot(self, name: str, interval_seconds: float) -> float:
        """Reserve the next call's slot; returns the seconds until it begins."""
        interval_ms = max(round(interval_seconds * 1000), 1)
        free_at = {"$max": [{"$ifNull": ["$slot_at", NOW]}, NOW]}
        taken = await self._destinations.find_one_and_update(
            {"_id": name},
            [{"$set": {"slot_at": {"$add": [free_at, interval_ms]}, "slot_asked_at": NOW}}],
            {"slot_at": 1, "slot_asked_at": 1},
            upsert=True,
            return_document=ReturnDocument.AFTER,
        )
        ahead = (taken["slot_at"] - taken["slot_asked_at"]).total_seconds()
        return max(float(ahead) - interval_ms / 1000, 0.0)

    async def suspend_as_asked(self, name: str, reason: str) -> None:
        """Suspend it because the third party accepts no more messages."""
        suspension = {"who": given("the third party"), "why": given(reason), "since": NOW}
        await self._destinations.update_one(
            {"_id": name, "paused": None}, [{"$set": {"paused": suspension}}]
        )

    async def suspend(self, name: str, operator: Operator) -> bool:
        """Suspend it until an operator resumes it; false if it was suspended. Recorded."""

        async def write(session: Session) -> bool:
            suspension = {"who": given(operator.who), "why": given(operator.why), "since": NOW}
            before = await self._destinations.find_one({"_id": name}, session=session)
            if before and before.get("paused"):
                return False
            await self._destinations.update_one(
                {"_id": name}, [{"$set": {"paused": suspension}}], upsert=True, session=session
            )
            await self._record("pause_destination", operator, name, "suspended", session)
            return True

        return await self._in_transaction(write)

    async def resume(self, name: str, operator: Operator) -> bool:
        """End its suspension and close its breaker; false if it accepts calls. Recorded."""

        async def write(session: Session) -> bool:
            before: DestinationState | None = await self._destinations.find_one(
                {"_id": name}, session=session
            )
            if before is None or accepts_calls(before):
                return False
            await self._destinations.update_one(
                {"_id": name},
                [{"$set": {**_CLOSED, "since": NOW, "reason": "", "paused": None}}],
                session=session,
            )
            suspension: Suspension | None = before.get("paused")
            was = (
                f"was suspended: {suspension['why']}"
                if suspension
                else f"breaker was open: {before['reason']}"
            )
            await self._record("resume_destination", operator, name, was, session)
            return True

        return await self._in_transaction(write)

    async def waiting(self) -> dict[str, Waiting]:
        """Open deliveries by destination; destinations without any are left out."""
        pipeline: list[dict[str, Any]] = [
            {"$match": {"status": "accepted"}},
            {"$project": {"created_at": 1, "deliveries.destination": 1, "deliveries.state": 1}},
            {"$unwind": "$deliveries"},
            {"$match": {"deliveries.state": {"$in": list(OPEN_STATES)}}},
            {
                "$group": {
                    "_id": "$deliveries.destination",
                    "count": {"$sum": 1},
                    "oldest_age_ms": {"$max": {"$subtract": [NOW, "$created_at"]}},
                }
            },
        ]
        return {
            # the clock of the service that accepted it may run ahead
            found["_id"]: Waiting(found["count"], max(found["oldest_age_ms"] / 1000, 0.0))
            async for found in aggregate(self._database[ASSISTANCES], pipeline)
        }

    async def _read(self, query: Mapping[str, Any]) -> list[Any]:
        # the server's time comes with the dates that it is compared with
        pipeline = [{"$match": dict(query)}, {"$set": {"now": NOW}}]
        return [found async for found in aggregate(self._destinations, pipeline)]

    async def _record(
        self, what: str, operator: Operator, name: str, result: str, session: Session
    ) -> None:
        await record_done(
            self._database, what, operator, destination=name, result=result, session=session
        )

    async def _in_transaction(self, write: Callable[[Session], Awaitable[bool]]) -> bool:
        return await in_transaction(self._database.client, write)


def _seen(found: dict[str, Any]) -> Seen:
    now: datetime = found.pop("now")
    return Seen(cast("DestinationState", found), now)
