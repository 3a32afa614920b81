"""
Keys whose events wait in MongoDB: which may be retried, and the first event of each.

Memory holds the keys only; an event is read when it may be released. A key is free again when
MongoDB holds none of its events and the window has none left to write.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from bson.errors import InvalidBSON
from loguru import logger

from outbox.state import State
from relay.window import ALONE, Entry, Fate
from runtime.mongo import ANY_WRITER, Database, aggregate

WAITING_STATES = [State.HELD.value, State.PARKED.value]

#: A writer may insert a document with these states; only a leader sets these fields.
NUMBER = {"$type": "number"}
HELD_BY_US = {"held_key": {"$type": "string"}, "ordinal": NUMBER}

#: Interval of checks whether an operator has decided about a parked event, and of retries of an
#: event that closes its channel; doubles to the cap.
FIRST_POLL_SECONDS = 1.0
POLL_CAP_SECONDS = 60.0


@dataclass(slots=True)
class HeldKey:
    """
    routing_key: of its first event; None when not known yet.
    in_flight: its first event was sent, and its fate is not saved yet.
    parked_polls: how often its first event was found parked.
    noted: number of its events that were held in this term.
    refusals: how often in a row its first event closed the channel, or was not confirmed.
    """

    routing_key: str | None
    due_at: float = 0.0
    in_flight: bool = False
    parked_polls: int = 0
    noted: int = 0
    refusals: int = 0


class HeldKeys:
    def __init__(self, database: Database, collection: str) -> None:
        self._outbox = database.get_collection(collection, codec_options=ANY_WRITER)
        self.keys: dict[str, HeldKey] = {}

    async def load(self) -> int:
        """
        Load the keys that earlier leaders held; each is due immediately.

        Returns the highest ordinal among their events, 0 without any: later ones must be higher.
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

    def note_saved(self, entries: Iterable[Entry]) -> None:
        """Register the keys that these hold; a released event's key may release its next one."""
        for entry in entries:
            if entry.fate in {Fate.HELD, Fate.PARKED}:
                routing_key = entry.event.routing_key if entry.event else None
                held = self.keys.setdefault(entry.key, HeldKey(routing_key))
                held.noted += 1
                if entry.reason.startswith(ALONE):
                    held.due_at = monotonic() + _growing_seconds(held.refusals)
                    held.refusals += 1
            if not entry.in_order:
                held = self.keys[entry.key]
                held.in_flight = False
                if entry.fate is Fate.PUBLISHED:
                    held.routing_key, held.refusals = None, 0
            elif entry.fate is Fate.HELD:
                logger.info(
                    "event.held", event_id=str(entry.id), key=entry.key, reason=entry.reason
                )

    def due(self, may_go: Callable[[str], bool]) -> Iterator[str]:
        """Keys whose first event may be sent now; `may_go` decides by its routing key."""
        now = monotonic()
        for key, held in list(self.keys.items()):
            if held.in_flight or held.due_at > now:
                continue
            if held.routing_key is None or may_go(held.routing_key):
                yield key

    async def first_of(self, key: str) -> dict[str, Any] | None:
        """The next event of this key; None when none is left."""
        waiting = {"held_key": key, "ordinal": NUMBER, "state": {"$in": WAITING_STATES}}
        first: list[tuple[str, int]] = [("ordinal", 1)]
        try:
            document: dict[str, Any] | None = await self._outbox.find_one(waiting, sort=first)
        except InvalidBSON:
            # it cannot be published, but its state can be read
            document = await self._outbox.find_one(waiting, {"state": 1, "ordinal": 1}, sort=first)
        return document

    async def find(self, event_id: Any) -> dict[str, Any] | None:
        """`held_key` and `routing_key` of an event that waits; None when it does not."""
        document: dict[str, Any] | None = await self._outbox.find_one(
            {"_id": event_id, **HELD_BY_US, "state": {"$in": WAITING_STATES}},
            {"held_key": 1, "routing_key": 1},
        )
        return document

    def make_due(self, key: str) -> None:
        held = self.keys[key]
        held.due_at, held.parked_polls, held.routing_key = 0.0, 0, None

    def mark_in_flight(self, key: str, routing_key: str) -> None:
        """Its first event is being sent."""
        held = self.keys[key]
        held.routing_key, held.in_flight, held.parked_polls = routing_key, True, 0

    def postpone(self, key: str) -> None:
        """Its first event is parked and needs an operator's decision; check again later."""
        held = self.keys[key]
        held.due_at = monotonic() + _growing_seconds(held.parked_polls)
        held.parked_polls += 1


def _growing_seconds(repeats: int) -> float:
    return min(FIRST_POLL_SECONDS * 2.0 ** min(repeats, 16), POLL_CAP_SECONDS)
