"""
Resync: publish all pending events, then tail the stream from the time of that snapshot.

A snapshot read returns everything committed up to its time T and nothing later; the stream, started
behind T, returns everything later. So there is no gap, whatever is written meanwhile. Used at the
first start and whenever the position is lost.
"""

from collections.abc import AsyncGenerator, Sequence

from bson import Timestamp
from pymongo.errors import OperationFailure

from outbox.state import PENDING
from relay.stream import BATCH_SIZE
from runtime.batch_cursor import BatchCursor
from runtime.mongo import Database, Document

SNAPSHOT_TOO_OLD = 239
SNAPSHOT_UNAVAILABLE = 246


class SnapshotExpired(Exception):
    """
    The server keeps a snapshot for minutes only, and has none for a missing collection.

    Start over: events marked so far are not read again.
    """


async def read_pending(
    database: Database, collection: str
) -> AsyncGenerator[tuple[Sequence[Document], Timestamp]]:
    """
    Batches of pending documents, in order within each key, with the snapshot's time.

    Yields at least one batch, perhaps empty, so that the time is known. Raises SnapshotExpired.
    """
    command = {
        "find": collection,
        "filter": PENDING,
        "sort": {"seq": 1, "created_at": 1, "_id": 1},
        "readConcern": {"level": "snapshot"},
    }
    cursor: BatchCursor | None = None
    try:
        cursor, batch = await BatchCursor.open(database, command, batch_size=BATCH_SIZE)
        snapshot_time = batch.snapshot_time
        if snapshot_time is None:
            raise SnapshotExpired("the outbox was dropped or renamed during the read")
        yield batch.documents, snapshot_time
        while not batch.exhausted:
            batch = await cursor.next_batch()
            yield batch.documents, snapshot_time
    except OperationFailure as error:
        if error.code in {SNAPSHOT_TOO_OLD, SNAPSHOT_UNAVAILABLE}:
            raise SnapshotExpired(str(error)) from error
        raise
    finally:
        if cursor is not None:
            await cursor.close()
