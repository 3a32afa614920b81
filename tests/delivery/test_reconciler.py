"""What the broker or a crash left behind comes back, once, and without a storm."""

import asyncio
import signal
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from assistance.collection import ASSISTANCES, ASSISTANCES_INDEXES
from assistance.retry_policy import RetryPolicy
from assistance.verdict import Done, Later
from consumers.delivery.hints import Hints
from consumers.delivery.ledger import Claim, Ledger, Recorded, Refusal, Refused
from consumers.maintenance.reconciler import PASS_LIMIT, Reconciler
from outbox.collection import OUTBOX
from runtime.mongo import Database, close, ensure_collection, open_client, retry_while_unavailable
from runtime.shutdown import Stop
from sandbox.mongodb import MongoServer
from sandbox.waiting import wait_until, wait_until_async
from tests.conftest import RunProcess
from tests.support.deliveries import Deliveries

HOUR = timedelta(hours=1)
SLACK = "slack"


@pytest.fixture
async def database(deliveries: Deliveries) -> AsyncIterator[Database]:
    client = open_client(deliveries.mongodb_url, process="test")
    database: Database = client[deliveries.database_name]
    await ensure_collection(database, ASSISTANCES, indexes=ASSISTANCES_INDEXES)
    await ensure_collection(database, OUTBOX)
    yield database
    await close(client)


@pytest.fixture
def reconciler(database: Database) -> Reconciler:
    return Reconciler(database, Stop())


def settle(deliveries: Deliveries, state: str = "published") -> None:
    deliveries.database[OUTBOX].update_many({}, {"$set": {"state": state}})


def hours_ago(hours: int) -> datetime:
    return datetime.now(UTC) - hours * HOUR


def accepted_long_ago(deliveries: Deliveries, **others: Any) -> str:
    """A request whose hint was published an hour ago and lost."""
    request_id = deliveries.accept(now=hours_ago(1), **others)
    settle(deliveries)
    return request_id


async def test_a_lost_hint_is_sent_again(reconciler: Reconciler, deliveries: Deliveries) -> None:
    request_id = accepted_long_ago(deliveries)
    assert await reconciler.run_once() == 1
    first, second = deliveries.hints(request_id)
    assert (second["state"], second["routing_key"]) == ("pending", "delivery_due.slack")
    assert first["_id"] in second["payload"]
    request, delivery = deliveries.request(request_id), deliveries.delivery(request_id)
    assert request["version"] == second["seq"] == 3
    assert (delivery["hint_event"], delivery["hints"]) == (second["_id"], 2)
    assert delivery["hint_until"] == request["next_due_at"]
    assert request["status"] == "accepted"
    assert await reconciler.run_once() == 0


async def test_a_hint_that_is_still_trusted_is_left_alone(
    reconciler: Reconciler, deliveries: Deliveries
) -> None:
    request_id = deliveries.accept()
    settle(deliveries)
    assert await reconciler.run_once() == 0
    assert len(deliveries.hints(request_id)) == 1


@pytest.mark.parametrize("state", ["pending", "held", "parked"])
async def test_a_hint_that_the_relay_still_has_is_waited_for(
    reconciler: Reconciler, deliveries: Deliveries, state: str
) -> None:
    request_id = accepted_long_ago(deliveries)
    settle(deliveries, state)
    assert await reconciler.run_once() == 1
    assert len(deliveries.hints(request_id)) == 1
    delivery = deliveries.delivery(request_id)
    assert delivery["hint_until"] > datetime.now(UTC)
    assert delivery["hints"] == 1
    assert await reconciler.run_once() == 0


async def test_a_hint_that_has_expired_since_counts_as_published(
    reconciler: Reconciler, deliveries: Deliveries
) -> None:
    request_id = accepted_long_ago(deliveries)
    deliveries.database[OUTBOX].delete_many({})
    assert await reconciler.run_once() == 1
    assert len(deliveries.hints(request_id)) == 1


async def test_hints_grow_rarer(reconciler: Reconciler, deliveries: Deliveries) -> None:
    request_id = accepted_long_ago(deliveries)
    waits = []
    for _ in range(8):
        await reconciler.run_once()
        settle(deliveries)
        left = deliveries.delivery(request_id)["hint_until"] - datetime.now(UTC)
        waits.append(round(left.total_seconds() / 60))
        deliveries.database[ASSISTANCES].update_one(
            {"_id": request_id},
            {"$set": {"deliveries.0.hint_until": hours_ago(1), "next_due_at": hours_ago(1)}},
        )
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60]


async def test_a_due_retry_and_an_expired_lease_are_sent_on_their_way(
    database: Database, reconciler: Reconciler, deliveries: Deliveries
) -> None:
    policy = RetryPolicy(delays_seconds=(0.0, 0.0), jitter_ratio=0.0)
    ledger = Ledger(database, policy=policy, lease_seconds=0.0, worker="w")
    retried, crashed = deliveries.accept(), deliveries.accept()
    settle(deliveries)
    claim = await ledger.claim(retried, SLACK)
    assert isinstance(claim, Claim)
    await ledger.record(claim, Later("503"), 1)
    assert isinstance(await ledger.claim(crashed, SLACK), Claim)
    last_due = max(deliveries.request(each)["next_due_at"] for each in (retried, crashed))
    await wait_until_async(lambda: datetime.now(UTC) > last_due, "both are due")
    assert await reconciler.run_once() == 2
    for request_id in (retried, crashed):
        assert deliveries.delivery(request_id)["hints"] == 1
        assert isinstance(await ledger.claim(request_id, SLACK), Claim)


async def test_a_retry_that_is_not_due_is_left_alone(
    database: Database, reconciler: Reconciler, deliveries: Deliveries
) -> None:
    policy = RetryPolicy(delays_seconds=(600.0,))
    ledger = Ledger(database, policy=policy, lease_seconds=30.0, worker="w")
    request_id = deliveries.accept(now=hours_ago(1))
    settle(deliveries)
    claim = await ledger.claim(request_id, SLACK)
    assert isinstance(claim, Claim)
    assert await reconciler.run_once() == 0
    await ledger.record(claim, Later("503"), 1)
    assert await reconciler.run_once() == 0


async def test_each_delivery_of_a_request_is_handled(
    reconciler: Reconciler, deliveries: Deliveries
) -> None:
    request_id = accepted_long_ago(deliveries, destinations=("slack", "email"))
    assert [await reconciler.run_once() for _ in range(3)] == [1, 1, 0]
    assert [hint["routing_key"] for hint in deliveries.hints(request_id)][2:] == [
        "delivery_due.slack",
        "delivery_due.email",
    ]
    assert [event["seq"] for event in deliveries.hints(request_id)] == [2, 3, 4, 5]


async def test_of_several_reconcilers_one_wins(database: Database, deliveries: Deliveries) -> None:
    requests = [accepted_long_ago(deliveries) for _ in range(20)]
    reconcilers = [Reconciler(database, Stop()) for _ in range(3)]
    await asyncio.gather(*(reconciler.run_once() for reconciler in reconcilers))
    for request_id in requests:
        assert len(deliveries.hints(request_id)) == 2
        assert deliveries.request(request_id)["version"] == 3


async def test_a_claim_in_between_wins_over_the_reconciler(
    database: Database, deliveries: Deliveries
) -> None:
    request_id = accepted_long_ago(deliveries)
    hints = Hints(database)
    [due] = await hints.find_due(datetime.now(UTC), limit=10)
    ledger = Ledger(database, policy=RetryPolicy(), lease_seconds=30.0, worker="w")
    claim = await ledger.claim(request_id, SLACK)
    assert isinstance(claim, Claim)
    assert await hints.send(due, datetime.now(UTC)) is None
    assert not await hints.postpone(due)
    assert isinstance(await ledger.record(claim, Done("200"), 1), Recorded)
    assert len(deliveries.hints(request_id)) == 1


async def test_a_burst_comes_back_in_passes(database: Database, deliveries: Deliveries) -> None:
    template = accepted_long_ago(deliveries)
    request = deliveries.request(template)
    deliveries.database[ASSISTANCES].insert_many(
        [{**request, "_id": f"{number}"} for number in range(PASS_LIMIT + 9)]
    )
    reconciler = Reconciler(database, Stop())
    assert await reconciler.run_once() == PASS_LIMIT
    assert await reconciler.run_once() == 10
    assert await reconciler.run_once() == 0


async def test_closed_requests_are_never_looked_at(
    database: Database, deliveries: Deliveries
) -> None:
    """The query is answered from the partial index alone, which holds open requests only."""
    ledger = Ledger(database, policy=RetryPolicy(), lease_seconds=30.0, worker="w")
    for _ in range(5):
        claim = await ledger.claim(accepted_long_ago(deliveries), SLACK)
        assert isinstance(claim, Claim)
        await ledger.record(claim, Done("200"), 1)
    query = {"next_due_at": {"$type": "date", "$lte": datetime.now(UTC)}}
    cursor = deliveries.database[ASSISTANCES].find(query).sort("next_due_at").limit(10)
    plan: Any = cursor.explain()
    assert plan["queryPlanner"]["winningPlan"]["inputStage"]["inputStage"]["stage"] == "IXSCAN"
    assert plan["executionStats"]["totalKeysExamined"] == 0


async def test_a_hint_that_came_before_its_time_is_sent_again_in_time(
    database: Database, deliveries: Deliveries
) -> None:
    """The service's clock ran ahead: the delivery must not wait until the hint is given up."""
    request_id = deliveries.accept(now=datetime.now(UTC) + timedelta(seconds=0.3))
    settle(deliveries)
    ledger = Ledger(database, policy=RetryPolicy(), lease_seconds=30.0, worker="w")
    assert await ledger.claim(request_id, SLACK) == Refused(Refusal.NOT_DUE)
    await Hints(database).spend(request_id, SLACK, "some older hint")
    assert deliveries.delivery(request_id)["hint_until"] > datetime.now(UTC) + timedelta(seconds=9)
    await Hints(database).spend(request_id, SLACK, deliveries.delivery(request_id)["hint_event"])
    delivery = deliveries.delivery(request_id)
    assert delivery["hint_until"] == delivery["due_at"]


async def test_a_server_that_has_yet_to_find_its_keys_is_waited_for(
    reconciler: Reconciler, deliveries: Deliveries
) -> None:
    """After a restart it may refuse for a moment what is signed with the time of before."""
    accepted_long_ago(deliveries)
    refusal = {"failCommands": ["find"], "appName": "test", "errorCode": 211}
    deliveries.client.admin.command(
        {"configureFailPoint": "failCommand", "mode": {"times": 1}, "data": refusal}
    )
    assert await retry_while_unavailable(reconciler.run_once) == 1


def test_the_reconciler_runs_until_it_is_asked_to_stop(
    run_process: RunProcess, deliveries: Deliveries
) -> None:
    process = run_process("consumers", "run", "reconciler", environment=deliveries.environment())
    request_id = accepted_long_ago(deliveries)
    wait_until(lambda: len(deliveries.hints(request_id)) == 2, "the lost hint is sent again")
    process.wait_log("hint.sent")
    assert request_id in process.output()
    process.signal(signal.SIGTERM)
    assert process.wait_exit() == 0


def test_the_reconciler_stops_soon_while_mongodb_is_frozen(
    own_mongo_server: MongoServer, rabbitmq_url: str, run_process: RunProcess
) -> None:
    deliveries = Deliveries(own_mongo_server.url, "assistance", rabbitmq_url)
    with deliveries.client:
        process = run_process(
            "consumers", "run", "reconciler", environment=deliveries.environment()
        )
        accepted_long_ago(deliveries)
        process.wait_log("hint.sent", deadline_seconds=30)
        own_mongo_server.pause()
        try:
            away = process.wait_log("mongodb.away", deadline_seconds=30)
            # a try that begins without MongoDB is a short one too
            process.wait_log("mongodb.away", after=away, deadline_seconds=15)
            process.signal(signal.SIGTERM)
            assert process.wait_exit(deadline_seconds=15) == 0
        finally:
            own_mongo_server.resume()


async def test_a_stop_ends_a_pass_between_two_deliveries(
    database: Database, deliveries: Deliveries
) -> None:
    accepted_long_ago(deliveries)
    stop = Stop()
    stop.request()
    assert await Reconciler(database, stop).run_once() == 0
    assert await Reconciler(database, Stop()).run_once() == 1


def test_the_reconciler_can_run_once_and_can_only_tell(
    run_process: RunProcess, deliveries: Deliveries
) -> None:
    request_id = accepted_long_ago(deliveries)
    ended = run_process(
        "consumers", "run", "reconciler", "--dry-run", environment=deliveries.environment()
    )
    assert ended.wait_exit() == 0
    assert f"{request_id} slack would send (hint_lost)" in ended.output()
    assert len(deliveries.hints(request_id)) == 1
    done = run_process(
        "consumers", "run", "reconciler", "--once", environment=deliveries.environment()
    )
    assert done.wait_exit() == 0
    assert "1 repaired" in done.output()
    assert len(deliveries.hints(request_id)) == 2
