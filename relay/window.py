"""
What has become of each event that was read: the window between reading and the saved position.

    read ──> admit ──> send ──> confirmed ──┬─> PUBLISHED ─┐
               │         │                  └─> HELD ──────┤
               │         └─ routing key paused ─> HELD ────┤ prefix ─> written ─> position saved
               ├─ key is held ──────────────────> HELD ────┤
               ├─ does not fit ─────────────────> PARKED ──┤
               └─ settled in an earlier term ───> KNOWN ───┘

No I/O and no clock: the same calls give the same answers. Confirms come in any order; what is
handed on for writing is always the contiguous prefix of events whose fate is known.

One event of a key is in flight at a time. A later one waits for its predecessor's confirm, because
nothing can call back a message that overtook one which the broker then refused.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any

from outbox.event import Event
from relay.checkpoint import Position


class Fate(Enum):
    PUBLISHED = "published"
    HELD = "held"
    PARKED = "parked"
    KNOWN = "known"


#: Why an event is held; operators query these words.
BEHIND = "behind_a_held_event"
NACKED = "refused_by_the_broker"
PAUSED = "routing_key_paused"
UNROUTABLE = "unroutable"


@dataclass(slots=True, eq=False)
class Entry:
    """
    One event on its way.

    ordinal: its place among all events this relay group ever read.
    position: where the stream stands behind it; None for what did not come from the stream.
    committed_at: by MongoDB's clock; None for what did not come from the stream.
    event: None when the document does not fit the contract; `reason` then says why.
    in_order: counts for the position; a held event that is let go does not.
    probe: was sent while its routing key was under suspicion.
    """

    id: Any
    key: str
    ordinal: int
    event: Event | None
    position: Position | None = None
    committed_at: datetime | None = None
    in_order: bool = True
    probe: bool = False
    fate: Fate | None = None
    reason: str = ""

    @property
    def size_bytes(self) -> int:
        return 0 if self.event is None else len(self.event.body)


@dataclass(frozen=True, slots=True)
class Confirmed:
    """ready: entries whose turn it is now; failed: what was refused or reached no queue."""

    ready: list[Entry]
    failed: list[Entry]


@dataclass(slots=True)
class Window:
    """
    messages_limit, bytes_limit: how much may be read beyond the last saved position.
    held_keys: keys whose later events must wait in MongoDB.
    """

    messages_limit: int
    bytes_limit: int
    held_keys: set[str] = field(default_factory=set)
    _open: deque[Entry] = field(default_factory=deque)
    _loose: list[Entry] = field(default_factory=list)
    _unsaved: int = 0
    _bytes: int = 0
    _next_tag: int = 1
    _in_flight: dict[int, Entry] = field(default_factory=dict)
    _queues: dict[str, deque[Entry]] = field(default_factory=dict)
    _returned: dict[str, str] = field(default_factory=dict)
    _unwritten: Counter[str] = field(default_factory=Counter)

    @property
    def has_room(self) -> bool:
        return (
            len(self._open) + self._unsaved < self.messages_limit and self._bytes < self.bytes_limit
        )

    @property
    def is_nearly_empty(self) -> bool:
        """Whether nobody waits for room soon."""
        return len(self._open) + self._unsaved < self.messages_limit // 4

    @property
    def may_send(self) -> bool:
        """Whether what is let go from MongoDB may go out beside what is in order."""
        return len(self._in_flight) < self.messages_limit

    @property
    def is_empty(self) -> bool:
        return not (self._open or self._unsaved or self._in_flight or self._loose)

    @property
    def in_flight_count(self) -> int:
        return len(self._in_flight)

    def admit(self, entry: Entry) -> bool:
        """Take in the next event; true when it is to be sent now."""
        self._open.append(entry)
        self._bytes += entry.size_bytes
        if entry.fate is not None:
            return False
        if entry.event is None:
            # it can never go; what follows on its key waits for a person
            entry.fate = Fate.PARKED
            self._block(entry.key)
            return False
        if entry.key in self.held_keys:
            self.hold(entry, BEHIND)
            return False
        queue = self._queues.get(entry.key)
        if queue is not None:
            queue.append(entry)
            return False
        return True

    def sent(self, entry: Entry) -> None:
        """The entry was published: it has the channel's next delivery tag."""
        self._in_flight[self._next_tag] = entry
        self._next_tag += 1
        if entry.in_order:
            self._queues.setdefault(entry.key, deque())

    def hold(self, entry: Entry, reason: str) -> None:
        """The entry cannot go now: it and what waits behind it go to MongoDB instead."""
        self._keep_back(entry, Fate.HELD, reason)

    def park(self, entry: Entry, reason: str) -> None:
        """The entry can never go, as its sending has shown; what waits behind it is held."""
        self._keep_back(entry, Fate.PARKED, reason)

    def has_unwritten(self, key: str) -> bool:
        """Whether events of this key are on their way to being held or parked in MongoDB."""
        return key in self._unwritten

    def free(self, key: str) -> bool:
        """MongoDB holds nothing of this key; false where more is on its way there."""
        if self.has_unwritten(key):
            return False
        self.held_keys.discard(key)
        return True

    def returned(self, message_id: str, reason: str) -> None:
        """The broker found no queue for it; a return always comes before its own confirm."""
        self._returned[message_id] = reason

    def confirmed(self, delivery_tag: int, *, multiple: bool, accepted: bool) -> Confirmed:
        """Settle what the confirm covers."""
        outcome = Confirmed([], [])
        for tag in self._covered(delivery_tag, multiple):
            entry = self._in_flight.pop(tag)
            assert entry.event is not None
            no_queue = self._returned.pop(entry.event.message_id, None) if self._returned else None
            if not accepted:
                self.hold(entry, NACKED)
                outcome.failed.append(entry)
            elif no_queue is not None:
                self.hold(entry, f"{UNROUTABLE}: {no_queue}")
                outcome.failed.append(entry)
            else:
                self._publish(entry, outcome.ready)
        return outcome

    def take_settled(self) -> list[Entry]:
        """
        The contiguous prefix whose fate is known, and held events that were let go.

        It fills the window until `saved` is called for it.
        """
        settled: list[Entry] = []
        while self._open and self._open[0].fate is not None:
            settled.append(self._open.popleft())
        settled += self._loose
        self._loose = []
        self._unsaved += len(settled)
        return settled

    def saved(self, entries: Iterable[Entry]) -> None:
        """These are written, and the position is behind them."""
        for entry in entries:
            self._unsaved -= 1
            if not entry.in_order:
                continue
            self._bytes -= entry.size_bytes
            if entry.fate in {Fate.HELD, Fate.PARKED}:
                self._unwritten[entry.key] -= 1
                if not self._unwritten[entry.key]:
                    del self._unwritten[entry.key]

    def _covered(self, delivery_tag: int, multiple: bool) -> list[int]:
        if not multiple:
            return [delivery_tag] if delivery_tag in self._in_flight else []
        covered = []
        for tag in self._in_flight:  # in order of tags
            if tag > delivery_tag:
                break
            covered.append(tag)
        return covered

    def _publish(self, entry: Entry, ready: list[Entry]) -> None:
        entry.fate = Fate.PUBLISHED
        if not entry.in_order:
            self._loose.append(entry)
            return
        queue = self._queues.get(entry.key)
        if queue:
            ready.append(queue.popleft())
        else:
            self._queues.pop(entry.key, None)

    def _keep_back(self, entry: Entry, fate: Fate, reason: str) -> None:
        entry.fate, entry.reason = fate, reason
        if not entry.in_order:
            self._loose.append(entry)
            return
        self._block(entry.key)
        for waiting in self._queues.pop(entry.key, ()):
            waiting.fate, waiting.reason = Fate.HELD, BEHIND
            self._block(waiting.key)

    def _block(self, key: str) -> None:
        self.held_keys.add(key)
        self._unwritten[key] += 1
