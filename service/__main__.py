"""`python -m service`: run the API, show one request's way, balance the books."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, NoReturn, TypeVar

import typer
from loguru import logger
from pymongo.errors import PyMongoError
from rich.console import Console

from assistance.books import OVERDUE_AFTER_SECONDS
from assistance.verdict import escape_unprintable
from runtime.logs import set_up_logs
from runtime.mongo import Database, UnsuitableServer, explained, open_client
from runtime.settings import MongoSettings, load_settings
from service.audit import balance, books_as_json, books_as_lines
from service.process import serve
from service.settings import ServiceSettings
from service.show import as_json, as_lines
from service.way import look_up

Result = TypeVar("Result")

commands = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

AsJson = Annotated[bool, typer.Option("--json", help="for machines")]


@commands.command()
def run() -> None:
    """Run the REST API until SIGTERM or Ctrl-C."""
    settings = load_settings(ServiceSettings, "service")
    set_up_logs("service", level=settings.log_level, format=settings.log_format)
    try:
        asyncio.run(serve(settings))
    except UnsuitableServer as refusal:
        logger.error(str(refusal))
        raise typer.Exit(1) from None


@commands.command()
def show(
    request_id: Annotated[str, typer.Argument(metavar="ID", help="as the API answered it")],
    json: AsJson = False,
) -> None:
    """Show what happened to one request, and what comes next."""
    way = _ask_mongodb(lambda database: look_up(database, request_id))
    if way is None:
        _end_with(f"no request has the id {escape_unprintable(request_id)}")
    if json:
        typer.echo(as_json(way))
    else:
        Console(highlight=False, soft_wrap=True).print(as_lines(way))


@commands.command()
def audit(
    json: AsJson = False,
    overdue_after_seconds: Annotated[
        float, typer.Option(min=0, help="counted as overdue when overlooked for so long")
    ] = OVERDUE_AFTER_SECONDS,
) -> None:
    """Balance the books; exits 1 when anything is unexplained or overdue."""
    books = _ask_mongodb(
        lambda database: balance(database, overdue_after_seconds=overdue_after_seconds)
    )
    typer.echo(books_as_json(books) if json else "\n".join(books_as_lines(books)))
    if not books.balanced:
        raise typer.Exit(1)


def _ask_mongodb(question: Callable[[Database], Awaitable[Result]]) -> Result:
    settings = load_settings(MongoSettings, "service")

    async def ask() -> Result:
        client = open_client(settings.mongodb_url.get_secret_value(), process="service")
        try:
            return await question(client[settings.mongodb_database])
        finally:
            client.close()

    try:
        return asyncio.run(ask())
    except PyMongoError as error:
        _end_with(explained(error))


def _end_with(sentence: str) -> NoReturn:
    typer.echo(sentence, err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    commands(prog_name="python -m service")
