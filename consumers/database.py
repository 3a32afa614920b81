"""The consumers' way to MongoDB."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from math import inf
from time import monotonic
from typing import TypeVar

import pymongo
from loguru import logger
from pymongo.errors import OperationFailure, PyMongoError

from assistance.collection import (
    ASSISTANCES,
    ASSISTANCES_INDEXES,
    ASSISTANCES_VALIDATOR,
    DEAD_LETTERS,
    DEAD_LETTERS_INDEXES,
)
from outbox.collection import INDEXES, OUTBOX
from runtime import operations
from runtime.mongo import (
    AUTHENTICATION_FAILED,
    UNAUTHORIZED,
    CommitUnknown,
    Database,
    check_server,
    close,
    ensure_collection,
    is_transient,
    open_client,
    ping,
)
from runtime.monitoring import Monitor
from runtime.operations import OPERATION_ITEMS, OPERATIONS
from runtime.retry import growing_delays
from runtime.settings import MongoSettings
from runtime.shutdown import Stop

#: A server that is frozen answers nothing; the next try may find another primary.
TRY_SECONDS = 5.0

#: How soon readiness tells that MongoDB has gone, or is back.
PING_SECONDS = 2.0

Result = TypeVar("Result")


class GivenUp(Exception):
    """A stop was asked for while MongoDB was away; nothing was done."""


@asynccontextmanager
async def open_database(
    settings: MongoSettings,
    process: str,
    stop: Stop,
    monitor: Monitor | None = None,
    *,
    patience_seconds: float = inf,
) -> AsyncIterator[Database]:
    """
    The database, checked and with its indexes, as soon as MongoDB is there.

    monitor: is told whether MongoDB answers.

    Raises UnsuitableServer, GivenUp, or PyMongoError once the patience is over.
    """
    client = open_client(settings.mongodb_url.get_secret_value(), process=process)
    database: Database = client[settings.mongodb_database]

    prepared = False
    if monitor is not None:
        answered = monitor.look_up("MongoDB", lambda: ping(client), every_seconds=PING_SECONDS)
        monitor.ready_when(lambda: None if answered.value else "MongoDB does not answer")
        monitor.ready_when(lambda: None if prepared else "it is starting")

    async def prepare() -> None:
        await check_server(client)
        await ensure_collection(database, OUTBOX, indexes=INDEXES)
        await ensure_collection(
            database, ASSISTANCES, indexes=ASSISTANCES_INDEXES, validator=ASSISTANCES_VALIDATOR
        )
        await ensure_collection(database, DEAD_LETTERS, indexes=DEAD_LETTERS_INDEXES)
        await ensure_collection(database, OPERATIONS, indexes=operations.INDEXES)
        await ensure_collection(database, OPERATION_ITEMS, indexes=operations.ITEMS_INDEXES)

    try:
        await insist(prepare, stop, patience_seconds=patience_seconds)
        prepared = True
        yield database
    finally:
        await close(client)


async def server_time(database: Database) -> datetime:
    """The ledger's dates are by the server's clock."""
    time: datetime = (await database.command("hello"))["localTime"]
    return time.replace(tzinfo=UTC)


async def insist(
    action: Callable[[], Awaitable[Result]],
    stop: Stop | None = None,
    *,
    try_seconds: float | None = TRY_SECONDS,
    patience_seconds: float = inf,
) -> Result:
    """
    Do it, and while MongoDB is away do it again, with growing waits.

    With `stop`, raises GivenUp once a stop is asked for; without, whoever waits may cancel.
    try_seconds: None for an action that bounds its own steps.
    patience_seconds: no try begins later; the last one's error is raised then.
    """
    delays = growing_delays()
    give_up_at = monotonic() + patience_seconds
    while True:
        try:
            with pymongo.timeout(try_seconds):
                return await action()
        except (PyMongoError, CommitUnknown) as error:
            if not _passes(error) or monotonic() >= give_up_at:
                raise
            # its own words hold the whole topology
            code = getattr(error, "code", None)
            logger.warning("mongodb.away", reason=type(error).__name__, code=code)
        if stop is None:
            await asyncio.sleep(next(delays))
        else:
            await stop.rest(next(delays))
            if stop.requested:
                raise GivenUp


def _passes(error: Exception) -> bool:
    if isinstance(error, CommitUnknown) or is_transient(error):
        return True
    # rights that are taken away come back when somebody sees the log
    return isinstance(error, OperationFailure) and error.code in {
        UNAUTHORIZED,
        AUTHENTICATION_FAILED,
    }
