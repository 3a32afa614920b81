"""
Published events whose mark MongoDB refuses for good, one document each in `journal`:

    {_id: {group, epoch, ordinal}, ids: [event id], refused, at}

Their documents stay pending, so whatever reads pending events asks here first.
"""

from collections.abc import Hashable
from contextlib import suppress
from typing import Any

from loguru import logger
from pymongo.errors import DuplicateKeyError

from relay.window import Entry
from runtime import clock
from runtime.mongo import ANY_WRITER, Database

JOURNAL = "journal"


class Journal:
    def __init__(self, database: Database, group: str) -> None:
        self._journal = database.get_collection(JOURNAL, codec_options=ANY_WRITER)
        self._group = group
        self._published: set[Hashable] = set()

    async def load(self) -> None:
        """Raises PyMongoError."""
        async for document in self._journal.find({"_id.group": self._group}, {"ids": 1}):
            self._published.update(document["ids"])

    def has(self, event_id: Any) -> bool:
        return (
            bool(self._published) and isinstance(event_id, Hashable) and event_id in self._published
        )

    async def add(self, entry: Entry, epoch: int, refused: str) -> None:
        """Record a published event; may be repeated. Raises PyMongoError."""
        if self.has(entry.id):
            return
        document_id = {"group": self._group, "epoch": epoch, "ordinal": entry.ordinal}
        document = {"_id": document_id, "ids": [entry.id], "refused": refused, "at": clock.now()}
        with suppress(DuplicateKeyError):  # an earlier try whose answer was lost
            await self._journal.insert_one(document)
        self._published.add(entry.id)
        logger.error("event.not_marked", event_id=str(entry.id), key=entry.key, reason=refused)
