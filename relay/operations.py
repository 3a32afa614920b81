"""
What an operator asks of the relay, and what came of it; one document each, kept for ever.

    {_id, group, what: release | discard | reset_position, event_id, who, why, asked_at,
     carried_out_at, result}

Releasing and discarding are wishes: the leader carries them out, because only it knows what is in
flight. Without a leader they wait for one. Resetting the position is done at once; it takes the
next epoch, so a leader that runs notices, and begins anew with a hand-over.
"""

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from bson import Binary, ObjectId
from bson.errors import InvalidId

from outbox.state import State
from relay.checkpoint import CHECKPOINTS, Deposed
from relay.held import WAITING_STATES
from runtime.mongo import ANY_WRITER, Database, Session, in_transaction
from runtime.operations import OPERATIONS, NothingToDo, Operator, operation, record_done

INDEXES: tuple[dict[str, Any], ...] = (
    {
        "name": "relay_wishes",
        "key": {"group": 1, "asked_at": 1},
        "partialFilterExpression": {"carried_out_at": None},
    },
)

LISTED_FIELDS = (
    *("type", "key", "seq", "routing_key", "created_at", "state", "reason"),
    *("held_key", "ordinal", "settled_at", "retry_at", "relay_epoch"),
)

WAITING = {"state": {"$in": WAITING_STATES}}


class Wish(StrEnum):
    RELEASE = "release"
    DISCARD = "discard"


RESET_POSITION = "reset_position"


async def list_waiting(database: Database, collection: str, limit: int) -> list[dict[str, Any]]:
    """
    Held and parked events, those of one key together and in order: what the relay has noted, and
    nothing that a writer wrote but their type and where they were to go.
    """
    outbox = database.get_collection(collection, codec_options=ANY_WRITER)
    cursor = outbox.find(
        WAITING,
        dict.fromkeys(LISTED_FIELDS, 1),
        sort=[("held_key", 1), ("ordinal", 1)],
        limit=limit,
    )
    waiting: list[dict[str, Any]] = await cursor.to_list(None)
    return waiting


async def ask(
    database: Database,
    collection: str,
    group: str,
    wish: Wish,
    event_ids: Sequence[str],
    operator: Operator,
) -> list[str]:
    """
    Record a wish for each event; the wishes' ids.

    Raises NothingToDo, naming every event that is not held or parked; then none is recorded.
    """
    outbox = database.get_collection(collection, codec_options=ANY_WRITER)
    found: list[Any] = []
    refused: list[str] = []
    for event_id in dict.fromkeys(event_ids):
        meant = {"_id": {"$in": _readings(event_id)}}
        waiting = await outbox.find_one(meant | WAITING, {"_id": 1})
        if waiting is None:
            refused.append(f"{event_id} is {_standing(await outbox.find_one(meant, {'state': 1}))}")
        else:
            found.append(waiting["_id"])
    if refused:
        raise NothingToDo(f"neither held nor parked: {', '.join(refused)}; nothing was changed")
    wishes = [operation(wish.value, operator, group=group, event_id=event_id) for event_id in found]
    await _operations(database).insert_many(wishes)
    return [recorded["_id"] for recorded in wishes]


async def reset_position(database: Database, group: str, operator: Operator) -> int:
    """
    Make whoever leads, or will, begin with a hand-over; the epoch that was taken for it.

    Raises NothingToDo when the group has no position: its first start is a hand-over anyway.
    """

    async def write(session: Session) -> int:
        document = await database[CHECKPOINTS].find_one_and_update(
            {"_id": group},
            {
                "$inc": {"epoch": 1},
                "$set": {
                    "owner": f"operator {operator.who}",
                    "handover": {"reason": RESET_POSITION, "since": datetime.now(UTC)},
                },
            },
            return_document=True,
            session=session,
        )
        if document is None:
            raise NothingToDo(f"group {group!r} has no position yet; nothing was changed")
        epoch: int = document["epoch"]
        await record_done(
            database,
            RESET_POSITION,
            operator,
            result=f"epoch {epoch} was taken",
            session=session,
            group=group,
            event_id=None,
        )
        return epoch

    return await in_transaction(database.client, write)


async def open_wishes(database: Database, group: str) -> list[dict[str, Any]]:
    """What the leader has yet to carry out, in the order in which it was asked for."""
    cursor = _operations(database).find(
        {"group": group, "carried_out_at": None}, sort=[("asked_at", 1)]
    )
    wishes: list[dict[str, Any]] = await cursor.to_list(None)
    return wishes


async def note_carried_out(
    database: Database, group: str, wish_id: str, result: str, *, epoch: int
) -> None:
    """
    Say what came of a wish, once.

    Raises Deposed, as it is for a newer leader to say then, and CommitUnknown.
    """

    async def write(session: Session) -> None:
        await database[OPERATIONS].update_one(
            {"_id": wish_id, "carried_out_at": None},
            {"$set": {"carried_out_at": datetime.now(UTC), "result": result}},
            session=session,
        )
        # written and not only read, or a newer epoch could be taken beside this transaction; last,
        # as whoever takes one waits for its end
        fenced = await database[CHECKPOINTS].update_one(
            {"_id": group, "epoch": epoch}, {"$set": {"last_wish": wish_id}}, session=session
        )
        if not fenced.matched_count:
            raise Deposed(f"a newer epoch than {epoch} leads group {group!r}")

    await in_transaction(database.client, write)


async def results_of(database: Database, wish_ids: Sequence[str]) -> dict[str, str | None]:
    """Event id -> what came of the wish, in their order; None while it waits for a leader."""
    cursor = _operations(database).find({"_id": {"$in": list(wish_ids)}})
    wishes = {wish["_id"]: wish async for wish in cursor}
    return {str(wishes[wish_id]["event_id"]): wishes[wish_id]["result"] for wish_id in wish_ids}


def _operations(database: Database) -> Any:
    # ids of events stand in these documents as their writers made them
    return database.get_collection(OPERATIONS, codec_options=ANY_WRITER)


def _standing(event: dict[str, Any] | None) -> str:
    if event is None:
        return "not in the outbox"
    # anything else is a foreign writer's word, and not for a terminal
    return event["state"] if event.get("state") in list(State) else State.PENDING.value


def _readings(event_id: str) -> list[Any]:
    """What a person may have meant: ids are strings, ObjectIds or UUIDs."""
    readings: list[Any] = [event_id]
    with suppress(InvalidId):
        readings.append(ObjectId(event_id))
    with suppress(ValueError):
        readings.append(Binary.from_uuid(UUID(event_id)))
    return readings
