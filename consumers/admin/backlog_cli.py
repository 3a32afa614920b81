"""`python -m consumers resend`, `... overdue`: the backlog of open deliveries."""

from dataclasses import asdict
from typing import Annotated

import typer

from assistance.delivery import is_open
from assistance.waiting import why_waiting
from consumers.admin.cli import with_database
from consumers.admin.resend import ResendOptions
from consumers.admin.resend import resend as resend_all
from consumers.database import server_time
from consumers.delivery.destinations import Destinations
from consumers.maintenance import overdue as overdue_requests
from consumers.settings import OverdueSettings, RedriveSettings
from runtime.exit_codes import ExitCode
from runtime.mongo import Database
from runtime.settings import load_settings
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


def resend(
    *,
    why: Why,
    who: Who,
    destination: Annotated[
        list[str] | None, typer.Option(help="only this destination; may be repeated")
    ] = None,
    rate: Annotated[float, typer.Option(min=0.1, max=1000, help="hints per second")] = 100.0,
    json: AsJson = False,
) -> None:
    """Send a new hint for every open delivery, after the broker lost messages."""
    settings = load_settings(RedriveSettings, "resend")
    chosen = frozenset(destination or ())
    if unknown := sorted(chosen - set(settings.destinations)):
        known = ", ".join(sorted(settings.destinations))
        raise typer.BadParameter(f"no such destination: {', '.join(unknown)}; known: {known}")
    asking = operator(who=who, why=why)

    async def work(database: Database, stop: Stop) -> tuple[dict[str, int], bool]:
        options = ResendOptions(chosen, rate, Destinations(database).unavailable)
        return await resend_all(database, options, asking, stop), stop.requested

    answers, stopped = with_database(settings, work)
    lines = [f"{answer}: {count}" for answer, count in sorted(answers.items())]
    if stopped:
        lines.append("stopped early: run the command again for the rest")
    print_result(
        {"results": answers, "stopped_early": stopped}, *(lines or ["nothing is open"]), json=json
    )
    if stopped:
        raise typer.Exit(ExitCode.UNFINISHED)


def overdue(
    *,
    limit: Annotated[int, typer.Option(min=1, help="how many of the oldest to list")] = 20,
    json: AsJson = False,
) -> None:
    """List requests older than TARGET_SECONDS. Exit code 1 when there are any."""
    settings = load_settings(OverdueSettings, "overdue")

    async def look(
        database: Database, _stop: Stop
    ) -> tuple[dict[str, overdue_requests.Overdue], list[dict[str, object]]]:
        unavailable, now = await Destinations(database).unavailable(), await server_time(database)
        found = await overdue_requests.overdue(database, settings.target_seconds)
        oldest = await overdue_requests.oldest(database, settings.target_seconds, limit=limit)
        return found, [
            {
                "request": one.request["_id"],
                "topic": one.request["topic"],
                "age_seconds": round(one.age_seconds),
                "destination": delivery["destination"],
                "waits": why_waiting(
                    delivery,
                    one.hints.get(delivery["hint_event"]),
                    now=now,
                    unavailable=unavailable,
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
    else:
        print_table(
            list(oldest[0]) if oldest else (),
            (list(row.values()) for row in oldest),
            if_empty=f"nothing is older than {settings.target_seconds:g} s",
        )
        print_if_cut({row["request"] for row in oldest}, limit)
        for name, one in found.items():
            at_least = "at least " if one.count >= overdue_requests.COUNTED_LIMIT else ""
            age = f"the oldest by {one.oldest_age_seconds:.0f} s"
            typer.echo(f"{name}: {at_least}{one.count} overdue, {age}")
    raise typer.Exit(ExitCode.FOUND if found else ExitCode.OK)
