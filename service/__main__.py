"""`python -m service`: run the API, show one request's history, audit all of them."""

from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer
from loguru import logger
from rich.console import Console

from assistance.books import Books
from assistance.waiting import OVERDUE_AFTER_SECONDS
from runtime.exit_codes import ExitCode
from runtime.logs import set_up_logs
from runtime.mongo import Database, UnsuitableServer, exit_code_of
from runtime.printable import escape_unprintable
from runtime.process import run_process
from runtime.settings import MongoSettings, load_settings
from runtime.terminal import (
    AsJson,
    CommandLine,
    ShowVersion,
    checked_database,
    fail,
    print_json,
    run_with_database,
)
from service.audit import balance, balance_since, books_as_document, books_as_lines
from service.process import serve
from service.settings import ServiceSettings
from service.show import as_document, as_lines
from service.timeline import find_history

Result = TypeVar("Result")

commands = CommandLine()


@commands.callback()
def service(*, version: ShowVersion = False) -> None:
    """Accept assistance requests by a REST API, and show what happened to them."""
    _ = version


@commands.command()
def run() -> None:
    """Run the REST API until SIGTERM or Ctrl-C."""
    settings = load_settings(ServiceSettings, "service")
    set_up_logs("service", level=settings.log_level, format=settings.log_format)
    if weak := settings.weak_keys():
        logger.warning("service.weak_keys", callers=weak)
    try:
        run_process(
            lambda stop: serve(settings, stop), grace_seconds=settings.shutdown_grace_seconds
        )
    except UnsuitableServer as refusal:
        logger.error(str(refusal))
        raise typer.Exit(exit_code_of(refusal)) from None


@commands.command()
def show(
    request_id: Annotated[str, typer.Argument(metavar="ID", help="as returned by the API")],
    json: AsJson = False,
) -> None:
    """Show what happened to one request, and what happens next."""
    history = _with_database(lambda database: find_history(database, request_id))
    if history is None:
        fail(f"no request has the id {escape_unprintable(request_id)}", ExitCode.NOTHING_DONE)
    if json:
        print_json(as_document(history))
    else:
        Console(highlight=False, soft_wrap=True).print(as_lines(history))


@commands.command()
def audit(
    json: AsJson = False,
    overdue_after_seconds: Annotated[
        float,
        typer.Option(min=0, help="how far past its due date a delivery is overdue"),
    ] = OVERDUE_AFTER_SECONDS,
    full: Annotated[
        bool,
        typer.Option("--full", help="read closed requests, too, that an earlier audit checked"),
    ] = False,
) -> None:
    """Balance the books. Exit code 1 when a request is unexplained or overdue."""

    async def read(database: Database) -> Books:
        if not full and (
            books := await balance_since(database, overdue_after_seconds=overdue_after_seconds)
        ):
            return books
        return await balance(database, overdue_after_seconds=overdue_after_seconds)

    books = _with_database(read)
    if json:
        print_json(books_as_document(books))
    else:
        typer.echo("\n".join(books_as_lines(books)))
    if not books.balanced:
        raise typer.Exit(ExitCode.FOUND)


def _with_database(work: Callable[[Database], Awaitable[Result]]) -> Result:
    settings = load_settings(MongoSettings, "service")
    return run_with_database(lambda: checked_database(settings, "service"), work)


if __name__ == "__main__":
    commands()
