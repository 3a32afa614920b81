"""
The position of a relay group, and the epoch that fences it.

    {_id: group, epoch, owner, led_since,
     lease: {epoch, renewed_at, lock, released},
                                    whether the owner lives, see lease.py
     settled,                       number of events this group has settled, across epochs
     position: {token, cluster_time},
     pipeline,                      the pipeline of the token's change stream
     source: {replica_set, database, collection, uuid},
                                    the outbox that the position belongs to
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
from time import monotonic
from typing import Any

from bson import Timestamp
from loguru import logger
from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError

from relay.lease import LEADER_TIMEOUT_SECONDS, PUBLISH_LIMIT_SECONDS, lease_of
from relay.source import Source
from runtime import clock
from runtime.mongo import Database, UnsuitableServer, ping

CHECKPOINTS = "checkpoints"

FIRST_START = "first_start"
UNFINISHED = "unfinished_handover"
PIPELINE_CHANGED = "pipeline_changed"
SOURCE_CHANGED = "another_outbox"


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


async def look(database: Database, group: str) -> tuple[dict[str, Any] | None, datetime]:
    """The group's document, None when there is none, and the server's time. Raises PyMongoError."""
    await ping(database.client)
    now = clock.now()
    document: dict[str, Any] | None = await database[CHECKPOINTS].find_one({"_id": group})
    return document, now


@dataclass(slots=True)
class Checkpoint:
    """
    This leader's view of its group's document; only the holder of the epoch can write it.

    renewed_at: by our own clock, when the last sign of life that was acknowledged was sent.
    """

    database: Database
    group: str
    epoch: int
    settled: int
    position: Position | None
    resync_reason: str | None
    led_since: datetime
    renewed_at: float
    source: Source
    search: UnfinishedSearch | None = None
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    async def take(
        cls,
        database: Database,
        seen: Mapping[str, Any] | None,
        *,
        group: str,
        owner: str,
        pipeline: str,
        source: Source,
        lock: str | None = None,
    ) -> "Checkpoint | None":
        """
        Take the next epoch, and read the stored position.

        seen: the group's document as `look` returned it. lock: the lock queue that is held.

        Returns None when epoch or lease have changed since. An epoch is never lower than the
        server's time in seconds, so that it is higher than those of another group, and of a
        document that was deleted or restored from a backup.
        """
        seen = seen or {}
        seconds = {"$toLong": {"$divide": [{"$toLong": "$$NOW"}, 1000]}}
        lease = {"epoch": "$epoch", "renewed_at": "$$NOW", "lock": lock, "released": False}
        sent_at = monotonic()
        try:
            document = await database[CHECKPOINTS].find_one_and_update(
                {"_id": group, "epoch": seen.get("epoch"), "lease": seen.get("lease")},
                [
                    {
                        "$set": {
                            "epoch": {"$max": [{"$add": ["$epoch", 1]}, seconds]},
                            "owner": owner,
                            "led_since": "$$NOW",
                            "settled": {"$ifNull": ["$settled", {"$toLong": 0}]},
                        }
                    },
                    # a document of an older version names none
                    {"$set": {"source": {"$ifNull": ["$source", {"$literal": source.document()}]}}},
                    {"$unset": "lease"},
                    {"$set": {"lease": lease}},
                ],
                upsert=not seen,
                return_document=ReturnDocument.AFTER,
            )
        except DuplicateKeyError:
            return None
        if document is None:
            return None
        stored = document.get("position")
        position = Position(stored["token"], stored["cluster_time"]) if stored else None
        return cls(
            database=database,
            group=group,
            epoch=document["epoch"],
            settled=document["settled"],
            position=position,
            resync_reason=_resync_reason(document, pipeline, source),
            led_since=document["led_since"],
            renewed_at=sent_at,
            source=source,
            search=_unfinished_search(document),
        )

    @property
    def silent_seconds(self) -> float:
        """Since the last sign of life that was acknowledged."""
        return monotonic() - self.renewed_at

    @property
    def may_publish(self) -> bool:
        """False once another relay may have overruled this one, until it knows better."""
        return self.silent_seconds < PUBLISH_LIMIT_SECONDS

    async def renew(self, lock: str | None) -> None:
        """Give a sign of life, and say which lock is held. Raises Deposed."""
        await self._write({}, {"lease.lock": lock})

    async def release(self) -> None:
        """Let another relay lead at once. The connection that published must be closed."""
        await self.database[CHECKPOINTS].update_one(
            {"_id": self.group, "epoch": self.epoch}, {"$set": {"lease.released": True}}
        )

    async def raise_epoch(self, above: int) -> None:
        """
        Take an epoch above one that was found in outbox documents. Raises Deposed.

        They were marked under another group, or under a document that was deleted or replaced.
        """
        async with self._writing:
            epoch = max(above, self.epoch) + 1
            result = await self.database[CHECKPOINTS].update_one(
                {"_id": self.group, "epoch": self.epoch},
                {"$set": {"epoch": epoch, "lease.epoch": epoch}},
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
        belongs_to = {"pipeline": pipeline, "source": self.source.document()}
        await self._write(under_way, {"handover": None, **belongs_to, **_position_fields(position)})

    async def begin_search(self, *, settled_to: int, code: int | None, reason: str) -> None:
        """Let a successor publish one at a time up to this event. Raises Deposed."""
        self.search = UnfinishedSearch(settled_to, code)
        fields = {"settled_to": settled_to, "code": code, "reason": reason}
        await self._write({}, {"search": {**fields, "since": clock.now()}})

    async def end_search(self) -> None:
        """Every event of the search is settled, and the position is behind it. Raises Deposed."""
        await self._write({}, {"search": None})
        self.search = None

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
            sent_at = monotonic()
            result = await self.database[CHECKPOINTS].update_one(
                {"_id": self.group, "epoch": self.epoch, **condition},
                {
                    "$set": {**fields, "saved_at": clock.now()},
                    "$currentDate": {"lease.renewed_at": True},
                },
            )
            if result.matched_count:
                self.renewed_at = sent_at
            # nothing matched: written by an earlier try whose reply was lost, or deposed
            elif not await self._is_stored(self.epoch):
                raise self._deposed()

    async def _is_stored(self, epoch: int) -> bool:
        mine = {"_id": self.group, "epoch": epoch}
        return await self.database[CHECKPOINTS].find_one(mine, {"_id": 1}) is not None

    def _deposed(self) -> Deposed:
        return Deposed(f"the position of group {self.group!r} has a newer epoch")


async def check_alone(checkpoint: Checkpoint) -> None:
    """
    Raises UnsuitableServer when a leader of another group serves the same outbox.

    Called by a leader, whose own lease the other one sees: of two that start at once, one notices.
    """
    others = checkpoint.database[CHECKPOINTS].find(
        {"_id": {"$ne": checkpoint.group}, "source": checkpoint.source.document()}
    )
    async for other in others:
        lease = lease_of(other)
        if lease is None or lease.released or checkpoint.source.uuid is None:
            continue
        if (clock.now() - lease.renewed_at).total_seconds() < LEADER_TIMEOUT_SECONDS:
            raise UnsuitableServer(
                f"the relay group {other['_id']!r} serves the outbox"
                f" {checkpoint.source.collection!r} already, so that each event would be published"
                f" twice: set RELAY_GROUP={other['_id']}, or stop the relays of that group first"
            )


def _unfinished_search(document: Mapping[str, Any]) -> UnfinishedSearch | None:
    stored = document.get("search")
    return UnfinishedSearch(stored["settled_to"], stored["code"]) if stored else None


def _resync_reason(document: Mapping[str, Any], pipeline: str, source: Source) -> str | None:
    if document.get("handover"):
        return UNFINISHED
    if not document.get("position"):
        return FIRST_START
    if document.get("pipeline") != pipeline:
        return PIPELINE_CHANGED
    if document.get("source") != source.document():
        return SOURCE_CHANGED
    return None


def _position_fields(position: Position) -> dict[str, Any]:
    return {"position": {"token": position.token, "cluster_time": position.cluster_time}}
