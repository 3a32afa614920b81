"""
What the leader writes into outbox documents: published, held, parked, discarded.

Each write skips documents that a newer epoch has marked, so a deposed leader's late write never
overwrites its successor's.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from pymongo import UpdateMany, UpdateOne
from pymongo.errors import BulkWriteError, OperationFailure

from outbox.collection import PUBLISHED_RETENTION_DAYS
from outbox.state import State
from relay.intake import is_addressable
from relay.window import Entry, Fate
from runtime.mongo import ANY_WRITER, UNAUTHORIZED, Database, UnsuitableServer, with_remedy

DOCUMENT_VALIDATION_FAILURE = 121

#: Fields that marks set; an application's own validator has to allow them.
MARK_FIELDS = (
    *("state", "reason", "published_at", "settled_at", "retry_at", "expire_at"),
    *("held_key", "ordinal", "relay_epoch"),
)

SETTLED_STATES = [
    state.value for state in (State.PUBLISHED, State.HELD, State.PARKED, State.DISCARDED)
]


class Marks:
    def __init__(self, database: Database, collection: str, epoch: int) -> None:
        self._outbox = database.get_collection(collection, codec_options=ANY_WRITER)
        self._epoch = epoch

    async def write(self, entries: Sequence[Entry], pause_seconds: Callable[[str], float]) -> None:
        """
        Mark each entry with its fate; may be repeated after an error.

        pause_seconds: seconds until a routing key may be sent to again; becomes `retry_at`.

        Raises UnsuitableServer without the right to update the outbox, or when the outbox has a
        validator that refuses the marks and the relay may not bypass it.
        """
        now = datetime.now(UTC)
        writes: list[UpdateOne | UpdateMany] = []
        published = [entry.id for entry in entries if entry.fate is Fate.PUBLISHED]
        if published:
            writes.append(self._mark_published(published, now))
        writes += [
            self._mark_waiting(entry, now, pause_seconds)
            for entry in entries
            if entry.fate in {Fate.HELD, Fate.PARKED} and is_addressable(entry.id)
        ]
        if not writes:
            return
        try:
            await self._outbox.bulk_write(writes, ordered=False)
        except BulkWriteError as error:
            if not _is_validators(error):
                raise
            await self._write_past_validator(writes)
        except OperationFailure as error:
            raise with_remedy(error) from error

    async def _write_past_validator(self, writes: Sequence[UpdateOne | UpdateMany]) -> None:
        """A validator is for writers; an event without its mark would be published again."""
        try:
            await self._outbox.bulk_write(writes, ordered=False, bypass_document_validation=True)
        except OperationFailure as error:
            if error.code != UNAUTHORIZED:
                raise
            raise UnsuitableServer(
                f"the validator of {self._outbox.name} refuses the fields the relay sets in events:"
                f" allow {', '.join(MARK_FIELDS)} in it, or grant the relay"
                " bypassDocumentValidation on the collection"
            ) from error

    async def settled_among(self, ids: Sequence[Any]) -> set[Any]:
        """The ids among these that an earlier leader has settled."""
        cursor = self._outbox.find(
            {"_id": {"$in": list(ids)}, "state": {"$in": SETTLED_STATES}}, {"_id": 1}
        )
        return {document["_id"] async for document in cursor}

    async def park(self, event_id: Any, reason: str) -> None:
        await self._set(event_id, {"state": State.PARKED.value, "reason": reason})

    async def release(self, event_id: Any) -> bool:
        """Make a parked event held; False when a newer epoch has marked it."""
        return await self._set(event_id, {"state": State.HELD.value})

    async def discard(self, event_id: Any) -> bool:
        """Give the event up, finally; it is kept. False when a newer epoch has marked it."""
        return await self._set(event_id, {"state": State.DISCARDED.value})

    async def _set(self, event_id: Any, fields: dict[str, Any]) -> bool:
        written = {**fields, "settled_at": datetime.now(UTC), "relay_epoch": self._epoch}
        result = await self._outbox.update_one(
            {"_id": event_id, **self._not_newer()}, {"$set": written}
        )
        return bool(result.matched_count)

    def _mark_published(self, ids: list[Any], now: datetime) -> UpdateMany:
        fields = {
            "state": State.PUBLISHED.value,
            "published_at": now,
            "expire_at": now + timedelta(days=PUBLISHED_RETENTION_DAYS),
            "relay_epoch": self._epoch,
        }
        kept = {"reason": "", "held_key": "", "ordinal": "", "retry_at": ""}
        return UpdateMany(
            {"_id": {"$in": ids}, **self._not_newer()}, {"$set": fields, "$unset": kept}
        )

    def _mark_waiting(
        self, entry: Entry, now: datetime, pause_seconds: Callable[[str], float]
    ) -> UpdateOne:
        fields = {
            "state": (State.PARKED if entry.fate is Fate.PARKED else State.HELD).value,
            "reason": entry.reason,
            "held_key": entry.key,
            "ordinal": entry.ordinal,
            "settled_at": now,
            "relay_epoch": self._epoch,
        }
        if entry.fate is Fate.HELD and entry.event is not None:
            pause = timedelta(seconds=pause_seconds(entry.event.routing_key))
            fields["retry_at"] = now + pause
        return UpdateOne({"_id": entry.id, **self._not_newer()}, {"$set": fields})

    def _not_newer(self) -> dict[str, Any]:
        return {"relay_epoch": {"$not": {"$gt": self._epoch}}}


def _is_validators(error: BulkWriteError) -> bool:
    refused = error.details.get("writeErrors", [])
    return any(one["code"] == DOCUMENT_VALIDATION_FAILURE for one in refused)
