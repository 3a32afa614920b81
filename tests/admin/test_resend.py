"""After a known loss on the broker everything open is sent again, once, and recorded."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from assistance.collection import ASSISTANCES
from assistance.retry_policy import RetryPolicy
from consumers.admin.resend import ResendOptions, resend
from consumers.delivery.ledger import Claim, Ledger
from consumers.maintenance.reconciler import Reconciler
from outbox.collection import OUTBOX
from runtime.operations import OPERATIONS, NothingToDo, Operator
from runtime.shutdown import Stop
from sandbox.waiting import wait_until
from tests.conftest import RunProcess
from tests.support.deliveries import Deliveries, slack_settings
from tests.support.operating import database_of, run_command
from tests.support.third_parties import ThirdParties

ANN = Operator("ann", "the broker's disk is gone")


async def none_unavailable() -> tuple[str, ...]:
    return ()


async def email_unavailable() -> tuple[str, ...]:
    return ("email",)


def settle(deliveries: Deliveries) -> None:
    deliveries.database[OUTBOX].update_many({}, {"$set": {"state": "published"}})


async def test_everything_open_is_sent_again_and_what_is_not_lost_is_left_alone(
    deliveries: Deliveries,
) -> None:
    lost = deliveries.accept(destinations=("slack", "slack-emea"))
    unavailable = deliveries.accept(destinations=("email",))
    later = deliveries.accept(now=datetime.now(UTC) + timedelta(hours=1))
    held = deliveries.accept()
    settle(deliveries)
    unpublished = deliveries.accept()
    before = deliveries.delivery(lost)
    async with database_of(deliveries) as database:
        policy = RetryPolicy()
        ledger = Ledger(database, policy=policy, lease_seconds=60.0, worker="w")
        assert isinstance(await ledger.claim(held, "slack"), Claim)
        options = ResendOptions((), 1000.0, email_unavailable)
        answers = await resend(database, options, ANN, Stop())
        assert answers == {
            "sent": 2,
            "destination suspended or breaker open": 1,
            "due later": 1,
            "in flight": 1,
            "hint to be published": 1,
        }
        for request_id in (unavailable, later, held, unpublished):
            assert len(deliveries.hints(request_id)) == 1
        hints = deliveries.hints(lost)
        assert [hint["state"] for hint in hints] == ["published", "published", "pending", "pending"]
        after = deliveries.delivery(lost)
        assert (after["hint_event"], after["hints"]) == (hints[2]["_id"], 2)
        assert before["hint_event"] in hints[2]["payload"]
        assert deliveries.request(lost)["version"] == hints[3]["seq"]
        # and no second wave behind it, neither by the reconciler nor by a hasty second command
        settle(deliveries)
        assert await Reconciler(database, Stop()).run_once() == 0
    [operation] = deliveries.database[OPERATIONS].find()
    assert (operation["what"], operation["who"], operation["why"]) == ("resend", "ann", ANN.why)
    assert operation["result"] == answers
    assert "open" not in operation


async def test_one_resend_runs_at_a_time_and_one_that_died_does_not_block_the_next(
    deliveries: Deliveries,
) -> None:
    deliveries.accept()
    settle(deliveries)
    now = datetime.now(UTC)
    other: dict[str, Any] = {"_id": "other", "what": "resend", "who": "bob", "open": True}
    async with database_of(deliveries) as database:
        options = ResendOptions((), 1000.0, none_unavailable)
        operations = deliveries.database[OPERATIONS]
        operations.insert_one(other | {"lease_until": now + timedelta(minutes=1)})
        with pytest.raises(NothingToDo, match="started by bob is running; nothing was sent"):
            await resend(database, options, ANN, Stop())
        operations.update_one({"_id": "other"}, {"$set": {"lease_until": now}})
        assert await resend(database, options, ANN, Stop()) == {"sent": 1}


def test_a_destination_can_be_chosen_and_must_exist(deliveries: Deliveries) -> None:
    both = deliveries.accept(destinations=("slack", "email"))
    settle(deliveries)
    said = run_command(deliveries, "resend", "--destination", "email", "--why", "lost")
    assert said.splitlines() == ["sent: 1"]
    assert [hint["routing_key"] for hint in deliveries.hints(both)[2:]] == ["delivery_due.email"]
    said = run_command(deliveries, "resend", "--destination", "e-mail", "--why", "x", code=2)
    assert "no such destination: e-mail; known: email, slack" in said
    run_command(deliveries, "resend", "--why", " ", code=2)
    assert deliveries.database[ASSISTANCES].count_documents({"version": 4}) == 1


def test_hints_that_the_broker_lost_are_made_up_for_and_each_request_is_delivered_once(
    run_process: RunProcess, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    environment = deliveries.environment(**slack_settings(third_parties))
    run_command(deliveries, "topology")
    lost = deliveries.accept_many(5)
    deliveries.publish_pending()
    with deliveries.channel() as channel:
        assert channel.queue_purge("deliveries.slack").method.message_count == len(lost)
    kept = deliveries.accept_many(2)
    deliveries.publish_pending()
    assert run_command(deliveries, "resend", "--why", "a disk is gone") == "sent: 7\n"
    hasty = run_command(deliveries, "resend", "--why", "a slip")
    assert hasty == "hint to be published: 7\n"
    assert deliveries.publish_pending() == 7
    worker = run_process("consumers", "run", "slack", environment=environment)
    wait_until(lambda: deliveries.count("succeeded") == 7, "all are delivered")
    wait_until(lambda: worker.output().count("delivery.not_claimed") == 2, "all hints are spent")
    called = [call["request_id"] for call in third_parties.calls("slack")]
    assert sorted(called) == sorted([*lost, *kept])
