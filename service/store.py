"""How the API writes and reads requests in MongoDB."""

from dataclasses import dataclass

import pymongo
from pymongo.errors import DuplicateKeyError, OperationFailure

from assistance.collection import ASSISTANCES, IDEMPOTENCY_KEYS
from assistance.request import Acceptance, Request
from outbox.collection import OUTBOX
from runtime.mongo import Client, Database, Session, in_transaction
from service.idempotency import Receipt
from service.listing import NEWEST_FIRST, Query
from service.schemas import HIDDEN_FIELDS, PUBLIC_FIELDS
from service.timeline import RequestHistory, find_history

#: Another transaction, still open, has written the same document.
WRITE_CONFLICT = 112


class _KeyTakenError(Exception):
    """Ends a transaction: another one has written the receipt of this key, or is about to."""


@dataclass(frozen=True, slots=True)
class RequestStore:
    client: Client
    database: Database
    deadline_seconds: float

    async def insert(self, acceptance: Acceptance) -> None:
        """
        Write the request and its events, all or none; committed by a majority when this returns.

        Raises CommitUnknown when no answer came in time, PyMongoError when nothing was written.
        """
        await in_transaction(
            self.client,
            lambda session: self._insert(acceptance, session),
            deadline_seconds=self.deadline_seconds,
        )

    async def insert_once(self, acceptance: Acceptance, receipt: Receipt) -> Receipt | None:
        """
        Write the request with its events and its receipt, unless the key already has a receipt.

        Returns the stored receipt, which may be an earlier request's, or None while another call
        with this key is in progress. Raises what `insert` raises.
        """

        async def write(session: Session) -> None:
            # first, so that of two concurrent calls one ends before it has written anything
            await self._insert_receipt(receipt, session)
            await self._insert(acceptance, session)

        with pymongo.timeout(self.deadline_seconds):
            try:
                await in_transaction(self.client, write, deadline_seconds=self.deadline_seconds)
            except _KeyTakenError:
                return await self._find_receipt(receipt["_id"])
            return receipt

    async def find(self, request_id: str) -> Request | None:
        """Raises PyMongoError when MongoDB does not answer in time."""
        with pymongo.timeout(self.deadline_seconds):
            found: Request | None = await self.database[ASSISTANCES].find_one(
                {"_id": request_id}, PUBLIC_FIELDS
            )
            return found

    async def page(self, query: Query, limit: int) -> list[Request]:
        """Up to `limit` requests, the newest first. Raises PyMongoError as `find` does."""
        with pymongo.timeout(self.deadline_seconds):
            cursor = self.database[ASSISTANCES].find(
                query.criteria, PUBLIC_FIELDS, sort=NEWEST_FIRST, hint=query.index, limit=limit
            )
            found: list[Request] = await cursor.to_list(limit)
            return found

    async def find_history(self, request_id: str) -> RequestHistory | None:
        """The request and its timeline. Raises PyMongoError as `find` does."""
        with pymongo.timeout(self.deadline_seconds):
            return await find_history(self.database, request_id, HIDDEN_FIELDS)

    async def _insert(self, acceptance: Acceptance, session: Session) -> None:
        await self.database[ASSISTANCES].insert_one(acceptance.request, session=session)
        await self.database[OUTBOX].insert_many(acceptance.outbox_documents, session=session)

    async def _insert_receipt(self, receipt: Receipt, session: Session) -> None:
        try:
            await self.database[IDEMPOTENCY_KEYS].insert_one(receipt, session=session)
        except DuplicateKeyError as taken:
            raise _KeyTakenError from taken
        except OperationFailure as error:
            if error.code == WRITE_CONFLICT:
                raise _KeyTakenError from error
            raise

    async def _find_receipt(self, receipt_id: str) -> Receipt | None:
        """None until a majority has it: until then it could be rolled back."""
        found: Receipt | None = await self.database[IDEMPOTENCY_KEYS].find_one({"_id": receipt_id})
        return found
