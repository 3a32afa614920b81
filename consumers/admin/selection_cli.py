"""The options that select dead letters, shared by the commands that list and change them."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from consumers.admin.dead_letters import Selection, parse_group

Ids = Annotated[
    list[str] | None,
    typer.Argument(help="IDs of letters or requests; default: all letters that match"),
]
GroupName = Annotated[str | None, typer.Option("--group", help="DESTINATION/REASON/CODE")]
Destination = Annotated[str | None, typer.Option("--destination", help="only this destination")]
Code = Annotated[str | None, typer.Option("--code", help="only this code")]
Reason = Annotated[
    str | None, typer.Option("--reason", help="e.g. permanent, attempts_used_up, rejected")
]
Since = Annotated[datetime | None, typer.Option(help="last seen at or after this time (UTC)")]
Until = Annotated[datetime | None, typer.Option(help="last seen at or before this time (UTC)")]
Yes = Annotated[bool, typer.Option("--yes", help="do not ask for confirmation")]


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


def not_all(chosen: Selection) -> Selection:
    """Raises typer.BadParameter for a selection of every undecided letter."""
    if chosen == Selection():
        raise typer.BadParameter(
            "refusing to act on every dead letter: pass IDs, --group or a filter"
        )
    return chosen


def counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
