"""`python -m consumers resend`, `... overdue`: what waits, and waits for too long."""

from dataclasses import asdict
from typing import Annotated

import typer

from assistance.delivery import is_open
from assistance.waiting import why_waiting
from consumers.admin.cli import with_database
from consumers.admin.resend import Wanted
from consumers.admin.resend import resend as send_again
from consumers.database import server_time
from consumers.delivery.destinations import Destinations
from consumers.maintenance import overdue as late
from consumers.settings import OverdueSettings, RedriveSettings
from runtime.mongo import Database
from runtime.settings import load_settings
from runtime.shutdown import Stop
from runtime.terminal import AsJson, Who, Why, operator, print_if_cut, print_json, print_table


def resend(
    *,
    why: Why,
    who: Who,
    destination: Annotated[
        list[str] | None, typer.Option(help="only for it; may be given several times")
    ] = None,
    rate: Annotated[float, typer.Option(min=0.1, max=1000, help="sent a second")] = 100.0,
) -> None:
    """Send every open delivery's hint again, after the broker has lost messages."""
    settings = load_settings(RedriveSettings, "resend")
    chosen = frozenset(destination or ())
    if unknown := sorted(chosen - set(settings.destinations)):
        known = ", ".join(sorted(settings.destinations))
        raise typer.BadParameter(f"no such destination: {', '.join(unknown)}; known: {known}")
    asking = operator(who=who, why=why)

    async def work(database: Database, stop: Stop) -> tuple[dict[str, int], bool]:
        wanted = Wanted(chosen, rate, Destinations(database).unavailable)
        return await send_again(database, wanted, asking, stop), stop.requested

    answers, stopped = with_database(settings, work)
    for answer, count in sorted(answers.items()):
        typer.echo(f"{answer}: {count}")
    if not answers:
        typer.echo("nothing is open")
    if stopped:
        typer.echo("stopped early: run it again for the rest")
        raise typer.Exit(1)


def overdue(
    *,
    limit: Annotated[int, typer.Option(min=1, help="so many of the oldest are named")] = 20,
    json: AsJson = False,
) -> None:
    """List requests that are past their target time (TARGET_SECONDS). Exit code 1 when any is."""
    settings = load_settings(OverdueSettings, "overdue")

    async def look(
        database: Database, _stop: Stop
    ) -> tuple[dict[str, late.Overdue], list[dict[str, object]]]:
        resting, now = await Destinations(database).unavailable(), await server_time(database)
        found = await late.overdue(database, settings.target_seconds)
        oldest = await late.oldest(database, settings.target_seconds, limit=limit)
        return found, [
            {
                "request": one.request["_id"],
                "topic": one.request["topic"],
                "age_seconds": round(one.age_seconds),
                "destination": delivery["destination"],
                "waits": why_waiting(
                    delivery, one.hints.get(delivery["hint_event"]), now=now, unavailable=resting
                ),
                "attempts": len(delivery["attempts"]),
            }
            for one in oldest
            for delivery in one.request["deliveries"]
            if is_open(delivery)
        ]

    found, oldest = with_database(settings, look)
    if json:
        print_json(
            {"overdue": {name: asdict(one) for name, one in found.items()}, "oldest": oldest}
        )
    elif not found:
        typer.echo(f"nothing is older than {settings.target_seconds:g} s")
    else:
        print_table(list(oldest[0]), (list(row.values()) for row in oldest))
        print_if_cut({row["request"] for row in oldest}, limit)
        for name, one in found.items():
            least = "at least " if one.count >= late.COUNTED_LIMIT else ""
            age = f"the oldest for {one.oldest_age_seconds:.0f} s"
            typer.echo(f"{name}: {least}{one.count} overdue, {age}")
    raise typer.Exit(1 if found else 0)
