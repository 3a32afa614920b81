"""How the consumers' commands reach MongoDB."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from consumers.database import open_database
from runtime.exit_codes import ExitCode
from runtime.logs import set_up_logs
from runtime.mongo import TRY_SECONDS, Database, GivenUp
from runtime.settings import MongoSettings
from runtime.shutdown import Stop
from runtime.terminal import CommandFailed, run_with_database

Result = TypeVar("Result")


def with_database(
    settings: MongoSettings, work: Callable[[Database, Stop], Awaitable[Result]]
) -> Result:
    """Run a command's work; Ctrl-C requests its stop, a failure ends it with one sentence."""
    set_up_logs("command", level="WARNING", format=settings.log_format)
    stop = Stop()

    @asynccontextmanager
    async def opened() -> AsyncIterator[Database]:
        stop.on_signals()
        try:
            async with open_database(
                settings, "command", stop, patience_seconds=TRY_SECONDS
            ) as database:
                yield database
        except GivenUp:
            raise CommandFailed(
                "stopped while MongoDB was unavailable", ExitCode.UNFINISHED
            ) from None

    return run_with_database(opened, lambda database: work(database, stop))
