"""
The run of a redrive: sends dead letters again while an operator watches.

    send one, the canary ─> it succeeds ─> send the rest at a rate ─> each has an outcome: done
            │                                   │
            └─ it does not                      └─ failures return, or no outcome comes
               v                                   v
             paused                              paused

An item is sent in one transaction with everything it changes, so no item is sent twice, even if the
command dies.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any

from pymongo import UpdateOne

from assistance.collection import ASSISTANCES, DEAD_LETTERS
from assistance.dead_letter import Decision
from assistance.delivery import Delivery
from assistance.redrive import (
    ItemState,
    Reopening,
    failures_return,
    reopen,
    why_skipped,
)
from assistance.request import Request, delivery_to
from consumers.admin import redrive_job
from consumers.admin.dead_letters import decide
from consumers.admin.pace import Pace
from consumers.admin.redrive_job import KnownDestinations, RedriveItem, RedriveLease
from consumers.database import server_time
from consumers.delivery.updates import change, given
from outbox.collection import OUTBOX
from runtime.mongo import Database, Session, in_transaction, retry_while_unavailable
from runtime.operations import OPERATION_ITEMS
from runtime.shutdown import Stop

#: The limit of items without an outcome; beyond it, nothing more is sent.
UNANSWERED_LIMIT = 100

#: Deliveries reopened in one transaction.
SENT_AT_ONCE = 25

TICK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class RedriveOptions:
    """
    rate_per_second: the maximum rate of letters sent.
    stop_share: the redrive pauses itself when this share of the newest outcomes are failures.
    patience_seconds: without any outcome for this long, the redrive pauses itself or, when all
    letters are sent, ends.
    """

    rate_per_second: float = 10.0
    stop_share: float = 0.5
    patience_seconds: float = 120.0


class Redrive:
    """One run, by the command that holds the lease."""

    def __init__(
        self,
        database: Database,
        lease: RedriveLease,
        destinations: KnownDestinations,
        options: RedriveOptions,
        stop: Stop,
        report: Callable[[str], None],
    ) -> None:
        """report: called with a line of progress for the operator."""
        self._database = database
        self._items = database[OPERATION_ITEMS]
        self._requests = database[ASSISTANCES]
        self._lease = lease
        self._destinations = destinations
        self._options = options
        self._stop = stop
        self._report = report
        self._outcomes: list[ItemState] = []
        self._unanswered = 0
        self._sent = 0

    @property
    def id(self) -> str:
        return self._lease.redrive_id

    async def run(self) -> None:
        """
        Run until done, paused or cancelled; the stored state says which.

        Raises PyMongoError, or GivenUp at a stop while MongoDB is unavailable; the redrive can be
        resumed then.
        """
        await self._retry(self._skip_earlier_outcomes)
        pace = Pace(self._options.rate_per_second)
        progressed_at = monotonic()
        while await self._retry(partial(redrive_job.renew, self._database, self._lease)):
            seen = await self._retry(self._observe)
            problem = "its command was stopped" if self._stop.requested else self._problem()
            if problem:
                await self._pause(problem)
                return
            sent, exhausted = await self._send_next(pace.take(self._room()))
            if seen or sent:
                progressed_at = monotonic()
            silent = monotonic() - progressed_at > self._options.patience_seconds
            if exhausted and (silent or not self._unanswered):
                await redrive_job.complete(self._database, self._lease)
                return
            if silent:
                await self._pause("no outcomes: check that the relay and the worker are running")
                return
            await self._stop.rest(TICK_SECONDS)

    async def _skip_earlier_outcomes(self) -> None:
        """The outcomes of an earlier run must not pause this one."""
        await redrive_job.observe(self._database, self.id)

    async def _observe(self) -> int:
        """Returns the number of new outcomes."""
        waiting = [ItemState.SENT.value]
        seen = await redrive_job.observe(self._database, self.id, states=waiting)
        if seen and not self._outcomes:
            self._report(f"the first letter: {seen[0].value}")
        self._outcomes += seen
        self._unanswered = await self._items.count_documents(
            {"operation": self.id, "state": {"$in": waiting}}
        )
        return len(seen)

    def _problem(self) -> str | None:
        if self._outcomes and self._outcomes[0] is not ItemState.SUCCEEDED:
            return f"the first letter: {self._outcomes[0].value}"
        if failures_return(self._outcomes, share=self._options.stop_share):
            return f"{self._options.stop_share:.0%} or more of the newest outcomes are failures"
        return None

    def _room(self) -> int:
        """How many letters may be sent now: first the canary alone."""
        if not self._outcomes:
            return 1 if self._sent == 0 else 0
        return UNANSWERED_LIMIT - self._unanswered

    async def _send_next(self, room: int) -> tuple[int, bool]:
        """Returns how many were sent, and whether none is left to send."""
        found = await self._retry(partial(self._planned, room + 1))
        sent = 0
        for start in range(0, min(room, len(found)), SENT_AT_ONCE):
            some = found[start : min(start + SENT_AT_ONCE, room)]
            sent += await self._retry(partial(self._send, some))
        self._sent += sent
        self._unanswered += sent
        return sent, len(found) <= room

    async def _planned(self, count: int) -> list[RedriveItem]:
        planned = {"operation": self.id, "state": ItemState.PLANNED.value}
        found: list[RedriveItem] = await (
            self._items.find(planned, sort=[("ordinal", 1)]).limit(count).to_list(count)
        )
        return found

    async def _send(self, some: Sequence[RedriveItem]) -> int:
        """
        Reopen the items' deliveries, or record why not; returns how many were reopened.

        May be repeated: an item is sent once.
        """
        while True:
            try:
                return await self._send_together(some)
            except _Overtaken:
                if len(some) > 1:
                    return sum([await self._send([item]) for item in some])

    async def _send_together(self, some: Sequence[RedriveItem]) -> int:
        """One transaction. Raises _Overtaken when a document changed since it was read."""
        planned = {"_id": _among(some, "_id"), "state": ItemState.PLANNED.value}
        items = await self._items.find(planned).to_list(None)
        letters = await self._by_id(DEAD_LETTERS, items, "letter")
        requests = await self._by_id(ASSISTANCES, items, "request_id")
        unavailable = await self._destinations.unavailable()
        now = await server_time(self._database)
        skipped: list[UpdateOne] = []
        opened: list[_Opened] = []
        for item in items:
            letter, request = letters[item["letter"]], requests.get(item["request_id"])
            skip = why_skipped(
                letter,
                request,
                configured=self._destinations.configured,
                unavailable=unavailable,
            )
            if skip is not None:
                why = {"$set": {"state": ItemState.SKIPPED.value, "why": skip.value}}
                skipped.append(UpdateOne({**planned, "_id": item["_id"]}, why))
                continue
            assert request is not None
            assert item["destination"] is not None
            delivery = delivery_to(request, item["destination"])
            assert delivery is not None
            reopening = reopen(request, delivery, redrive_id=self.id, now=now)
            opened.append(_Opened(item, request, delivery, reopening))
        if skipped:
            await self._items.bulk_write(skipped)
        if opened:
            await self._commit(opened)
        return len(opened)

    async def _by_id(
        self, collection: str, items: Sequence[Mapping[str, Any]], name: str
    ) -> dict[str, Any]:
        found = self._database[collection].find({"_id": _among(items, name)}, {"body": False})
        return {document["_id"]: document async for document in found}

    async def _commit(self, opened: Sequence["_Opened"]) -> None:
        decided = decide(Decision.REDRIVEN, self._lease.operation)
        undecided = {"decision": None}
        writes = (
            (self._items, [one.item_update() for one in opened]),
            (self._requests, [one.request_update() for one in opened]),
            (
                self._database[DEAD_LETTERS],
                [UpdateOne({"_id": one.item["letter"], **undecided}, decided) for one in opened],
            ),
        )
        events = [event for one in opened for event in one.reopening.outbox_documents]

        async def write(session: Session) -> None:
            for collection, updates in writes:
                answer = await collection.bulk_write(updates, session=session)
                if answer.matched_count < len(updates):
                    raise _Overtaken
            await self._database[OUTBOX].insert_many(events, session=session)

        await in_transaction(self._database.client, write)

    async def _pause(self, reason: str) -> None:
        await redrive_job.pause_own(self._database, self._lease, reason)

    async def _retry(self, action: Any) -> Any:
        return await retry_while_unavailable(action, self._stop, waits_for_rights=False)


class _Overtaken(Exception):
    """A document changed since it was read; the transaction was rolled back."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """A delivery as it was read, and its reopening."""

    item: RedriveItem
    request: Request
    delivery: Delivery
    reopening: Reopening

    def item_update(self) -> UpdateOne:
        sent = {
            "state": ItemState.SENT.value,
            "sent_at": self.reopening.request_fields["updated_at"],
            "hint_event": self.reopening.hint_event,
            "attempts_before": len(self.delivery["attempts"]),
        }
        planned = {"_id": self.item["_id"], "state": ItemState.PLANNED.value}
        return UpdateOne(planned, {"$set": sent})

    def request_update(self) -> UpdateOne:
        same = {
            "destination": self.delivery["destination"],
            "state": self.delivery["state"],
            "fence": self.delivery["fence"],
        }
        as_read = {
            "_id": self.request["_id"],
            "version": self.request["version"],
            "deliveries": {"$elemMatch": same},
        }
        changed = change(
            self.delivery["destination"],
            {name: given(value) for name, value in self.reopening.delivery_fields.items()},
            {name: given(value) for name, value in self.reopening.request_fields.items()},
        )
        return UpdateOne(as_read, changed)


def _among(items: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    return {"$in": [item[name] for item in items]}
