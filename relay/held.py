"""
Keys whose events wait in MongoDB: when each is tried again, and what its first event is.

Memory holds the keys only; the events are looked up when their turn comes. A key is free again
when MongoDB holds none of its events and none is on its way there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

from outbox.state import State
from relay.settling import Entry, Fate
from runtime.mongo import LENIENT, Database

FIRST_RETRY_SECONDS = 1.0
RETRY_CAP_SECONDS = 60.0

WAITING_STATES = [State.HELD.value, State.PARKED.value]


def retry_delay_seconds(tries: int) -> float:
    """1, 2, 4, ... seconds, a minute at most: the queue may appear at any moment."""
    return float(min(FIRST_RETRY_SECONDS * 2.0 ** min(tries, 16), RETRY_CAP_SECONDS))


@dataclass(slots=True)
class HeldKey:
    """
    tries: how often its first event was let go in vain.
    going: its first event is on its way to the broker.
    """

    due_at: float
    tries: int = 0
    going: bool = False


class HeldKeys:
    def __init__(self, database: Database, collection: str) -> None:
        self._outbox = database.get_collection(collection, codec_options=LENIENT)
        self.keys: dict[str, HeldKey] = {}

    async def load(self) -> None:
        """What earlier leaders held; each key is tried as soon as this one is ready."""
        pipeline: Sequence[dict[str, Any]] = [
            {"$match": {"state": {"$in": WAITING_STATES}}},
            {"$group": {"_id": "$held_key"}},
        ]
        async for group in self._outbox.aggregate(pipeline):
            self.keys[group["_id"]] = HeldKey(due_at=monotonic())

    def note_settled(self, entries: Iterable[Entry]) -> dict[str, datetime]:
        """
        Take note of entries that are about to be written; when each held key is tried again.
        """
        now, retry_at = monotonic(), {}
        for entry in entries:
            if entry.fate not in {Fate.HELD, Fate.PARKED}:
                continue
            held = self.keys.setdefault(entry.key, HeldKey(now + retry_delay_seconds(0)))
            if not entry.in_order:
                held.tries += 1
                held.due_at = now + retry_delay_seconds(held.tries)
            retry_at[entry.key] = datetime.now(UTC) + timedelta(seconds=held.due_at - now)
        return retry_at

    def note_written(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if entry.in_order:
                continue
            held = self.keys[entry.key]
            held.going = False
            if entry.fate is Fate.PUBLISHED:
                # the next one of this key may go at once
                held.tries, held.due_at = 0, monotonic()

    def due(self) -> list[str]:
        now = monotonic()
        return [key for key, held in self.keys.items() if held.due_at <= now and not held.going]

    async def first_of(self, key: str) -> dict[str, Any] | None:
        """The event of this key whose turn it is, or None when none is left."""
        document: dict[str, Any] | None = await self._outbox.find_one(
            {"held_key": key, "state": {"$in": WAITING_STATES}}, sort=[("ordinal", 1)]
        )
        return document

    def postpone(self, key: str) -> None:
        """A person has to decide about its first event; look again later."""
        held = self.keys[key]
        held.tries += 1
        held.due_at = monotonic() + retry_delay_seconds(held.tries)
