"""What is known of the outbox beside the stream: how much waits, how long the position holds."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from bson import Timestamp

from outbox.state import PENDING_STATES
from relay.checkpoint import CHECKPOINTS
from runtime.mongo import Database, aggregate

#: Counting reads the index: a tenth of a second for so many. A longer backlog is told as this.
COUNT_LIMIT = 100_000

#: Their dates are read too, which is slower.
DATES_LIMIT = 10_000

PENDING = {"state": {"$in": list(PENDING_STATES)}}

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
    Seconds between the oldest entry of the oplog and the saved position: when none are left, the
    position is lost. None where there is no position yet.

    Raises PyMongoError, as where the right to read `local.oplog.rs` is missing.
    """
    checkpoint = await database[CHECKPOINTS].find_one({"_id": group}, {"position.cluster_time": 1})
    saved = ((checkpoint or {}).get("position") or {}).get("cluster_time")
    oplog = database.client["local"]["oplog.rs"]
    oldest = await oplog.find_one({}, {"ts": 1}, sort=[("$natural", 1)])
    if not isinstance(saved, Timestamp) or oldest is None:
        return None
    return float(saved.time - oldest["ts"].time)
