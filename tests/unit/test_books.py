"""The books: each request has its place, and whatever does not add up is found."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from assistance import events
from assistance.books import LISTED_LIMIT, Books, Place, place_of
from assistance.delivery import Delivery, DeliveryState
from assistance.request import Request, Status, accept, event_context, next_due_at
from assistance.routing import Destination
from assistance.waiting import Reason
from outbox.state import State

BORN = datetime(2026, 11, 23, 10, 0, tzinfo=UTC)
SOON = BORN + timedelta(seconds=2)
LONG_AFTER = BORN + timedelta(days=8)

OutboxDocuments = list[dict[str, Any]]


def accepted(*destinations: str) -> tuple[Request, OutboxDocuments]:
    acceptance = accept(
        request_id="7b0c",
        topic="sales",
        description="x",
        destinations=[Destination(name, "slack") for name in destinations or ("slack",)],
        now=BORN,
    )
    return acceptance.request, acceptance.outbox_documents


def published(documents: OutboxDocuments) -> OutboxDocuments:
    return [{**document, "state": State.PUBLISHED.value} for document in documents]


def change(request: Request, index: int = 0, **fields: object) -> None:
    request["deliveries"][index].update(cast(Delivery, fields))
    request["next_due_at"] = next_due_at(request["deliveries"])


def close(request: Request, documents: OutboxDocuments, status: Status) -> None:
    for index in range(len(request["deliveries"])):
        change(request, index, state=status.value, lease_until=None)
    append_fact(request, documents, events.FACT_OF_STATUS[status], status)


def append_fact(request: Request, documents: OutboxDocuments, type: str, status: Status) -> None:
    request["version"] += 1
    request["status"] = status.value
    request["updated_at"] = SOON
    documents.append(
        events.fact(
            type,
            event_context(request, SOON),
            topic=request["topic"],
            status=status,
            seq=request["version"],
        )
    )


def reason_of(request: Request, documents: OutboxDocuments, now: datetime = SOON) -> Reason | None:
    place = place_of(request, documents, now=now)
    assert place.discrepancies == ()
    return place.reason


def doubts(request: Request, documents: OutboxDocuments, now: datetime = SOON) -> str:
    return "; ".join(place_of(request, documents, now=now).discrepancies)


def test_a_new_request_waits_for_the_relay() -> None:
    assert reason_of(*accepted()) is Reason.TO_BE_PUBLISHED


def test_a_hint_without_a_state_is_still_to_be_published() -> None:
    request, documents = accepted()
    for document in documents:
        del document["state"]
    assert reason_of(request, documents) is Reason.TO_BE_PUBLISHED


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (State.PUBLISHED, Reason.QUEUED),
        (State.HELD, Reason.HELD),
        (State.PARKED, Reason.PARKED),
        (State.DISCARDED, Reason.DISCARDED),
    ],
)
def test_a_request_waits_where_its_hint_stands(state: State, reason: Reason) -> None:
    request, documents = accepted()
    documents[1]["state"] = state.value
    assert reason_of(request, documents) is reason


def test_a_claimed_request_is_in_flight_until_the_claim_expires() -> None:
    request, documents = accepted()
    lease_until = SOON + timedelta(seconds=30)
    change(
        request,
        state=DeliveryState.CLAIMED.value,
        lease_until=lease_until,
        hint_until=lease_until,
    )
    assert reason_of(request, published(documents)) is Reason.IN_FLIGHT
    expired = lease_until + timedelta(seconds=1)
    assert reason_of(request, published(documents), expired) is Reason.CLAIM_EXPIRED


def test_a_request_that_is_tried_again_later_waits_for_its_date_then_for_the_reconciler() -> None:
    request, documents = accepted()
    due_at = SOON + timedelta(minutes=2)
    change(request, due_at=due_at, hint_until=due_at)
    assert reason_of(request, published(documents)) is Reason.DUE_LATER
    assert reason_of(request, published(documents), due_at) is Reason.DUE
    overlooked = due_at + timedelta(seconds=301)
    assert reason_of(request, published(documents), overlooked) is Reason.OVERDUE


def test_who_waits_for_the_relay_is_not_overdue_however_long_it_takes() -> None:
    request, documents = accepted()
    assert reason_of(request, documents, LONG_AFTER) is Reason.TO_BE_PUBLISHED


def test_of_several_deliveries_the_most_worrying_one_is_told() -> None:
    request, documents = accepted("slack", "email")
    documents = published(documents)
    documents[2]["state"] = State.HELD.value
    assert reason_of(request, documents) is Reason.HELD


@pytest.mark.parametrize("status", [Status.SUCCEEDED, Status.FAILED])
def test_a_closed_request_waits_for_nothing(status: Status) -> None:
    request, documents = accepted("slack", "email")
    close(request, documents, status)
    assert reason_of(request, documents) is None
    assert reason_of(request, [], LONG_AFTER) is None, "its events have been removed since"


def test_a_redriven_request_waits_again() -> None:
    request, documents = accepted()
    close(request, documents, Status.FAILED)
    change(request, state=DeliveryState.WAITING.value)
    append_fact(request, documents, events.REDRIVEN, Status.ACCEPTED)
    assert reason_of(request, documents) is Reason.TO_BE_PUBLISHED


def test_an_old_open_request_may_have_lost_its_published_events() -> None:
    request, _ = accepted()
    assert reason_of(request, [], LONG_AFTER) is Reason.OVERDUE


def test_a_status_that_the_deliveries_do_not_add_up_to_is_found() -> None:
    request, documents = accepted("slack", "email")
    change(request, state=DeliveryState.FAILED.value)
    append_fact(request, documents, events.FAILED, Status.FAILED)
    assert doubts(request, documents) == (
        "it is failed, but its deliveries (failed, waiting) imply accepted"
    )


def test_a_request_with_nothing_open_that_is_still_accepted_is_found() -> None:
    request, documents = accepted()
    change(request, state=DeliveryState.SUCCEEDED.value)
    assert (
        doubts(request, documents)
        == "it is accepted, but its deliveries (succeeded) imply succeeded"
    )


def _without_date(request: Request) -> None:
    request["next_due_at"] = None


def _too_late(request: Request) -> None:
    request["next_due_at"] = BORN + timedelta(days=1)


@pytest.mark.parametrize("spoil", [_without_date, _too_late])
def test_an_open_request_that_the_reconciler_would_overlook_is_found(
    spoil: Callable[[Request], None],
) -> None:
    request, documents = accepted()
    spoil(request)
    assert "its deliveries imply 2026-11-23T10:01:00.000+00:00" in doubts(request, documents)


def test_a_closed_request_with_a_date_is_found() -> None:
    request, documents = accepted()
    close(request, documents, Status.SUCCEEDED)
    request["next_due_at"] = BORN
    assert "its deliveries imply none" in doubts(request, documents)


def test_a_final_status_that_no_fact_tells_is_found() -> None:
    request, documents = accepted()
    close(request, documents, Status.SUCCEEDED)
    request["version"] -= 1
    documents.pop()
    assert doubts(request, documents) == (
        "it is succeeded, but its newest fact in the outbox is accepted"
    )


def test_a_fact_that_its_request_does_not_bear_out_is_found() -> None:
    request, documents = accepted()
    append_fact(request, documents, events.SUCCEEDED, Status.ACCEPTED)
    assert doubts(request, documents) == (
        "it is accepted, but its newest fact in the outbox is succeeded"
    )


def test_a_missing_event_is_found() -> None:
    request, documents = accepted("slack", "email")
    assert doubts(request, [documents[0], documents[2]]) == (
        "it has appended 3 events, but the outbox holds numbers 1, 3; "
        f"the delivery to slack is open, but its hint {documents[1]['_id']} is not in the outbox"
    )


def test_an_event_too_many_is_found() -> None:
    request, documents = accepted()
    assert "holds numbers 1, 2, 2" in doubts(request, [*documents, documents[1]])


@pytest.mark.parametrize("seq", [{}, {"seq": None}, {"seq": "3"}, {"seq": 3.0}, {"seq": -1}])
def test_an_event_of_ours_that_another_application_wrote_is_found(seq: dict[str, object]) -> None:
    request, documents = accepted()
    for type in (events.SUCCEEDED, events.HINT):
        foreign = {"_id": {"not": "ours"}, "type": type, **seq}
        assert doubts(request, [*documents, foreign]) == (
            f"1 of its events have no valid `seq`, so another application wrote them: {type}"
        )


def test_the_books_count_each_request_once_and_list_the_first_doubtful_ones() -> None:
    books = Books()
    request, documents = accepted()
    for number in range(30):
        books.enter(f"open {number}", place_of(request, documents, now=SOON))
    for number in range(25):
        books.enter(f"lost {number}", place_of(request, [], now=SOON))
    close(request, documents, Status.SUCCEEDED)
    books.enter("closed", place_of(request, documents, now=SOON))

    assert str(books) == "accepted 56 = succeeded 1 + failed 0 + waiting 55, unexplained 25"
    assert not books.balanced
    assert [found.request_id for found in books.listed] == [
        f"lost {number}" for number in range(LISTED_LIMIT)
    ]
    assert all(found.why for found in books.listed)


@pytest.mark.parametrize("reason", [Reason.OVERDUE, None])
def test_books_with_an_overdue_request_do_not_balance(reason: Reason | None) -> None:
    books = Books()
    books.enter("overlooked", Place(Status.ACCEPTED, reason, ()))

    assert books.overdue == 1
    assert books.unexplained == 0
    assert not books.balanced


def test_empty_books_balance() -> None:
    assert Books().balanced
    assert str(Books()) == "accepted 0 = succeeded 0 + failed 0 + waiting 0, unexplained 0"


def test_a_request_waiting_for_a_suspended_destination_is_not_overdue() -> None:
    request, documents = accepted("slack", "email")
    place = place_of(request, published(documents), now=LONG_AFTER, unavailable={"slack", "email"})
    assert place.reason is Reason.UNAVAILABLE
    place = place_of(request, published(documents), now=LONG_AFTER, unavailable={"slack"})
    assert place.reason is Reason.OVERDUE


def test_a_delivery_that_needs_a_decision_is_reported_as_such() -> None:
    request, documents = accepted()
    change(request, state=DeliveryState.NEEDS_DECISION.value)
    assert reason_of(request, published(documents), LONG_AFTER) is Reason.NEEDS_DECISION
