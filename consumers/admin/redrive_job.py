"""
Redrives as they stand in MongoDB: planned, begun, taken over, paused, cancelled, ended.

    running ──> done           an operation of `what: redrive`; `open` until done or cancelled
     │  ^
     v  │ resume               while one is open no other begins: a unique index holds that
    paused ──> cancelled

Whoever runs it holds a lease on the operation and renews it before each step, so that a pause or
a cancel is noticed within a tick, and a command that died can be followed by another.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

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
from runtime.mongo import Database, aggregate, new_owner
from runtime.operations import (
    OPERATION_ITEMS,
    OPERATIONS,
    NothingToDo,
    Operator,
    operation,
    record_done,
)

REDRIVE = "redrive"

LEASE_MS = 30_000

#: So many items are written or looked at in one go.
PART_COUNT = 1000


class State(StrEnum):
    RUNNING = "running"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    DONE = "done"


class NotFree(Exception):
    """Another redrive is open, or this one is in other hands; says which, and what can be done."""


@dataclass(frozen=True, slots=True)
class Places:
    """configured: the names of all; resting: finds out which of them are paused or down."""

    configured: Collection[str]
    resting: Callable[[], Awaitable[Collection[str]]]


@dataclass(frozen=True, slots=True)
class Planned:
    letter: DeadLetter
    skip: Skip | None


async def plan(database: Database, selection: Selection, places: Places) -> list[Planned]:
    """What would be sent, and what would be skipped and why. Raises NothingToDo."""
    found = await letters(database, selection)
    if not found:
        raise NothingToDo("no dead letter matches; nothing was changed")
    resting = await places.resting()
    planned: list[Planned] = []
    for some in in_parts(found):
        requests = await _requests_of(database, some)
        planned += [
            Planned(
                letter,
                why_skipped(
                    letter,
                    requests.get(letter.get("request_id")),
                    configured=places.configured,
                    not_accepting=resting,
                ),
            )
            for letter in some
        ]
    return planned


@dataclass(frozen=True, slots=True)
class Held:
    """asked: the operation; owner: whoever may renew its lease."""

    asked: Mapping[str, Any]
    owner: str


async def begin(
    database: Database,
    planned: Sequence[Planned],
    selection: Selection,
    operator: Operator,
    *,
    rate_per_second: float,
) -> Held:
    """Raises NotFree while another redrive is open."""
    asked = operation(
        REDRIVE,
        operator,
        selection=selection.as_document(),
        rate_per_second=rate_per_second,
        state=State.RUNNING.value,
        reason=None,
        open=True,
        owner=new_owner(),
        lease_until=datetime.now(UTC),
        items_count=None,
    )
    try:
        await database[OPERATIONS].insert_one(asked)
    except DuplicateKeyError:
        other = await database[OPERATIONS].find_one({"what": REDRIVE, "open": True})
        if other is None:
            raise NotFree("another redrive has ended just now; try again") from None
        raise NotFree(describe(other, await server_time(database))) from None
    held = Held(asked, asked["owner"])
    for start in range(0, len(planned), PART_COUNT):
        await renew(database, held)
        some = enumerate(planned[start : start + PART_COUNT], start)
        await database[OPERATION_ITEMS].insert_many(
            [_item(asked["_id"], ordinal, one) for ordinal, one in some]
        )
    whole = {"$set": {"items_count": len(planned)}}
    await database[OPERATIONS].update_one({"_id": asked["_id"]}, whole)
    return held


def _item(redrive_id: str, ordinal: int, planned: Planned) -> dict[str, Any]:
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


async def renew(database: Database, held: Held) -> bool:
    """False once somebody paused or cancelled it, or took it over."""
    answer = await database[OPERATIONS].update_one(
        {"_id": held.asked["_id"], "state": State.RUNNING.value, "owner": held.owner},
        [{"$set": {"lease_until": {"$add": [NOW, LEASE_MS]}}}],
    )
    return bool(answer.matched_count)


async def take_over(database: Database, redrive_id: str, operator: Operator) -> Held:
    """Resume one that is paused, or whose command is gone. Raises NothingToDo or NotFree."""
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
        raise NotFree(describe(await find(database, redrive_id), now))
    await record_done(database, "resume_redrive", operator, result="resumed", redrive=redrive_id)
    return Held(taken, owner)


async def pause(database: Database, redrive_id: str, operator: Operator) -> None:
    """Nothing more is sent until it is resumed. Raises NothingToDo."""
    paused = {"$set": {"state": State.PAUSED.value, "reason": f"{operator.who}: {operator.why}"}}
    answer = await database[OPERATIONS].update_one(
        {"_id": redrive_id, "what": REDRIVE, "state": State.RUNNING.value}, paused
    )
    if not answer.matched_count:
        now = await server_time(database)
        raise NothingToDo(describe(await find(database, redrive_id), now))
    await record_done(database, "pause_redrive", operator, result="paused", redrive=redrive_id)


async def cancel(database: Database, redrive_id: str, operator: Operator) -> None:
    """End it: what was not sent never is; what was sent goes its way. Raises NothingToDo."""
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
    await close(database, redrive_id, State.CANCELLED)
    await record_done(database, "cancel_redrive", operator, result="cancelled", redrive=redrive_id)


async def close(database: Database, redrive_id: str, state: State, **condition: Any) -> None:
    """End it, unless it has ended or the condition does not hold; its result are the counts."""
    await observe(database, redrive_id, states=UNFINISHED)
    ended = {
        "state": state.value,
        "result": await counts(database, redrive_id),
        "carried_out_at": datetime.now(UTC),
    }
    await database[OPERATIONS].update_one(
        {"_id": redrive_id, "open": True, **condition}, {"$set": ended, "$unset": {"open": True}}
    )


async def observe(
    database: Database, redrive_id: str, *, states: Sequence[str] = UNFINISHED
) -> list[ItemState]:
    """Note what has come of the items in these states since; the new states."""
    items = database[OPERATION_ITEMS]
    found: list[dict[str, Any]] = await items.find(
        {"operation": redrive_id, "state": {"$in": list(states)}}
    ).to_list(None)
    changed: list[ItemState] = []
    for some in in_parts(found):
        requests = await _requests_of(database, some)
        updates: list[UpdateOne] = []
        for item in some:
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
            await items.bulk_write(updates, ordered=False)
    return changed


async def counts(database: Database, redrive_id: str) -> dict[str, int]:
    """How many items are in each state."""
    pipeline: list[dict[str, Any]] = [
        {"$match": {"operation": redrive_id}},
        {"$group": {"_id": "$state", "count": {"$sum": 1}}},
        {"$sort": {"_id": 1}},
    ]
    groups = aggregate(database[OPERATION_ITEMS], pipeline)
    return {group["_id"]: group["count"] async for group in groups}


async def find(database: Database, redrive_id: str) -> dict[str, Any]:
    """Raises NothingToDo."""
    found: dict[str, Any] | None = await database[OPERATIONS].find_one(
        {"_id": redrive_id, "what": REDRIVE}
    )
    if found is None:
        raise NothingToDo(f"there is no redrive {redrive_id!r}; nothing was changed")
    return found


async def newest(database: Database, limit: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await (
        database[OPERATIONS].find({"what": REDRIVE}, sort=[("asked_at", -1)]).to_list(limit)
    )
    return found


def describe(asked: Mapping[str, Any], now: datetime) -> str:
    """Which redrive it is, how it stands, and what can be done about it."""
    whose = f"redrive {asked['_id']}, asked for by {asked['who']} ({asked['why']}),"
    if not asked.get("open"):
        return f"{whose} is {asked['state']}"
    if asked["items_count"] is None and asked["lease_until"] <= now:
        return f"{whose} was never planned to its end: cancel it"
    if asked["state"] == State.PAUSED:
        return f"{whose} is paused ({asked['reason']}): resume or cancel it"
    if asked["lease_until"] <= now:
        return f"{whose} has lost its command: resume or cancel it"
    return f"{whose} is running: wait for it, pause or cancel it"


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
