"""
Keys whose events wait in MongoDB: which may be tried again, and what its first event is.

Memory holds the keys only; the events are looked up when their turn comes. A key is free again
when MongoDB holds none of its events and none is on its way there.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from bson.errors import InvalidBSON

from outbox.state import State
from relay.window import Entry, Fate
from runtime.mongo import ANY_WRITER, Database, aggregate

WAITING_STATES = [State.HELD.value, State.PARKED.value]

#: Somebody else may write these states into a document; only a leader gives it a place.
NUMBER = {"$type": "number"}
HELD_BY_US = {"held_key": {"$type": "string"}, "ordinal": NUMBER}

#: How often to look whether a person has decided about a parked event; doubles up to a minute.
FIRST_LOOK_SECONDS = 1.0
LOOK_CAP_SECONDS = 60.0


@dataclass(slots=True)
class HeldKey:
    """
    routing_key: of its first event; None when not known yet.
    going: its first event is on its way to the broker.
    looks: how often its first event was found parked.
    noted: how many of its events were held in this term.
    """

    routing_key: str | None
    due_at: float = 0.0
    going: bool = False
    looks: int = 0
    noted: int = 0


class HeldKeys:
    def __init__(self, database: Database, collection: str) -> None:
        self._outbox = database.get_collection(collection, codec_options=ANY_WRITER)
        self.keys: dict[str, HeldKey] = {}

    async def load(self) -> int:
        """
        What earlier leaders held; each key is tried as soon as this one is ready.

        The highest ordinal among them: what is held from now on stands behind it.
        """
        pipeline: Sequence[dict[str, Any]] = [
            {"$match": {**HELD_BY_US, "state": {"$in": WAITING_STATES}}},
            {"$group": {"_id": "$held_key", "highest": {"$max": "$ordinal"}}},
        ]
        highest = 0
        async for group in aggregate(self._outbox, pipeline):
            self.keys[group["_id"]] = HeldKey(routing_key=None)
            highest = max(highest, group["highest"])
        return highest

    def note_settled(self, entries: Iterable[Entry]) -> None:
        """Take note of what is about to be written."""
        for entry in entries:
            if entry.fate in {Fate.HELD, Fate.PARKED}:
                routing_key = entry.event.routing_key if entry.event else None
                held = self.keys.setdefault(entry.key, HeldKey(routing_key))
                held.noted += 1

    def note_written(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if entry.in_order:
                continue
            held = self.keys[entry.key]
            held.going = False
            if entry.fate is Fate.PUBLISHED:
                held.routing_key = None

    def due(self, may_go: Callable[[str], bool]) -> Iterator[str]:
        """Keys whose first event may be tried now; `may_go` is asked about its routing key."""
        now = monotonic()
        for key, held in list(self.keys.items()):
            if held.going or held.due_at > now:
                continue
            if held.routing_key is None or may_go(held.routing_key):
                yield key

    async def first_of(self, key: str) -> dict[str, Any] | None:
        """The event of this key whose turn it is, or None when none is left."""
        waiting = {"held_key": key, "ordinal": NUMBER, "state": {"$in": WAITING_STATES}}
        first: list[tuple[str, int]] = [("ordinal", 1)]
        try:
            document: dict[str, Any] | None = await self._outbox.find_one(waiting, sort=first)
        except InvalidBSON:
            # nobody can publish it, but its state can be read
            document = await self._outbox.find_one(waiting, {"state": 1, "ordinal": 1}, sort=first)
        return document

    async def find(self, event_id: Any) -> dict[str, Any] | None:
        """`held_key` and `routing_key` of an event that waits; None when it does not."""
        document: dict[str, Any] | None = await self._outbox.find_one(
            {"_id": event_id, **HELD_BY_US, "state": {"$in": WAITING_STATES}},
            {"held_key": 1, "routing_key": 1},
        )
        return document

    def look_now(self, key: str) -> None:
        held = self.keys[key]
        held.due_at, held.looks, held.routing_key = 0.0, 0, None

    def let_go(self, key: str, routing_key: str) -> None:
        """Its first event is on its way."""
        held = self.keys[key]
        held.routing_key, held.going, held.looks = routing_key, True, 0

    def postpone(self, key: str) -> None:
        """A person has to decide about its first event; look again later."""
        held = self.keys[key]
        held.due_at = monotonic() + min(FIRST_LOOK_SECONDS * 2.0**held.looks, LOOK_CAP_SECONDS)
        held.looks = min(held.looks + 1, 16)
