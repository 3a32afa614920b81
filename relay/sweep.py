"""
The safety net: pending events behind the saved position. It should never find any.

No local clock is used. An event seen pending was committed before the server's current time; if it
is still pending once the position has passed that time, the stream or the relay missed it.
"""

from time import monotonic
from typing import Any

from bson import Timestamp

from outbox.state import PENDING
from relay.checkpoint import Position
from relay.intake import is_addressable
from runtime.mongo import ANY_WRITER, Database, Document

SWEEP_SECONDS = 10.0
SWEEP_LIMIT = 1000

#: Of publishing, so that several sweeps in a row keep the order of each key.
ORDER = [("seq", 1), ("created_at", 1), ("_id", 1)]


class Sweep:
    def __init__(self, database: Database, collection: str) -> None:
        self._database = database
        self._outbox = database.get_collection(collection, codec_options=ANY_WRITER)
        self._seen_ids: list[Any] = []
        self._seen_at: Timestamp | None = None
        self._due_at = monotonic()

    async def missed(self, position: Position) -> list[Document]:
        """Missed events, in order within each key; empty until the next sweep is due."""
        if monotonic() < self._due_at:
            return []
        self._due_at = monotonic() + SWEEP_SECONDS
        missed: list[Document] = []
        if self._seen_at is not None and position.cluster_time > self._seen_at:
            missed = await self._still_pending()
            self._seen_at = None
        if self._seen_at is None:
            await self._note_pending()
        return missed

    async def _still_pending(self) -> list[Document]:
        cursor = self._outbox.find({"_id": {"$in": self._seen_ids}, **PENDING}, sort=ORDER)
        documents: list[Document] = await cursor.to_list(None)
        return documents

    async def _note_pending(self) -> None:
        cursor = self._outbox.find(PENDING, {"_id": 1}, sort=ORDER, limit=SWEEP_LIMIT)
        ids = [document["_id"] async for document in cursor]
        self._seen_ids = [event_id for event_id in ids if is_addressable(event_id)]
        # read after the query, so that it is not earlier than any commit the query saw
        self._seen_at = (await self._database.command("ping"))["operationTime"]
