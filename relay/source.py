"""What an outbox is identified by, and whether it can be one."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

from pymongo.errors import OperationFailure

from outbox.state import State
from runtime.mongo import UNAUTHORIZED, Database, UnsuitableServer

#: The field whose index removes events that were published.
EXPIRY_FIELD = "expire_at"


@dataclass(frozen=True, slots=True)
class Source:
    """
    replica_set: empty behind a mongos. uuid: the server's name for the collection, which a dropped,
    restored or copied one does not share; None where the server gives none.
    """

    replica_set: str
    database: str
    collection: str
    uuid: UUID | None

    def document(self) -> dict[str, Any]:
        return asdict(self)


async def identify(database: Database, collection: str) -> Source:
    """Raises PyMongoError."""
    hello = await database.command("hello")
    found = await _described(database, collection)
    uuid = (found or {}).get("info", {}).get("uuid")
    # a command's answer is decoded without the client's options: the driver gives it as binary
    return Source(
        hello.get("setName", ""),
        database.name,
        collection,
        UUID(bytes=bytes(uuid)) if isinstance(uuid, bytes) else uuid,
    )


async def check_outbox(database: Database, collection: str) -> None:
    """Raises UnsuitableServer, with the remedy, for what can never work; a missing one is fine."""
    hello = await database.command("hello")
    primary = hello.get("primary")
    if hello.get("secondary") and primary and primary != hello.get("me"):
        raise UnsuitableServer(
            "MONGODB_URL leads to a secondary only: remove directConnection from it, or name the"
            f" primary, {primary}"
        )
    found = await _described(database, collection)
    if found is None:
        return
    outbox = f"the outbox {collection!r} in the database {database.name!r}"
    kind = "capped" if found.get("options", {}).get("capped") else found.get("type", "collection")
    if kind != "collection":
        what = {"view": "a view", "timeseries": "a time series", "capped": "a capped collection"}
        raise UnsuitableServer(
            f"{outbox} is {what.get(kind, kind)}, which has no changes to follow or no events to"
            " mark: use an ordinary collection, and name it in OUTBOX_COLLECTION"
        )
    for index in await _indexes(database, collection):
        if "expireAfterSeconds" in index and not _spares_unpublished(index):
            raise UnsuitableServer(
                f"the index {index['name']!r} of {outbox} deletes events whether they are published"
                f" or not: drop it (db.getCollection({collection!r}).dropIndex({index['name']!r}));"
                " published events are removed after seven days anyway"
            )


async def _described(database: Database, collection: str) -> Mapping[str, Any] | None:
    listing = await database.command({"listCollections": 1, "filter": {"name": collection}})
    found: list[Mapping[str, Any]] = listing["cursor"]["firstBatch"]
    return found[0] if found else None


async def _indexes(database: Database, collection: str) -> list[Mapping[str, Any]]:
    try:
        listing = await database.command({"listIndexes": collection})
    except OperationFailure as error:
        if error.code != UNAUTHORIZED:  # a right that earlier installations did not grant
            raise
        return []
    indexes: list[Mapping[str, Any]] = listing["cursor"]["firstBatch"]
    return indexes


def _spares_unpublished(index: Mapping[str, Any]) -> bool:
    """Whether this TTL index cannot delete an event that is not published."""
    states = index.get("partialFilterExpression", {}).get("state")
    final = {State.PUBLISHED.value, State.DISCARDED.value}
    if isinstance(states, Mapping) and set(states) in ({"$in"}, {"$eq"}):
        states = states.get("$in", [states.get("$eq")])
    named = states if isinstance(states, list) else [states]
    return list(index["key"]) == [EXPIRY_FIELD] or set(named) <= final
