"""`python -m relay run`, `... position show | reset`, `... held list | release | discard`"""

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Annotated, Any, TypeVar

import typer

from relay import operations
from relay.checkpoint import CHECKPOINTS
from relay.operations import RequestKind
from relay.process import run as run_relay
from relay.settings import OutboxSettings, RelaySettings
from runtime import clock
from runtime.exit_codes import ExitCode
from runtime.logs import set_up_logs
from runtime.mongo import Database, UnsuitableServer
from runtime.mongo import exit_code_of as exit_code_of_mongodb
from runtime.operations import NothingToDo, Operator
from runtime.process import run_process
from runtime.rabbit import BrokerRefused
from runtime.rabbit import exit_code_of as exit_code_of_rabbitmq
from runtime.settings import load_settings
from runtime.terminal import (
    AsJson,
    CommandLine,
    ShowVersion,
    Who,
    Why,
    checked_database,
    fail,
    operator,
    print_if_cut,
    print_json,
    print_result,
    print_table,
    printable,
    run_with_database,
)

Result = TypeVar("Result")

#: How long a command waits for the leader to execute its request, which stays recorded.
PATIENCE_SECONDS = 10.0

commands = CommandLine()
position = typer.Typer(no_args_is_help=True, help="The relay's position in the outbox.")
held = typer.Typer(
    no_args_is_help=True,
    help="Events that are not published: held ones are retried, parked ones need your decision.",
)
commands.add_typer(position, name="position")
commands.add_typer(held, name="held")

EventIds = Annotated[list[str], typer.Argument(help="event IDs, as shown by `held list`")]


@commands.callback()
def relay(*, version: ShowVersion = False) -> None:
    """Publish the events of an outbox in MongoDB to RabbitMQ."""
    _ = version


@commands.command()
def run() -> None:
    """Lead or stand by until SIGTERM or Ctrl-C."""
    settings = load_settings(RelaySettings, "relay")
    set_up_logs("relay", level=settings.log_level, format=settings.log_format)

    try:
        run_process(
            lambda stop: run_relay(settings, stop), grace_seconds=settings.relay_drain_seconds
        )
    except UnsuitableServer as refusal:
        fail(f"relay: {refusal}", exit_code_of_mongodb(refusal))
    except BrokerRefused as refusal:
        fail(f"relay: {refusal}", exit_code_of_rabbitmq(refusal))


@position.command()
def show(*, json: AsJson = False) -> None:
    """Show the relay group's position, its leader, and how many events are settled."""
    settings = load_settings(OutboxSettings, "relay")

    async def read(database: Database) -> dict[str, Any]:
        group = settings.relay_group
        document: dict[str, Any] | None = await database[CHECKPOINTS].find_one({"_id": group})
        if document is None:
            raise NothingToDo(f"group {group!r} has no position yet: none of its relays has led")
        return document

    print_fields(with_database(settings, read), json=json)


@position.command()
def reset(*, why: Why, who: Who, json: AsJson = False) -> None:
    """Start a resync: all pending events are published, and only those. Always safe."""
    settings = load_settings(OutboxSettings, "relay")
    asking = operator(who=who, why=why)
    epoch = with_database(
        settings,
        lambda database: operations.reset_position(database, settings.relay_group, asking),
    )
    said = f"epoch {epoch} was taken; the leader starts a resync within 10 s"
    print_result({"epoch": epoch}, said, json=json)


@held.command("list")
def list_held(*, limit: Annotated[int, typer.Option(min=1)] = 50, json: AsJson = False) -> None:
    """List held and parked events, grouped by key and in order."""
    settings = load_settings(OutboxSettings, "relay")
    waiting = with_database(
        settings,
        lambda database: operations.list_waiting(database, settings.outbox_collection, limit),
    )
    if json:
        print_json(waiting)
        return
    fields = ("_id", "held_key", "state", "reason", "settled_at", "retry_at")
    print_table(
        ("event", "key", "state", "reason", "since", "next try"),
        ([document.get(name) for name in fields] for document in waiting),
        cell_limit=None,
        if_empty="no event is held or parked",
    )
    print_if_cut(waiting, limit)


@held.command()
def release(event_ids: EventIds, *, why: Why, who: Who, json: AsJson = False) -> None:
    """Have the leader retry held or parked events now."""
    request(RequestKind.RELEASE, event_ids, operator(who=who, why=why), json=json)


@held.command()
def discard(event_ids: EventIds, *, why: Why, who: Who, json: AsJson = False) -> None:
    """Give events up: they are never published; later events of their keys are."""
    request(RequestKind.DISCARD, event_ids, operator(who=who, why=why), json=json)


def request(kind: RequestKind, event_ids: list[str], asking: Operator, *, json: bool) -> None:
    settings = load_settings(OutboxSettings, "relay")

    async def ask_and_wait(database: Database) -> dict[str, str | None]:
        request_ids = await operations.ask(
            database, settings.outbox_collection, settings.relay_group, kind, event_ids, asking
        )
        give_up_at = monotonic() + PATIENCE_SECONDS
        while True:
            results = await operations.results_of(database, request_ids)
            if all(results.values()) or monotonic() > give_up_at:
                return results
            await asyncio.sleep(0.2)

    results = with_database(settings, ask_and_wait)
    recorded = "recorded; the next leader executes it"
    print_result(
        [{"event": event_id, "result": result} for event_id, result in results.items()],
        *(f"{event_id}: {result or recorded}" for event_id, result in results.items()),
        json=json,
    )
    if not all(results.values()):
        raise typer.Exit(ExitCode.UNFINISHED)


def with_database(
    settings: OutboxSettings, work: Callable[[Database], Awaitable[Result]]
) -> Result:
    return run_with_database(lambda: checked_database(settings, "relay command"), work)


def print_fields(document: dict[str, Any], *, json: bool) -> None:
    if json:
        print_json(document)
        return
    place = document.get("position") or {}
    cluster_time = place.get("cluster_time")
    at = cluster_time.as_datetime() if cluster_time else None
    lines = {
        "group": document["_id"],
        "epoch": document["epoch"],
        "owner": document["owner"],
        "led since UTC": document["led_since"],
        "sign of life": (document.get("lease") or {}).get("renewed_at"),
        "lock": (document.get("lease") or {}).get("lock"),
        "settled": document["settled"],
        "position UTC": at,
        "age": None if at is None else f"{(clock.now() - at).total_seconds():.0f} s",
        "resync": (document.get("handover") or {}).get("reason"),
    }
    for name, value in lines.items():
        typer.echo(f"{name:13} {printable(value)}")


if __name__ == "__main__":
    commands()
