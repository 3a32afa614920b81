"""What the commands of all three processes share: who asks and why, a database, and safe output."""

import asyncio
import getpass
import json
import os
import sys
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import typer
from pymongo.errors import PyMongoError
from rich.console import Console
from rich.table import Column, Table

from runtime.mongo import Database, DatabaseError, check_server, close, explain_error, open_client
from runtime.operations import NothingToDo, Operator
from runtime.printable import escape_unprintable
from runtime.settings import MongoSettings

Result = TypeVar("Result")

#: A cell of a table is cut here, unless the table may not cut its cells.
CELL_LIMIT_CHARACTERS = 200


def current_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the user of a container may have no name
        return f"uid {os.getuid()}"


#: Every command that changes something takes these two.
Why = Annotated[str, typer.Option(help="the reason, recorded with the operation")]
Who = Annotated[
    str,
    typer.Option(help="the operator, recorded with the operation", default_factory=current_user),
]

AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def operator(*, who: str, why: str) -> Operator:
    """Raises typer.BadParameter for an empty reason."""
    if not why.strip():
        raise typer.BadParameter(
            "give a reason: it is recorded with the operation", param_hint="--why"
        )
    return Operator(who, why)


class CommandFailed(Exception):
    """Ends a command with exit code 1; its text is the sentence that the operator reads."""


def run_with_database(
    opened: Callable[[], AbstractAsyncContextManager[Database]],
    work: Callable[[Database], Awaitable[Result]],
) -> Result:
    """Run a command's work; a failure ends the process with one sentence and exit code 1."""

    async def connected() -> Result:
        async with opened() as database:
            return await work(database)

    try:
        return asyncio.run(connected())
    except (NothingToDo, CommandFailed) as failure:
        sys.exit(str(failure))
    except (DatabaseError, PyMongoError) as error:
        sys.exit(explain_error(error))


@asynccontextmanager
async def checked_database(settings: MongoSettings, process: str) -> AsyncIterator[Database]:
    """
    The database as it is; no collection or index is created.

    Raises UnsuitableServer, or PyMongoError when MongoDB is not reachable.
    """
    client = open_client(settings.mongodb_url.get_secret_value(), process=process)
    try:
        await check_server(client)
        yield client[settings.mongodb_database]
    finally:
        await close(client)


def as_json(value: Any) -> str:
    """ASCII only, so that no text of a stranger can steer the terminal; dates in UTC with a Z."""
    return json.dumps(value, default=_encodable, indent=2)


def print_json(value: Any) -> None:
    typer.echo(as_json(value))


def _encodable(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    cell_limit: int | None = CELL_LIMIT_CHARACTERS,
) -> None:
    shown = list(rows)
    dates = {at for row in shown for at, cell in enumerate(row) if isinstance(cell, datetime)}
    titles = (f"{name} UTC" if at in dates else name for at, name in enumerate(columns))
    # folded, not cut: a cut ID cannot be given to the next command
    table = Table(*(Column(title, overflow="fold") for title in titles))
    for row in shown:
        table.add_row(*(printable(cell, limit=cell_limit) for cell in row))
    Console(soft_wrap=True, highlight=False, markup=False).print(table)


def print_if_cut(shown: Collection[Any], limit: int) -> None:
    if len(shown) == limit:
        typer.echo(f"the first {limit}; --limit shows more")


def printable(value: Any, *, limit: int | None = CELL_LIMIT_CHARACTERS) -> str:
    """One line of text for a terminal, whatever a stranger wrote into the field."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")
    text = str(value)
    shown = escape_unprintable(text[:limit])
    return shown if limit is None or len(text) <= limit else f"{shown}…"
