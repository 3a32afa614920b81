"""`python -m relay run`, `... position show | reset`, `... held list | release | discard`"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from time import monotonic
from typing import Annotated, Any, TypeVar

import typer
from pymongo.errors import PyMongoError
from rich.console import Console
from rich.table import Table

from relay import operations
from relay.checkpoint import CHECKPOINTS
from relay.operations import Wish
from relay.relay import run as run_relay
from relay.settings import OutboxSettings, RelaySettings
from runtime.logs import set_up_logs
from runtime.mongo import (
    Database,
    DatabaseError,
    UnsuitableServer,
    check_server,
    explained,
    open_client,
)
from runtime.operations import NothingToDo, Operator, Who, Why, operator
from runtime.rabbit import BrokerRefused
from runtime.settings import load_settings
from runtime.shutdown import Stop

Result = TypeVar("Result")

#: How long a command waits for the leader to carry out a wish before it leaves it to the future.
PATIENCE_SECONDS = 10.0


commands = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
position = typer.Typer(no_args_is_help=True, help="Where the relay stands in the outbox.")
held = typer.Typer(
    no_args_is_help=True, help="Events that wait: held ones for the broker, parked ones for you."
)
commands.add_typer(position, name="position")
commands.add_typer(held, name="held")

AsJson = Annotated[bool, typer.Option("--json", help="for machines")]
EventIds = Annotated[list[str], typer.Argument(help="the events' ids, as `held list` shows them")]


@commands.callback()
def relay() -> None:
    """Publish what is appended to an outbox in MongoDB to RabbitMQ."""


@commands.command()
def run() -> None:
    """Lead or stand by until SIGTERM or Ctrl-C."""
    settings = load_settings(RelaySettings, "relay")
    set_up_logs("relay", level=settings.log_level, format=settings.log_format)

    async def live() -> None:
        stop = Stop()
        stop.on_signals()
        await run_relay(settings, stop)

    try:
        asyncio.run(live())
    except (UnsuitableServer, BrokerRefused) as refusal:
        sys.exit(f"relay: {refusal}")


@position.command()
def show(*, json: AsJson = False) -> None:
    """Show the position of the relay's group, who leads, and how many events are settled."""

    async def read(database: Database, settings: OutboxSettings) -> Any:
        group = settings.relay_group
        document = await database[CHECKPOINTS].find_one({"_id": group})
        if document is None:
            raise NothingToDo(f"group {group!r} has no position yet: no relay of it has led")
        return document

    print_fields(with_database(read), json=json)


@position.command()
def reset(why: Why, who: Who) -> None:
    """Begin anew with a hand-over: what is pending is published, and only that. Always safe."""

    async def write(database: Database, settings: OutboxSettings) -> int:
        return await operations.reset_position(
            database, settings.relay_group, operator(who=who, why=why)
        )

    epoch = with_database(write)
    typer.echo(f"epoch {epoch} was taken; whoever leads begins anew with a hand-over within 5 s")


@held.command("list")
def list_held(*, limit: Annotated[int, typer.Option(min=1)] = 50, json: AsJson = False) -> None:
    """List what is held or parked, those of one key together and in order."""

    async def read(database: Database, settings: OutboxSettings) -> Any:
        return await operations.list_waiting(database, settings.outbox_collection, limit)

    waiting = with_database(read)
    if json:
        typer.echo(as_json(waiting))
        return
    table = Table("event", "key", "state", "reason", "since UTC", "tried again UTC")
    for document in waiting:
        fields = ("_id", "held_key", "state", "reason", "settled_at", "retry_at")
        table.add_row(*(printable(document.get(name)) for name in fields))
    Console(soft_wrap=True, highlight=False, markup=False).print(table)
    if len(waiting) == limit:
        typer.echo(f"the first {limit}; --limit shows more")


@held.command()
def release(event_ids: EventIds, why: Why, who: Who) -> None:
    """Have the leader try held or parked events again now."""
    wish(Wish.RELEASE, event_ids, operator(who=who, why=why))


@held.command()
def discard(event_ids: EventIds, why: Why, who: Who) -> None:
    """Give events up: they are never published; what waits behind them goes."""
    wish(Wish.DISCARD, event_ids, operator(who=who, why=why))


def wish(what: Wish, event_ids: list[str], asking: Operator) -> None:
    async def ask_and_wait(database: Database, settings: OutboxSettings) -> dict[str, str | None]:
        wish_ids = await operations.ask(
            database, settings.outbox_collection, settings.relay_group, what, event_ids, asking
        )
        give_up_at = monotonic() + PATIENCE_SECONDS
        while True:
            results = await operations.results_of(database, wish_ids)
            if all(results.values()) or monotonic() > give_up_at:
                return results
            await asyncio.sleep(0.2)

    for event_id, result in with_database(ask_and_wait).items():
        typer.echo(f"{event_id}: {result or 'recorded; the next leader carries it out'}")


def with_database(work: Callable[[Database, OutboxSettings], Awaitable[Result]]) -> Result:
    """Run a command's work; what goes wrong ends the process with one sentence."""
    settings = load_settings(OutboxSettings, "relay")

    async def connected() -> Result:
        client = open_client(settings.mongodb_url.get_secret_value(), process="relay command")
        try:
            await check_server(client)
            return await work(client[settings.mongodb_database], settings)
        finally:
            client.close()

    try:
        return asyncio.run(connected())
    except NothingToDo as nothing:
        sys.exit(str(nothing))
    except (DatabaseError, PyMongoError) as error:
        sys.exit(explained(error))


def print_fields(document: dict[str, Any], *, json: bool) -> None:
    if json:
        typer.echo(as_json(document))
        return
    place = document.get("position") or {}
    cluster_time = place.get("cluster_time")
    at = cluster_time.as_datetime() if cluster_time else None
    lines = {
        "group": document["_id"],
        "epoch": document["epoch"],
        "owner": document["owner"],
        "led since UTC": document["led_since"],
        "settled": document["settled"],
        "position UTC": at,
        "age": None if at is None else f"{(datetime.now(UTC) - at).total_seconds():.0f} s",
        "hand-over": (document.get("handover") or {}).get("reason"),
    }
    for name, value in lines.items():
        typer.echo(f"{name:13} {printable(value)}")


def as_json(value: Any) -> str:
    return json.dumps(value, default=encodable, indent=2)


def encodable(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else printable(value)


def printable(value: Any) -> str:
    """One line of text for a terminal, whatever a writer put into the field."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")
    return "".join(character if character.isprintable() else "�" for character in str(value))


if __name__ == "__main__":
    commands()
