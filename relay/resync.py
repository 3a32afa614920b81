"""
The hand-over: publish what is pending, then tail the stream from the moment that was read.

One snapshot read shows everything committed up to its time T and nothing after it; the stream,
started behind T, brings everything after. So there is no gap, whoever writes meanwhile. Used at the
first start and whenever the position is lost; it publishes what is pending, and only that.
"""

from collections.abc import AsyncGenerator, Sequence

from bson import Timestamp
from pymongo.errors import OperationFailure

from outbox.state import PENDING_STATES
from relay.stream import BATCH_SIZE
from runtime.batch_cursor import BatchCursor
from runtime.mongo import Database, Document

SNAPSHOT_TOO_OLD = 239
SNAPSHOT_UNAVAILABLE = 246


class SnapshotExpired(Exception):
    """
    The server keeps a snapshot for minutes only, and has none of a collection that is not there;
    begin anew, what is marked stays marked.
    """


async def read_pending(
    database: Database, collection: str
) -> AsyncGenerator[tuple[Sequence[Document], Timestamp]]:
    """
    Batches of pending documents, those of one key in order, and the snapshot's time.

    At least one batch comes, so that the time is known. Raises SnapshotExpired.
    """
    command = {
        "find": collection,
        "filter": {"state": {"$in": list(PENDING_STATES)}},
        "sort": {"seq": 1, "created_at": 1, "_id": 1},
        "readConcern": {"level": "snapshot"},
    }
    cursor: BatchCursor | None = None
    try:
        cursor, batch = await BatchCursor.open(database, command, batch_size=BATCH_SIZE)
        snapshot_time = batch.snapshot_time
        if snapshot_time is None:
            raise SnapshotExpired("the outbox was dropped or renamed meanwhile")
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
