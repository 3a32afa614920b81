"""
The position of a relay group, and the epoch that fences it.

    {_id: group, epoch, owner, led_since,
     settled,                       number of events this group has settled, across epochs
     position: {token, cluster_time},
     pipeline,                      the pipeline of the token's change stream
     handover: {reason, since},     during a resync
     last_wish}                     the operator request that a leader of this group executed last

Every write matches the writer's epoch, and `settled` or the cluster time must grow: neither a
deposed leader nor a late write of the current one can move the position back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from bson import Timestamp
from pymongo import ReturnDocument

from runtime.mongo import Database

CHECKPOINTS = "checkpoints"

FIRST_START = "first_start"
UNFINISHED = "unfinished_handover"
PIPELINE_CHANGED = "pipeline_changed"


class Deposed(Exception):
    """A newer epoch exists: another relay leads."""


@dataclass(frozen=True, slots=True)
class Position:
    """token: None right after a resync, when the stream starts at `cluster_time`."""

    token: Mapping[str, Any] | None
    cluster_time: Timestamp


@dataclass(slots=True)
class Checkpoint:
    """This leader's view of its group's document; only the holder of the epoch can write it."""

    database: Database
    group: str
    epoch: int
    settled: int
    position: Position | None
    resync_reason: str | None
    led_since: datetime

    @classmethod
    async def take(
        cls, database: Database, *, group: str, owner: str, pipeline: str
    ) -> "Checkpoint":
        """
        Take the next epoch unconditionally, and read the stored position.

        A new document starts from the time in seconds, so that its epochs are higher than those
        of a document that was deleted.
        """
        first_epoch = {"$toLong": {"$divide": [{"$toLong": "$$NOW"}, 1000]}}
        document = await database[CHECKPOINTS].find_one_and_update(
            {"_id": group},
            [
                {
                    "$set": {
                        "epoch": {"$add": [{"$ifNull": ["$epoch", first_epoch]}, 1]},
                        "owner": owner,
                        "led_since": "$$NOW",
                        "settled": {"$ifNull": ["$settled", {"$toLong": 0}]},
                    }
                }
            ],
            upsert=True,
            return_document=ReturnDocument.AFTER,
        )
        stored = document.get("position")
        position = Position(stored["token"], stored["cluster_time"]) if stored else None
        return cls(
            database=database,
            group=group,
            epoch=document["epoch"],
            settled=document["settled"],
            position=position,
            resync_reason=_resync_reason(document, pipeline),
            led_since=document["led_since"],
        )

    async def begin_resync(self, reason: str) -> None:
        """Invalidate the position until the pending events are settled. Raises Deposed."""
        self.resync_reason = reason
        await self._write({}, {"handover": {"reason": reason, "since": datetime.now(UTC)}})

    async def end_resync(self, position: Position, pipeline: str) -> None:
        """All events pending at this position are settled; save it. Raises Deposed."""
        self.resync_reason, self.position = None, position
        under_way = {"handover": {"$ne": None}}
        await self._write(
            under_way, {"handover": None, "pipeline": pipeline, **_position_fields(position)}
        )

    async def save(self, *, settled: int, position: Position | None) -> None:
        """
        Save the number of settled events and the position behind them.

        position: None leaves the stored one, as during a resync.
        May be repeated after an error. Raises Deposed.
        """
        grows: dict[str, Any] = {"settled": {"$lt": settled}}
        fields: dict[str, Any] = {"settled": settled}
        if position is not None:
            fields |= _position_fields(position)
            later = {"settled": settled, "position.cluster_time": {"$lt": position.cluster_time}}
            grows = {"$or": [grows, later]}
        await self._write(grows, fields)
        self.settled = settled
        if position is not None:
            self.position = position

    async def _write(self, condition: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
        checkpoints = self.database[CHECKPOINTS]
        mine = {"_id": self.group, "epoch": self.epoch}
        result = await checkpoints.update_one(
            {**mine, **condition}, {"$set": {**fields, "saved_at": datetime.now(UTC)}}
        )
        # nothing matched: written by an earlier try whose reply was lost, or a newer epoch exists
        if not result.matched_count and not await checkpoints.find_one(mine, {"_id": 1}):
            raise Deposed(f"the position of group {self.group!r} has a newer epoch")


def _resync_reason(document: Mapping[str, Any], pipeline: str) -> str | None:
    if document.get("handover"):
        return UNFINISHED
    if not document.get("position"):
        return FIRST_START
    if document.get("pipeline") != pipeline:
        return PIPELINE_CHANGED
    return None


def _position_fields(position: Position) -> dict[str, Any]:
    return {"position": {"token": position.token, "cluster_time": position.cluster_time}}
