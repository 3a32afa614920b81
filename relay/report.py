"""
The relay's own metrics, and whether it makes progress.

The other files only report what happened; nothing here does I/O or raises. Counters grow by
batches, and one event at a time is timed, so that the cost per event stays negligible.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Histogram

from relay.checkpoint import Checkpoint
from relay.window import Entry, Fate, Window
from runtime import clock
from runtime.rabbit import Connection

#: A longer wait is reported as a lack of progress; shorter ones are normal.
PATIENCE_SECONDS = 5.0

LATENCY_BUCKETS_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)


@dataclass(frozen=True, slots=True)
class Leadership:
    """What a leader works with; silent_seconds: see Publisher.silent_seconds."""

    checkpoint: Checkpoint
    window: Window
    connection: Connection
    silent_seconds: Callable[[], float]


class Report:
    """leadership: of the current term; None while this relay does not lead."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, meaning: str) -> Counter:
            return Counter(f"relay_{name}", meaning, registry=registry)

        self._published = counter("published", "events confirmed by the broker and routed")
        self._held = counter(
            "held", "events held: refused, unroutable, or behind a held event of their key"
        )
        self._parked = counter("parked", "events that cannot be published without an operator")
        self._deleted = counter(
            "deleted", "events that their application deleted before they were marked"
        )
        self._closures = counter(
            "channel_closures", "channels that the broker closed because of a message"
        )
        self._returned = counter("returned", "messages that reached no queue")
        self._nacked = counter("nacked", "messages that the broker refused")
        self._repeats = counter(
            "possible_repeats",
            "events that an earlier term may have published, too: committed before this term "
            "and not marked; an upper bound",
        )
        self._reconnects = counter("reconnects", "restarts of the relay's loop after an error")
        self._confirm = Histogram(
            "relay_confirm_seconds",
            "from publishing to the confirm; one event at a time is measured",
            buckets=LATENCY_BUCKETS_SECONDS,
            registry=registry,
        )
        self._commit_to_confirm = Histogram(
            "relay_commit_to_confirm_seconds",
            "from the commit, by MongoDB's clock, to the confirm, by the relay's clock; one event "
            "at a time is measured",
            buckets=LATENCY_BUCKETS_SECONDS,
            registry=registry,
        )
        self.leadership: Leadership | None = None
        self._why_idle: str | None = "it is starting"
        self._waits: dict[str, float] = {}
        self._refused: str | None = None
        self._sample: tuple[Entry, float] | None = None
        self._seen_up_to: datetime | None = None

    def leads(self, leadership: Leadership) -> None:
        self.leadership, self._why_idle = leadership, None

    def stands_by(self) -> None:
        """Another relay holds the lock."""
        self._why_idle = None

    def interrupted(self, reason: str) -> None:
        """An error ended the term or the standby; the relay starts over."""
        self._end_term()
        self._reconnects.inc()
        self._why_idle = reason

    def ended(self) -> None:
        self._end_term()
        self._why_idle = "its term of leadership has ended"

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """`what` counts as a lack of progress once it takes more than PATIENCE_SECONDS."""
        self._waits[what] = monotonic()
        try:
            yield
        finally:
            self._waits.pop(what, None)

    def sent(self, entry: Entry) -> None:
        if self._sample is None:
            self._sample = entry, monotonic()

    def confirmed(self) -> None:
        """The fate of some entries was decided."""
        if self._sample is None or self._sample[0].fate is None:
            return
        entry, sent_at = self._sample
        self._sample = None
        if entry.fate is Fate.PUBLISHED:
            self._confirm.observe(monotonic() - sent_at)
            if entry.committed_at is not None:
                age_seconds = clock.age_seconds(entry.committed_at)
                self._commit_to_confirm.observe(age_seconds)

    def failed(self, count: int, *, accepted: bool) -> None:
        """accepted: the broker accepted the messages but found no queue for them."""
        (self._returned if accepted else self._nacked).inc(count)

    def channel_closed(self) -> None:
        """The broker closed a channel, or the connection of a lone channel, after a message."""
        self._closures.inc()

    def search_waits(self, reason: str | None) -> bool:
        """The broker refuses what is left; None once it accepts one. False when known already."""
        is_new = self._refused is None
        self._refused = reason
        return is_new

    def settled(self, entries: Sequence[Entry]) -> None:
        """These are written, and the position is behind them."""
        published = held = parked = 0
        for entry in entries:
            if entry.fate is Fate.PUBLISHED:
                published += 1
            elif entry.fate is Fate.PARKED:
                parked += 1
            elif entry.fate is Fate.HELD and entry.in_order:
                held += 1
        self._published.inc(published)
        self._held.inc(held)
        self._parked.inc(parked)
        newest = next((entry for entry in reversed(entries) if entry.committed_at), None)
        if newest is not None and newest.committed_at is not None:
            self._note_seen(newest.committed_at)

    def parked_later(self) -> None:
        """A held event turned out to be unfit at its release and was parked."""
        self._parked.inc()

    def deleted(self, count: int) -> None:
        self._deleted.inc(count)

    def repeats(self, count: int) -> None:
        self._repeats.inc(count)

    def caught_up(self) -> None:
        """The last read was empty, and every event read before is settled."""
        self._note_seen(clock.now())

    @property
    def lag_seconds(self) -> float | None:
        """Seconds since the last empty read or the commit of the last settled event, if newer."""
        return None if self._seen_up_to is None else clock.age_seconds(self._seen_up_to)

    @property
    def why_no_progress(self) -> str | None:
        """The reason in words; None while it stands by, or leads and makes progress."""
        leadership = self.leadership
        if leadership is None:
            return self._why_idle
        if leadership.connection.blocked:
            return "RabbitMQ blocks publishing: it is short of memory or disk space"
        if self._refused is not None:
            return f"RabbitMQ refuses what is to be published: {self._refused}"
        unrenewed_seconds = leadership.checkpoint.silent_seconds
        if unrenewed_seconds > PATIENCE_SECONDS:
            return f"no sign of life was written to MongoDB for {unrenewed_seconds:.0f} s"
        silent_seconds = leadership.silent_seconds()
        if silent_seconds > PATIENCE_SECONDS:
            return f"RabbitMQ has not confirmed a message for {silent_seconds:.0f} s"
        for what, since in self._waits.items():
            waited_seconds = monotonic() - since
            if waited_seconds > PATIENCE_SECONDS:
                return f"{what} has taken {waited_seconds:.0f} s"
        if leadership.checkpoint.resync_reason is not None:
            return f"a resync is in progress: {leadership.checkpoint.resync_reason}"
        return None

    def _note_seen(self, moment: datetime) -> None:
        self._seen_up_to = max(moment, self._seen_up_to or moment)

    def _end_term(self) -> None:
        self.leadership, self._sample, self._seen_up_to = None, None, None
        self._refused = None
        self._waits.clear()
