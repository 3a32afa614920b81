"""Opens MongoDB for the consumers, with their collections and indexes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from math import inf

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
    Database,
    check_server,
    close,
    ensure_collection,
    open_client,
    ping,
    retry_while_unavailable,
)
from runtime.monitoring import Monitor
from runtime.operations import OPERATION_ITEMS, OPERATIONS
from runtime.settings import MongoSettings
from runtime.shutdown import Stop

#: How often readiness checks whether MongoDB answers.
PING_SECONDS = 2.0


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
    Wait for MongoDB, check it, create collections and indexes, and yield the database.

    monitor: its readiness then follows MongoDB's.
    patience_seconds: how long to wait for MongoDB.

    Raises UnsuitableServer, GivenUp, or PyMongoError after `patience_seconds`.
    """
    client = open_client(settings.mongodb_url.get_secret_value(), process=process)
    database: Database = client[settings.mongodb_database]

    prepared = False
    if monitor is not None:
        answered = monitor.poll(
            "MongoDB", lambda: ping(client), every_seconds=PING_SECONDS, even_unseen=True
        )
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
        # no deadline for a try: an index takes as long as it takes, and the steps have their own
        await retry_while_unavailable(
            prepare, stop, try_seconds=None, patience_seconds=patience_seconds
        )
        prepared = True
        yield database
    finally:
        await close(client)


async def server_time(database: Database) -> datetime:
    """The clock that the ledger's dates are by."""
    time: datetime = (await database.command("hello"))["localTime"]
    return time.replace(tzinfo=UTC)
