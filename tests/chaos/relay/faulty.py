"""
`python -m tests.chaos.relay.faulty FAULT run`: the relay with a deliberate fault, which the
campaign must find, or it is blind.
"""

import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from bson import Timestamp

import relay.reader
from outbox.state import PENDING
from relay.__main__ import commands
from relay.reader import Reader
from relay.stream import BATCH_SIZE, Change
from runtime.batch_cursor import BatchCursor
from runtime.mongo import Database, Document


def save_before_confirm() -> None:
    """The position is saved behind a batch as soon as it was read."""
    admit = Reader._admit_changes

    async def saving_first(self: Reader, changes: Sequence[Change]) -> None:
        settled = self._checkpoint.settled + len(changes)
        await self._checkpoint.save(settled=settled, position=changes[-1].position)
        await admit(self, changes)

    Reader._admit_changes = saving_first  # type: ignore[method-assign]


def read_without_snapshot() -> None:
    """What is pending is read as it comes; the moment from which to tail is asked for apart."""

    async def read_pending(
        database: Database, collection: str
    ) -> AsyncGenerator[tuple[Sequence[Document], Timestamp]]:
        command: dict[str, Any] = {
            "find": collection,
            "filter": PENDING,
            "sort": {"seq": 1, "created_at": 1, "_id": 1},
        }
        cursor, batch = await BatchCursor.open(database, command, batch_size=BATCH_SIZE)
        while True:
            moment = (await database.command("ping"))["operationTime"]
            yield batch.documents, moment
            if batch.exhausted:
                return
            batch = await cursor.next_batch()

    relay.reader.read_pending = read_pending  # type: ignore[attr-defined]


FAULTS: dict[str, Callable[[], None]] = {
    "save-before-confirm": save_before_confirm,
    "read-without-snapshot": read_without_snapshot,
}


if __name__ == "__main__":
    FAULTS[sys.argv.pop(1)]()
    commands()
