"""
What operators did: one document per operation in the collection `operations`, never removed.

    {_id, what, who, why, asked_at, carried_out_at, result, and what it was about}

`carried_out_at` and `result` are None until a requested operation has been executed.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypedDict
from uuid import uuid4

from runtime import clock
from runtime.mongo import Database, Session

OPERATIONS = "operations"

#: The result per item of an operation that may have thousands of items.
OPERATION_ITEMS = "operation_items"

INDEXES: tuple[dict[str, Any], ...] = (
    {
        # an operation that must run alone sets `open` when it starts, and unsets it when it ends
        "name": "one_at_a_time",
        "key": {"what": 1},
        "unique": True,
        "partialFilterExpression": {"open": True},
    },
    {"name": "newest_of_kind", "key": {"what": 1, "asked_at": -1}},
)

ITEMS_INDEXES: tuple[dict[str, Any], ...] = (
    {"name": "in_order", "key": {"operation": 1, "state": 1, "ordinal": 1}},
)


@dataclass(frozen=True, slots=True)
class Operator:
    """who: the operator's name; why: the reason. Both are recorded with the operation."""

    who: str
    why: str


class Operation(TypedDict):
    """carried_out_at, result: None until it has been executed."""

    _id: str
    what: str
    who: str
    why: str
    asked_at: datetime
    carried_out_at: datetime | None
    result: Any


class NothingToDo(Exception):
    """The command has nothing to act on; nothing was changed."""


def operation(what: str, operator: Operator, **about: Any) -> dict[str, Any]:
    """A requested operation, not executed yet."""
    return {
        "_id": str(uuid4()),
        "what": what,
        **about,
        "who": operator.who,
        "why": operator.why,
        "asked_at": clock.now(),
        "carried_out_at": None,
        "result": None,
    }


async def record_done(
    database: Database,
    what: str,
    operator: Operator,
    *,
    result: Any,
    session: Session | None = None,
    **about: Any,
) -> str:
    """Record an executed operation, in the transaction that executed it if there is one; its ID."""
    done = operation(what, operator, **about)
    done |= {"carried_out_at": clock.now(), "result": result}
    await database[OPERATIONS].insert_one(done, session=session)
    operation_id: str = done["_id"]
    return operation_id
