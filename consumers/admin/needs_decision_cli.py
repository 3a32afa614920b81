"""`python -m consumers needs-decision list | sent | retry`"""

from typing import Annotated, Any

import typer

from consumers.admin.cli import with_database
from consumers.admin.needs_decision import NeedsDecision
from runtime.mongo import Database
from runtime.settings import MongoSettings, load_settings
from runtime.shutdown import Stop
from runtime.terminal import (
    AsJson,
    Who,
    Why,
    operator,
    print_if_cut,
    print_json,
    print_result,
    print_table,
)

commands = typer.Typer(
    no_args_is_help=True,
    help="Deliveries that the third party did not answer, and that an operator must decide.",
)

RequestId = Annotated[str, typer.Argument(help="as shown by `needs-decision list`")]
Destination = Annotated[str, typer.Argument(help="the delivery's destination")]


@commands.command("list")
def list_undecided(
    *, limit: Annotated[int, typer.Option(min=1)] = 50, json: AsJson = False
) -> None:
    """List the deliveries that need a decision, oldest first."""
    settings = load_settings(MongoSettings, "needs-decision")

    async def read(database: Database, _stop: Stop) -> list[dict[str, Any]]:
        return [
            {
                "request": request["_id"],
                "destination": delivery["destination"],
                "topic": request["topic"],
                "accepted": request["created_at"],
                "called": delivery["attempts"][-1]["started_at"],
                "code": delivery["attempts"][-1].get("code"),
                "attempts": len(delivery["attempts"]),
                "idempotency_key": delivery["idempotency_key"],
            }
            for request, delivery in await NeedsDecision(database).undecided(limit)
        ]

    rows = with_database(settings, read)
    if json:
        print_json(rows)
    else:
        print_table(
            [*rows[0]] if rows else (),
            [list(row.values()) for row in rows],
            if_empty="nothing needs a decision",
        )
        print_if_cut({row["request"] for row in rows}, limit)


@commands.command()
def sent(
    request_id: RequestId, destination: Destination, *, why: Why, who: Who, json: AsJson = False
) -> None:
    """Close a delivery as succeeded: the third party has the message."""
    asking = operator(who=who, why=why)

    async def write(database: Database, _stop: Stop) -> None:
        await NeedsDecision(database).sent(request_id, destination, asking)

    with_database(load_settings(MongoSettings, "needs-decision"), write)
    print_result(
        {"request": request_id, "destination": destination, "state": "succeeded"},
        f"{request_id} to {destination} is closed as succeeded",
        json=json,
    )


@commands.command()
def retry(
    request_id: RequestId, destination: Destination, *, why: Why, who: Who, json: AsJson = False
) -> None:
    """Send the message again, with the same idempotency key."""
    asking = operator(who=who, why=why)

    async def write(database: Database, _stop: Stop) -> None:
        await NeedsDecision(database).retry(request_id, destination, asking)

    with_database(load_settings(MongoSettings, "needs-decision"), write)
    print_result(
        {"request": request_id, "destination": destination, "state": "waiting"},
        f"{request_id} to {destination} is due again; its worker gets a new hint",
        json=json,
    )
