"""Requests for assistance in MongoDB, as the API writes and reads them."""

from dataclasses import dataclass

import pymongo

from assistance.collection import ASSISTANCES
from assistance.request import Acceptance, Request
from outbox.collection import OUTBOX
from runtime.mongo import Client, Database, Session, in_transaction


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

        async def write(session: Session) -> None:
            await self.database[ASSISTANCES].insert_one(acceptance.request, session=session)
            await self.database[OUTBOX].insert_many(acceptance.outbox_documents, session=session)

        await in_transaction(self.client, write, deadline_seconds=self.deadline_seconds)

    async def find(self, request_id: str) -> Request | None:
        """Raises PyMongoError when MongoDB does not answer in time."""
        with pymongo.timeout(self.deadline_seconds):
            found: Request | None = await self.database[ASSISTANCES].find_one(
                {"_id": request_id}, {"deliveries": False}
            )
            return found
