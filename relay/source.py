"""What an outbox is identified by."""

from dataclasses import dataclass

from runtime.mongo import Database


@dataclass(frozen=True, slots=True)
class Source:
    """replica_set: empty behind a mongos."""

    replica_set: str
    database: str
    collection: str


async def identify(database: Database, collection: str) -> Source:
    """Raises PyMongoError."""
    hello = await database.command("hello")
    return Source(hello.get("setName", ""), database.name, collection)
