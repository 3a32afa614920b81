"""
Hints: who may wake a worker for a delivery, and when.

A hint is trusted until `hint_until`. Then a new one may be appended to the outbox, in the one
transaction that sets the next `hint_until`, and only if the newest was published: one that still
waits in the outbox is the relay's to send. Of several who try, one wins.
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
from consumers.delivery.updates import NOW, change, given
from outbox.collection import OUTBOX
from outbox.state import State
from runtime.mongo import Database, Session, in_transaction

#: A dead letter proves that the newest hint is lost, so its patience is cut short; doubled with
#: each hint since the last attempt, so that a worker that crashes on and on makes no storm.
GIVEN_BACK_SECONDS = 5.0

#: Settled, and gone from the queues or on the way to be: there is nothing more to wait for.
_NOT_ON_ITS_WAY = frozenset({State.PUBLISHED.value, State.DISCARDED.value})


class Step(StrEnum):
    """What is due to a delivery whose hint is no longer trusted."""

    SEND = auto()
    POSTPONE = auto()


@dataclass(frozen=True, slots=True)
class DueDelivery:
    """A delivery that the reconciler has to see to, as it was found."""

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
        The deliveries that are due and woken by nobody, those waiting longest first.

        excluded: the destinations whose deliveries are left out.

        One of each request: its new hint bumps the version that the others would rely on.
        """
        return await self._find_due(now, {"$nin": sorted(excluded)} if excluded else None, limit)

    async def find_due_for(self, destination: str, now: datetime) -> list[DueDelivery]:
        """The one that waits longest for this destination, if any does."""
        return await self._find_due(now, {"$in": [destination]}, 1)

    async def _find_due(
        self, now: datetime, destinations: Mapping[str, list[str]] | None, limit: int
    ) -> list[DueDelivery]:
        # the type is spelled out because only then may the partial index serve
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
        """Append a new hint; its event id, or None where somebody else was quicker."""
        delivery = due.delivery
        hints = delivery["hints"] + 1
        context = EventContext(due.request_id, now, delivery["hint_event"], due.trace)
        hint = events.hint(context, destination=due.destination, seq=due.version + 1)
        changed = change(
            due.destination,
            {
                "hint_event": given(hint["_id"]),
                "hints": given(hints),
                "hint_until": _after(hint_patience_seconds(hints)),
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
        """Trust the newest hint for longer: it is still on its way to the broker."""
        patience_seconds = hint_patience_seconds(max(due.delivery["hints"], 1))
        answer = await self._requests.update_one(
            _as_found(due), change(due.destination, {"hint_until": _after(patience_seconds)})
        )
        return bool(answer.matched_count)

    async def spend(self, request_id: str, destination: str, hint_event: str) -> None:
        """
        The newest hint came before its delivery was due, and wakes nobody any more.

        The service's clock may run ahead of the database's; without this such a delivery would
        wait until its hint is no longer trusted.
        """
        await self._requests.update_one(
            _waiting_for(request_id, destination, hint_event),
            change(destination, {"hint_until": "$$delivery.due_at"}),
        )

    async def give_back(self, request_id: str, destination: str, hint_event: str) -> bool:
        """The newest hint is lost for sure: trust it for a short while only. Whether it was."""
        doubled = {"$pow": [2, {"$min": [{"$max": [{"$add": ["$$delivery.hints", -1]}, 0]}, 16]}]}
        patience_ms = {"$multiply": [int(GIVEN_BACK_SECONDS * 1000), doubled]}
        sooner = {"$min": ["$$delivery.hint_until", {"$add": [NOW, patience_ms]}]}
        answer = await self._requests.update_one(
            _waiting_for(request_id, destination, hint_event),
            change(destination, {"hint_until": sooner}),
        )
        return bool(answer.matched_count)

    async def unsettled(self, event_ids: list[str]) -> set[str]:
        """Those of the events that are still the relay's to send."""
        # a published event expires in time; one that is no longer there was sent
        query = {"_id": {"$in": event_ids}, "state": {"$nin": sorted(_NOT_ON_ITS_WAY)}}
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


def _after(seconds: float) -> dict[str, Any]:
    return {"$add": [NOW, int(seconds * 1000)]}


def _as_found(due: DueDelivery) -> dict[str, Any]:
    """Untouched since: a claim, a record or another reconciler would have moved one of these."""
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
