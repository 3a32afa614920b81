"""`python -m consumers destinations list | suspend | resume`, and `... routes`."""

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from pydantic import SecretStr

from assistance.breaker import BreakerState, DestinationState, breaker_state, describe
from assistance.routing import Routing, RoutingTable
from consumers.admin.cli import with_database
from consumers.channels import UnknownChannel, find_channel, settings_table
from consumers.delivery.destinations import Destinations, Seen
from consumers.settings import CallSettings, destination_table, with_own
from runtime.mongo import Database
from runtime.operations import NothingToDo, Operator
from runtime.settings import (
    EXIT_CONFIGURATION,
    MongoSettings,
    SettingsTable,
    load_settings,
    read_settings,
    variable_name,
)
from runtime.shutdown import Stop
from runtime.terminal import AsJson, Who, Why, operator, print_json, print_table

commands = typer.Typer(
    no_args_is_help=True, help="Show which destinations accept calls; suspend and resume them."
)

Name = Annotated[str, typer.Argument(help="the destination, as shown by `destinations list`")]


class DestinationsTable(MongoSettings, RoutingTable):
    """What these commands read."""


class RoutesTable(CallSettings, RoutingTable):
    """What all destinations have in common, and where topics go."""


@commands.command("list")
def list_destinations(*, json: AsJson = False) -> None:
    """List every destination: its state, since when and why, and what waits for it."""
    settings = load_settings(DestinationsTable, "destinations")

    async def read(database: Database, _stop: Stop) -> list[dict[str, Any]]:
        destinations = Destinations(database)
        seen, waiting = await destinations.all(), await destinations.waiting()
        names = sorted({*settings.destinations, *seen, *waiting})
        return [
            {
                "destination": name,
                "channel": settings.destinations.get(name),
                **_state_of(seen.get(name)),
                "waiting": waiting[name].count if name in waiting else 0,
                "oldest age": f"{waiting[name].oldest_age_seconds:.0f} s"
                if name in waiting
                else None,
            }
            for name in names
        ]

    rows = with_database(settings, read)
    if json:
        print_json(rows)
    else:
        print_table([*rows[0]], [list(row.values()) for row in rows])


@commands.command()
def suspend(name: Name, why: Why, who: Who) -> None:
    """Stop calling a destination: its workers stop consuming its queue within two seconds."""
    settings = load_settings(DestinationsTable, "destinations")
    asking = operator(who=who, why=why)
    if name not in settings.destinations:
        raise _unknown(name, settings)

    async def write(database: Database, _stop: Stop) -> None:
        if not await Destinations(database).suspend(name, asking):
            raise NothingToDo(f"{name} is already suspended; nothing was changed")

    with_database(settings, write)
    typer.echo(f"{name} is suspended: calls under way finish, all other messages wait in its queue")


@commands.command()
def resume(name: Name, why: Why, who: Who) -> None:
    """End a suspension, and close an open breaker without waiting for a probe."""
    settings = load_settings(DestinationsTable, "destinations")
    asking: Operator = operator(who=who, why=why)

    async def write(database: Database, _stop: Stop) -> None:
        if await Destinations(database).resume(name, asking):
            return
        # a destination that is no longer configured may still be suspended, and is listed
        if name not in settings.destinations:
            raise _unknown(name, settings)
        raise NothingToDo(f"{name} is neither suspended nor open; nothing was changed")

    with_database(settings, write)
    typer.echo(f"{name} accepts calls again within two seconds")


def _unknown(name: str, settings: DestinationsTable) -> typer.BadParameter:
    known = ", ".join(sorted(settings.destinations))
    return typer.BadParameter(f"there is no destination {name!r}; known: {known}")


def routes() -> None:
    """Show where topics go and how each destination is configured, secrets masked; check it."""
    table = load_settings(RoutesTable, "routes")
    print_table(
        ("topic", "destination", "channel"),
        [
            (topic, destination.name, destination.channel)
            for topic in table.routing.topics
            for destination in table.routing.destinations_of(topic)
        ],
    )
    problems: list[str] = []
    rows: list[tuple[str, str, Any]] = []
    for name in table.routing.destinations:
        for setting, value in _configured(name, table, table.routing, problems).items():
            rows.append((name, setting, value))
    print_table(("destination", "setting", "value"), rows)
    if problems:
        sys.stderr.writelines(f"{problem}\n" for problem in problems)
        raise SystemExit(EXIT_CONFIGURATION)


def _configured(
    name: str, table: RoutesTable, routing: Routing, problems: list[str]
) -> dict[str, Any]:
    """What is in force for one destination; adds to the problems what keeps it from working."""
    own = read_settings(destination_table(name))
    try:
        channel = find_channel(routing.destinations[name].channel)
    except UnknownChannel as unknown:
        problems.append(f"DESTINATIONS.{name}: {unknown}")
        return {}
    channel_settings = read_settings(settings_table(channel, name))
    for read in (own, channel_settings):
        problems += read if isinstance(read, list) else []
    if isinstance(own, list):
        return {}
    calls = with_own(table, own)
    rate = own.rate_per_second
    if rate is None:
        rate = getattr(channel, "RATE_PER_SECOND", 0)
    return {
        "rate per second": rate or "no limit",
        "concurrency": calls.concurrency,
        "call timeout": f"{calls.call_timeout_seconds:g} s",
        "schedule": ", ".join(f"{seconds:g} s" for seconds in calls.retry_delays_seconds)
        or "one attempt",
        "on unknown": own.on_unknown.value,
        **({} if isinstance(channel_settings, list) else _masked(channel_settings)),
    }


def _masked(settings: SettingsTable) -> Mapping[str, Any]:
    table = type(settings)
    return {
        variable_name(table, name): "**********" if _is_secret(value) else value
        for name in table.model_fields
        if (value := getattr(settings, name)) is not None
    }


def _is_secret(value: Any) -> bool:
    return isinstance(value, SecretStr) or (
        isinstance(value, list | tuple) and any(_is_secret(one) for one in value)
    )


def _state_of(seen: Seen | None) -> dict[str, Any]:
    if seen is None:
        return {"state": BreakerState.CLOSED.value, "since": None, "reason": "", "next probe": None}
    found: DestinationState = seen.state
    state = breaker_state(found, seen.now)
    next_probe = found.get("open_until") if state is BreakerState.OPEN else None
    return {"state": state.value, **describe(found), "next probe": next_probe}
