"""
Finds the event because of which the broker closes the channel or the connection.

A closure does not name its message, and what was in flight may have been published or not. So all
of it is suspect, and is published again one at a time:

    suspect ─┬─ confirmed ──────────────────> settled; now the exchange is known to accept events
             └─ refused ─┬─ the broker's text names it ───────────────> blamed
                         └─ unproven ─┬─ refused once more after
                                      │  another was confirmed ───────> blamed
                                      └─ nothing is confirmed: a fault of all; wait, and retry

Pure: no I/O and no clock. The window lets at most one event of a key in, so order per key needs no
care here.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from outbox.event import Event
from relay.window import CLOSES_CHANNEL, UNCONFIRMED, Entry
from runtime.rabbit import ACCESS_REFUSED, CONNECTION_CODES, NOT_FOUND, PRECONDITION_FAILED

#: Refusals in a row before a pause: each costs a channel, and a line in the broker's log.
TRIES_IN_A_ROW = 16

#: The broker cuts its text at 255 bytes and ends it so.
CUT = "..."

#: Retrying cannot help: the message itself is refused. 403 and 404 depend on the broker's set-up,
#: 541 on its state.
FINAL_CODES = (CONNECTION_CODES | {PRECONDITION_FAILED}) - {541}


@dataclass(frozen=True, slots=True)
class Refusal:
    """
    The answer to a message that was published alone.

    code: AMQP's reply code; None when the connection was lost, or the confirm is overdue.
    is_silence: the confirm is overdue.
    """

    code: int | None
    text: str
    is_silence: bool = False

    def __str__(self) -> str:
        return self.text if self.code is None else f"{self.code} {self.text}"

    @property
    def reason(self) -> str:
        """Stored in the event."""
        return UNCONFIRMED if self.is_silence else f"{CLOSES_CHANNEL}: {self}"

    @property
    def is_final(self) -> bool:
        return self.code in FINAL_CODES

    @property
    def concerns_all(self) -> bool:
        """Whether the text speaks of the exchange, not of one message."""
        return self.code == NOT_FOUND or (
            self.code == ACCESS_REFUSED and " topic '" not in self.text
        )

    def names(self, event: Event) -> bool:
        """Whether the text names the routing key, or the size, of this event."""
        if self.code == PRECONDITION_FAILED:
            return f"message size {len(event.body)} " in self.text
        if self.code != ACCESS_REFUSED:
            return False
        _, _, named = self.text.partition(" topic '")
        if named.startswith(f"{event.routing_key}'"):
            return True
        return named.endswith(CUT) and event.routing_key.startswith(named.removesuffix(CUT))


@dataclass(slots=True)
class Search:
    """
    later: set aside until the search is over.

    Each entry that `take_next` returns is to be answered by `settled`, `refused` or `give_back`.
    """

    later: deque[Entry] = field(default_factory=deque)
    _suspects: deque[Entry] = field(default_factory=deque)
    _unproven: deque[Entry] = field(default_factory=deque)
    _confirmed_count: int = 0
    #: for each entry that was refused: how many had been confirmed by then
    _refused_at: dict[Entry, int] = field(default_factory=dict)
    _refused_in_a_row: int = 0

    def suspect(self, entries: Iterable[Entry]) -> None:
        """These were in flight at the closure, in order of publishing."""
        self._suspects.extend(entries)

    @property
    def is_over(self) -> bool:
        return not (self._suspects or self._unproven)

    @property
    def is_stuck(self) -> bool:
        """Whether the next try has to wait for `resume`."""
        return bool(self._unproven) and (
            self._refused_in_a_row >= TRIES_IN_A_ROW or not (self._suspects or self.later)
        )

    def take_next(self) -> Entry | None:
        """The entry to publish next, alone; None when the search is over, or has to pause."""
        if self._refused_in_a_row >= TRIES_IN_A_ROW:
            return None
        if self._unproven and self._refused_at[self._unproven[0]] < self._confirmed_count:
            return self._unproven.popleft()
        if self._suspects:
            return self._suspects.popleft()
        if self._unproven and self.later:
            # only another event can prove that the exchange accepts any
            return self.later.popleft()
        return None

    def settled(self, entry: Entry, *, confirmed: bool) -> None:
        """confirmed: the broker answered it; otherwise it was decided without being sent."""
        self._refused_at.pop(entry, None)
        if confirmed:
            self._confirmed_count += 1
            self._refused_in_a_row = 0

    def refused(self, entry: Entry, refusal: Refusal) -> bool:
        """Whether this entry is to blame; otherwise it is tried again."""
        assert entry.event is not None
        refused_at = self._refused_at.pop(entry, None)
        proven = refused_at is not None and refused_at < self._confirmed_count
        if proven or refusal.names(entry.event):
            self._refused_in_a_row = 0
            return True
        self._refused_at[entry] = self._confirmed_count
        self._unproven.append(entry)
        self._refused_in_a_row += TRIES_IN_A_ROW if refusal.concerns_all else 1
        return False

    def give_back(self, entry: Entry) -> None:
        """It could not be published for a reason of its own, such as a lost connection."""
        self._suspects.appendleft(entry)

    def resume(self) -> None:
        """A pause is over: go on with the next, and with the unproven ones after the last."""
        self._refused_in_a_row = 0
        if not self._suspects and not self.later:
            self._suspects.extend(self._unproven)
            self._unproven.clear()
