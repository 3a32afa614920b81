"""
Hints: when a delivery gets a new message that wakes a worker.

A hint is trusted until `hint_until`. After that a new one may be appended to the outbox, in the
transaction that sets the next `hint_until`, and only if the newest hint was published: one that is
still in the outbox will be sent by the relay. Of several concurrent attempts, one wins.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum, auto
from typing import Any

from assistance import events
from assistance.collection import ASSISTANCES
from assistance.delivery import (
    ACTIVE_STATES,
    Delivery,
    DeliveryState,
    hint_patience_seconds,
    next_look_at,
)
from assistance.events import EventContext
from assistance.request import Request
from consumers.delivery.updates import NOW, change, from_now, given
from outbox.collection import OUTBOX
from outbox.state import State
from runtime.mongo import Database, Session, in_transaction

#: A dead letter proves that the newest hint is lost, so it is trusted for this long only. Doubled
#: with each hint since the last attempt, which slows down a worker that crashes again and again.
REQUEUED_SECONDS = 5.0

#: Events that the relay will not send any more.
_SETTLED = frozenset({State.PUBLISHED.value, State.DISCARDED.value})


class Step(StrEnum):
    """What to do for a delivery whose hint is no longer trusted."""

    SEND = auto()
    POSTPONE = auto()


@dataclass(frozen=True, slots=True)
class DueDelivery:
    """A delivery that needs the reconciler, as it was found."""

    request_id: str
    version: int
    delivery: Delivery
    step: Step
    trace: Mapping[str, str] | None = None

    @property
    def destination(self) -> str:
        return self.delivery["destination"]


class Hints:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._requests = database[ASSISTANCES]
        self._outbox = database[OUTBOX]

    async def find_due(
        self, now: datetime, *, limit: int, excluded: Collection[str] = ()
    ) -> list[DueDelivery]:
        """
        The deliveries that are due and have no trusted hint, those waiting longest first.

        excluded: the destinations whose deliveries are left out.

        At most one per request: its new hint raises the version that the others would rely on.
        """
        return await self._find_due(now, {"$nin": sorted(excluded)} if excluded else None, limit)

    async def find_due_for(self, destination: str, now: datetime) -> list[DueDelivery]:
        """The delivery to this destination that has waited longest; empty if none is due."""
        return await self._find_due(now, {"$in": [destination]}, 1)

    async def _find_due(
        self, now: datetime, destinations: Mapping[str, list[str]] | None, limit: int
    ) -> list[DueDelivery]:
        # without the type the server cannot use the partial index
        due: dict[str, Any] = {"next_due_at": {"$type": "date", "$lte": now}}
        if destinations is not None:
            waiting = {
                "destination": destinations,
                "state": {"$in": list(ACTIVE_STATES)},
                "due_at": {"$lte": now},
                "hint_until": {"$lte": now},
            }
            due["deliveries"] = {"$elemMatch": waiting}
        requests: list[Request] = (
            await self._requests.find(due).sort("next_due_at").limit(limit).to_list(limit)
        )
        found = [
            (request, delivery)
            for request in requests
            if (delivery := _first_due(request, now, destinations)) is not None
        ]
        unsettled = await self.unsettled([delivery["hint_event"] for _, delivery in found])
        return [
            DueDelivery(
                request["_id"],
                request["version"],
                delivery,
                Step.POSTPONE if delivery["hint_event"] in unsettled else Step.SEND,
                request.get("trace"),
            )
            for request, delivery in found
        ]

    async def send(self, due: DueDelivery, now: datetime) -> str | None:
        """Append a new hint; its event id, or None if the delivery was changed in between."""
        delivery = due.delivery
        hints = delivery["hints"] + 1
        context = EventContext(due.request_id, now, delivery["hint_event"], due.trace)
        hint = events.hint(context, destination=due.destination, seq=due.version + 1)
        changed = change(
            due.destination,
            {
                "hint_event": given(hint["_id"]),
                "hints": given(hints),
                "hint_until": from_now(hint_patience_seconds(hints)),
            },
            {"version": given(due.version + 1)},
        )

        async def write(session: Session) -> bool:
            answer = await self._requests.update_one(
                {**_as_found(due), "version": due.version}, changed, session=session
            )
            if answer.matched_count:
                await self._outbox.insert_one(hint, session=session)
            return bool(answer.matched_count)

        sent = await in_transaction(self._database.client, write)
        return str(hint["_id"]) if sent else None

    async def postpone(self, due: DueDelivery) -> bool:
        """Trust the newest hint for longer: the relay has yet to publish it."""
        patience_seconds = hint_patience_seconds(max(due.delivery["hints"], 1))
        answer = await self._requests.update_one(
            _as_found(due), change(due.destination, {"hint_until": from_now(patience_seconds)})
        )
        return bool(answer.matched_count)

    async def spend(self, request_id: str, destination: str, hint_event: str) -> None:
        """
        Trust the newest hint until the due date only: it was consumed before the delivery was due.

        The service's clock may run ahead of the database's. Without this, such a delivery would
        wait until its hint is no longer trusted.
        """
        await self._requests.update_one(
            _waiting_for(request_id, destination, hint_event),
            change(destination, {"hint_until": "$$delivery.due_at"}),
        )

    async def requeue(self, request_id: str, destination: str, hint_event: str) -> bool:
        """Trust a lost hint for a short time only; false if it is not the delivery's newest."""
        doubled = {"$pow": [2, {"$min": [{"$max": [{"$add": ["$$delivery.hints", -1]}, 0]}, 16]}]}
        patience_ms = {"$multiply": [int(REQUEUED_SECONDS * 1000), doubled]}
        sooner = {"$min": ["$$delivery.hint_until", {"$add": [NOW, patience_ms]}]}
        answer = await self._requests.update_one(
            _waiting_for(request_id, destination, hint_event),
            change(destination, {"hint_until": sooner}),
        )
        return bool(answer.matched_count)

    async def unsettled(self, event_ids: list[str]) -> set[str]:
        """Those of the events that the relay has yet to publish."""
        # a published event expires; one that is missing was published
        query = {"_id": {"$in": event_ids}, "state": {"$nin": sorted(_SETTLED)}}
        return {event["_id"] async for event in self._outbox.find(query, {"_id": 1})}


def _first_due(
    request: Request, now: datetime, destinations: Mapping[str, list[str]] | None
) -> Delivery | None:
    for delivery in request["deliveries"]:
        look_at = next_look_at(delivery)
        if look_at is not None and look_at <= now and _among(delivery, destinations):
            return delivery
    return None


def _among(delivery: Delivery, destinations: Mapping[str, list[str]] | None) -> bool:
    match destinations:
        case {"$in": names}:
            return delivery["destination"] in names
        case {"$nin": names}:
            return delivery["destination"] not in names
    return True


def _as_found(due: DueDelivery) -> dict[str, Any]:
    """Unchanged since: a claim, a record or another reconciler changes one of these fields."""
    same = {
        name: due.delivery[name]
        for name in ("destination", "state", "fence", "due_at", "hint_event", "hint_until")
    }
    return {"_id": due.request_id, "deliveries": {"$elemMatch": same}}


def _waiting_for(request_id: str, destination: str, hint_event: str) -> dict[str, Any]:
    waiting = {
        "destination": destination,
        "state": DeliveryState.WAITING.value,
        "hint_event": hint_event,
    }
    return {"_id": request_id, "deliveries": {"$elemMatch": waiting}}
