"""
The position of a relay group, and the epoch that fences it.

    {_id: group, epoch, owner, led_since,
     settled,                       number of events this group has settled, across epochs
     position: {token, cluster_time},
     pipeline,                      the pipeline of the token's change stream
     handover: {reason, since},     during a resync
     search: {settled_to, code, reason, since},
                                    while the event is searched that the broker refuses
     last_wish}                     the operator request that a leader of this group executed last

Every write matches the writer's epoch, and `settled` or the cluster time must grow: neither a
deposed leader nor a late write of the current one can move the position back.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from bson import Timestamp
from loguru import logger
from pymongo import ReturnDocument

from runtime import clock
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


@dataclass(frozen=True, slots=True)
class UnfinishedSearch:
    """
    One of the events up to number `settled_to` closed the channel or the connection, or stopped all
    confirms.

    code: AMQP's reply code; None when the broker gave none.
    """

    settled_to: int
    code: int | None


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
    search: UnfinishedSearch | None = None
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    async def take(
        cls, database: Database, *, group: str, owner: str, pipeline: str
    ) -> "Checkpoint":
        """
        Take the next epoch unconditionally, and read the stored position.

        An epoch is never lower than the server's time in seconds, so that it is higher than those
        of another group, and of a document that was deleted or restored from a backup.
        """
        seconds = {"$toLong": {"$divide": [{"$toLong": "$$NOW"}, 1000]}}
        document = await database[CHECKPOINTS].find_one_and_update(
            {"_id": group},
            [
                {
                    "$set": {
                        "epoch": {"$max": [{"$add": ["$epoch", 1]}, seconds]},
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
            search=_unfinished_search(document),
        )

    async def raise_epoch(self, above: int) -> None:
        """
        Take an epoch above one that was found in outbox documents. Raises Deposed.

        They were marked under another group, or under a document that was deleted or replaced.
        """
        async with self._writing:
            epoch = max(above, self.epoch) + 1
            result = await self.database[CHECKPOINTS].update_one(
                {"_id": self.group, "epoch": self.epoch}, {"$set": {"epoch": epoch}}
            )
            # nothing matched: written by an earlier try whose reply was lost, or deposed
            if not result.matched_count and not await self._is_stored(epoch):
                raise self._deposed()
            logger.warning("epoch.raised", former=self.epoch, epoch=epoch)
            self.epoch = epoch

    async def begin_resync(self, reason: str) -> None:
        """Invalidate the position until the pending events are settled. Raises Deposed."""
        self.resync_reason = reason
        await self._write({}, {"handover": {"reason": reason, "since": clock.now()}})

    async def end_resync(self, position: Position, pipeline: str) -> None:
        """All events pending at this position are settled; save it. Raises Deposed."""
        self.resync_reason, self.position = None, position
        under_way = {"handover": {"$ne": None}}
        await self._write(
            under_way, {"handover": None, "pipeline": pipeline, **_position_fields(position)}
        )

    async def begin_search(self, *, settled_to: int, code: int | None, reason: str) -> None:
        """Let a successor publish one at a time up to this event. Raises Deposed."""
        self.search = UnfinishedSearch(settled_to, code)
        fields = {"settled_to": settled_to, "code": code, "reason": reason}
        await self._write({}, {"search": {**fields, "since": clock.now()}})

    async def end_search(self) -> None:
        """Every event of the search is settled, and the position is behind it. Raises Deposed."""
        self.search = None
        await self._write({}, {"search": None})

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
        async with self._writing:
            result = await self.database[CHECKPOINTS].update_one(
                {"_id": self.group, "epoch": self.epoch, **condition},
                {"$set": {**fields, "saved_at": clock.now()}},
            )
            # nothing matched: written by an earlier try whose reply was lost, or deposed
            if not result.matched_count and not await self._is_stored(self.epoch):
                raise self._deposed()

    async def _is_stored(self, epoch: int) -> bool:
        mine = {"_id": self.group, "epoch": epoch}
        return await self.database[CHECKPOINTS].find_one(mine, {"_id": 1}) is not None

    def _deposed(self) -> Deposed:
        return Deposed(f"the position of group {self.group!r} has a newer epoch")


def _unfinished_search(document: Mapping[str, Any]) -> UnfinishedSearch | None:
    stored = document.get("search")
    return UnfinishedSearch(stored["settled_to"], stored["code"]) if stored else None


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
