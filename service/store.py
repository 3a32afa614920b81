"""Requests for assistance in MongoDB, as the API writes and reads them."""

from dataclasses import dataclass

import pymongo
from pymongo.errors import DuplicateKeyError, OperationFailure

from assistance.collection import ASSISTANCES, IDEMPOTENCY_KEYS
from assistance.request import Acceptance, Request
from outbox.collection import OUTBOX
from runtime.mongo import Client, Database, Session, in_transaction
from service.idempotency import Receipt
from service.listing import NEWEST_FIRST, Query
from service.schemas import TOLD, UNTOLD
from service.way import Way, look_up

#: Another transaction that is not over has written the same document.
WRITE_CONFLICT = 112


class _KeyTakenError(Exception):
    """Ends a transaction: another one has written the receipt of this key, or is writing it."""


@dataclass(frozen=True, slots=True)
class Requests:
    client: Client
    database: Database
    deadline_seconds: float

    async def insert(self, acceptance: Acceptance) -> None:
        """
        The request and its events, both or neither; committed by a majority when this returns.

        Raises CommitUnknown where no answer came in time, PyMongoError where nothing was written.
        """
        await in_transaction(
            self.client,
            lambda session: self._insert(acceptance, session),
            deadline_seconds=self.deadline_seconds,
        )

    async def insert_once(self, acceptance: Acceptance, receipt: Receipt) -> Receipt | None:
        """
        The same together with its receipt, unless the key has one: the receipt that stands, which
        may be an earlier request's. None while another call with this key is being answered.

        Raises what `insert` raises.
        """

        async def write(session: Session) -> None:
            # first, so that of two calls at once one ends before it has written anything
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
                {"_id": request_id}, TOLD
            )
            return found

    async def page(self, query: Query, limit: int) -> list[Request]:
        """The first of what the query finds, the newest first. Raises as `find` does."""
        with pymongo.timeout(self.deadline_seconds):
            found: list[Request] = (
                await self.database[ASSISTANCES]
                .find(query.criteria, TOLD, sort=NEWEST_FIRST, hint=query.index, limit=limit)
                .to_list(limit)
            )
            return found

    async def find_way(self, request_id: str) -> Way | None:
        """The request and its events, for a timeline. Raises as `find` does."""
        with pymongo.timeout(self.deadline_seconds):
            return await look_up(self.database, request_id, UNTOLD)

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
        """None until a majority has it: before that it might still be undone."""
        found: Receipt | None = await self.database[IDEMPOTENCY_KEYS].find_one({"_id": receipt_id})
        return found
