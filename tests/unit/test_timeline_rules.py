"""The timeline of a request: what happened, in order, and what comes next."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from assistance.delivery import Delivery
from assistance.request import Request, accept
from assistance.routing import Destination
from runtime.printable import escape_unprintable
from service.timeline import Entry, timeline

BORN = datetime(2026, 11, 23, 10, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def accepted() -> tuple[Request, list[dict[str, Any]]]:
    acceptance = accept(
        request_id="7b0c",
        topic="sales",
        description="x",
        destinations=[Destination("slack", "slack")],
        now=BORN,
    )
    return acceptance.request, acceptance.outbox_documents


def next_entry(
    delivery: Mapping[str, object], hint: Mapping[str, object], *, after: timedelta
) -> Entry:
    request, (fact, birth_hint) = accepted()
    request["deliveries"][0].update(cast(Delivery, delivery))
    *_, last = timeline(request, [fact, {**birth_hint, **hint}], now=BORN + after)
    assert (last.what, last.subject) == ("next", "slack")
    return last


PUBLISHED = {"state": "published", "published_at": BORN}
CLAIMED = {
    "state": "claimed",
    "lease_until": BORN + 2 * MINUTE,
    "hint_until": BORN + 2 * MINUTE,
}


@pytest.mark.parametrize(
    ("delivery", "hint", "after", "at", "detail"),
    [
        ({}, {}, MINUTE, None, "hint to be published: the relay"),
        ({}, PUBLISHED, MINUTE / 2, None, "queued: a worker takes it;"),
        ({}, PUBLISHED, MINUTE, BORN + MINUTE, "due: the reconciler wakes"),
        ({}, PUBLISHED, 9 * MINUTE, BORN + MINUTE, "overdue: it was not picked up"),
        (CLAIMED, PUBLISHED, MINUTE, None, "in flight: a worker is delivering it"),
        (CLAIMED, PUBLISHED, 2 * MINUTE, BORN + 2 * MINUTE, "claim expired: its worker is gone"),
        ({"due_at": BORN + 2 * MINUTE}, PUBLISHED, MINUTE, BORN + 2 * MINUTE, "due later: the"),
        (
            {},
            {"state": "held", "reason": "NO_ROUTE", "retry_at": BORN + MINUTE},
            MINUTE,
            BORN + MINUTE,
            "hint held: the relay tries it again (NO_ROUTE)",
        ),
        (
            {},
            {"state": "parked", "reason": "too large"},
            MINUTE,
            None,
            "an operator decides (too l",
        ),
    ],
)
def test_what_comes_next_is_shown_for_each_state_of_a_delivery(
    delivery: Mapping[str, object],
    hint: Mapping[str, object],
    after: timedelta,
    at: datetime | None,
    detail: str,
) -> None:
    found = next_entry(delivery, hint, after=after)
    assert found.at == at
    assert detail in found.detail


def test_what_happened_is_shown_in_the_order_of_time() -> None:
    request, documents = accepted()
    for number, document in enumerate(documents, start=1):
        document |= {"state": "published", "published_at": BORN + number * MINUTE}
    request["deliveries"][0]["attempts"] = [
        {
            "number": 1,
            "fence": 1,
            "worker": "w",
            "started_at": BORN + MINUTE * 1.5,
            "ended_at": BORN + MINUTE * 3,
            "verdict": "done",
            "code": "200",
        }
    ]
    found = timeline(request, documents[::-1], now=BORN + MINUTE)
    assert [entry.what for entry in found[:-1]] == [
        "accepted",
        "appended",
        "appended",
        "published",
        "started",
        "published",
        "ended",
    ]


def test_nothing_comes_after_the_end() -> None:
    request, documents = accepted()
    request["deliveries"][0]["state"] = "succeeded"
    assert "next" not in [entry.what for entry in timeline(request, documents, now=BORN)]


def test_events_that_are_not_kept_any_more_are_named() -> None:
    request, _ = accepted()
    removed, *_ = timeline(request, [], now=BORN)
    assert removed.detail == "2 of 2 were published long ago and are not kept"


def test_events_of_other_writers_are_left_out() -> None:
    request, documents = accepted()
    foreign = {"_id": "f", "key": request["_id"], "type": "order_placed", "routing_key": "orders"}
    found = timeline(request, [foreign, *documents], now=BORN)
    assert found == timeline(request, documents, now=BORN)


@pytest.mark.parametrize("seq", [{}, {"seq": None}, {"seq": "2"}, {"seq": 2.0}, {"seq": 0}])
def test_an_event_of_ours_that_another_application_wrote_is_shown_as_such(
    seq: Mapping[str, object],
) -> None:
    request, documents = accepted()
    foreign = {"_id": {"not": "ours"}, "key": request["_id"], "type": "delivery_due", **seq}
    found = timeline(request, [foreign, *documents], now=BORN)
    (shown,) = [entry for entry in found if "another application" in entry.detail]
    assert shown.what == "appended"
    found.remove(shown)
    assert found == timeline(request, documents, now=BORN)


def test_text_is_printed_without_its_tricks() -> None:
    assert escape_unprintable("é 🙂 \x1b[31m\u202e\n") == "é 🙂 \\x1b[31m\\u202e\\n"


@pytest.mark.parametrize("relays_clock", [-60 * MINUTE, 60 * MINUTE])
def test_the_order_does_not_depend_on_the_relays_clock(relays_clock: timedelta) -> None:
    request, documents = accepted()
    published = {"state": "published", "published_at": BORN + relays_clock}
    found = [
        (entry.what, entry.detail)
        for entry in timeline(request, [{**one, **published} for one in documents], now=BORN)
        if entry.what != "next"
    ]
    whats = [what for what, _ in found]
    assert whats[0] == "accepted"
    assert [what for what in whats if what != "accepted"].count("appended") == len(documents)
    assert whats.index("appended") < whats.index("published")
    appended = [detail for what, detail in found if what == "appended"]
    assert appended == ["event 1", "event 2"]


def test_attempts_keep_their_order_whatever_the_workers_clocks() -> None:
    request, documents = accepted()
    request["deliveries"][0]["attempts"] = [
        cast(Any, {"number": 1, "started_at": BORN + 5 * MINUTE, "ended_at": BORN + 6 * MINUTE}),
        cast(Any, {"number": 2, "started_at": BORN - 9 * MINUTE, "ended_at": BORN - 8 * MINUTE}),
    ]
    found = [
        (entry.what, entry.subject)
        for entry in timeline(request, documents, now=BORN)
        if entry.what in {"started", "ended"}
    ]
    first, second = "slack, attempt 1", "slack, attempt 2"
    assert found == [("started", first), ("ended", first), ("started", second), ("ended", second)]
