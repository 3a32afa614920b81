"""`python -m consumers destinations list | suspend | resume`, and `... routes`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from pydantic import SecretStr

from assistance.breaker import BreakerState, DestinationState, breaker_state, describe
from assistance.routing import Destination as RoutedDestination
from assistance.routing import RoutingTable
from consumers.admin.cli import with_database
from consumers.channels import UnknownChannel, find_channel, settings_table, unknown_rule
from consumers.delivery.destinations import Destinations, Seen
from consumers.settings import CallSettings, destination_table, with_own
from runtime.exit_codes import ExitCode
from runtime.mongo import Database
from runtime.operations import NothingToDo, Operator
from runtime.settings import (
    MongoSettings,
    SettingsTable,
    given_settings,
    load_settings,
    read_settings,
    variable_name,
)
from runtime.shutdown import Stop
from runtime.terminal import (
    AsJson,
    Who,
    Why,
    operator,
    print_json,
    print_result,
    print_table,
)

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
        print_table(
            [*rows[0]] if rows else (),
            [list(row.values()) for row in rows],
            if_empty="there are no destinations",
        )


@commands.command()
def suspend(name: Name, *, why: Why, who: Who, json: AsJson = False) -> None:
    """Stop calling a destination: its workers stop consuming its queue within two seconds."""
    settings = load_settings(DestinationsTable, "destinations")
    asking = operator(who=who, why=why)
    if name not in settings.destinations:
        raise _unknown(name, settings)

    async def write(database: Database, _stop: Stop) -> None:
        if not await Destinations(database).suspend(name, asking):
            raise NothingToDo(f"{name} is already suspended; nothing was changed")

    with_database(settings, write)
    said = f"{name} is suspended: calls under way finish, all other messages wait in its queue"
    print_result({"destination": name, "state": "suspended"}, said, json=json)


@commands.command()
def resume(name: Name, *, why: Why, who: Who, json: AsJson = False) -> None:
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
    said = f"{name} accepts calls again within two seconds"
    print_result({"destination": name, "state": "closed"}, said, json=json)


def _unknown(name: str, settings: DestinationsTable) -> typer.BadParameter:
    known = ", ".join(sorted(settings.destinations))
    return typer.BadParameter(f"there is no destination {name!r}; known: {known}")


def routes(*, json: AsJson = False) -> None:
    """
    Show where topics go and how each destination is configured, secrets masked; check it.

    A destination without any setting of its channel belongs to another worker, and is no problem.
    """
    table = load_settings(RoutesTable, "routes")
    found = [
        _configured(name, table, destination)
        for name, destination in table.routing.destinations.items()
    ]
    if not any(one.is_here for one in found):
        # none is here, so none belongs to another worker: show what all of them lack
        problems = [problem for one in found for problem in (*one.problems, *one.missing)]
    else:
        problems = [problem for one in found for problem in one.problems]
    topics = [
        (topic, destination.name, destination.channel)
        for topic in table.routing.topics
        for destination in table.routing.destinations_of(topic)
    ]
    if json:
        print_json(
            {
                "topics": [
                    dict(zip(("topic", "destination", "channel"), row, strict=True))
                    for row in topics
                ],
                "destinations": {one.name: one.settings for one in found},
                "problems": problems,
            }
        )
    else:
        print_table(("topic", "destination", "channel"), topics, if_empty="there are no topics")
        print_table(
            ("destination", "setting", "value"),
            [
                (one.name, setting, value)
                for one in found
                for setting, value in one.settings.items()
            ],
            if_empty="no destination is configured",
        )
        for problem in problems:
            typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(ExitCode.CONFIGURATION)


@dataclass(frozen=True, slots=True)
class _Configured:
    """
    What is in force for one destination, and what keeps it from working.

    missing: the lines on its channel's settings when none of them is given here.
    """

    name: str
    settings: Mapping[str, Any]
    problems: Sequence[str] = ()
    missing: Sequence[str] = ()

    @property
    def is_here(self) -> bool:
        return not self.missing


def _configured(name: str, table: RoutesTable, destination: RoutedDestination) -> _Configured:
    own = read_settings(destination_table(name))
    try:
        channel = find_channel(destination.channel)
    except UnknownChannel as unknown:
        return _Configured(name, {}, [f"DESTINATIONS.{name}: {unknown}"])
    channel_table = settings_table(channel, name)
    channel_settings = read_settings(channel_table)
    problems = own if isinstance(own, list) else []
    missing: list[str] = []
    if isinstance(channel_settings, list):
        if given_settings(channel_table):
            problems = [*problems, *channel_settings]
        else:
            missing = channel_settings
    if isinstance(own, list):
        return _Configured(name, {}, problems, missing)
    calls = with_own(table, own)
    rate = own.rate_per_second
    if rate is None:
        rate = getattr(channel, "RATE_PER_SECOND", 0)
    shown = {
        "rate per second": rate or "no limit",
        "concurrency": calls.concurrency,
        "call timeout": f"{calls.call_timeout_seconds:g} s",
        "schedule": ", ".join(f"{seconds:g} s" for seconds in calls.retry_delays_seconds)
        or "one attempt",
        "on unknown": unknown_rule(channel, own.on_unknown).value,
        **({} if isinstance(channel_settings, list) else _masked(channel_settings)),
        **({"channel's settings": "not given here"} if missing else {}),
    }
    return _Configured(name, shown, problems, missing)


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
