"""`python -m consumers dead-letters list | show | discard`"""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from consumers.admin import dead_letters
from consumers.admin.cli import with_database
from consumers.admin.dead_letters import Selection
from consumers.admin.selection_cli import (
    Code,
    Destination,
    GroupName,
    Ids,
    Reason,
    Since,
    Until,
    Yes,
    counted,
    not_all,
    selection,
)
from runtime.settings import MongoSettings, load_settings
from runtime.terminal import (
    AsJson,
    Who,
    Why,
    confirm,
    operator,
    print_if_cut,
    print_json,
    print_result,
    print_table,
    printable,
)

commands = typer.Typer(
    no_args_is_help=True, help="Failed deliveries and unreadable messages: redrive or discard them."
)

#: A stored body may have 16 KiB; `--json` prints all of it.
BODY_SHOWN_CHARACTERS = 2000


@commands.command("list")
def list_letters(
    ids: Ids = None,
    *,
    group: GroupName = None,
    destination: Destination = None,
    code: Code = None,
    reason: Reason = None,
    since: Since = None,
    until: Until = None,
    decided: Annotated[bool, typer.Option("--all", help="include decided letters")] = False,
    limit: Annotated[int, typer.Option(min=1)] = 50,
    json: AsJson = False,
) -> None:
    """List undecided letters: the groups, or, given a filter, the letters."""
    chosen = selection(ids, group, destination, code, reason, since, until, decided=decided)
    settings = load_settings(MongoSettings, "dead-letters")
    if chosen == Selection(decided=decided):
        _print_groups(
            with_database(settings, lambda database, _: dead_letters.groups(database, chosen)),
            decided=decided,
            json=json,
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
        ("letter", "reason", "code", "answer", "times", "last seen", "decision"),
        ([letter.get(name) for name in fields] for letter in found),
        if_empty="no dead letter matches",
    )
    print_if_cut(found, limit)


def _print_groups(
    found: Sequence[dead_letters.GroupOfLetters], *, decided: bool, json: bool
) -> None:
    if json:
        print_json([{**_as_dict(one), "group": str(one.group)} for one in found])
        return
    print_table(
        ("group", "count", "first seen", "last seen", "newest letter"),
        ([one.group, one.count, one.first_seen_at, one.last_seen_at, one.sample] for one in found),
        if_empty="there are no dead letters" if decided else "no dead letter is undecided",
    )


def _as_dict(one: dead_letters.GroupOfLetters) -> dict[str, Any]:
    names = ("count", "first_seen_at", "last_seen_at", "sample")
    return {name: getattr(one, name) for name in names}


@commands.command()
def show(letter_id: Annotated[str, typer.Argument(metavar="ID")], *, json: AsJson = False) -> None:
    """Show one letter, its history of decisions, and its delivery's attempts."""

    settings = load_settings(MongoSettings, "dead-letters")
    letter, delivery = with_database(
        settings, lambda database, _: dead_letters.find(database, letter_id)
    )
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
    group: GroupName = None,
    destination: Destination = None,
    code: Code = None,
    reason: Reason = None,
    since: Since = None,
    until: Until = None,
    yes: Yes = False,
    json: AsJson = False,
) -> None:
    """Discard letters: they are kept with your reason, and their requests stay failed."""
    chosen = not_all(selection(ids, group, destination, code, reason, since, until))
    asking = operator(who=who, why=why)
    settings = load_settings(MongoSettings, "dead-letters")
    if not yes:
        found = with_database(settings, lambda database, _: dead_letters.letters(database, chosen))
        confirm(f"discard {counted(len(found), 'letter')}?")
    operation_id, results = with_database(
        settings, lambda database, _: dead_letters.discard(database, chosen, asking)
    )
    print_result(
        {"operation": operation_id, "results": results},
        *(f"{result}: {count}" for result, count in Counter(results.values()).items()),
        f"recorded as operation {operation_id}",
        json=json,
    )
