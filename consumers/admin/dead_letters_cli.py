"""`python -m consumers dead-letters list | show | discard`"""

import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from assistance.collection import ASSISTANCES, DEAD_LETTERS
from assistance.dead_letter import DeadLetter
from assistance.request import Request, delivery_to
from consumers.admin import dead_letters
from consumers.admin.cli import with_database
from consumers.admin.dead_letters import Selection, parse_group
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
    print_table,
    printable,
)

commands = typer.Typer(
    no_args_is_help=True, help="What could not be delivered, or not even read: yours to decide."
)

#: The body of a letter may have 16 KiB; `--json` shows all of it.
BODY_SHOWN_CHARACTERS = 2000

Ids = Annotated[
    list[str] | None, typer.Argument(help="letters, or requests; without any, all that match")
]
InGroup = Annotated[str | None, typer.Option("--group", help="DESTINATION/REASON/CODE")]
To = Annotated[str | None, typer.Option("--destination", help="only those for it")]
WithCode = Annotated[str | None, typer.Option("--code", help="only those with it")]
WithReason = Annotated[
    str | None, typer.Option("--reason", help="such as permanent, attempts_used_up, rejected")
]
Since = Annotated[datetime | None, typer.Option(help="last seen then or later; UTC")]
Until = Annotated[datetime | None, typer.Option(help="last seen then or before; UTC")]
Yes = Annotated[bool, typer.Option("--yes", help="do not ask")]


@commands.command("list")
def list_letters(
    ids: Ids = None,
    *,
    group: InGroup = None,
    destination: To = None,
    code: WithCode = None,
    reason: WithReason = None,
    since: Since = None,
    until: Until = None,
    decided: Annotated[bool, typer.Option("--all", help="those with a decision too")] = False,
    limit: Annotated[int, typer.Option(min=1)] = 50,
    json: AsJson = False,
) -> None:
    """List what waits for a decision: by group, or, with any filter, letter by letter."""
    chosen = selection(ids, group, destination, code, reason, since, until, decided=decided)
    settings = load_settings(MongoSettings, "dead-letters")
    if chosen == Selection(decided=decided):
        _print_groups(
            with_database(settings, lambda database, _: dead_letters.groups(database, chosen)), json
        )
        return
    found = with_database(
        settings, lambda database, _: dead_letters.letters(database, chosen, limit=limit)
    )
    if json:
        print_json(found)
        return
    fields = ("_id", "reason", "code", "excerpt", "count", "last_seen_at", "decision")
    print_table(
        ("letter", "reason", "code", "said", "times", "last seen", "decision"),
        ([letter.get(name) for name in fields] for letter in found),
    )
    print_if_cut(found, limit)


def _print_groups(found: Sequence[dead_letters.GroupOfLetters], json: bool) -> None:
    if json:
        print_json([{**_as_dict(one), "group": str(one.group)} for one in found])
        return
    print_table(
        ("group", "count", "first seen", "last seen", "newest letter"),
        ([one.group, one.count, one.first_seen_at, one.last_seen_at, one.sample] for one in found),
    )


def _as_dict(one: dead_letters.GroupOfLetters) -> dict[str, Any]:
    names = ("count", "first_seen_at", "last_seen_at", "sample")
    return {name: getattr(one, name) for name in names}


@commands.command()
def show(letter_id: Annotated[str, typer.Argument(metavar="ID")], *, json: AsJson = False) -> None:
    """Show one letter with all that was decided, and the attempts of its delivery."""

    async def read(database: Database, _stop: Stop) -> tuple[DeadLetter | None, Request | None]:
        letter = await database[DEAD_LETTERS].find_one({"_id": letter_id})
        request = letter and await database[ASSISTANCES].find_one(
            {"_id": letter.get("request_id")}, {"description": False}
        )
        return letter, request

    letter, request = with_database(load_settings(MongoSettings, "dead-letters"), read)
    if letter is None:
        sys.exit(f"there is no dead letter {letter_id!r}")
    destination = letter["destination"]
    delivery = delivery_to(request, destination) if request and destination else None
    if json:
        print_json({"letter": letter, "delivery": delivery})
        return
    for name, value in letter.items():
        if name != "decisions":
            typer.echo(f"{name:14} {printable(value, limit=BODY_SHOWN_CHARACTERS)}")
    for taken in letter.get("decisions", ()):
        said = f"{taken['decision']} by {taken['who']}: {taken['why']}"
        typer.echo(f"{'decided':14} {printable(taken['at'])} {printable(said)}")
    if delivery is None:
        return
    typer.echo(f"{'delivery':14} {delivery['state']}")
    for attempt in delivery["attempts"]:
        ended = [attempt.get(name) for name in ("verdict", "code", "excerpt")]
        said = ", ".join(printable(part) for part in ended if part)
        typer.echo(f"{'attempt':14} {attempt['number']} {printable(attempt['started_at'])} {said}")


@commands.command()
def discard(
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
    yes: Yes = False,
) -> None:
    """Give letters up: they are kept, with your reason, and their requests stay failed."""
    chosen = some(selection(ids, group, destination, code, reason, since, until))
    asking = operator(who=who, why=why)
    settings = load_settings(MongoSettings, "dead-letters")
    if not yes:
        found = with_database(settings, lambda database, _: dead_letters.letters(database, chosen))
        typer.confirm(f"discard {counted(len(found), 'letter')}?", abort=True)
    operation_id, results = with_database(
        settings, lambda database, _: dead_letters.discard(database, chosen, asking)
    )
    for result, count in Counter(results.values()).items():
        typer.echo(f"{result}: {count}")
    typer.echo(f"recorded as operation {operation_id}")


def selection(
    ids: list[str] | None,
    group: str | None,
    destination: str | None,
    code: str | None,
    reason: str | None,
    since: datetime | None,
    until: datetime | None,
    *,
    decided: bool = False,
) -> Selection:
    try:
        parsed = None if group is None else parse_group(group)
    except ValueError as problem:
        raise typer.BadParameter(str(problem), param_hint="--group") from None
    return Selection(
        ids=tuple(ids or ()),
        group=parsed,
        destination=destination,
        code=code,
        reason=reason,
        since=since and since.replace(tzinfo=UTC),
        until=until and until.replace(tzinfo=UTC),
        decided=decided,
    )


def some(chosen: Selection) -> Selection:
    if chosen == Selection():
        raise typer.BadParameter("name letters, a --group or a filter: it is not done to all")
    return chosen


def counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
