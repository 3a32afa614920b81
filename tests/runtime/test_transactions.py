"""Transactions: the caller's deadline holds, and an abandoned one is aborted."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Self

import pymongo
import pytest
from pymongo import MongoClient
from pymongo.errors import InvalidOperation, PyMongoError

from runtime import mongo
from runtime.mongo import Database, Session, close, in_transaction, open_client


@pytest.fixture
async def database(mongodb_url: str, database_name: str) -> AsyncIterator[Database]:
    client = open_client(mongodb_url, process="test")
    database = client[database_name]
    await database.create_collection("things")
    yield database
    await close(client)


@pytest.mark.parametrize("outer_seconds", [None, 0.5])
async def test_a_given_up_transaction_leaves_nothing_open(
    database: Database, mongodb_url: str, outer_seconds: float | None
) -> None:
    """With a deadline of its own, and with a caller's that is over already."""

    async def write(session: Session) -> None:
        await database["things"].insert_one({"_id": 1}, session=session)
        while True:  # until the deadline ends it on our side, of which the server knows nothing
            await asyncio.sleep(0.1)
            await database["things"].find_one({"_id": 1}, session=session)

    with pytest.raises(PyMongoError), pymongo.timeout(outer_seconds):
        await in_transaction(database.client, write, deadline_seconds=outer_seconds or 0.5)
    with MongoClient[dict[str, Any]](mongodb_url) as client:
        open_ones = client.admin.aggregate(
            [
                {"$currentOp": {"idleSessions": True}},
                {"$match": {"transaction": {"$exists": True}}},
            ]
        )
        assert list(open_ones) == []
    await database["things"].update_one({"_id": 1}, {"$set": {"free": True}}, upsert=True)


async def test_a_transaction_that_is_refused_leaves_nothing_behind(database: Database) -> None:
    async def write(session: Session) -> None:
        await database["things"].insert_one({"_id": 1}, session=session)
        await database["things"].insert_one({"_id": 1}, session=session)

    with pytest.raises(PyMongoError):
        await in_transaction(database.client, write, deadline_seconds=2)
    assert await database["things"].count_documents({}) == 0


class CommittedMeanwhile:
    """
    A session whose commit goes on in the driver's thread after its caller was cancelled, and ends
    between the look at `in_transaction` and the abort, as motor's may.
    """

    in_transaction = True

    def __init__(self) -> None:
        self.committing = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def start_transaction(self, **_: object) -> None:
        pass

    async def commit_transaction(self) -> None:
        self.committing.set()
        await asyncio.Event().wait()

    async def abort_transaction(self) -> None:
        raise InvalidOperation("Cannot call abortTransaction after calling commitTransaction")


async def test_a_task_cancelled_during_its_commit_ends_as_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = CommittedMeanwhile()

    async def start_session(_client: object) -> CommittedMeanwhile:
        return session

    async def write(_session: Session) -> None:
        pass

    monkeypatch.setattr(mongo, "start_session", start_session)
    client: Any = None
    transaction = asyncio.create_task(in_transaction(client, write))
    await session.committing.wait()
    transaction.cancel()
    with pytest.raises(asyncio.CancelledError):
        await transaction
