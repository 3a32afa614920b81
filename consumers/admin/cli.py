"""What the operators' commands share: a database for as long as they work, and safe printing."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from datetime import datetime
from typing import Annotated, Any, TypeVar

import orjson
import typer
from pymongo.errors import PyMongoError
from rich.console import Console
from rich.table import Column, Table

from assistance.verdict import escape_unprintable
from consumers.database import TRY_SECONDS, GivenUp, open_database
from runtime.logs import set_up_logs
from runtime.mongo import Database, DatabaseError, explained
from runtime.operations import NothingToDo
from runtime.settings import MongoSettings
from runtime.shutdown import Stop

Result = TypeVar("Result")

AsJson = Annotated[bool, typer.Option("--json", help="for machines")]


def with_database(
    settings: MongoSettings, work: Callable[[Database, Stop], Awaitable[Result]]
) -> Result:
    """Run a command's work; what goes wrong ends the process with one sentence."""
    set_up_logs("command", level="WARNING", format=settings.log_format)

    async def connected() -> Result:
        stop = Stop()
        stop.on_signals()
        opened = open_database(settings, "command", stop, patience_seconds=TRY_SECONDS)
        async with opened as database:
            return await work(database, stop)

    try:
        return asyncio.run(connected())
    except NothingToDo as nothing:
        sys.exit(str(nothing))
    except GivenUp:
        sys.exit("stopped while MongoDB was away")
    except (DatabaseError, PyMongoError) as error:
        sys.exit(explained(error))


def print_json(value: Any) -> None:
    text = orjson.dumps(value, default=str, option=orjson.OPT_INDENT_2 | orjson.OPT_UTC_Z)
    typer.echo(text.decode())


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    shown = list(rows)
    moments = {at for row in shown for at, cell in enumerate(row) if isinstance(cell, datetime)}
    titles = (f"{name} UTC" if at in moments else name for at, name in enumerate(columns))
    # an id that is cut cannot be given to the next command
    table = Table(*(Column(title, overflow="fold") for title in titles))
    for row in shown:
        table.add_row(*(printable(cell) for cell in row))
    Console(soft_wrap=True, highlight=False, markup=False).print(table)


def print_if_cut(shown: Collection[Any], limit: int) -> None:
    if len(shown) == limit:
        typer.echo(f"the first {limit}; --limit shows more")


def printable(value: Any, *, limit: int = 200) -> str:
    """One line for a terminal, cut, whatever a stranger wrote into the field."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")
    text = str(value)
    shown = escape_unprintable(text[:limit])
    return shown if len(text) <= limit else f"{shown}…"
