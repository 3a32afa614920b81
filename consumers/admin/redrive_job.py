"""
Redrives as they are stored: planned, started, resumed, paused, cancelled, ended.

    running ──> done           an operation of `what: redrive`; `open` until done or cancelled
     │  ^
     v  │ resume               only one is open at a time: a unique index enforces it
    paused ──> cancelled

Every change of this state is made in this file. The command that runs a redrive holds a lease on
the operation and renews it before each step. So it notices a pause or a cancel within a tick, and
another command can resume a redrive whose command died.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, NotRequired, TypedDict, cast

from pymongo import ReturnDocument, UpdateOne
from pymongo.errors import DuplicateKeyError

from assistance.collection import ASSISTANCES
from assistance.dead_letter import DeadLetter
from assistance.delivery import Delivery
from assistance.redrive import UNFINISHED, ItemState, Skip, outcome_of, why_skipped
from assistance.request import Request, delivery_to
from consumers.admin.dead_letters import Selection, letters
from consumers.database import server_time
from consumers.delivery.updates import NOW
from runtime import clock
from runtime.mongo import Database, aggregate, new_owner
from runtime.operations import (
    OPERATION_ITEMS,
    OPERATIONS,
    NothingToDo,
    Operation,
    Operator,
    operation,
    record_done,
)

REDRIVE = "redrive"

LEASE_MS = 30_000

#: Items written or read at once.
PART_COUNT = 1000


class State(StrEnum):
    RUNNING = "running"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    DONE = "done"


class RedriveOperation(Operation):
    """
    lease_until: until when its owner may run it, by the server's clock.
    items_count: None until all items are stored.
    reason: why it is paused or was cancelled.
    """

    selection: Mapping[str, Any]
    rate_per_second: float
    state: str
    reason: str | None
    open: NotRequired[bool]
    owner: str
    lease_until: datetime
    items_count: int | None


class RedriveItem(TypedDict):
    """
    One letter of a redrive. why: why it was skipped; code: of the newest attempt.

    sent_at, hint_event, attempts_before: once it was sent.
    """

    _id: str
    operation: str
    ordinal: int
    letter: str
    request_id: str | None
    destination: str | None
    state: str
    why: str | None
    code: NotRequired[str | None]
    sent_at: NotRequired[datetime]
    hint_event: NotRequired[str]
    attempts_before: NotRequired[int]


class RedriveBusy(Exception):
    """Another redrive is open, or another command runs this one; says which, and what to do."""


@dataclass(frozen=True, slots=True)
class KnownDestinations:
    """configured: all names; unavailable: finds those suspended or with an open breaker."""

    configured: Collection[str]
    unavailable: Callable[[], Awaitable[Collection[str]]]


@dataclass(frozen=True, slots=True)
class Planned:
    letter: DeadLetter
    skip: Skip | None


async def plan(
    database: Database, selection: Selection, destinations: KnownDestinations
) -> list[Planned]:
    """What would be sent, what skipped, and why. Raises NothingToDo."""
    found = await letters(database, selection)
    if not found:
        raise NothingToDo("no dead letter matches; nothing was changed")
    unavailable = await destinations.unavailable()
    planned: list[Planned] = []
    for some in in_parts(found):
        requests = await _requests_of(database, some)
        planned += [
            Planned(
                letter,
                why_skipped(
                    letter,
                    requests.get(letter.get("request_id")),
                    configured=destinations.configured,
                    unavailable=unavailable,
                ),
            )
            for letter in some
        ]
    return planned


@dataclass(frozen=True, slots=True)
class RedriveLease:
    """owner: the run that may renew the lease; stored in the operation."""

    operation: RedriveOperation
    owner: str

    @property
    def redrive_id(self) -> str:
        return self.operation["_id"]


async def start(
    database: Database,
    planned: Sequence[Planned],
    selection: Selection,
    operator: Operator,
    *,
    rate_per_second: float,
) -> RedriveLease:
    """Store a planned redrive. Raises RedriveBusy while another redrive is open."""
    asked = operation(
        REDRIVE,
        operator,
        selection=selection.as_document(),
        rate_per_second=rate_per_second,
        state=State.RUNNING.value,
        reason=None,
        open=True,
        owner=new_owner(),
        lease_until=clock.now(),
        items_count=None,
    )
    try:
        await database[OPERATIONS].insert_one(asked)
    except DuplicateKeyError:
        other = await database[OPERATIONS].find_one({"what": REDRIVE, "open": True})
        if other is None:
            raise RedriveBusy("another redrive ended a moment ago; try again") from None
        raise RedriveBusy(describe(other, await server_time(database))) from None
    lease = RedriveLease(cast(RedriveOperation, asked), asked["owner"])
    for start in range(0, len(planned), PART_COUNT):
        await renew(database, lease)
        some = enumerate(planned[start : start + PART_COUNT], start)
        await database[OPERATION_ITEMS].insert_many(
            [_item(asked["_id"], ordinal, one) for ordinal, one in some]
        )
    whole = {"$set": {"items_count": len(planned)}}
    await database[OPERATIONS].update_one({"_id": asked["_id"]}, whole)
    return lease


def _item(redrive_id: str, ordinal: int, planned: Planned) -> RedriveItem:
    letter = planned.letter
    return {
        "_id": f"{redrive_id}/{letter['_id']}",
        "operation": redrive_id,
        "ordinal": ordinal,
        "letter": letter["_id"],
        "request_id": letter.get("request_id"),
        "destination": letter.get("destination"),
        "state": (ItemState.SKIPPED if planned.skip else ItemState.PLANNED).value,
        "why": planned.skip and planned.skip.value,
    }


async def renew(database: Database, lease: RedriveLease) -> bool:
    """False once the redrive was paused or cancelled, or another command resumed it."""
    answer = await database[OPERATIONS].update_one(
        {"_id": lease.redrive_id, "state": State.RUNNING.value, "owner": lease.owner},
        [{"$set": {"lease_until": {"$add": [NOW, LEASE_MS]}}}],
    )
    return bool(answer.matched_count)


async def resume(database: Database, redrive_id: str, operator: Operator) -> RedriveLease:
    """Resume a redrive that is paused or whose command died. Raises NothingToDo or RedriveBusy."""
    await find(database, redrive_id)
    gone = {"$expr": {"$lte": ["$lease_until", NOW]}}
    owner = new_owner()
    taken = await database[OPERATIONS].find_one_and_update(
        {
            "_id": redrive_id,
            "open": True,
            "items_count": {"$ne": None},
            "$or": [
                {"state": State.PAUSED.value},
                {"state": State.RUNNING.value, **gone},
            ],
        },
        [
            {
                "$set": {
                    "state": State.RUNNING.value,
                    "reason": None,
                    "owner": owner,
                    "lease_until": {"$add": [NOW, LEASE_MS]},
                }
            }
        ],
        return_document=ReturnDocument.AFTER,
    )
    if taken is None:
        now = await server_time(database)
        raise RedriveBusy(describe(await find(database, redrive_id), now))
    await record_done(database, "resume_redrive", operator, result="resumed", redrive=redrive_id)
    return RedriveLease(taken, owner)


async def pause(database: Database, redrive_id: str, operator: Operator) -> None:
    """Send nothing more until it is resumed. Raises NothingToDo."""
    if not await _pause(database, redrive_id, f"{operator.who}: {operator.why}"):
        now = await server_time(database)
        raise NothingToDo(describe(await find(database, redrive_id), now))
    await record_done(database, "pause_redrive", operator, result="paused", redrive=redrive_id)


async def pause_own(database: Database, lease: RedriveLease, reason: str) -> None:
    """The run that holds the lease pauses itself; without effect once it has lost the lease."""
    await _pause(database, lease.redrive_id, reason, owner=lease.owner)


async def _pause(database: Database, redrive_id: str, reason: str, **condition: Any) -> bool:
    running = {"_id": redrive_id, "what": REDRIVE, "state": State.RUNNING.value, **condition}
    paused = {"$set": {"state": State.PAUSED.value, "reason": reason}}
    answer = await database[OPERATIONS].update_one(running, paused)
    return bool(answer.matched_count)


async def complete(database: Database, lease: RedriveLease) -> None:
    """The run that holds the lease ends the redrive; without effect once it has lost the lease."""
    await _end(database, lease.redrive_id, State.DONE, owner=lease.owner)


async def cancel(database: Database, redrive_id: str, operator: Operator) -> None:
    """End it: planned letters stay dead letters; sent ones are delivered. Raises NothingToDo."""
    reason = f"{operator.who}: {operator.why}"
    answer = await database[OPERATIONS].update_one(
        {"_id": redrive_id, "what": REDRIVE, "open": True},
        {"$set": {"state": State.CANCELLED.value, "reason": reason}},
    )
    if not answer.matched_count:
        now = await server_time(database)
        raise NothingToDo(describe(await find(database, redrive_id), now))
    await database[OPERATION_ITEMS].update_many(
        {"operation": redrive_id, "state": ItemState.PLANNED.value},
        {"$set": {"state": ItemState.SKIPPED.value, "why": Skip.CANCELLED.value}},
    )
    await _end(database, redrive_id, State.CANCELLED)
    await record_done(database, "cancel_redrive", operator, result="cancelled", redrive=redrive_id)


async def _end(database: Database, redrive_id: str, state: State, **condition: Any) -> None:
    """End an open redrive that meets the condition; the counts become its result."""
    await observe(database, redrive_id, states=UNFINISHED)
    ended = {
        "state": state.value,
        "result": await counts(database, redrive_id),
        "carried_out_at": clock.now(),
    }
    await database[OPERATIONS].update_one(
        {"_id": redrive_id, "open": True, **condition}, {"$set": ended, "$unset": {"open": True}}
    )


async def observe(
    database: Database, redrive_id: str, *, states: Sequence[str] = UNFINISHED
) -> list[ItemState]:
    """Update the items in these states from their deliveries; returns each changed item's state."""
    collection = database[OPERATION_ITEMS]
    found: list[RedriveItem] = await collection.find(
        {"operation": redrive_id, "state": {"$in": list(states)}}
    ).to_list(None)
    changed: list[ItemState] = []
    for some in in_parts(found):
        requests = await _requests_of(database, some)
        updates: list[UpdateOne] = []
        for item in some:
            # a sent item has a request and a delivery
            assert item["destination"] is not None
            delivery = delivery_to(requests[item["request_id"]], item["destination"])
            assert delivery is not None
            state = outcome_of(
                delivery, redrive_id=redrive_id, attempts_before=item["attempts_before"]
            )
            if state != item["state"]:
                changed.append(state)
                seen = {"state": state.value, "code": _last_code(delivery)}
                updates.append(
                    UpdateOne({"_id": item["_id"], "state": item["state"]}, {"$set": seen})
                )
        if updates:
            await collection.bulk_write(updates, ordered=False)
    return changed


async def items(
    database: Database, redrive_id: str, *, state: ItemState | None = None, limit: int
) -> list[RedriveItem]:
    query = {"operation": redrive_id, **({"state": state.value} if state else {})}
    cursor = database[OPERATION_ITEMS].find(query, sort=[("ordinal", 1)], limit=limit)
    found: list[RedriveItem] = await cursor.to_list(None)
    return found


async def counts(database: Database, redrive_id: str) -> dict[str, int]:
    """The number of items per state."""
    pipeline: list[dict[str, Any]] = [
        {"$match": {"operation": redrive_id}},
        {"$group": {"_id": "$state", "count": {"$sum": 1}}},
        {"$sort": {"_id": 1}},
    ]
    groups = aggregate(database[OPERATION_ITEMS], pipeline)
    return {group["_id"]: group["count"] async for group in groups}


async def find(database: Database, redrive_id: str) -> RedriveOperation:
    """Raises NothingToDo."""
    found: RedriveOperation | None = await database[OPERATIONS].find_one(
        {"_id": redrive_id, "what": REDRIVE}
    )
    if found is None:
        raise NothingToDo(f"there is no redrive {redrive_id!r}; nothing was changed")
    return found


async def newest(database: Database, limit: int) -> list[RedriveOperation]:
    found: list[RedriveOperation] = await (
        database[OPERATIONS].find({"what": REDRIVE}, sort=[("asked_at", -1)]).to_list(limit)
    )
    return found


def describe(redrive: RedriveOperation, now: datetime) -> str:
    """Which redrive it is, its state, and what to do about it."""
    name = f"redrive {redrive['_id']}, started by {redrive['who']} ({redrive['why']}),"
    if not redrive.get("open"):
        return f"{name} is {redrive['state']}"
    if redrive["items_count"] is None and redrive["lease_until"] <= now:
        return f"{name} was not planned completely: cancel it"
    if redrive["state"] == State.PAUSED:
        return f"{name} is paused ({redrive['reason']}): resume or cancel it"
    if redrive["lease_until"] <= now:
        return f"{name} has lost its command: resume or cancel it"
    return f"{name} is running: wait for it, pause or cancel it"


async def _requests_of(
    database: Database, of: Sequence[Mapping[str, Any]]
) -> dict[str | None, Request]:
    ids = sorted({one["request_id"] for one in of if one.get("request_id") is not None})
    cursor = database[ASSISTANCES].find({"_id": {"$in": ids}}, {"description": False})
    return {request["_id"]: request async for request in cursor}


def _last_code(delivery: Delivery) -> str | None:
    codes = [attempt["code"] for attempt in delivery["attempts"] if "code" in attempt]
    return codes[-1] if codes else None


def in_parts(found: Sequence[Any]) -> list[Sequence[Any]]:
    return [found[start : start + PART_COUNT] for start in range(0, len(found), PART_COUNT)]
