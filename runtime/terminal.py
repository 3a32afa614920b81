"""What the commands of all three processes share: options, a database, exit codes, safe output."""

import asyncio
import getpass
import json
import os
import sys
import traceback
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version as version_of
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from pymongo.errors import PyMongoError
from rich.console import Console
from rich.table import Column, Table

from runtime.exit_codes import ExitCode
from runtime.mongo import (
    Database,
    DatabaseError,
    check_server,
    close,
    exit_code_of,
    explain_error,
    open_client,
)
from runtime.operations import NothingToDo, Operator
from runtime.printable import escape_unprintable
from runtime.settings import MongoSettings

Result = TypeVar("Result")

DISTRIBUTION = "assistance-relay"

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


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(version_of(DISTRIBUTION))
        raise typer.Exit


ShowVersion = Annotated[
    bool,
    typer.Option(
        "--version", callback=_print_version, is_eager=True, help="print the version and exit"
    ),
]


class CommandLine(typer.Typer):
    """The commands of a process; a programming error has an exit code of its own."""

    def __init__(self) -> None:
        super().__init__(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().__call__(*arguments, **options)
        except Exception as error:
            traceback.print_exc()
            raise SystemExit(ExitCode.INTERNAL_ERROR) from error


def operator(*, who: str, why: str) -> Operator:
    """Raises typer.BadParameter for an empty reason."""
    if not why.strip():
        raise typer.BadParameter(
            "give a reason: it is recorded with the operation", param_hint="--why"
        )
    return Operator(who, why)


class CommandFailed(Exception):
    """Ends a command; its text is the sentence that the operator reads."""

    def __init__(self, text: str, exit_code: ExitCode) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def fail(text: str, exit_code: ExitCode) -> NoReturn:
    """End the process with one sentence for the operator."""
    typer.echo(text, err=True)
    raise typer.Exit(exit_code)


def confirm(question: str) -> None:
    """Ends the process unless the operator answers with yes."""
    with suppress(typer.Abort):
        if typer.confirm(question, err=True):
            return
    fail("not confirmed: nothing was changed", ExitCode.INTERRUPTED)


def run_with_database(
    opened: Callable[[], AbstractAsyncContextManager[Database]],
    work: Callable[[Database], Awaitable[Result]],
) -> Result:
    """Run a command's work; a failure ends the process with one sentence and its exit code."""

    async def connected() -> Result:
        async with opened() as database:
            return await work(database)

    try:
        return asyncio.run(connected())
    except NothingToDo as refusal:
        fail(str(refusal), ExitCode.NOTHING_DONE)
    except CommandFailed as failure:
        fail(str(failure), failure.exit_code)
    except (DatabaseError, PyMongoError) as error:
        fail(explain_error(error), exit_code_of(error))


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


def print_result(result: Any, *lines: str, json: bool) -> None:
    """What a command did: for a program, or in words."""
    if json:
        print_json(result)
    else:
        typer.echo("\n".join(lines))


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
    if_empty: str,
) -> None:
    """
    A table as wide as the terminal; without a terminal, one line per row, however long.

    if_empty: printed instead of a table without rows.
    """
    shown = list(rows)
    if not shown:
        typer.echo(if_empty)
        return
    dates = {at for row in shown for at, cell in enumerate(row) if isinstance(cell, datetime)}
    titles = [f"{name} UTC" if at in dates else name for at, name in enumerate(columns)]
    cells = [[printable(cell, limit=cell_limit) for cell in row] for row in shown]
    if not sys.stdout.isatty():
        typer.echo("\n".join(_aligned([titles, *cells])))
        return
    # folded, not cut: a cut ID cannot be given to the next command
    table = Table(*(Column(title, overflow="fold") for title in titles))
    for row in cells:
        table.add_row(*row)
    Console(soft_wrap=True, highlight=False, markup=False).print(table)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(padded).rstrip()


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
