"""`python -m consumers unknown list | sent | again`"""

from typing import Annotated, Any

import typer

from consumers.admin.cli import with_database
from consumers.admin.needs_decision import Unknowns
from runtime.mongo import Database
from runtime.settings import MongoSettings, load_settings
from runtime.shutdown import Stop
from runtime.terminal import AsJson, Who, Why, operator, print_if_cut, print_json, print_table

commands = typer.Typer(
    no_args_is_help=True,
    help="Calls that were not answered, of destinations whose rule is to ask a person.",
)

RequestId = Annotated[str, typer.Argument(help="the request, as `unknown list` shows it")]
Destination = Annotated[str, typer.Argument(help="and the destination")]


@commands.command("list")
def list_unknown(*, limit: Annotated[int, typer.Option(min=1)] = 50, json: AsJson = False) -> None:
    """List what waits for a decision, the oldest first, and what is known of it."""
    settings = load_settings(MongoSettings, "unknown")

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
            for request, delivery in await Unknowns(database).undecided(limit)
        ]

    rows = with_database(settings, read)
    if json:
        print_json(rows)
    elif rows:
        print_table([*rows[0]], [list(row.values()) for row in rows])
        print_if_cut({row["request"] for row in rows}, limit)
    else:
        typer.echo("nothing waits for a decision")


@commands.command()
def sent(request_id: RequestId, destination: Destination, why: Why, who: Who) -> None:
    """The third party has it: close the delivery as succeeded."""
    asking = operator(who=who, why=why)

    async def write(database: Database, _stop: Stop) -> None:
        await Unknowns(database).sent(request_id, destination, asking)

    with_database(load_settings(MongoSettings, "unknown"), write)
    typer.echo(f"{request_id} to {destination} is closed as succeeded")


@commands.command()
def again(request_id: RequestId, destination: Destination, why: Why, who: Who) -> None:
    """Send it again, with the same idempotency key."""
    asking = operator(who=who, why=why)

    async def write(database: Database, _stop: Stop) -> None:
        await Unknowns(database).again(request_id, destination, asking)

    with_database(load_settings(MongoSettings, "unknown"), write)
    typer.echo(f"{request_id} to {destination} is due again, and its worker is told")
