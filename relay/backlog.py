"""Measures the outbox independently of the stream: pending events, and the oplog runway."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from bson import Timestamp

from outbox.state import PENDING
from relay.checkpoint import CHECKPOINTS
from runtime.mongo import Database, aggregate

#: Counting reads the index: 0.1 s for this many. A longer backlog is reported as this number.
COUNT_LIMIT = 100_000

#: The age of the oldest needs the documents, which is slower than the index.
DATES_LIMIT = 10_000

OLDEST: list[dict[str, Any]] = [
    {"$match": PENDING},
    {"$limit": DATES_LIMIT},
    {"$match": {"created_at": {"$type": "date"}}},
    {"$group": {"_id": None, "created_at": {"$min": "$created_at"}}},
]


@dataclass(frozen=True, slots=True)
class Backlog:
    """
    pending_count: at most COUNT_LIMIT; oldest_at: of the first DATES_LIMIT in order of publishing.
    """

    pending_count: int
    oldest_at: datetime | None


async def measure_backlog(database: Database, collection: str) -> Backlog:
    """Bounded, however much is pending. Raises PyMongoError."""
    outbox = database[collection]
    count = await outbox.count_documents(PENDING, limit=COUNT_LIMIT)
    oldest = [group async for group in aggregate(outbox, OLDEST)]
    return Backlog(count, oldest[0]["created_at"] if oldest else None)


async def measure_runway(database: Database, group: str) -> float | None:
    """
    Seconds between the oldest entry of the oplog and the saved position, which is lost at 0.

    None when there is no position yet. Raises PyMongoError, for instance without the right to read
    `local.oplog.rs`.
    """
    checkpoint = await database[CHECKPOINTS].find_one({"_id": group}, {"position.cluster_time": 1})
    saved = ((checkpoint or {}).get("position") or {}).get("cluster_time")
    oplog = database.client["local"]["oplog.rs"]
    oldest = await oplog.find_one({}, {"ts": 1}, sort=[("$natural", 1)])
    if not isinstance(saved, Timestamp) or oldest is None:
        return None
    return float(saved.time - oldest["ts"].time)
