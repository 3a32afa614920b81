"""
What the leader writes into outbox documents: published, held, parked, discarded.

Each write skips documents that a newer epoch has marked, so a deposed leader's late write never
overwrites its successor's. A write that matched fewer documents than it names finds out why:

    the document is gone    its application deleted it; there is nothing to mark
    a newer epoch           the checkpoint has it, too: Deposed
                            the checkpoint has ours: marked under another group or checkpoint;
                            take a higher epoch, and write again
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol

import bson
from loguru import logger
from pymongo import UpdateMany, UpdateOne
from pymongo.errors import BulkWriteError, OperationFailure

from outbox.collection import PUBLISHED_RETENTION_DAYS
from outbox.state import State
from relay.intake import is_addressable
from relay.journal import Journal
from relay.window import Entry, Fate
from runtime import clock
from runtime.mongo import ANY_WRITER, UNAUTHORIZED, Database, UnsuitableServer, with_remedy

DOCUMENT_VALIDATION_FAILURE = 121

#: Refusals because of one document: an index key that exists already (11000, a unique index of the
#: application) or cannot be built (2, 171, 16755), a document that grows too large (10334, 17419).
DOCUMENT_CODES = frozenset({2, 171, 10334, 11000, 16755, 17419})

#: Fields that marks set; an application's own validator has to allow them.
MARK_FIELDS = (
    *("state", "reason", "published_at", "settled_at", "retry_at", "expire_at"),
    *("held_key", "ordinal", "relay_epoch"),
)

SETTLED_STATES = [
    state.value for state in (State.PUBLISHED, State.HELD, State.PARKED, State.DISCARDED)
]


#: A higher number in a document is not an epoch that a relay took, but its writer's.
MAX_EPOCH = 2**53


class Fence(Protocol):
    """The part of a Checkpoint that marks need."""

    epoch: int

    async def raise_epoch(self, above: int) -> None: ...


class Marks:
    def __init__(
        self, database: Database, collection: str, fence: Fence, journal: Journal | None = None
    ) -> None:
        self._outbox = database.get_collection(collection, codec_options=ANY_WRITER)
        self._fence = fence
        self._journal = journal

    async def write(
        self, entries: Sequence[Entry], pause_seconds: Callable[[str], float]
    ) -> list[Entry]:
        """
        Mark each entry with its fate; may be repeated after an error.

        pause_seconds: seconds until a routing key may be sent to again; becomes `retry_at`.

        Returns the entries whose documents are gone.

        Raises Deposed. Raises UnsuitableServer without the right to update the outbox, or when the
        outbox has a validator that refuses the marks and the relay may not bypass it.
        """
        published = [entry for entry in entries if entry.fate is Fate.PUBLISHED]
        waiting = [
            entry
            for entry in entries
            if entry.fate in {Fate.HELD, Fate.PARKED} and is_addressable(entry.id)
        ]
        marked = published + waiting
        while marked:
            now = clock.now()
            writes: list[UpdateOne | UpdateMany] = []
            if published:
                writes.append(self._mark_published([entry.id for entry in published], now))
            writes += [self._mark_waiting(entry, now, pause_seconds) for entry in waiting]
            try:
                matched = await self._matched_by(writes)
            except BulkWriteError as error:
                if self._journal is None or not _is_about_documents(error):
                    raise
                refused = await self._write_one_by_one(self._journal, marked, now, pause_seconds)
                published = [entry for entry in published if entry not in refused]
                waiting = [entry for entry in waiting if entry not in refused]
                marked = published + waiting
                continue
            if matched == len(marked):
                break
            there = await self._raise_epoch_above_those_of([entry.id for entry in marked])
            if there is not None:
                return [entry for entry in marked if _encoded(entry.id) not in there]
        return []

    async def _write_one_by_one(
        self,
        journal: Journal,
        entries: Sequence[Entry],
        now: datetime,
        pause_seconds: Callable[[str], float],
    ) -> list[Entry]:
        """
        Mark each by itself; returns those that MongoDB refuses to mark.

        A published one is settled by the journal. One that is to wait stays pending, and the sweep
        tries it again.
        """
        refused = []
        for entry in entries:
            write: UpdateOne | UpdateMany
            if entry.fate is Fate.PUBLISHED:
                write = self._mark_published([entry.id], now)
            else:
                write = self._mark_waiting(entry, now, pause_seconds)
            try:
                await self._matched_by([write])
            except BulkWriteError as error:
                if not _is_about_documents(error):
                    raise
                refused.append(entry)
                reason = error.details["writeErrors"][0]["errmsg"]
                if entry.fate is Fate.PUBLISHED:
                    await journal.add(entry, self._fence.epoch, reason)
                else:
                    logger.error(
                        "event.not_marked", event_id=str(entry.id), key=entry.key, reason=reason
                    )
        return refused

    async def _matched_by(self, writes: Sequence[UpdateOne | UpdateMany]) -> int:
        try:
            result = await self._outbox.bulk_write(writes, ordered=False)
        except BulkWriteError as error:
            if not _is_validators(error):
                raise
            return await self._matched_past_validator(writes)
        except OperationFailure as error:
            raise with_remedy(error) from error
        return int(result.matched_count)

    async def _matched_past_validator(self, writes: Sequence[UpdateOne | UpdateMany]) -> int:
        """A validator is for writers; an event without its mark would be published again."""
        try:
            result = await self._outbox.bulk_write(
                writes, ordered=False, bypass_document_validation=True
            )
        except OperationFailure as error:
            if error.code != UNAUTHORIZED:
                raise
            raise UnsuitableServer(
                f"the validator of {self._outbox.name} refuses the fields the relay sets in events:"
                f" allow {', '.join(MARK_FIELDS)} in it, or grant the relay"
                " bypassDocumentValidation on the collection"
            ) from error
        return int(result.matched_count)

    async def _raise_epoch_above_those_of(self, ids: list[Any]) -> set[bytes] | None:
        """
        Take an epoch above the highest in these documents, so that they can be marked.

        Returns the encoded ids that exist when none of them has a higher epoch than ours, otherwise
        None. Raises Deposed.
        """
        cursor = self._outbox.find({"_id": {"$in": ids}}, {"relay_epoch": 1})
        found = [document async for document in cursor]
        newer = [document["relay_epoch"] for document in found if self._is_newer(document)]
        if not newer:
            return {_encoded(document["_id"]) for document in found}
        await self._fence.raise_epoch(above=int(max(newer)))
        return None

    def _is_newer(self, document: Mapping[str, Any]) -> bool:
        epoch = document.get("relay_epoch")
        return isinstance(epoch, int | float) and self._fence.epoch < epoch <= MAX_EPOCH

    async def settled_among(self, ids: Sequence[Any]) -> set[Any]:
        """The ids among these that an earlier leader has settled."""
        cursor = self._outbox.find(
            {"_id": {"$in": list(ids)}, "state": {"$in": SETTLED_STATES}}, {"_id": 1}
        )
        return {document["_id"] async for document in cursor}

    async def park(self, event_id: Any, reason: str) -> bool:
        """Park an event at its release; False when it is gone. Raises Deposed."""
        return await self._set(event_id, {"state": State.PARKED.value, "reason": reason})

    async def release(self, event_id: Any) -> bool:
        """Make a parked event held; False when it is gone. Raises Deposed."""
        return await self._set(event_id, {"state": State.HELD.value})

    async def discard(self, event_id: Any) -> bool:
        """Give the event up, finally; it is kept. False when it is gone. Raises Deposed."""
        return await self._set(event_id, {"state": State.DISCARDED.value})

    async def _set(self, event_id: Any, fields: dict[str, Any]) -> bool:
        while True:
            written = {**fields, "settled_at": clock.now(), "relay_epoch": self._fence.epoch}
            result = await self._outbox.update_one(
                {"_id": event_id, **self._not_newer()}, {"$set": written}
            )
            if result.matched_count:
                return True
            there = await self._raise_epoch_above_those_of([event_id])
            if there is not None and not there:
                return False

    def _mark_published(self, ids: list[Any], now: datetime) -> UpdateMany:
        fields = {
            "state": State.PUBLISHED.value,
            "published_at": now,
            "expire_at": now + timedelta(days=PUBLISHED_RETENTION_DAYS),
            "relay_epoch": self._fence.epoch,
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
            "relay_epoch": self._fence.epoch,
        }
        if entry.fate is Fate.HELD and entry.event is not None:
            pause = timedelta(seconds=pause_seconds(entry.event.routing_key))
            fields["retry_at"] = now + pause
        return UpdateOne({"_id": entry.id, **self._not_newer()}, {"$set": fields})

    def _not_newer(self) -> dict[str, Any]:
        newer = {"$gt": self._fence.epoch, "$lte": MAX_EPOCH}
        # a comparison also matches an element of an array, which is no epoch
        return {"$or": [{"relay_epoch": {"$not": newer}}, {"relay_epoch": {"$type": "array"}}]}


def _encoded(event_id: Any) -> bytes:
    """Unlike the id itself, which may be an object, it can be looked up in a set."""
    return bson.encode({"_id": event_id}, codec_options=ANY_WRITER)


def _is_about_documents(error: BulkWriteError) -> bool:
    """Whether all that MongoDB refused, it refused because of the documents' content."""
    refused = error.details.get("writeErrors", [])
    return bool(refused) and all(one["code"] in DOCUMENT_CODES for one in refused)


def _is_validators(error: BulkWriteError) -> bool:
    refused = error.details.get("writeErrors", [])
    return any(one["code"] == DOCUMENT_VALIDATION_FAILURE for one in refused)
