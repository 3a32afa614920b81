"""
MongoDB: the client, its errors and transactions.

The only file that depends on motor, which is past its end of life. PyMongo's asyncio API differs
from motor in `aggregate`, `start_session`, `start_transaction` and `close`: one of the two returns
a coroutine where the other returns the result. Only this file calls them. `MONGODB_DRIVER=pymongo`
selects PyMongo's API, so that the tests and benchmarks can run on both.

    DatabaseError (PyMongo's errors pass through unchanged)
    ├── UnsuitableServer   no replica set, or too old; says how to fix it
    │   └── AccessRefused  it refuses the user, the password or a right
    └── CommitUnknown      the commit was sent and not answered: everything is written, or nothing
"""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from datetime import UTC
from functools import cache
from inspect import isawaitable
from math import inf
from time import monotonic
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit
from uuid import uuid4

import pymongo
from bson import CodecOptions
from bson.binary import UuidRepresentation
from bson.codec_options import DatetimeConversion
from bson.raw_bson import RawBSONDocument
from loguru import logger
from motor.motor_asyncio import (
    AsyncIOMotorClient,
    AsyncIOMotorClientSession,
    AsyncIOMotorCollection,
    AsyncIOMotorDatabase,
)
from pymongo import AsyncMongoClient
from pymongo.errors import ConnectionFailure, InvalidOperation, OperationFailure, PyMongoError
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from runtime import clock
from runtime.exit_codes import ExitCode
from runtime.retry import growing_delays
from runtime.shutdown import Stop

Client = AsyncIOMotorClient[Any]
Database = AsyncIOMotorDatabase[Any]
Collection = AsyncIOMotorCollection[Any]
Session = AsyncIOMotorClientSession
Result = TypeVar("Result")

REMEDY = "check that it is running and that MONGODB_URL is right"

DRIVERS: Mapping[str, Any] = {"motor": AsyncIOMotorClient, "pymongo": AsyncMongoClient}

#: Change streams on 6.0 push the filter down to the oplog; older ones are past their end of life.
OLDEST_SERVER = (6, 0)

UNAUTHORIZED = 13
AUTHENTICATION_FAILED = 18
NAMESPACE_EXISTS = 48
#: An index of these keys exists under another name, or with other options.
INDEX_OPTIONS_CONFLICT = 85
#: An index of this name exists with other keys.
INDEX_KEY_SPECS_CONFLICT = 86

#: https://www.mongodb.com/docs/manual/reference/error-codes/ : a server that is stepping down,
#: starting, has lost a cursor, or has yet to find the keys that sign its times (211, just after a
#: restart). All of these are transient.
TRANSIENT_CODES = frozenset(
    {6, 7, 43, 89, 91, 189, 211, 262, 9001, 10107, 11600, 11602, 13435, 13436}
)

TRANSIENT_LABELS = (
    "RetryableWriteError",
    "ResumableChangeStreamError",
    "TransientTransactionError",
)

#: A refusal repeats the whole command, with people's data; its name and collection are enough.
COMMAND_DUMP = re.compile(r" command \{ (\w+: [^,}]+).*", re.DOTALL)

#: Parts that the driver adds to its messages: configuration, topology, the server's whole answer.
DRIVERS_DUMP = re.compile(r" \(configured timeouts: [^)]*\)|, (Timeout|full error): .*", re.DOTALL)

#: A server in that topology: often the only place where the driver names the server.
ASKED_SERVER = re.compile(r"<ServerDescription \('([^']+)', (\d+)\)")

#: A frozen server does not answer; the next try may find another primary.
TRY_SECONDS = 5.0

#: A connection that is not established by then is given up.
CONNECT_SECONDS = 5.0

#: How often the driver checks each server, and so how soon it notices one that is frozen.
HEARTBEAT_SECONDS = 5.0

#: A command that has no answer by then is given up with its connection. Every command of a process
#: takes less; one that may take longer runs in a `pymongo.timeout` of its own, which replaces this.
ANSWER_SECONDS = 10.0

#: An index of a large collection takes as long as it takes.
INDEX_BUILD_SECONDS = 24 * 3600.0

#: How long a client may take to say goodbye to a server that does not answer.
CLOSE_SECONDS = 1.0

#: A transaction that conflicts with others is repeated for up to this long.
TRANSACTION_SECONDS = 10.0

#: How long it may take to abort a transaction that was given up.
ABORT_SECONDS = 0.25

#: For documents of other applications: a date beyond Python's years stays a number, and bytes that
#: are not UTF-8 become lone surrogates, which the next encoder of the text refuses.
ANY_WRITER: CodecOptions[dict[str, Any]] = CodecOptions(
    # a UUID stays binary: one of the wrong length would make a whole batch undecodable
    uuid_representation=UuidRepresentation.UNSPECIFIED,
    tz_aware=True,
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
    unicode_decode_error_handler="surrogateescape",
)

RAW = ANY_WRITER.with_options(document_class=RawBSONDocument)

Document = Mapping[str, Any]


class DatabaseError(Exception):
    """The root of the errors defined here."""


class UnsuitableServer(DatabaseError):
    """The server cannot do what is needed; the message says why and how to fix it."""


class AccessRefused(UnsuitableServer):
    """The server refuses the user, the password or a right."""


class CommitUnknown(DatabaseError):
    """It is unknown whether the transaction was committed; nothing is half written."""


class GivenUp(Exception):
    """A stop was requested while MongoDB was unavailable; nothing was done."""


def open_client(
    url: str,
    *,
    process: str,
    server_selection_seconds: float = 5.0,
    answer_seconds: float = ANSWER_SECONDS,
    overrule_url: bool = False,
) -> Client:
    """
    A pooled client; writes are acknowledged by a majority.

    answer_seconds: the deadline of a command outside any `pymongo.timeout`.
    overrule_url: whether the deadlines replace those in the URL, such as its `socketTimeoutMS`.
    """
    deadlines = {
        "connectTimeoutMS": CONNECT_SECONDS,
        "heartbeatFrequencyMS": HEARTBEAT_SECONDS,
        "socketTimeoutMS": answer_seconds,
    }
    in_url = set() if overrule_url else {name.lower() for name, _ in parse_qsl(urlsplit(url).query)}
    driver = DRIVERS[os.environ.get("MONGODB_DRIVER", "motor")]
    client: Client = driver(
        url,
        appname=process,
        serverSelectionTimeoutMS=int(server_selection_seconds * 1000),
        w="majority",
        readConcernLevel="majority",
        tz_aware=True,
        uuidRepresentation="standard",
        **{
            name: int(seconds * 1000)
            for name, seconds in deadlines.items()
            if name.lower() not in in_url
        },
    )
    return client


async def close(client: Client) -> None:
    """Ends within `CLOSE_SECONDS`, also when the server does not answer."""
    closing: Any = client.close
    with pymongo.timeout(CLOSE_SECONDS):
        await _result_of(closing())


async def aggregate(
    collection: Collection, pipeline: Sequence[Mapping[str, Any]]
) -> AsyncIterator[dict[str, Any]]:
    """The documents that the pipeline returns. Raises PyMongoError."""
    async for document in await _result_of(collection.aggregate(pipeline)):
        yield document


async def start_session(client: Client, **options: Any) -> Session:
    session: Session = await _result_of(client.start_session(**options))
    return session


@asynccontextmanager
async def snapshot_session(client: Client) -> AsyncIterator[Session]:
    """All reads in this session see the data of one moment, that of the first read."""
    async with await start_session(client, snapshot=True) as session:
        yield session


async def _result_of(answer: Any) -> Any:
    return await answer if isawaitable(answer) else answer


def is_transient(error: BaseException) -> bool:
    """Whether the same command may succeed once the servers have recovered."""
    if isinstance(error, ConnectionFailure):
        return True
    if not isinstance(error, PyMongoError):
        return False
    if error.timeout or any(error.has_error_label(label) for label in TRANSIENT_LABELS):
        return True
    return isinstance(error, OperationFailure) and error.code in TRANSIENT_CODES


async def retry_while_unavailable(
    action: Callable[[], Awaitable[Result]],
    stop: Stop | None = None,
    *,
    try_seconds: float | None = TRY_SECONDS,
    patience_seconds: float = inf,
    waits_for_rights: bool = True,
    on_unavailable: Callable[[PyMongoError | CommitUnknown], None] | None = None,
) -> Result:
    """
    Run the idempotent `action`, and repeat it with growing delays while MongoDB is unavailable.

    stop: once a stop is requested, no further try is made, and GivenUp is raised.
    try_seconds: the deadline of each try; None for an action that bounds its own steps.
    patience_seconds: no try begins later; then the last try's error is raised.
    waits_for_rights: whether a refused user or right is waited for, too: a process logs once that
        it waits, and goes on when the right is granted again; a command ends.
    on_unavailable: called with the error of each try instead of logging it.

    Raises GivenUp, and whatever the action raised that repeating cannot cure.
    """
    delays = growing_delays()
    give_up_at = monotonic() + patience_seconds
    refused = False
    while True:
        try:
            with pymongo.timeout(try_seconds):
                return await action()
        except (PyMongoError, CommitUnknown) as error:
            waits = waits_for_rights if is_refusal(error) else _may_recover(error)
            if not waits or monotonic() >= give_up_at:
                raise
            if on_unavailable is not None:
                on_unavailable(error)
            elif not is_refusal(error):
                # the error's text would repeat the whole topology
                code = getattr(error, "code", None)
                logger.warning("mongodb.away", reason=type(error).__name__, code=code)
            elif not refused:
                refused = True
                logger.error("mongodb.access_refused", reason=explain_error(error))
        if stop is None:
            await asyncio.sleep(next(delays))
        else:
            await stop.rest(next(delays))
            if stop.requested:
                raise GivenUp("MongoDB was unavailable until the stop")


def _may_recover(error: PyMongoError | CommitUnknown) -> bool:
    return isinstance(error, CommitUnknown) or is_transient(error)


def is_refusal(error: BaseException) -> bool:
    """Whether the server refuses the user, the password or a right."""
    codes = {UNAUTHORIZED, AUTHENTICATION_FAILED}
    return isinstance(error, OperationFailure) and error.code in codes


async def ping(client: Client) -> bool:
    """True, and the server's clock is noted; raises PyMongoError while the server is away."""
    await _hello(client)
    return True


async def _hello(client: Client) -> Mapping[str, Any]:
    hello: Mapping[str, Any] = await client.admin.command("hello")
    clock.note_server_time(hello["localTime"].replace(tzinfo=UTC))
    return hello


async def check_server(client: Client) -> None:
    """Raises UnsuitableServer if the server cannot be used, PyMongoError while it is away."""
    try:
        hello = await _hello(client)
        version = (await client.admin.command("buildInfo"))["versionArray"]
    except OperationFailure as error:
        raise with_remedy(error) from error
    if "setName" not in hello and hello.get("msg") != "isdbgrid":
        raise UnsuitableServer(
            "MongoDB runs without a replica set, so it has neither transactions nor change "
            "streams: start it with --replSet and call rs.initiate() once"
        )
    if tuple(version[:2]) < OLDEST_SERVER:
        raise UnsuitableServer(
            f"MongoDB is {'.'.join(map(str, version[:3]))}; "
            f"{'.'.join(map(str, OLDEST_SERVER))} or newer is needed"
        )


def with_remedy(error: OperationFailure) -> PyMongoError | UnsuitableServer:
    """The same error, or one that says how to fix it where credentials or rights are missing."""
    if error.code == AUTHENTICATION_FAILED:
        return AccessRefused("MongoDB refuses the user or password in MONGODB_URL: correct them")
    if error.code == UNAUTHORIZED:
        refusal = (error.details or {}).get("errmsg", "not authorized")
        needed = COMMAND_DUMP.sub(r" \1", refusal)
        return AccessRefused(
            f"MongoDB refuses a right that is needed ({needed}): "
            "run `python -m installation mongodb`, which grants the role of this process"
        )
    return error


def explain_error(error: PyMongoError | DatabaseError) -> str:
    """One sentence for the operator: what is wrong and what to check."""
    if isinstance(error, CommitUnknown):
        return "MongoDB did not answer the commit: all was done, or nothing; check before repeating"
    if isinstance(error, OperationFailure):
        error = with_remedy(error)
    if isinstance(error, DatabaseError):
        return str(error)
    said = DRIVERS_DUMP.sub("", str(error))
    if is_transient(error):
        asked = ", ".join(":".join(server) for server in ASKED_SERVER.findall(str(error)))
        which = f"MongoDB at {asked}" if asked else "MongoDB"
        return f"{which} is not reachable ({said}): {REMEDY}"
    return f"MongoDB: {said}"


def exit_code_of(error: PyMongoError | DatabaseError) -> ExitCode:
    """How a process ends that this error ends."""
    if isinstance(error, CommitUnknown):
        return ExitCode.UNFINISHED
    if isinstance(error, OperationFailure):
        error = with_remedy(error)
    if isinstance(error, AccessRefused):
        return ExitCode.PERMISSION
    if isinstance(error, UnsuitableServer):
        return ExitCode.CONFIGURATION
    return ExitCode.UNAVAILABLE if is_transient(error) else ExitCode.INTERNAL_ERROR


async def ensure_collection(
    database: Database,
    name: str,
    *,
    indexes: Iterable[Mapping[str, Any]] = (),
    validator: Mapping[str, Any] | None = None,
) -> None:
    """
    Create the collection, its indexes and its validator where they are missing or different.
    Idempotent, and safe to run in several processes at once.
    """
    options = {} if validator is None else {"validator": dict(validator)}
    try:
        found = await database.command({"listCollections": 1, "filter": {"name": name}})
        existing = found["cursor"]["firstBatch"]
        if not existing:
            await _create_collection(database, name, options)
        elif options and existing[0]["options"].get("validator") != options["validator"]:
            # only if different: collMod waits for open transactions and blocks all other writes
            await _command_of_any_length(database, {"collMod": name, **options})
        await _ensure_indexes(database, name, [dict(index) for index in indexes])
    except OperationFailure as error:
        raise with_remedy(error) from error


async def _ensure_indexes(
    database: Database, collection: str, indexes: Sequence[Mapping[str, Any]]
) -> None:
    if not indexes:
        return
    try:
        await _command_of_any_length(
            database, {"createIndexes": collection, "indexes": list(indexes)}
        )
    except OperationFailure as error:
        if error.code not in {INDEX_OPTIONS_CONFLICT, INDEX_KEY_SPECS_CONFLICT}:
            raise
        if len(indexes) > 1:
            for index in indexes:
                await _ensure_indexes(database, collection, [index])
        elif error.code == INDEX_OPTIONS_CONFLICT:
            # of the same keys, which is what queries need
            said = (error.details or {}).get("errmsg", "")
            _report_other_index(collection, indexes[0]["name"], said)
        else:
            raise UnsuitableServer(_index_of_other_keys(collection, indexes[0])) from error


@cache
def _report_other_index(collection: str, index: str, reason: str) -> None:
    """Once in a process for each difference."""
    logger.warning("index.differs", collection=collection, index=index, reason=reason)


def _index_of_other_keys(collection: str, index: Mapping[str, Any]) -> str:
    name, keys = index["name"], dict(index["key"])
    return (
        f"the collection {collection!r} has an index {name!r} that is not on {keys}: drop it"
        f" (db.getCollection({collection!r}).dropIndex({name!r})), and create it again under"
        " another name if your application needs it"
    )


async def _command_of_any_length(database: Database, command: Mapping[str, Any]) -> None:
    """
    A command that may rightly take hours, and mostly takes no time.

    Its deadline is lifted only when it is exceeded while the server answers something else.
    """
    try:
        await database.command(dict(command))
    except PyMongoError as error:
        if not error.timeout:
            raise
        await ping(database.client)
        with pymongo.timeout(INDEX_BUILD_SECONDS):
            await database.command(dict(command))


async def _create_collection(database: Database, name: str, options: Mapping[str, Any]) -> None:
    try:
        await database.command({"create": name, **options})
    except OperationFailure as error:
        if error.code != NAMESPACE_EXISTS:  # created by another process
            raise


async def in_transaction(
    client: Client,
    write: Callable[[Session], Awaitable[Result]],
    *,
    deadline_seconds: float = TRANSACTION_SECONDS,
) -> Result:
    """
    Run `write` in a transaction, committed by a majority when this returns.

    `write` may run more than once, so it must not create IDs or call other systems. The drivers'
    own `with_transaction` retries for two minutes whatever the deadline, hence this loop.

    Raises CommitUnknown when the commit was not answered in time, and any error of `write`.
    """
    async with await start_session(client) as session:
        try:
            with pymongo.timeout(deadline_seconds):
                return await _until_committed(session, write, monotonic() + deadline_seconds)
        finally:
            # A transaction left open would lock what it wrote for a minute. The caller's deadline
            # may be over, and a nested one cannot be longer: hence a context without deadlines.
            await asyncio.create_task(_abort_in_time(session), context=Context())


async def _until_committed(
    session: Session, write: Callable[[Session], Awaitable[Result]], give_up_at: float
) -> Result:
    delays = growing_delays(first_seconds=0.01, cap_seconds=0.2)
    while True:
        await _result_of(
            session.start_transaction(
                read_concern=ReadConcern("snapshot"), write_concern=WriteConcern("majority")
            )
        )
        try:
            result = await write(session)
            await _commit(session)
        except PyMongoError as error:
            passes = error.has_error_label("TransientTransactionError")
            if not passes or monotonic() >= give_up_at:
                raise
        else:
            return result
        await _abort(session)
        await asyncio.sleep(next(delays))


async def _abort(session: Session) -> None:
    if session.in_transaction:  # type: ignore[truthy-function]  # motor's stub lost a @property
        await session.abort_transaction()


async def _abort_in_time(session: Session) -> None:
    # A cancelled commit goes on in the driver's thread. If it ends before the abort, nothing is
    # left to abort, and the driver's refusal must not replace the caller's CancelledError.
    with pymongo.timeout(ABORT_SECONDS), suppress(InvalidOperation):
        await _abort(session)


async def _commit(session: Session) -> None:
    try:
        await session.commit_transaction()  # the driver itself sends it a second time
    except PyMongoError as error:
        if error.has_error_label("UnknownTransactionCommitResult"):
            raise CommitUnknown(str(error)) from error
        raise


def new_owner() -> str:
    """A name that no other process ever has; host and pod names are reused."""
    return str(uuid4())
