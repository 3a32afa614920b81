"""
MongoDB; the only file that imports motor, which is past its end of life: to move to PyMongo's
own asyncio interface is to change this file.

    DatabaseError (PyMongo's errors pass through as they are)
    ├── UnsuitableServer   no replica set, too old, or rights are missing; says the cure
    └── CommitUnknown      the commit was sent and no answer came: all is written, or nothing
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar
from uuid import uuid4

import pymongo
from bson import CodecOptions, Timestamp
from bson.binary import UuidRepresentation
from bson.codec_options import DatetimeConversion
from bson.raw_bson import RawBSONDocument
from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorClientSession, AsyncIOMotorDatabase
from pymongo.errors import ConnectionFailure, OperationFailure, PyMongoError
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from runtime.retry import growing_delays
from runtime.undecodable import cursor_in

Client = AsyncIOMotorClient[Any]
Database = AsyncIOMotorDatabase[Any]
Session = AsyncIOMotorClientSession
Result = TypeVar("Result")

#: Change streams on 6.0 push the filter down to the oplog; older servers are past their own end.
OLDEST_SERVER = (6, 0)

UNAUTHORIZED = 13
AUTHENTICATION_FAILED = 18
NAMESPACE_EXISTS = 48

#: https://www.mongodb.com/docs/manual/reference/error-codes/ : a server that is stepping down,
#: starting, has lost a cursor, or has yet to find the keys that sign its times (211, for a moment
#: after a restart); all of them pass.
TRANSIENT_CODES = frozenset(
    {6, 7, 43, 89, 91, 189, 211, 262, 9001, 10107, 11600, 11602, 13435, 13436}
)

TRANSIENT_LABELS = (
    "RetryableWriteError",
    "ResumableChangeStreamError",
    "TransientTransactionError",
)

#: A refusal repeats the whole command, with what people wrote; its name and collection are enough.
COMMAND_DUMP = re.compile(r" command \{ (\w+: [^,}]+).*", re.DOTALL)

#: What the driver adds to its messages: its configuration, its topology, the server's whole answer.
DRIVERS_DUMP = re.compile(r" \(configured timeouts: [^)]*\)|, (Timeout|full error): .*", re.DOTALL)

#: A server in that topology: often the only place where the driver says whom it asked.
ASKED_SERVER = re.compile(r"<ServerDescription \('([^']+)', (\d+)\)")

#: How long the end of a transaction that was given up may take.
ABORT_SECONDS = 0.25

#: For documents of unknown writers: a date beyond Python's years stays a number, and bytes that
#: are no UTF-8 become lone surrogates, which whoever encodes the text again will notice.
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
    """The root of this file's own errors."""


class UnsuitableServer(DatabaseError):
    """The server cannot do what is asked of it; the message says why, and the cure."""


class CommitUnknown(DatabaseError):
    """Whether the transaction was committed is not known; it is whole either way."""


def open_client(url: str, *, process: str, server_selection_seconds: float = 5.0) -> Client:
    """A pooled client, one a process; writes are acknowledged by a majority."""
    return AsyncIOMotorClient(
        url,
        appname=process,
        serverSelectionTimeoutMS=int(server_selection_seconds * 1000),
        w="majority",
        readConcernLevel="majority",
        tz_aware=True,
        uuidRepresentation="standard",
    )


def is_transient(error: BaseException) -> bool:
    """Whether the same command may succeed once the servers have sorted themselves out."""
    if isinstance(error, ConnectionFailure):
        return True
    if not isinstance(error, PyMongoError):
        return False
    if error.timeout or any(error.has_error_label(label) for label in TRANSIENT_LABELS):
        return True
    return isinstance(error, OperationFailure) and error.code in TRANSIENT_CODES


async def ping(client: Client) -> bool:
    """True; raises PyMongoError while the server is away."""
    await client.admin.command("ping")
    return True


async def check_server(client: Client) -> None:
    """Raises UnsuitableServer where the server can never serve; PyMongoError while it is away."""
    try:
        hello = await client.admin.command("hello")
        version = (await client.admin.command("buildInfo"))["versionArray"]
    except OperationFailure as error:
        raise named(error) from error
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


def named(error: OperationFailure) -> PyMongoError | UnsuitableServer:
    """The same error, or, where rights are missing, one that says the cure."""
    if error.code == AUTHENTICATION_FAILED:
        return UnsuitableServer("MongoDB refuses the user or password in MONGODB_URL: correct them")
    if error.code == UNAUTHORIZED:
        refusal = (error.details or {}).get("errmsg", "not authorized")
        needed = COMMAND_DUMP.sub(r" \1", refusal)
        return UnsuitableServer(
            f"MongoDB refuses a right that is needed ({needed}): "
            "grant the role that deploy/mongodb describes for this process"
        )
    return error


def explained(error: PyMongoError | DatabaseError) -> str:
    """What is wrong and what to look at, in one sentence for whoever gave a command."""
    if isinstance(error, CommitUnknown):
        return "MongoDB did not answer the commit: all was done, or nothing; look before you repeat"
    if isinstance(error, OperationFailure):
        error = named(error)
    if isinstance(error, DatabaseError):
        return str(error)
    said = DRIVERS_DUMP.sub("", str(error))
    if is_transient(error):
        asked = ", ".join(":".join(server) for server in ASKED_SERVER.findall(str(error)))
        which = f"MongoDB at {asked}" if asked else "MongoDB"
        return f"{which} does not answer ({said}): look whether it runs, and at MONGODB_URL"
    return f"MongoDB: {said}"


async def ensure_collection(
    database: Database,
    name: str,
    *,
    indexes: Iterable[Mapping[str, Any]] = (),
    validator: Mapping[str, Any] | None = None,
) -> None:
    """
    Create the collection, its indexes and its validator where they are missing or different. May
    be repeated, and run by several processes at once.
    """
    options = {} if validator is None else {"validator": dict(validator)}
    try:
        found = await database.command({"listCollections": 1, "filter": {"name": name}})
        existing = found["cursor"]["firstBatch"]
        if not existing:
            await _create_collection(database, name, options)
        elif options and existing[0]["options"].get("validator") != options["validator"]:
            # only then: it waits for every open transaction, and all other writes wait behind it
            await database.command({"collMod": name, **options})
        specifications = [dict(index) for index in indexes]
        if specifications:
            await database.command({"createIndexes": name, "indexes": specifications})
    except OperationFailure as error:
        raise named(error) from error


async def _create_collection(database: Database, name: str, options: Mapping[str, Any]) -> None:
    try:
        await database.command({"create": name, **options})
    except OperationFailure as error:
        if error.code != NAMESPACE_EXISTS:  # another process was quicker
            raise


async def in_transaction(
    client: Client,
    write: Callable[[Session], Awaitable[Result]],
    *,
    deadline_seconds: float,
) -> Result:
    """
    Run `write` in a transaction, committed by a majority when this returns.

    `write` may run more than once, so it makes no ids and calls nobody. The drivers' own
    `with_transaction` retries for two minutes whatever the caller's deadline, hence this loop.

    Raises CommitUnknown when no answer to the commit came in time, and whatever `write` raised.
    """
    async with await client.start_session() as session:
        try:
            with pymongo.timeout(deadline_seconds):
                return await _until_committed(session, write, monotonic() + deadline_seconds)
        finally:
            # One left open would block what it wrote for a minute. The caller's deadlines may be
            # over, and nested ones never last longer: hence a context without any.
            await asyncio.create_task(_abort_in_time(session), context=Context())


async def _until_committed(
    session: Session, write: Callable[[Session], Awaitable[Result]], give_up_at: float
) -> Result:
    delays = growing_delays(first_seconds=0.01, cap_seconds=0.2)
    while True:
        session.start_transaction(
            read_concern=ReadConcern("snapshot"), write_concern=WriteConcern("majority")
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
    with pymongo.timeout(ABORT_SECONDS):
        await _abort(session)


async def _commit(session: Session) -> None:
    try:
        await session.commit_transaction()  # the driver itself sends it a second time
    except PyMongoError as error:
        if error.has_error_label("UnknownTransactionCommitResult"):
            raise CommitUnknown(str(error)) from error
        raise


@dataclass(frozen=True, slots=True)
class Batch:
    """
    resume_token: where a change stream stands after this batch; None for other cursors.
    snapshot_time: the moment that a snapshot read shows; None for other cursors.
    exhausted: nothing follows.
    """

    documents: Sequence[Document]
    resume_token: Document | None
    snapshot_time: Timestamp | None
    exhausted: bool


class BatchCursor:
    """
    A cursor read in whole batches, by `aggregate` or `find` and then `getMore` commands: six times
    as many events a second as motor's own cursor, which pays a thread's hop for each.

    Never cancel a read: motor's thread would go on, and what it brings would be lost. After a
    cancelled or failed read this cursor is of no more use; open another.
    """

    def __init__(self, database: Database, session: Session, batch_size: int) -> None:
        self._database = database
        self._session = session
        self._batch_size = batch_size
        self._cursor_id = 0
        self._collection = ""

    @classmethod
    async def open(
        cls, database: Database, command: Mapping[str, Any], *, batch_size: int
    ) -> tuple["BatchCursor", Batch]:
        """The cursor and its first batch. `command` is a `find` or an `aggregate`."""
        # causal consistency would add a read time of its own to the command's
        session = await database.client.start_session(causal_consistency=False)
        cursor = cls(database, session, batch_size)
        size = {"batchSize": batch_size}
        options = size if "find" in command else {"cursor": size}
        try:
            batch = await cursor._run({**command, **options})
        except BaseException:
            await session.end_session()
            raise
        return cursor, batch

    async def next_batch(self, *, wait_ms: int | None = None) -> Batch:
        """wait_ms: how long the server waits for something to come (change streams only)."""
        command: dict[str, Any] = {
            "getMore": self._cursor_id,
            "collection": self._collection,
            "batchSize": self._batch_size,
        }
        if wait_ms is not None:
            command["maxTimeMS"] = wait_ms
        return await self._run(command)

    async def close(self) -> None:
        """Free what the server keeps for this cursor; it would forget it by itself in time."""
        try:
            if self._cursor_id:
                command = {"killCursors": self._collection, "cursors": [self._cursor_id]}
                await self._database.command(command, session=self._session)
        except PyMongoError:
            pass  # away or gone already: the server ends idle cursors by itself
        finally:
            await self._session.end_session()

    async def _run(self, command: Mapping[str, Any]) -> Batch:
        try:
            reply = await self._database.command(
                dict(command), session=self._session, codec_options=RAW
            )
        except OperationFailure as error:
            raise named(error) from error
        cursor = cursor_in(reply, ANY_WRITER)
        self._cursor_id = cursor["id"]
        self._collection = cursor["ns"].split(".", 1)[1]
        documents = cursor.get("nextBatch")
        return Batch(
            documents=cursor["firstBatch"] if documents is None else documents,
            resume_token=cursor.get("postBatchResumeToken"),
            snapshot_time=cursor.get("atClusterTime"),
            exhausted=self._cursor_id == 0,
        )


def new_owner() -> str:
    """A name that no other process ever has; a host's or a pod's may come back."""
    return str(uuid4())
