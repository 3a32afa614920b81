"""Settling: whatever order acks, nacks, returns and `multiple` come in."""

from datetime import UTC, datetime

from bson import Timestamp
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outbox.event import Event
from relay.checkpoint import Position
from relay.window import (
    BEHIND,
    NACKED,
    UNCONFIRMED,
    UNROUTABLE,
    Entry,
    Fate,
    LateConfirm,
    Window,
)

KEYS = ("a", "b", "c")


def an_event(number: int, key: str) -> Event:
    return Event(
        id=number,
        message_id=str(number),
        type="t",
        key=key,
        seq=number,
        routing_key="r",
        must_route=True,
        body=b"x" * 10,
        content_type="application/json",
        headers={},
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


def an_entry(number: int, key: str = "a", *, fits: bool = True) -> Entry:
    event = an_event(number, key) if fits else None
    return Entry(number, key, number, event, Position(None, Timestamp(number + 1, 0)))


class AnyOrderOfConfirms(RuleBasedStateMachine):
    """A relay that reads, a broker that answers as it likes, and a position that trails behind."""

    @initialize(limit=st.integers(1, 8))
    def start(self, limit: int) -> None:
        self.limit = limit
        self.window = Window(messages_limit=limit, bytes_limit=1_000_000)
        self.admitted: list[Entry] = []
        self.saved: list[Entry] = []
        self.unsaved: list[list[Entry]] = []
        self.in_flight: dict[int, Entry] = {}
        self.tags = 0
        self.accepted: set[int] = set()
        self.refused: set[int] = set()

    def send(self, entry: Entry) -> None:
        self.window.sent(entry)
        self.tags += 1
        self.in_flight[self.tags] = entry

    @precondition(lambda self: self.window.has_room)
    @rule(key=st.sampled_from(KEYS), fits=st.sampled_from([True, True, True, False]))
    def read(self, key: str, fits: bool) -> None:
        entry = an_entry(len(self.admitted), key, fits=fits)
        self.admitted.append(entry)
        if self.window.admit(entry):
            self.send(entry)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), multiple=st.booleans(), accepted=st.sampled_from([True, True, False]))
    def confirm(self, data: st.DataObject, multiple: bool, accepted: bool) -> None:
        tag = data.draw(st.sampled_from(sorted(self.in_flight)))
        covered = [open_tag for open_tag in self.in_flight if multiple and open_tag <= tag] or [tag]
        for open_tag in covered:
            entry = self.in_flight.pop(open_tag)
            (self.accepted if accepted else self.refused).add(entry.id)
            if accepted and data.draw(st.sampled_from([False, False, True]), "returned"):
                self.window.returned(str(entry.id), "r", "312 NO_ROUTE")
                self.refused.add(entry.id)
        for entry in self.window.confirmed(tag, multiple=multiple, accepted=accepted).ready:
            self.send(entry)

    @rule()
    def take(self) -> None:
        taken = self.window.take_settled()
        if taken:
            self.unsaved.append(taken)

    @precondition(lambda self: self.unsaved)
    @rule()
    def save(self) -> None:
        entries = self.unsaved.pop(0)
        self.window.saved(entries)
        self.saved += entries

    @invariant()
    def the_position_moves_over_a_contiguous_prefix(self) -> None:
        taken = self.saved + [entry for batch in self.unsaved for entry in batch]
        assert taken == self.admitted[: len(taken)]
        assert all(entry.fate is not None for entry in taken)

    @invariant()
    def one_event_of_a_key_is_in_flight(self) -> None:
        keys = [entry.key for entry in self.in_flight.values()]
        assert len(keys) == len(set(keys))

    @invariant()
    def published_means_accepted_and_routed(self) -> None:
        for entry in self.admitted:
            if entry.fate is Fate.PUBLISHED:
                assert entry.id in self.accepted
                assert entry.id not in self.refused

    @invariant()
    def nothing_overtakes_a_held_event_of_its_key(self) -> None:
        blocked: set[str] = set()
        for entry in self.admitted:
            if entry.fate in {Fate.HELD, Fate.PARKED}:
                blocked.add(entry.key)
            elif entry.key in blocked:
                assert entry.fate is None, f"{entry.key} was published past a held event"
                assert entry not in self.in_flight.values()

    @invariant()
    def the_window_is_bounded(self) -> None:
        assert len(self.admitted) - len(self.saved) <= self.limit

    def teardown(self) -> None:
        if not hasattr(self, "window"):
            return
        while self.in_flight:
            tag = max(self.in_flight)
            self.in_flight.clear()
            for entry in self.window.confirmed(tag, multiple=True, accepted=True).ready:
                self.send(entry)
        for entries in [*self.unsaved, self.window.take_settled()]:
            self.window.saved(entries)
        assert self.window.is_empty, "when every confirm has come, nothing is left open"


AnyOrderOfConfirms.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestAnyOrderOfConfirms = AnyOrderOfConfirms.TestCase


def a_window() -> Window:
    return Window(messages_limit=100, bytes_limit=1000)


def publish(window: Window, *entries: Entry) -> None:
    for entry in entries:
        if window.admit(entry):
            window.sent(entry)


def test_a_confirm_ahead_of_an_earlier_one_does_not_move_the_position() -> None:
    window = a_window()
    publish(window, an_entry(1, "a"), an_entry(2, "b"))
    window.confirmed(2, multiple=False, accepted=True)
    assert window.take_settled() == []
    window.confirmed(1, multiple=False, accepted=True)
    assert [entry.id for entry in window.take_settled()] == [1, 2]


def test_a_returned_event_is_held_although_it_was_acked() -> None:
    window = a_window()
    publish(window, an_entry(1))
    window.returned("1", "r", "312 NO_ROUTE")
    window.confirmed(1, multiple=False, accepted=True)
    (entry,) = window.take_settled()
    assert (entry.fate, entry.reason) == (Fate.HELD, f"{UNROUTABLE}: 312 NO_ROUTE")


def test_two_returned_events_whose_ids_read_alike_are_both_held() -> None:
    """A string and a UUID; the broker confirms both with one ack."""
    window = a_window()
    publish(window, an_entry(1, "a"), an_entry(1, "b"))
    window.returned("1", "r", "312 NO_ROUTE")
    window.returned("1", "r", "312 NO_ROUTE")
    window.confirmed(2, multiple=True, accepted=True)
    assert [entry.fate for entry in window.take_settled()] == [Fate.HELD, Fate.HELD]


def test_a_return_counts_for_the_confirm_that_follows_it() -> None:
    window = a_window()
    publish(window, an_entry(1, "a"), an_entry(1, "b"))
    window.returned("1", "r", "312 NO_ROUTE")
    window.confirmed(1, multiple=False, accepted=True)
    window.confirmed(2, multiple=False, accepted=True)
    assert [entry.fate for entry in window.take_settled()] == [Fate.HELD, Fate.PUBLISHED]


def test_a_return_that_may_mean_either_of_two_events_holds_both() -> None:
    window = a_window()
    publish(window, an_entry(1, "a"), an_entry(1, "b"))
    window.returned("1", "r", "312 NO_ROUTE")
    window.confirmed(2, multiple=True, accepted=True)
    assert [entry.fate for entry in window.take_settled()] == [Fate.HELD, Fate.HELD]


def test_a_return_of_another_routing_key_means_another_event() -> None:
    window = a_window()
    publish(window, an_entry(1, "a"))
    window.returned("1", "elsewhere", "312 NO_ROUTE")
    window.confirmed(1, multiple=False, accepted=True)
    assert [entry.fate for entry in window.take_settled()] == [Fate.PUBLISHED]


def test_what_a_closed_channel_leaves_unconfirmed_is_recalled_in_order() -> None:
    window = a_window()
    first, second, third, fourth = (an_entry(n, key) for n, key in enumerate("abcd"))
    publish(window, first, second, third)
    window.confirmed(2, multiple=False, accepted=True)
    assert window.recall() == [first, third]
    assert window.in_flight_count == 0
    assert not window.is_empty
    publish(window, fourth)  # the first on the next channel
    window.confirmed(1, multiple=True, accepted=True)
    assert fourth.fate is Fate.PUBLISHED
    assert first.fate is None
    window.answered(first, accepted=True, no_queue=None)
    window.park(third, "closes_the_channel")
    assert [entry.fate for entry in window.take_settled()] == [
        *(Fate.PUBLISHED, Fate.PUBLISHED, Fate.PARKED, Fate.PUBLISHED)
    ]
    assert window.unconfirmed_count == 0


def test_what_is_set_aside_keeps_back_its_key_and_nobody_else() -> None:
    window = a_window()
    aside, behind, other = an_entry(1, "a"), an_entry(2, "a"), an_entry(3, "b")
    assert window.admit(aside)
    window.set_aside(aside)
    assert not window.admit(behind)
    assert window.admit(other)
    assert window.answered(aside, accepted=True, no_queue=None).ready == [behind]


def test_an_overdue_event_is_held_once_a_later_one_is_confirmed() -> None:
    window = a_window()
    overdue, behind, later = an_entry(1, "a"), an_entry(2, "a"), an_entry(3, "b")
    publish(window, overdue, behind, later)
    assert window.hold_overdue(before_tag=3) == []
    window.confirmed(2, multiple=False, accepted=True)
    assert window.hold_overdue(before_tag=3) == [overdue]
    assert [(entry.fate, entry.reason) for entry in window.take_settled()] == [
        (Fate.HELD, UNCONFIRMED),
        (Fate.HELD, BEHIND),
        (Fate.PUBLISHED, ""),
    ]
    assert window.is_owed(1)
    window.confirmed(1, multiple=False, accepted=True)
    assert not window.is_owed(1)
    assert window.take_late_confirm(1) == LateConfirm(accepted=True, no_queue=None)
    assert window.take_late_confirm(1) is None


def test_what_waits_behind_a_refused_event_is_held_with_it() -> None:
    window = a_window()
    publish(window, an_entry(1), an_entry(2), an_entry(3, "b"))
    failed = window.confirmed(1, multiple=False, accepted=False).failed
    window.confirmed(2, multiple=False, accepted=True)
    settled = window.take_settled()
    assert [entry.id for entry in failed] == [1]
    assert [(entry.id, entry.fate, entry.reason) for entry in settled] == [
        (1, Fate.HELD, NACKED),
        (2, Fate.HELD, BEHIND),
        (3, Fate.PUBLISHED, ""),
    ]


def test_a_key_is_not_free_while_more_of_it_is_on_its_way_to_mongodb() -> None:
    window = a_window()
    window.held_keys.add("a")
    publish(window, an_entry(1))
    assert not window.free("a")
    window.saved(window.take_settled())
    assert window.free("a")
    publish(window, an_entry(2))
    assert window.in_flight_count == 1


def test_a_held_event_let_go_counts_for_no_position() -> None:
    window = a_window()
    held = an_entry(1)
    held.in_order = False
    window.sent(held)
    publish(window, an_entry(2, "b"))
    window.confirmed(1, multiple=False, accepted=True)
    assert [(entry.id, entry.fate) for entry in window.take_settled()] == [(1, Fate.PUBLISHED)]
    assert not window.is_empty


def test_an_event_that_does_not_fit_is_parked_and_holds_back_its_key_only() -> None:
    window = a_window()
    publish(window, an_entry(1, fits=False), an_entry(2), an_entry(3, "b"))
    window.confirmed(1, multiple=True, accepted=True)
    fates = {entry.id: entry.fate for entry in window.take_settled()}
    assert fates == {1: Fate.PARKED, 2: Fate.HELD, 3: Fate.PUBLISHED}


def test_what_came_before_an_event_that_does_not_fit_goes_its_way() -> None:
    window = a_window()
    first, second = an_entry(1), an_entry(2)
    publish(window, first, second, an_entry(3, fits=False))
    assert window.confirmed(1, multiple=False, accepted=True).ready == [second]


def test_the_window_is_full_by_bytes_too() -> None:
    window = Window(messages_limit=100, bytes_limit=15)
    publish(window, an_entry(1, "a"), an_entry(2, "b"))
    assert not window.has_room
