"""`python -m consumers dead-letters redrive`, and `... redrives list | show | pause | ...`"""

import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from assistance.redrive import ItemState
from consumers.admin import redrive_job
from consumers.admin.cli import with_database
from consumers.admin.dead_letters import NOTHING, Group
from consumers.admin.dead_letters_cli import (
    Ids,
    InGroup,
    Since,
    To,
    Until,
    WithCode,
    WithReason,
    Yes,
    counted,
    selection,
    some,
)
from consumers.admin.redrive_job import Held, NotFree, Places, Planned
from consumers.admin.redrive_runner import Manner, Redrive
from consumers.delivery.destinations import Destinations
from consumers.settings import RedriveSettings
from runtime.mongo import Database
from runtime.operations import OPERATION_ITEMS
from runtime.settings import MongoSettings, load_settings
from runtime.shutdown import Stop
from runtime.terminal import (
    AsJson,
    Who,
    Why,
    operator,
    print_if_cut,
    print_json,
    print_table,
    printable,
)

redrives = typer.Typer(
    no_args_is_help=True, help="The redrives: how they stand, and steering them."
)

#: Skipped ones of one reason that are named, beside their count.
NAMED_COUNT = 3

RedriveId = Annotated[str, typer.Argument(metavar="ID", help="as `redrives list` shows it")]


def redrive(
    ids: Ids = None,
    *,
    why: Why,
    who: Who,
    group: InGroup = None,
    destination: To = None,
    code: WithCode = None,
    reason: WithReason = None,
    since: Since = None,
    until: Until = None,
    rate: Annotated[float, typer.Option(min=0.01, max=1000, help="sent a second")] = 10.0,
    stop_share: Annotated[
        float, typer.Option(min=0.01, max=1, help="pause when so many of the newest 20 fail")
    ] = 0.5,
    patience_seconds: Annotated[
        float, typer.Option(min=0, help="how long to wait for any outcome")
    ] = 120.0,
    preview: Annotated[bool, typer.Option("--preview", help="only say what would be sent")] = False,
    yes: Yes = False,
) -> None:
    """
    Open failed deliveries again: one first, and when it succeeds the rest, at a rate.

    It pauses itself when failures return. Ctrl-C pauses it too. Exit code 1 unless it is done.
    """
    chosen = some(selection(ids, group, destination, code, reason, since, until))
    asking = operator(who=who, why=why)
    settings = load_settings(RedriveSettings, "redrive")
    planned = with_database(
        settings,
        lambda database, _: redrive_job.plan(database, chosen, _places(database, settings)),
    )
    sendable = _preview(planned)
    if preview or not sendable:
        return
    if not yes:
        typer.confirm(f"send {counted(sendable, 'letter')}?", abort=True)
    manner = Manner(rate, stop_share, patience_seconds)

    async def run(database: Database, stop: Stop) -> str:
        held = await redrive_job.begin(database, planned, chosen, asking, rate_per_second=rate)
        typer.echo(f"redrive {held.asked['_id']}")
        return await _run(database, held, _places(database, settings), manner, stop)

    _end(settings, run)


@redrives.command("list")
def list_redrives(*, limit: Annotated[int, typer.Option(min=1)] = 20, json: AsJson = False) -> None:
    """List the redrives, the newest first."""
    settings = load_settings(MongoSettings, "dead-letters")
    found = with_database(settings, lambda database, _: redrive_job.newest(database, limit))
    if json:
        print_json(found)
        return
    fields = ("_id", "asked_at", "who", "why", "state", "reason")
    print_table(
        ("redrive", "asked", "who", "why", "state", "reason", "result"),
        ([*(one[name] for name in fields), _told(one["result"] or {})] for one in found),
    )
    print_if_cut(found, limit)


@redrives.command("show")
def show_redrive(
    redrive_id: RedriveId,
    *,
    state: Annotated[ItemState | None, typer.Option(help="only items in it")] = None,
    limit: Annotated[int, typer.Option(min=1)] = 50,
    json: AsJson = False,
) -> None:
    """Show what has come of each letter, by now."""

    async def read(database: Database, _stop: Stop) -> tuple[Any, dict[str, int], list[Any]]:
        asked = await redrive_job.find(database, redrive_id)
        await redrive_job.observe(database, redrive_id)
        query = {"operation": redrive_id, **({"state": state.value} if state else {})}
        items = database[OPERATION_ITEMS].find(query, sort=[("ordinal", 1)], limit=limit)
        return asked, await redrive_job.counts(database, redrive_id), await items.to_list(None)

    settings = load_settings(MongoSettings, "dead-letters")
    asked, counts, items = with_database(settings, read)
    if json:
        print_json({**asked, "counts": counts, "items": items})
        return
    for name in ("_id", "asked_at", "who", "why", "state", "reason", "rate_per_second"):
        typer.echo(f"{name:16} {printable(asked[name])}")
    typer.echo(f"{'counts':16} {_told(counts)}")
    fields = ("letter", "state", "why", "code")
    print_table(fields, ([item.get(name) for name in fields] for item in items))
    print_if_cut(items, limit)


@redrives.command()
def pause(redrive_id: RedriveId, *, why: Why, who: Who) -> None:
    """Send nothing more until it is resumed."""
    asking = operator(who=who, why=why)
    settings = load_settings(MongoSettings, "dead-letters")
    with_database(settings, lambda database, _: redrive_job.pause(database, redrive_id, asking))
    typer.echo("paused")


@redrives.command()
def cancel(redrive_id: RedriveId, *, why: Why, who: Who) -> None:
    """End it: what was not sent stays a dead letter, what was sent goes its way."""
    asking = operator(who=who, why=why)
    settings = load_settings(MongoSettings, "dead-letters")
    with_database(settings, lambda database, _: redrive_job.cancel(database, redrive_id, asking))
    typer.echo("cancelled")


@redrives.command()
def resume(
    redrive_id: RedriveId,
    *,
    why: Why,
    who: Who,
    stop_share: Annotated[float, typer.Option(min=0.01, max=1)] = 0.5,
    patience_seconds: Annotated[float, typer.Option(min=0)] = 120.0,
) -> None:
    """Go on with one that is paused, or whose command is gone; with a canary first, as before."""
    asking = operator(who=who, why=why)
    settings = load_settings(RedriveSettings, "redrive")

    async def run(database: Database, stop: Stop) -> str:
        held = await redrive_job.take_over(database, redrive_id, asking)
        manner = Manner(held.asked["rate_per_second"], stop_share, patience_seconds)
        return await _run(database, held, _places(database, settings), manner, stop)

    _end(settings, run)


async def _run(database: Database, held: Held, places: Places, manner: Manner, stop: Stop) -> str:
    """Run it, say how it ended, and give its state."""
    redrive_id = held.asked["_id"]
    await Redrive(database, held, places, manner, stop, typer.echo).run()
    asked = await redrive_job.find(database, redrive_id)
    reason = f" ({asked['reason']})" if asked["reason"] else ""
    counts = await redrive_job.counts(database, redrive_id)
    typer.echo(f"{asked['state']}{printable(reason)}: {_told(counts)}")
    state: str = asked["state"]
    if state == redrive_job.State.PAUSED:
        typer.echo(
            f"go on with: python -m consumers dead-letters redrives resume {redrive_id} --why ..."
        )
    return state


def _end(settings: RedriveSettings, run: Callable[[Database, Stop], Awaitable[str]]) -> None:
    try:
        state = with_database(settings, run)
    except NotFree as refusal:
        sys.exit(f"refused: {printable(refusal, limit=1000)}; nothing was changed")
    raise typer.Exit(0 if state == redrive_job.State.DONE else 1)


def _preview(planned: Sequence[Planned]) -> int:
    """Say what would be sent, and what skipped and why; how many would be sent."""
    to_send = Counter(str(Group.of(one.letter)) for one in planned if one.skip is None)
    for group, count in to_send.most_common():
        typer.echo(f"send {count}: {printable(group)}")
    skipped: dict[str, list[str]] = {}
    for one in planned:
        if one.skip is not None:
            skipped.setdefault(one.skip.value, []).append(one.letter["_id"])
    for why, ids in skipped.items():
        named = ", ".join(ids[:NAMED_COUNT]) + (", …" if len(ids) > NAMED_COUNT else "")
        typer.echo(f"skip {len(ids)}: {why} ({printable(named, limit=400)})")
    return to_send.total()


def _places(database: Database, settings: RedriveSettings) -> Places:
    return Places(frozenset(settings.destinations), Destinations(database).unavailable)


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{state} {count}" for state, count in counts.items()) or NOTHING
