"""
The run of a redrive: dead letters sent on their way again, under an operator's eyes.

    send one, the canary ─> it succeeds ─> send the rest at a rate ─> each has an outcome: done
            │                                   │
            └─ it does not                      └─ failures return, or no outcome comes
               v                                   v
             paused                              paused

Each item is sent in one transaction with what it changes, so none is sent twice, whatever happens
to the command.
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
from consumers.admin.redrive_job import Held, Places, State
from consumers.database import server_time
from consumers.delivery.updates import change, given
from outbox.collection import OUTBOX
from runtime.mongo import Database, Session, in_transaction, retry_while_unavailable
from runtime.operations import OPERATION_ITEMS, OPERATIONS
from runtime.shutdown import Stop

Item = Mapping[str, Any]

#: So many may be without an outcome: whoever answers nothing gets no more.
UNANSWERED_LIMIT = 100

#: Opened in one transaction.
SENT_AT_ONCE = 25

TICK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Manner:
    """
    rate_per_second: letters sent a second, at most.
    stop_share: it pauses itself when so large a share of the newest outcomes are no successes.
    patience_seconds: how long it waits for any outcome before it pauses itself or, when all are
    sent, ends.
    """

    rate_per_second: float = 10.0
    stop_share: float = 0.5
    patience_seconds: float = 120.0


class Redrive:
    """One run, by the command that holds the lease."""

    def __init__(
        self,
        database: Database,
        held: Held,
        places: Places,
        manner: Manner,
        stop: Stop,
        tell: Callable[[str], None],
    ) -> None:
        """tell: is given a word now and then, for whoever watches."""
        self._database = database
        self._items = database[OPERATION_ITEMS]
        self._requests = database[ASSISTANCES]
        self._held = held
        self._places = places
        self._manner = manner
        self._stop = stop
        self._tell = tell
        self._outcomes: list[ItemState] = []
        self._unanswered = 0
        self._sent = 0

    @property
    def id(self) -> str:
        redrive_id: str = self._held.asked["_id"]
        return redrive_id

    async def run(self) -> None:
        """
        Until it is done, paused or cancelled; the operation says which.

        Raises PyMongoError, or GivenUp at a stop while MongoDB is away: then it can be resumed.
        """
        await self._insist(self._take_stock)
        pace = Pace(self._manner.rate_per_second)
        progressed_at = monotonic()
        while await self._insist(partial(redrive_job.renew, self._database, self._held)):
            seen = await self._insist(self._observe)
            trouble = "its command was stopped" if self._stop.requested else self._trouble()
            if trouble:
                await self._pause(trouble)
                return
            sent, exhausted = await self._send_next(pace.take(self._room()))
            if seen or sent:
                progressed_at = monotonic()
            silent = monotonic() - progressed_at > self._manner.patience_seconds
            if exhausted and (silent or not self._unanswered):
                await redrive_job.close(self._database, self.id, State.DONE, owner=self._held.owner)
                return
            if silent:
                await self._pause("no outcome comes: do the relay and the worker run?")
                return
            await self._stop.rest(TICK_SECONDS)

    async def _take_stock(self) -> None:
        """What came of an earlier run's meanwhile is not for this one to judge."""
        await redrive_job.observe(self._database, self.id)

    async def _observe(self) -> int:
        """How many outcomes came."""
        waiting = [ItemState.SENT.value]
        seen = await redrive_job.observe(self._database, self.id, states=waiting)
        if seen and not self._outcomes:
            self._tell(f"the first one came back: {seen[0].value}")
        self._outcomes += seen
        self._unanswered = await self._items.count_documents(
            {"operation": self.id, "state": {"$in": waiting}}
        )
        return len(seen)

    def _trouble(self) -> str | None:
        if self._outcomes and self._outcomes[0] is not ItemState.SUCCEEDED:
            return f"the first one came back: {self._outcomes[0].value}"
        if failures_return(self._outcomes, share=self._manner.stop_share):
            return f"failures return: {self._manner.stop_share:.0%} or more of the newest"
        return None

    def _room(self) -> int:
        """How many may be sent now: the canary first, by itself."""
        if not self._outcomes:
            return 1 if self._sent == 0 else 0
        return UNANSWERED_LIMIT - self._unanswered

    async def _send_next(self, room: int) -> tuple[int, bool]:
        """How many were sent, and whether nothing is planned any more."""
        found = await self._insist(partial(self._planned, room + 1))
        sent = 0
        for start in range(0, min(room, len(found)), SENT_AT_ONCE):
            some = found[start : min(start + SENT_AT_ONCE, room)]
            sent += await self._insist(partial(self._send, some))
        self._sent += sent
        self._unanswered += sent
        return sent, len(found) <= room

    async def _planned(self, count: int) -> list[dict[str, Any]]:
        planned = {"operation": self.id, "state": ItemState.PLANNED.value}
        found: list[dict[str, Any]] = await (
            self._items.find(planned, sort=[("ordinal", 1)]).limit(count).to_list(count)
        )
        return found

    async def _send(self, some: Sequence[Item]) -> int:
        """
        Open their deliveries again, or note why not; how many were opened. May be repeated: what
        is sent is sent once.
        """
        while True:
            try:
                return await self._send_together(some)
            except _Overtaken:
                if len(some) > 1:
                    return sum([await self._send([item]) for item in some])

    async def _send_together(self, some: Sequence[Item]) -> int:
        """One transaction. Raises _Overtaken when something is not as it was read."""
        planned = {"_id": _among(some, "_id"), "state": ItemState.PLANNED.value}
        items = await self._items.find(planned).to_list(None)
        letters = await self._by_id(DEAD_LETTERS, items, "letter")
        requests = await self._by_id(ASSISTANCES, items, "request_id")
        resting = await self._places.resting()
        now = await server_time(self._database)
        skipped: list[UpdateOne] = []
        opened: list[_Opened] = []
        for item in items:
            letter, request = letters[item["letter"]], requests.get(item["request_id"])
            skip = why_skipped(
                letter,
                request,
                configured=self._places.configured,
                not_accepting=resting,
            )
            if skip is not None:
                why = {"$set": {"state": ItemState.SKIPPED.value, "why": skip.value}}
                skipped.append(UpdateOne({**planned, "_id": item["_id"]}, why))
                continue
            assert request is not None
            delivery = delivery_to(request, item["destination"])
            assert delivery is not None
            reopening = reopen(request, delivery, redrive_id=self.id, now=now)
            opened.append(_Opened(item, request, delivery, reopening))
        if skipped:
            await self._items.bulk_write(skipped)
        if opened:
            await self._commit(opened)
        return len(opened)

    async def _by_id(self, collection: str, items: Sequence[Item], name: str) -> dict[str, Any]:
        found = self._database[collection].find({"_id": _among(items, name)}, {"body": False})
        return {document["_id"]: document async for document in found}

    async def _commit(self, opened: Sequence["_Opened"]) -> None:
        decided = decide(Decision.REDRIVEN, self._held.asked)
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
        await self._database[OPERATIONS].update_one(
            {"_id": self.id, "state": State.RUNNING.value, "owner": self._held.owner},
            {"$set": {"state": State.PAUSED.value, "reason": reason}},
        )

    async def _insist(self, action: Any) -> Any:
        return await retry_while_unavailable(action, self._stop)


class _Overtaken(Exception):
    """Something was changed since it was read; nothing of the transaction stays."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """A delivery as it was read, and what makes it wait again."""

    item: Item
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


def _among(items: Sequence[Item], name: str) -> dict[str, Any]:
    return {"$in": [item[name] for item in items]}
