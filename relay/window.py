"""
The window: the fate of each event between its reading and the saved position.

    read ──> admit ──> send ──> confirmed ──┬─> PUBLISHED ─┐
               │         │                  └─> HELD ──────┤
               │         └─ routing key paused ─> HELD ────┤ prefix ─> marked ─> position saved
               ├─ key is held ──────────────────> HELD ────┤
               ├─ does not fit ─────────────────> PARKED ──┤
               └─ settled in an earlier term ───> KNOWN ───┘

Deterministic: no I/O and no clock. Confirms arrive in any order; only the contiguous prefix of
decided events is taken for writing.

One event of a key is in flight at a time. A later one waits for its predecessor's confirm, because
a message cannot be recalled once it has overtaken one that the broker then refuses.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
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


#: Reasons for holding an event, stored in its document; operators query them.
BEHIND = "behind_a_held_event"
NACKED = "refused_by_the_broker"
PAUSED = "routing_key_paused"
CLOSES_CHANNEL = "closes_the_channel"
UNCONFIRMED = "not_confirmed"

#: An event held for one of these reasons would stop others again, so it is published alone.
ALONE = (CLOSES_CHANNEL, UNCONFIRMED)
UNROUTABLE = "unroutable"


@dataclass(slots=True, eq=False)
class Entry:
    """
    One event between its reading and the saved position.

    ordinal: its place among all events this relay group has read.
    position: where the stream stands behind it; None when it was not read from the stream.
    committed_at: by MongoDB's clock; None when it was not read from the stream.
    event: None when the document does not fit the contract; `reason` then says why.
    in_order: counts for the position; False for a released event.
    probe: was sent while its routing key had a backoff.
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
    """ready: entries that may be sent now; failed: entries refused, or returned as unroutable."""

    ready: list[Entry]
    failed: list[Entry]


@dataclass(frozen=True, slots=True)
class LateConfirm:
    """accepted: not nacked. no_queue: why it was returned; None when it was routed."""

    accepted: bool
    no_queue: str | None


@dataclass(slots=True)
class Window:
    """
    messages_limit, bytes_limit: maximum read beyond the last saved position.
    held_keys: keys whose later events must wait in MongoDB.
    """

    messages_limit: int
    bytes_limit: int
    held_keys: set[str] = field(default_factory=set)
    _open: deque[Entry] = field(default_factory=deque)
    _released: list[Entry] = field(default_factory=list)
    _unsaved: int = 0
    _bytes: int = 0
    _next_tag: int = 1
    _in_flight: dict[int, Entry] = field(default_factory=dict)
    _queues: dict[str, deque[Entry]] = field(default_factory=dict)
    _returned: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    _unwritten: Counter[str] = field(default_factory=Counter)
    _set_aside: set[Entry] = field(default_factory=set)
    _highest_confirmed_tag: int = 0
    _overdue: dict[int, Entry] = field(default_factory=dict)
    _late: dict[Any, LateConfirm] = field(default_factory=dict)

    @property
    def has_room(self) -> bool:
        return (
            len(self._open) + self._unsaved < self.messages_limit and self._bytes < self.bytes_limit
        )

    @property
    def is_nearly_empty(self) -> bool:
        """Whether the reader is far from waiting for room."""
        return len(self._open) + self._unsaved < self.messages_limit // 4

    @property
    def may_send(self) -> bool:
        """Whether a held event may be released now."""
        return self.unconfirmed_count < self.messages_limit

    @property
    def is_empty(self) -> bool:
        return not (
            self._open or self._unsaved or self._in_flight or self._released or self._set_aside
        )

    @property
    def in_flight_count(self) -> int:
        return len(self._in_flight)

    @property
    def unconfirmed_count(self) -> int:
        """In flight, or set aside."""
        return len(self._in_flight) + len(self._set_aside)

    @property
    def unsaved_count(self) -> int:
        """An upper bound of the events that are read beyond the saved position."""
        return len(self._open) + self._unsaved

    def admit(self, entry: Entry) -> bool:
        """Append the next event; True when it is to be sent now."""
        self._open.append(entry)
        self._bytes += entry.size_bytes
        if entry.fate is not None:
            return False
        if entry.event is None:
            # it can never be sent; later events of its key wait for an operator
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
        """The entry was sent: it has the channel's next delivery tag."""
        self._in_flight[self._next_tag] = entry
        self._next_tag += 1
        if self._set_aside:
            self._set_aside.discard(entry)
        if entry.in_order:
            self._queues.setdefault(entry.key, deque())

    def set_aside(self, entry: Entry) -> None:
        """The entry is sent later, or alone; later events of its key wait behind it."""
        self._set_aside.add(entry)
        if entry.in_order:
            self._queues.setdefault(entry.key, deque())

    def recall(self) -> list[Entry]:
        """
        The channel is closed: what it left unconfirmed, in order of publishing, is set aside.

        The next channel counts its delivery tags from one.
        """
        recalled = list(self._in_flight.values())
        self._in_flight.clear()
        self._overdue.clear()
        self._returned.clear()
        self._next_tag, self._highest_confirmed_tag = 1, 0
        self._set_aside.update(recalled)
        return recalled

    def hold(self, entry: Entry, reason: str) -> None:
        """Hold the entry, and what waits behind it, in MongoDB: it cannot be sent now."""
        self._hold_back(entry, Fate.HELD, reason)

    def park(self, entry: Entry, reason: str) -> None:
        """Park the entry: it can never be sent. What waits behind it is held."""
        self._hold_back(entry, Fate.PARKED, reason)

    def has_unwritten(self, key: str) -> bool:
        """Whether held or parked events of this key are not saved yet."""
        return key in self._unwritten

    def free(self, key: str) -> bool:
        """Unblock a key of which MongoDB holds nothing; False when more is about to be written."""
        if self.has_unwritten(key):
            return False
        self.held_keys.discard(key)
        return True

    def returned(self, message_id: str, routing_key: str, reason: str) -> None:
        """The broker found no queue for it; a return always precedes the message's confirm."""
        self._returned.setdefault((message_id, routing_key), []).append(reason)

    def confirmed(self, delivery_tag: int, *, multiple: bool, accepted: bool) -> Confirmed:
        """Decide the fate of every entry the confirm covers."""
        outcome = Confirmed([], [])
        self._highest_confirmed_tag = max(self._highest_confirmed_tag, delivery_tag)
        if self._overdue:
            self._note_late(delivery_tag, multiple=multiple, accepted=accepted)
        covered = [self._in_flight.pop(tag) for tag in self._covered(delivery_tag, multiple)]
        unroutable = self._take_returned(covered) if self._returned else {}
        for entry in covered:
            self._decide(entry, outcome, accepted=accepted, no_queue=unroutable.get(entry))
        return outcome

    def answered(self, entry: Entry, *, accepted: bool, no_queue: str | None) -> Confirmed:
        """Decide the fate of an entry that was published alone."""
        self._set_aside.discard(entry)
        outcome = Confirmed([], [])
        self._decide(entry, outcome, accepted=accepted, no_queue=no_queue)
        return outcome

    @property
    def next_tag(self) -> int:
        """The delivery tag of the next entry that is sent."""
        return self._next_tag

    @property
    def awaits_newest(self) -> bool:
        """Whether something is unconfirmed that was sent after everything that is confirmed."""
        return any(tag > self._highest_confirmed_tag for tag in self._in_flight)

    def hold_overdue(self, before_tag: int) -> list[Entry]:
        """
        Hold what was sent before this delivery tag, and was passed by a confirm of a later one.

        The channel still owes these confirms: see `is_owed` and `take_late_confirm`.
        """
        passed_tag = min(before_tag, self._highest_confirmed_tag) - 1
        overdue = {tag: self._in_flight.pop(tag) for tag in self._covered(passed_tag, True)}
        self._overdue |= overdue
        for entry in overdue.values():
            self.hold(entry, UNCONFIRMED)
        return list(overdue.values())

    def is_owed(self, event_id: Any) -> bool:
        """Whether the confirm of this held event may still come: another copy would be a repeat."""
        return any(entry.id == event_id for entry in self._overdue.values())

    def take_late_confirm(self, event_id: Any) -> LateConfirm | None:
        """What the broker answered after the event was held; None when nothing has come."""
        return self._late.pop(event_id, None)

    def take_settled(self) -> list[Entry]:
        """
        The contiguous decided prefix, and decided released events.

        They occupy the window until `saved` is called for them.
        """
        settled: list[Entry] = []
        while self._open and self._open[0].fate is not None:
            settled.append(self._open.popleft())
        settled += self._released
        self._released = []
        self._unsaved += len(settled)
        return settled

    def saved(self, entries: Iterable[Entry]) -> None:
        """These are marked, and the position is saved behind them."""
        for entry in entries:
            self._unsaved -= 1
            if not entry.in_order:
                continue
            self._bytes -= entry.size_bytes
            if entry.fate in {Fate.HELD, Fate.PARKED}:
                self._unwritten[entry.key] -= 1
                if not self._unwritten[entry.key]:
                    del self._unwritten[entry.key]

    def _note_late(self, delivery_tag: int, *, multiple: bool, accepted: bool) -> None:
        tags = [
            tag for tag in self._overdue if tag == delivery_tag or (multiple and tag < delivery_tag)
        ]
        late = [self._overdue.pop(tag) for tag in tags]
        unroutable = self._take_returned(late) if self._returned else {}
        for entry in late:
            self._late[entry.id] = LateConfirm(accepted, unroutable.get(entry))

    def _take_returned(self, covered: Sequence[Entry]) -> dict[Entry, str]:
        """
        The entries among these that were returned, with the reason.

        A return carries no tag, and a string and a UUID may read alike. Where fewer messages were
        returned than could be meant, all of them count as returned: a repeat is better than a loss.
        """
        unroutable: dict[Entry, str] = {}
        meant: Counter[tuple[str, str]] = Counter()
        for entry in covered:
            assert entry.event is not None
            identity = entry.event.message_id, entry.event.routing_key
            if entry.event.must_route and identity in self._returned:
                unroutable[entry] = self._returned[identity][0]
                meant[identity] += 1
        for identity, count in meant.items():
            del self._returned[identity][:count]
            if not self._returned[identity]:
                del self._returned[identity]
        return unroutable

    def _covered(self, delivery_tag: int, multiple: bool) -> list[int]:
        if not multiple:
            return [delivery_tag] if delivery_tag in self._in_flight else []
        covered = []
        for tag in self._in_flight:  # in order of tags
            if tag > delivery_tag:
                break
            covered.append(tag)
        return covered

    def _decide(
        self, entry: Entry, outcome: Confirmed, *, accepted: bool, no_queue: str | None
    ) -> None:
        if not accepted:
            self.hold(entry, NACKED)
            outcome.failed.append(entry)
        elif no_queue is not None:
            self.hold(entry, f"{UNROUTABLE}: {no_queue}")
            outcome.failed.append(entry)
        else:
            self._publish(entry, outcome.ready)

    def _publish(self, entry: Entry, ready: list[Entry]) -> None:
        entry.fate = Fate.PUBLISHED
        if not entry.in_order:
            self._released.append(entry)
            return
        queue = self._queues.get(entry.key)
        if queue:
            ready.append(queue.popleft())
        else:
            self._queues.pop(entry.key, None)

    def _hold_back(self, entry: Entry, fate: Fate, reason: str) -> None:
        entry.fate, entry.reason = fate, reason
        self._set_aside.discard(entry)
        if not entry.in_order:
            self._released.append(entry)
            return
        self._block(entry.key)
        for waiting in self._queues.pop(entry.key, ()):
            waiting.fate, waiting.reason = Fate.HELD, BEHIND
            self._block(waiting.key)

    def _block(self, key: str) -> None:
        self.held_keys.add(key)
        self._unwritten[key] += 1
