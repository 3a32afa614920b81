"""The search for an event that closes the channel: which goes next, and which is to blame."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.search import TRIES_IN_A_ROW, Refusal, Search
from relay.window import Entry
from tests.unit.test_window import an_entry

FRAME_ERROR = Refusal(501, "FRAME_ERROR - type 2")
NO_EXCHANGE = Refusal(404, "NOT_FOUND - no exchange 'events' in vhost '/'")
NO_WRITE = Refusal(403, "ACCESS_REFUSED - access to exchange 'events' in vhost '/' refused")


def forbidden(routing_key: str) -> Refusal:
    text = f"ACCESS_REFUSED - access to topic '{routing_key}' in exchange 'events' in vhost '/'"
    cut = text.encode()[:252].decode(errors="ignore") + "..."
    return Refusal(403, text if len(text) <= 255 else cut)


def entries(count: int) -> list[Entry]:
    return [an_entry(number, f"key-{number}") for number in range(count)]


def a_search(suspects: list[Entry]) -> Search:
    search = Search()
    search.suspect(suspects)
    return search


def answers(search: Search, bad: dict[Entry, Refusal], tries: int) -> Iterator[tuple[Entry, str]]:
    """What happens at each of the next tries."""
    for _ in range(tries):
        entry = search.take_next()
        if entry is None:
            return
        if entry not in bad:
            search.settled(entry, confirmed=True)
            yield entry, "confirmed"
        elif search.refused(entry, bad[entry]):
            yield entry, "blamed"
        else:
            yield entry, "refused"


def test_a_refusal_that_names_the_routing_key_blames_at_once() -> None:
    first, second = entries(2)
    search = a_search([first, second])
    assert list(answers(search, {first: forbidden("r")}, 9)) == [
        (first, "blamed"),
        (second, "confirmed"),
    ]
    assert search.is_over


def test_a_refusal_that_names_nothing_blames_only_after_another_was_confirmed() -> None:
    first, second = entries(2)
    search = a_search([first, second])
    assert list(answers(search, {first: FRAME_ERROR}, 9)) == [
        (first, "refused"),
        (second, "confirmed"),
        (first, "blamed"),
    ]
    assert search.is_over


def test_an_only_event_is_not_blamed_until_a_later_one_is_confirmed() -> None:
    only, later = entries(2)
    search = a_search([only])
    for _ in range(5):
        assert list(answers(search, {only: FRAME_ERROR}, 9)) == [(only, "refused")]
        assert search.is_stuck
        assert not search.is_over
        search.resume()
    search.later.append(later)
    assert list(answers(search, {only: FRAME_ERROR}, 9)) == [
        (only, "refused"),
        (later, "confirmed"),
        (only, "blamed"),
    ]


@pytest.mark.parametrize("refusal", [NO_EXCHANGE, NO_WRITE])
def test_a_refusal_that_concerns_all_is_not_tried_with_the_others(refusal: Refusal) -> None:
    suspects = entries(5)
    search = a_search(suspects)
    bad = dict.fromkeys(suspects, refusal)
    for suspect in suspects:
        assert list(answers(search, bad, 9)) == [(suspect, "refused")]
        assert search.is_stuck
        search.resume()
    confirmed = [entry for entry, answer in answers(search, {}, 9) if answer == "confirmed"]
    assert confirmed == suspects, "the fault is corrected: all go out, in order"


def test_refusals_in_a_row_end_in_a_pause() -> None:
    suspects = entries(3 * TRIES_IN_A_ROW)
    search = a_search(suspects)
    bad = dict.fromkeys(suspects[:-1], FRAME_ERROR)
    assert len(list(answers(search, bad, 999))) == TRIES_IN_A_ROW
    search.resume()
    assert len(list(answers(search, bad, 999))) == TRIES_IN_A_ROW
    search.resume()
    blamed = [entry for entry, answer in answers(search, bad, 999) if answer == "blamed"]
    assert blamed == suspects[:-1]
    assert search.is_over


def test_a_lost_connection_gives_the_suspect_back() -> None:
    first, second = entries(2)
    search = a_search([first, second])
    assert search.take_next() is first
    search.give_back(first)
    assert search.take_next() is first


@pytest.mark.parametrize("routing_key", ["r", "r.a", "ü" * 110, "r" * 255])
def test_the_routing_key_is_found_in_the_brokers_text_also_where_it_is_cut(
    routing_key: str,
) -> None:
    event = an_entry(1).event
    assert event is not None
    named = event.__class__(**{name: getattr(event, name) for name in event.__slots__})
    object.__setattr__(named, "routing_key", routing_key)
    assert forbidden(routing_key).names(named)
    assert not forbidden("other").names(named)
    assert not forbidden(f"{routing_key[:3]}x").names(named)
    assert not NO_WRITE.names(named)


def test_the_size_is_found_in_the_brokers_text() -> None:
    event = an_entry(1).event
    assert event is not None
    size = "PRECONDITION_FAILED - message size {} is larger than configured max size 5"
    assert Refusal(406, size.format(len(event.body))).names(event)
    assert not Refusal(406, size.format(f"1{len(event.body)}")).names(event)


@pytest.mark.parametrize(
    ("code", "is_final"), [(403, False), (404, False), (406, True), (501, True), (541, False)]
)
def test_what_an_operator_must_correct_in_the_event_is_final(code: int, is_final: bool) -> None:
    assert Refusal(code, "").is_final is is_final
    assert not Refusal(None, "lost").is_final


@settings(max_examples=300, deadline=None)
@given(
    bad=st.lists(st.sampled_from(["good", "named", "unnamed"]), min_size=1, max_size=40),
    later=st.integers(0, 5),
    cured_after=st.none() | st.integers(0, 60),
)
def test_whatever_is_refused_only_the_bad_are_blamed_and_the_good_go_once(
    bad: list[str], later: int, cured_after: int | None
) -> None:
    """cured_after: until this many tries, the broker refuses everything; None: it never does."""
    suspects = entries(len(bad) + later)
    refusals = {"named": forbidden("r"), "unnamed": FRAME_ERROR}
    search = a_search(suspects[: len(bad)])
    search.later.extend(suspects[len(bad) :])
    refused = {
        entry: refusals[kind] for entry, kind in zip(suspects, bad, strict=False) if kind != "good"
    }
    outcome: dict[Entry, str] = {}
    tries = 0
    for _ in range(500):
        entry = search.take_next()
        if entry is None:
            if search.is_over:
                break
            search.resume()
            continue
        assert entry not in outcome, "a decided event is published again"
        tries += 1
        of_all = cured_after is not None and tries <= cured_after
        refusal = NO_EXCHANGE if of_all else refused.get(entry)
        if refusal is None:
            search.settled(entry, confirmed=True)
            outcome[entry] = "confirmed"
        elif search.refused(entry, refusal):
            outcome[entry] = "blamed"
    for entry, decided in outcome.items():
        assert decided == ("blamed" if entry in refused else "confirmed")
    undecided = [entry for entry in suspects if entry not in outcome]
    if search.is_over:
        assert not set(undecided) & set(suspects[: len(bad)])
    else:
        assert all(refused.get(entry) is FRAME_ERROR for entry in undecided), "a good one waits"
