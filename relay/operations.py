"""
Operator requests to the relay and their results; one document each, never deleted.

    {_id, group, what: release | discard | reset_position, event_id, who, why, asked_at,
     carried_out_at, result}

Release and discard are executed by the leader, because only it knows what is in flight. Without a
leader they wait for one. A reset of the position is executed at once: it takes the next epoch, so a
running leader is deposed and starts over with a resync.
"""

from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from typing import Any
from uuid import UUID

from bson import Binary, ObjectId
from bson.errors import InvalidId

from outbox.state import State
from relay.checkpoint import CHECKPOINTS, Deposed
from relay.held import WAITING_STATES
from runtime import clock
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


class RequestKind(StrEnum):
    RELEASE = "release"
    DISCARD = "discard"


RESET_POSITION = "reset_position"


async def list_waiting(database: Database, collection: str, limit: int) -> list[dict[str, Any]]:
    """
    Held and parked events, in order within each key.

    Only LISTED_FIELDS: the relay's own, and of the writer's those without payload and headers.
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
    kind: RequestKind,
    event_ids: Sequence[str],
    operator: Operator,
) -> list[str]:
    """
    Record a request for each event; returns the requests' ids.

    Raises NothingToDo, naming every event that is not held or parked; then none is recorded.
    """
    outbox = database.get_collection(collection, codec_options=ANY_WRITER)
    found: list[Any] = []
    refused: list[str] = []
    for event_id in dict.fromkeys(event_ids):
        meant = {"_id": {"$in": _possible_ids(event_id)}}
        waiting = await outbox.find_one(meant | WAITING, {"_id": 1})
        if waiting is None:
            refused.append(f"{event_id} is {_state_of(await outbox.find_one(meant, {'state': 1}))}")
        else:
            found.append(waiting["_id"])
    if refused:
        raise NothingToDo(f"neither held nor parked: {', '.join(refused)}; nothing was changed")
    requests = [
        operation(kind.value, operator, group=group, event_id=event_id) for event_id in found
    ]
    await _operations(database).insert_many(requests)
    return [request["_id"] for request in requests]


async def reset_position(database: Database, group: str, operator: Operator) -> int:
    """
    Make the current or next leader start with a resync; returns the epoch taken for it.

    Raises NothingToDo when the group has no position: its first start is a resync anyway.
    """

    handover = {"reason": RESET_POSITION, "since": clock.now()}

    async def write(session: Session) -> int:
        document = await database[CHECKPOINTS].find_one_and_update(
            {"_id": group},
            [
                {
                    "$set": {
                        "epoch": {"$add": ["$epoch", 1]},
                        "owner": {"$literal": f"operator {operator.who}"},
                        "handover": {"$literal": handover},
                    }
                },
                # the deposed leader's lease, so that no other leads before it could notice
                {"$set": {"lease": {"epoch": "$epoch"}}},
            ],
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


async def open_requests(database: Database, group: str) -> list[dict[str, Any]]:
    """Requests that the leader has not executed yet, oldest first."""
    cursor = _operations(database).find(
        {"group": group, "carried_out_at": None}, sort=[("asked_at", 1)]
    )
    requests: list[dict[str, Any]] = await cursor.to_list(None)
    return requests


async def record_result(
    database: Database, group: str, request_id: str, result: str, *, epoch: int
) -> None:
    """
    Record the result of a request; later calls for it change nothing.

    Raises Deposed, because then only the newer leader may record it, and CommitUnknown.
    """

    async def write(session: Session) -> None:
        await database[OPERATIONS].update_one(
            {"_id": request_id, "carried_out_at": None},
            {"$set": {"carried_out_at": clock.now(), "result": result}},
            session=session,
        )
        # a write, because after a mere read a newer epoch could be taken during this transaction;
        # last, because taking an epoch waits until the transaction ends
        fenced = await database[CHECKPOINTS].update_one(
            {"_id": group, "epoch": epoch}, {"$set": {"last_wish": request_id}}, session=session
        )
        if not fenced.matched_count:
            raise Deposed(f"a newer epoch than {epoch} leads group {group!r}")

    await in_transaction(database.client, write)


async def results_of(database: Database, request_ids: Sequence[str]) -> dict[str, str | None]:
    """Event id -> result, in the order of the ids; None until a leader has executed the request."""
    cursor = _operations(database).find({"_id": {"$in": list(request_ids)}})
    requests = {request["_id"]: request async for request in cursor}
    return {str(requests[one]["event_id"]): requests[one]["result"] for one in request_ids}


def _operations(database: Database) -> Any:
    # these documents contain event ids of any type that a writer may use
    return database.get_collection(OPERATIONS, codec_options=ANY_WRITER)


def _state_of(event: dict[str, Any] | None) -> str:
    if event is None:
        return "not in the outbox"
    # any other state is a foreign writer's text, which must not reach a terminal
    return event["state"] if event.get("state") in list(State) else State.PENDING.value


def _possible_ids(event_id: str) -> list[Any]:
    """The ids that this text may stand for: ids are strings, ObjectIds or UUIDs."""
    candidates: list[Any] = [event_id]
    with suppress(InvalidId):
        candidates.append(ObjectId(event_id))
    with suppress(ValueError):
        candidates.append(Binary.from_uuid(UUID(event_id)))
    return candidates
