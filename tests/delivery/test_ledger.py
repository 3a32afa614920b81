"""Who may call for a delivery, and what is written of it: against a real replica set."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import SON
from pymongo.errors import OperationFailure

from assistance.collection import ASSISTANCES, ASSISTANCES_INDEXES, ASSISTANCES_VALIDATOR
from assistance.delivery import Ask, Failed, Succeeded, TryAgain, UnknownRule
from assistance.request import next_due_at
from assistance.retry_policy import RetryPolicy
from assistance.verdict import Done, Later, Never, Unknown
from consumers.admin.needs_decision import NeedsDecision
from consumers.delivery.ledger import (
    NONE_LEFT,
    WORKER_LOST,
    Claim,
    Ledger,
    Recorded,
    Refusal,
    Refused,
)
from consumers.delivery.updates import change, given
from outbox.collection import OUTBOX
from runtime.mongo import Database, close, ensure_collection, open_client
from runtime.operations import Operator
from sandbox.waiting import wait_until_async
from tests.support.deliveries import Deliveries

POLICY = RetryPolicy(delays_seconds=(5.0, 30.0), jitter_ratio=0.0)
SLACK = "slack"


@pytest.fixture
async def database(deliveries: Deliveries) -> AsyncIterator[Database]:
    client = open_client(deliveries.mongodb_url, process="test")
    database: Database = client[deliveries.database_name]
    await ensure_collection(
        database, ASSISTANCES, indexes=ASSISTANCES_INDEXES, validator=ASSISTANCES_VALIDATOR
    )
    await ensure_collection(database, OUTBOX)
    yield database
    await close(client)


@pytest.fixture
def ledger(database: Database) -> Ledger:
    return new_ledger(database)


def new_ledger(database: Database, *, worker: str = "w", lease_seconds: float = 30.0) -> Ledger:
    return Ledger(database, policy=POLICY, lease_seconds=lease_seconds, worker=worker)


async def claimed(ledger: Ledger, request_id: str, destination: str = SLACK) -> Claim:
    claim = await ledger.claim(request_id, destination)
    assert isinstance(claim, Claim)
    return claim


def make_due(deliveries: Deliveries, request_id: str) -> None:
    """As if the time had passed: due, and its lease over."""
    past = datetime.now(UTC) - timedelta(seconds=1)
    deliveries.database[ASSISTANCES].update_one(
        {"_id": request_id},
        {"$set": {"deliveries.0.due_at": past}},
    )
    deliveries.database[ASSISTANCES].update_one(
        {"_id": request_id, "deliveries.0.lease_until": {"$type": "date"}},
        {"$set": {"deliveries.0.lease_until": past}},
    )


async def test_a_claim_takes_the_delivery_with_the_next_fence(
    ledger: Ledger, deliveries: Deliveries
) -> None:
    request_id = deliveries.accept("$description, not {an: expression}", topic="sales")
    claim = await claimed(ledger, request_id)
    assert (claim.fence, claim.attempt, claim.may_be_repeat, claim.used_up) == (1, 1, False, False)
    assert claim.description == "$description, not {an: expression}"
    delivery = deliveries.delivery(request_id)
    assert delivery["state"] == "claimed"
    assert delivery["hint_until"] == delivery["lease_until"] == claim.lease_until
    assert delivery["hints"] == 0
    [attempt] = delivery["attempts"]
    assert (attempt["number"], attempt["fence"], attempt["worker"]) == (1, 1, "w")
    assert "ended_at" not in attempt
    assert deliveries.request(request_id)["next_due_at"] == claim.lease_until


async def test_of_many_who_claim_at_once_one_wins(
    database: Database, deliveries: Deliveries
) -> None:
    request_id = deliveries.accept()
    ledgers = [new_ledger(database, worker=f"w{number}") for number in range(8)]
    answers = await asyncio.gather(*(ledger.claim(request_id, SLACK) for ledger in ledgers))
    assert sum(isinstance(answer, Claim) for answer in answers) == 1
    assert answers.count(Refused(Refusal.CLAIMED)) == 7
    assert len(deliveries.attempts(request_id)) == 1


async def test_what_is_not_there_not_due_or_closed_is_not_claimed(
    ledger: Ledger, deliveries: Deliveries
) -> None:
    later = deliveries.accept(now=datetime.now(UTC) + timedelta(hours=1))
    closed = deliveries.accept()
    await ledger.record(await claimed(ledger, closed), Done("200"), 1)
    assert await ledger.claim("no such request", SLACK) == Refused(Refusal.UNKNOWN_REQUEST)
    assert await ledger.claim(later, "email") == Refused(Refusal.UNKNOWN_REQUEST)
    assert await ledger.claim(later, SLACK) == Refused(Refusal.NOT_DUE)
    assert await ledger.claim(closed, SLACK) == Refused(Refusal.CLOSED)


async def test_a_destination_with_a_dollar_is_only_a_name(
    ledger: Ledger, deliveries: Deliveries
) -> None:
    request_id = deliveries.accept()
    for name in ("$destination", "$$ROOT", "slack.x", ""):
        assert await ledger.claim(request_id, name) == Refused(Refusal.UNKNOWN_REQUEST)


async def test_a_claim_touches_its_own_delivery_only(
    ledger: Ledger, deliveries: Deliveries
) -> None:
    request_id = deliveries.accept(destinations=("slack", "email"))
    before = deliveries.delivery(request_id, "email")
    await claimed(ledger, request_id)
    assert deliveries.delivery(request_id, "email") == before


async def test_done_closes_the_delivery_and_the_request_and_tells_it(
    ledger: Ledger, deliveries: Deliveries
) -> None:
    request_id = deliveries.accept()
    claim = await claimed(ledger, request_id)
    assert await ledger.record(claim, Done("200", "ok"), 1) == Recorded(Succeeded())
    request = deliveries.request(request_id)
    assert (request["status"], request["next_due_at"]) == ("succeeded", None)
    assert request["version"] == 3
    assert request["updated_at"] > request["created_at"]
    [attempt] = deliveries.attempts(request_id)
    assert attempt["ended_at"] >= attempt["started_at"]
    assert (attempt["verdict"], attempt["code"], attempt["excerpt"]) == ("done", "200", "ok")
    fact = deliveries.database[OUTBOX].find_one({"type": "assistance_request_succeeded"})
    assert fact is not None
    assert (fact["key"], fact["seq"], fact["must_route"]) == (request_id, 3, False)


async def test_never_fails_the_request_and_leaves_a_dead_letter(
    ledger: Ledger, deliveries: Deliveries
) -> None:
    request_id = deliveries.accept()
    claim = await claimed(ledger, request_id)
    assert await ledger.record(claim, Never("404", "no_service"), 1) == Recorded(
        Failed("permanent")
    )
    assert deliveries.request(request_id)["status"] == "failed"
    assert deliveries.facts(request_id)[-1] == "assistance_request_failed"
    [letter] = deliveries.letters()
    assert letter["_id"] == f"delivery/{request_id}/slack"
    assert (letter["origin"], letter["reason"], letter["code"]) == ("delivery", "permanent", "404")
    assert letter["first_seen_at"] == letter["last_seen_at"]


@pytest.mark.parametrize("verdict", [Later("503"), Unknown("no_answer_in_time")])
async def test_later_and_unknown_wait_for_their_next_date(
    ledger: Ledger, deliveries: Deliveries, verdict: Later | Unknown
) -> None:
    request_id = deliveries.accept()
    claim = await claimed(ledger, request_id)
    recorded = await ledger.record(claim, verdict, 2)
    assert isinstance(recorded, Recorded)
    assert isinstance(recorded.conclusion, TryAgain)
    delivery = deliveries.delivery(request_id)
    assert (delivery["state"], delivery["lease_until"]) == ("waiting", None)
    assert delivery["due_at"] == delivery["hint_until"]
    wait_seconds = (delivery["due_at"] - delivery["attempts"][0]["ended_at"]).total_seconds()
    assert wait_seconds == pytest.approx(5.0, abs=0.1)
    assert delivery["attempts"][0]["calls"] == 2
    request = deliveries.request(request_id)
    assert (request["status"], request["version"]) == ("accepted", 2)
    assert request["next_due_at"] == delivery["due_at"]


async def test_the_wait_that_a_third_party_asks_for_wins(
    ledger: Ledger, deliveries: Deliveries
) -> None:
    request_id = deliveries.accept()
    claim = await claimed(ledger, request_id)
    await ledger.record(claim, Later("429", retry_after_seconds=77.0), 1)
    delivery = deliveries.delivery(request_id)
    wait_seconds = (delivery["due_at"] - delivery["attempts"][0]["ended_at"]).total_seconds()
    assert wait_seconds == pytest.approx(77.0, abs=0.1)


async def test_attempts_that_are_used_up_fail_the_delivery(
    ledger: Ledger, deliveries: Deliveries
) -> None:
    request_id = deliveries.accept()
    conclusions = []
    for _ in range(POLICY.attempts_limit):
        make_due(deliveries, request_id)
        recorded = await ledger.record(await claimed(ledger, request_id), Later("503"), 1)
        assert isinstance(recorded, Recorded)
        conclusions.append(type(recorded.conclusion))
    assert conclusions == [TryAgain, TryAgain, Failed]
    assert [attempt["number"] for attempt in deliveries.attempts(request_id)] == [1, 2, 3]
    assert deliveries.letters()[0]["reason"] == "attempts_used_up"


async def test_a_stale_fence_cannot_record(database: Database, deliveries: Deliveries) -> None:
    request_id = deliveries.accept()
    frozen = await claimed(new_ledger(database, worker="frozen"), request_id)
    make_due(deliveries, request_id)
    successor = await claimed(new_ledger(database, worker="successor"), request_id)
    assert successor.fence == frozen.fence + 1
    for verdict in (Done("200"), Never("404"), Later("503"), Unknown("x")):
        assert await new_ledger(database).record(frozen, verdict, 1) == Refused(Refusal.FENCED)
    assert deliveries.delivery(request_id)["state"] == "claimed"
    assert deliveries.facts(request_id) == ["assistance_request_created"]
    assert isinstance(await new_ledger(database).record(successor, Done("200"), 1), Recorded)


async def test_an_attempt_that_its_worker_left_open_ends_as_unknown(
    database: Database, deliveries: Deliveries
) -> None:
    request_id = deliveries.accept()
    await claimed(new_ledger(database, worker="dead"), request_id)
    make_due(deliveries, request_id)
    claim = await claimed(new_ledger(database, worker="alive"), request_id)
    lost, new = deliveries.attempts(request_id)
    assert (lost["verdict"], lost["code"], lost["worker"]) == ("unknown", "worker_lost", "dead")
    assert "ended_at" in lost
    assert "ended_at" not in new
    assert claim.may_be_repeat


async def test_an_unknown_attempt_long_ago_still_makes_a_repeat(
    ledger: Ledger, deliveries: Deliveries
) -> None:
    request_id = deliveries.accept()
    await ledger.record(await claimed(ledger, request_id), Unknown("no_answer_in_time"), 1)
    make_due(deliveries, request_id)
    await ledger.record(await claimed(ledger, request_id), Later("connect_error"), 1)
    make_due(deliveries, request_id)
    assert (await claimed(ledger, request_id)).may_be_repeat


async def test_an_attempt_that_does_not_count_uses_up_none(
    ledger: Ledger, deliveries: Deliveries
) -> None:
    request_id = deliveries.accept()
    for _ in range(POLICY.attempts_limit + 1):
        make_due(deliveries, request_id)
        claim = await claimed(ledger, request_id)
        recorded = await ledger.record(claim, Later("lease_spent", counts=False), 0)
        assert isinstance(recorded, Recorded)
        assert isinstance(recorded.conclusion, TryAgain)
    delivery = deliveries.delivery(request_id)
    assert delivery["attempts_counted"] == 0
    assert {attempt["counted"] for attempt in delivery["attempts"]} == {False}
    make_due(deliveries, request_id)
    claim = await claimed(ledger, request_id)
    assert (claim.attempt, claim.counted, claim.used_up) == (POLICY.attempts_limit + 2, 1, False)


async def test_where_a_person_is_to_be_asked_no_worker_calls_again(
    database: Database, deliveries: Deliveries
) -> None:
    """Neither after a lost answer, nor after a worker that may have died in mid-call."""
    ledger = Ledger(
        database, policy=POLICY, lease_seconds=30, worker="w", on_unknown=UnknownRule.ASK
    )
    unanswered, orphaned = deliveries.accept(), deliveries.accept()
    claim = await claimed(ledger, unanswered)
    assert await ledger.record(claim, Unknown("no_answer_in_time"), 1) == Recorded(Ask())
    await claimed(ledger, orphaned)
    make_due(deliveries, orphaned)
    claim = await claimed(ledger, orphaned)
    assert claim.lost
    assert await ledger.record(claim, WORKER_LOST, 0) == Recorded(Ask())
    for request_id in (unanswered, orphaned):
        request = deliveries.request(request_id)
        assert (request["status"], request["next_due_at"]) == ("accepted", None)
        assert deliveries.delivery(request_id)["state"] == "needs_decision"
        assert await ledger.claim(request_id, SLACK) == Refused(Refusal.NOT_DUE)
        [attempt] = deliveries.attempts(request_id)
        assert attempt["verdict"] == "unknown"


async def test_a_delivery_whose_workers_all_died_fails_without_another_call(
    database: Database, deliveries: Deliveries
) -> None:
    request_id = deliveries.accept()
    ledger = new_ledger(database)
    for _ in range(POLICY.attempts_limit):
        await claimed(ledger, request_id)
        make_due(deliveries, request_id)
    claim = await claimed(ledger, request_id)
    assert claim.used_up
    assert len(deliveries.attempts(request_id)) == POLICY.attempts_limit
    recorded = await ledger.record(claim, NONE_LEFT, 0)
    assert recorded == Recorded(Failed("attempts_used_up"))
    assert deliveries.request(request_id)["status"] == "failed"
    assert deliveries.attempts(request_id)[-1]["code"] == "worker_lost"
    assert deliveries.letters()[0]["code"] == "attempts_used_up"


async def test_a_request_is_final_when_its_last_delivery_is(
    ledger: Ledger, deliveries: Deliveries
) -> None:
    request_id = deliveries.accept(destinations=("slack", "email"))
    await ledger.record(await claimed(ledger, request_id, "slack"), Never("404"), 1)
    assert deliveries.request(request_id)["status"] == "accepted"
    await ledger.record(await claimed(ledger, request_id, "email"), Done("250"), 1)
    request = deliveries.request(request_id)
    assert (request["status"], request["next_due_at"]) == ("failed", None)
    assert deliveries.facts(request_id) == [
        "assistance_request_created",
        "assistance_request_failed",
    ]


async def test_the_last_deliveries_of_a_request_recorded_at_once_append_one_fact(
    database: Database, deliveries: Deliveries
) -> None:
    requests = [deliveries.accept(destinations=("slack", "email")) for _ in range(20)]
    ledger = new_ledger(database)
    for request_id in requests:
        claims = [await claimed(ledger, request_id, name) for name in ("slack", "email")]
        await asyncio.gather(*(ledger.record(claim, Done("200"), 1) for claim in claims))
    for request_id in requests:
        request = deliveries.request(request_id)
        assert (request["status"], request["version"]) == ("succeeded", 4)
        assert deliveries.facts(request_id) == [
            "assistance_request_created",
            "assistance_request_succeeded",
        ]


async def test_a_record_whose_answer_was_lost_is_not_written_twice(
    ledger: Ledger, deliveries: Deliveries
) -> None:
    request_id = deliveries.accept()
    claim = await claimed(ledger, request_id)
    first, second = [await ledger.record(claim, Done("200"), 1) for _ in range(2)]
    assert first == second == Recorded(Succeeded())
    assert deliveries.request(request_id)["version"] == 3


async def test_a_record_is_all_or_nothing(database: Database, deliveries: Deliveries) -> None:
    """The outbox refuses the fact: then the delivery is not closed either."""
    request_id = deliveries.accept()
    ledger = new_ledger(database)
    claim = await claimed(ledger, request_id)
    await database.command(
        SON(collMod=OUTBOX, validator={"type": {"$ne": "assistance_request_failed"}})
    )
    with pytest.raises(OperationFailure):
        await ledger.record(claim, Never("404"), 1)
    assert deliveries.delivery(request_id)["state"] == "claimed"
    assert deliveries.request(request_id)["status"] == "accepted"
    assert deliveries.letters() == []
    await database.command(SON(collMod=OUTBOX, validator={}))
    assert await ledger.record(claim, Never("404"), 1) == Recorded(Failed("permanent"))


async def test_the_server_computes_the_next_look_as_the_contract_does(
    database: Database, deliveries: Deliveries
) -> None:
    request_id = deliveries.accept(destinations=("slack", "email"))
    ledger = new_ledger(database)

    async def agrees() -> None:
        request: Any = await database[ASSISTANCES].find_one({"_id": request_id})
        assert request["next_due_at"] == next_due_at(request["deliveries"])

    await agrees()
    claim = await claimed(ledger, request_id, "slack")
    await agrees()
    await ledger.record(claim, Later("503"), 1)
    await agrees()
    await ledger.record(await claimed(ledger, request_id, "email"), Done("250"), 1)
    await agrees()
    past = datetime(2026, 1, 1, tzinfo=UTC)
    await database[ASSISTANCES].update_one(
        {"_id": request_id}, change("slack", {"due_at": given(past)})
    )
    await agrees()
    await ledger.record(await claimed(ledger, request_id, "slack"), Done("200"), 1)
    await agrees()


async def test_the_holder_knows_when_its_lease_ends(
    database: Database, deliveries: Deliveries
) -> None:
    claim = await claimed(new_ledger(database, lease_seconds=0.3), deliveries.accept())
    assert 0 < claim.seconds_left() <= 0.3
    await wait_until_async(lambda: claim.now() > claim.lease_until, "the server's lease is over")
    assert claim.seconds_left() < 0, "the holder's own lease never outlives the server's"
    skew = abs(claim.now() - datetime.now(UTC))
    assert skew < timedelta(seconds=1)


async def test_lost_answers_are_repeated_twice_and_then_a_person_is_asked(
    database: Database, deliveries: Deliveries
) -> None:
    """Also when workers died during the calls; an operator's retry starts the count again."""
    rarely = Ledger(
        database, policy=RetryPolicy(), lease_seconds=30, worker="w", on_unknown=UnknownRule.RARELY
    )
    unanswered, orphaned = deliveries.accept(), deliveries.accept()
    for number in range(3):
        make_due(deliveries, unanswered)
        claim = await claimed(rarely, unanswered)
        assert not claim.lost
        recorded = await rarely.record(claim, Unknown("no_answer_in_time"), 1)
        assert isinstance(recorded, Recorded)
        assert isinstance(recorded.conclusion, Ask if number == 2 else TryAgain)
    assert deliveries.delivery(unanswered)["state"] == "needs_decision"
    for _ in range(3):
        make_due(deliveries, orphaned)
        assert not (await claimed(rarely, orphaned)).lost
    make_due(deliveries, orphaned)
    claim = await claimed(rarely, orphaned)
    assert claim.lost
    assert await rarely.record(claim, WORKER_LOST, 0) == Recorded(Ask())

    await NeedsDecision(database).retry(unanswered, SLACK, Operator("ann", "not in the channel"))
    make_due(deliveries, unanswered)
    claim = await claimed(rarely, unanswered)
    assert (claim.lost, claim.unknown_outcomes) == (False, 0)


async def test_what_certainly_failed_does_not_count_as_an_unknown_outcome(
    database: Database, deliveries: Deliveries
) -> None:
    rarely = Ledger(
        database, policy=RetryPolicy(), lease_seconds=30, worker="w", on_unknown=UnknownRule.RARELY
    )
    request_id = deliveries.accept()
    for verdict in (Later("503"), Unknown("reset"), Later("503"), Later("535", counts=False)):
        make_due(deliveries, request_id)
        await rarely.record(await claimed(rarely, request_id), verdict, 1)
    make_due(deliveries, request_id)
    assert (await claimed(rarely, request_id)).unknown_outcomes == 1
