"""
What operators did: one document each in the collection `operations`, kept for ever.

    {_id, what, who, why, asked_at, carried_out_at, result, and whatever it was about}

`carried_out_at` and `result` are None for as long as it is a wish that somebody has to carry out.
"""

import getpass
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import uuid4

import typer

from runtime.mongo import Database, Session

OPERATIONS = "operations"

#: What came of each thing that an operation was about, where those may be thousands.
OPERATION_ITEMS = "operation_items"

INDEXES: tuple[dict[str, Any], ...] = (
    {
        # whoever begins what may only run alone sets `open`, and unsets it at the end
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
    """who asks, and why: both are kept with what was done."""

    who: str
    why: str


class NothingToDo(Exception):
    """The command asks for what is not there; nothing was changed."""


def operation(what: str, operator: Operator, **about: Any) -> dict[str, Any]:
    """A wish, still to be carried out."""
    return {
        "_id": str(uuid4()),
        "what": what,
        **about,
        "who": operator.who,
        "why": operator.why,
        "asked_at": datetime.now(UTC),
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
    """Keep what was done just now, in the transaction that did it where there is one; its id."""
    done = operation(what, operator, **about)
    done |= {"carried_out_at": datetime.now(UTC), "result": result}
    await database[OPERATIONS].insert_one(done, session=session)
    operation_id: str = done["_id"]
    return operation_id


def current_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"


#: The two options that every command has which changes something.
Why = Annotated[str, typer.Option(help="kept with what was done")]
Who = Annotated[str, typer.Option(help="kept as well", default_factory=current_user)]


def operator(*, who: str, why: str) -> Operator:
    """Raises typer.BadParameter for an empty reason."""
    if not why.strip():
        raise typer.BadParameter("say why: it is kept with what was done", param_hint="--why")
    return Operator(who, why)
