"""The change stream on the outbox: whole batches of inserts, from a position that may be old."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from time import monotonic
from typing import Any

from bson import Timestamp
from loguru import logger
from pymongo.errors import OperationFailure, PyMongoError

from relay.checkpoint import Position
from runtime.batch_cursor import Batch, BatchCursor
from runtime.mongo import Document, UnsuitableServer, is_transient
from runtime.retry import growing_delays
from runtime.shutdown import Stop
from runtime.stream_client import StreamClient

#: Marks and expiries are changes too, and must not come back as events. `_id` is the resume token
#: and has to survive. A token belongs to its pipeline: changing this causes a resync.
STAGES: tuple[Mapping[str, Any], ...] = (
    {"$match": {"operationType": {"$in": ["insert", "invalidate"]}}},
    {"$project": {"operationType": 1, "clusterTime": 1, "wallTime": 1, "fullDocument": 1}},
)

PIPELINE = hashlib.sha256(json.dumps(STAGES).encode()).hexdigest()[:16]

BATCH_SIZE = 1000

#: Bounds empty reads only, and so how long a stop may wait for the read in progress.
WAIT_MS = 500

CHANGE_STREAM_HISTORY_LOST = 286
CHANGE_STREAM_FATAL = 280
INVALID_RESUME_TOKEN = 260
BSON_OBJECT_TOO_LARGE = 10334
POSITION_LOST_CODES = {
    CHANGE_STREAM_HISTORY_LOST: "the oplog has rolled past the position",
    CHANGE_STREAM_FATAL: "the position's resume token was not found",
    INVALID_RESUME_TOKEN: "the position's resume token is not usable",
    # a resync reads the event by itself, which fits, and parks it
    BSON_OBJECT_TOO_LARGE: "an event is too large for the change stream",
}
NOT_TAKEN = "the server rejects the position's resume token"


#: A read that has no answer for this long is stuck, unless the server needs this long to scan the
#: oplog and answers otherwise.
STUCK_SECONDS = 5.0


class PositionLost(Exception):
    """The stream cannot resume from the position; a resync is needed."""


@dataclass(frozen=True, slots=True)
class Change:
    """committed_at: by the server's clock. position: behind this change."""

    document: Document
    position: Position
    committed_at: datetime


@dataclass(frozen=True, slots=True)
class Reading:
    """changes: in commit order; position: behind all of them, and behind what was filtered out."""

    changes: Sequence[Change]
    position: Position | None


class OutboxStream:
    """
    Survives elections and lost cursors: it resumes where it stopped. Never cancel a read.

    Raises PositionLost, and PyMongoError that is not transient.
    """

    def __init__(self, client: StreamClient, collection: str, position: Position) -> None:
        self._stream_access = client
        self._collection = collection
        self._position = position
        self._cursor: BatchCursor | None = None
        self._lost: str | None = None
        self._asked_at: float | None = None

    @property
    def is_stuck(self) -> bool:
        """Whether the read in progress should have been answered by now."""
        if self._asked_at is None or self._stream_access.is_extended:
            return False
        return monotonic() - self._asked_at > STUCK_SECONDS

    async def read(self, stop: Stop) -> Reading:
        """What has arrived, immediately, or nothing after WAIT_MS."""
        if self._lost is not None:
            raise PositionLost(self._lost)
        delays = growing_delays()
        self._asked_at = monotonic()
        while True:
            try:
                reading = self._reading(await self._next_batch())
                if not reading.changes:
                    await self._shorten_deadline()
            except PyMongoError as error:
                resuming = self._cursor is None and self._position.token is not None
                await self._discard_cursor()
                _raise_when_lost(error, resuming=resuming)
                if not is_transient(error) or stop.requested:
                    raise
                logger.warning("stream.reopened", reason=str(error))
                if error.timeout:
                    await self._stream_access.extend()
            else:
                self._asked_at = None
                return reading
            await stop.rest(next(delays))

    async def _shorten_deadline(self) -> None:
        """It has caught up with the oplog: the next read is a short one again."""
        if self._stream_access.is_extended:
            await self._discard_cursor()
            await self._stream_access.restore()

    async def close(self) -> None:
        """Close the cursor and the client."""
        await self._discard_cursor()
        await self._stream_access.close()

    async def _discard_cursor(self) -> None:
        if self._cursor is not None:
            await self._cursor.close()
            self._cursor = None

    async def _next_batch(self) -> Batch:
        if self._cursor is not None:
            return await self._cursor.next_batch(wait_ms=WAIT_MS)
        stages = [{"$changeStream": _start(self._position)}, *STAGES]
        command = {"aggregate": self._collection, "pipeline": stages}
        self._cursor, batch = await BatchCursor.open(
            self._stream_access.database, command, batch_size=BATCH_SIZE
        )
        return batch

    def _reading(self, batch: Batch) -> Reading:
        changes = []
        for change in batch.documents:
            if change["operationType"] == "invalidate":
                self._lost = "the outbox was dropped or renamed"
                break
            if "wallTime" not in change:
                raise UnsuitableServer(
                    "the change stream does not say when an event was committed (wallTime):"
                    " MongoDB 6.0 or newer is needed"
                )
            changes.append(
                Change(
                    change["fullDocument"],
                    Position(change["_id"], change["clusterTime"]),
                    change["wallTime"],
                )
            )
        if batch.exhausted and self._lost is None:
            self._lost = "the change stream ended"
        if self._lost is not None:
            if not changes:
                raise PositionLost(self._lost)
            return Reading(changes, changes[-1].position)
        position = changes[-1].position if changes else None
        if batch.resume_token is not None:
            scanned = cluster_time_of(batch.resume_token)
            if scanned is not None:
                position = Position(batch.resume_token, scanned)
        if position is not None:
            self._position = position
        return Reading(changes, position)


def cluster_time_of(token: Mapping[str, Any]) -> Timestamp | None:
    """
    The cluster time inside a resume token; None when the token has another format.

    The server writes `_data` as a hexadecimal KeyString: the type byte of a timestamp, 0x82, then
    seconds and increment, four bytes each, big endian.
    https://github.com/mongodb/mongo/blob/r6.0.5/src/mongo/db/pipeline/resume_token.h
    """
    data = token.get("_data")
    if not isinstance(data, str) or not data.startswith("82") or len(data) < 18:  # noqa: PLR2004
        return None
    try:
        return Timestamp(int(data[2:10], 16), int(data[10:18], 16))
    except ValueError:
        return None


def _start(position: Position) -> dict[str, Any]:
    if position.token is None:
        # the server includes this time, and the position is behind all changes of `cluster_time`
        behind = Timestamp(position.cluster_time.time, position.cluster_time.inc + 1)
        return {"startAtOperationTime": behind}
    # like resumeAfter, but also accepts the token of an invalidate
    return {"startAfter": position.token}


def _raise_when_lost(error: PyMongoError, *, resuming: bool) -> None:
    """resuming: a token was passed; servers reject an unreadable one with many different codes."""
    if not isinstance(error, OperationFailure):
        return
    reason = POSITION_LOST_CODES.get(error.code or 0)
    if reason is None and resuming and not is_transient(error):
        reason = NOT_TAKEN
    if reason is not None:
        raise PositionLost(f"{reason} ({error.code})") from error
