"""What the workers promise, against a real broker, a real database and real third parties."""

import asyncio
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from time import monotonic
from typing import Any

import pika
import pytest
from pydantic import SecretStr

from consumers.delivery.subscriber import PREFETCH_RATIO, Subscriber, Subscription
from consumers.topology import declare_deliveries
from runtime.rabbit import AmqpChannel, AmqpMessage
from runtime.settings import RabbitSettings
from runtime.shutdown import Stop
from sandbox.mongodb import MongoServer
from sandbox.rabbitmq import RabbitServer
from sandbox.waiting import wait_until, wait_until_async
from tests.conftest import RunProcess
from tests.support.deliveries import (
    RETRY_DELAYS_SECONDS,
    Deliveries,
)
from tests.support.stage import RECEIVING, Stage, lines, stop
from tests.support.third_parties import ThirdParties

ATTEMPTS = len(RETRY_DELAYS_SECONDS) + 1


def test_a_request_reaches_slack_and_is_acknowledged_in_the_ledger(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    worker = stage.start("slack")
    request_id = deliveries.accept("Is it in stock?")
    stage.wait_status(request_id, "succeeded")
    [received] = third_parties.received("slack", request_id=request_id)
    assert "Is it in stock?" in received["text"]
    assert received["idempotency_key"] == deliveries.delivery(request_id)["idempotency_key"]
    assert deliveries.facts(request_id) == [
        "assistance_request_created",
        "assistance_request_succeeded",
    ]
    [attempt] = deliveries.attempts(request_id)
    assert (attempt["verdict"], attempt["calls"], attempt["number"]) == ("done", 1, 1)
    assert deliveries.request(request_id)["next_due_at"] is None
    stop(worker)


def test_a_request_reaches_the_mailbox(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    worker = stage.start("email")
    request_id = deliveries.accept(
        "Was kostet das Große?", topic="pricing", destinations=("email",)
    )
    stage.wait_status(request_id, "succeeded")
    [received] = third_parties.received("email", request_id=request_id)
    assert received["subject"] == "[pricing] Was kostet das Große?"
    key = deliveries.delivery(request_id, "email")["idempotency_key"]
    assert received["message_id"] == f"<{key}@example.org>"
    stop(worker)


def test_a_dead_slack_delays_no_mail(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    third_parties.misbehave("slack", "hang")
    stage.start("slack")
    stage.start("email")
    request_id = deliveries.accept(destinations=("slack", "email"))
    deliveries.publish_pending()
    wait_until(
        lambda: deliveries.delivery(request_id, "email")["state"] == "succeeded", "the mail is sent"
    )
    assert deliveries.request(request_id)["status"] == "accepted"


def test_a_failing_slack_is_called_as_often_as_configured_with_growing_delays(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    third_parties.misbehave("slack", "status", code=500)
    worker = stage.start("slack", retry_jitter_ratio=0)
    stage.start_reconciler()
    request_id = deliveries.accept()
    stage.wait_status(request_id, "failed")
    attempts = deliveries.attempts(request_id)
    assert len(third_parties.calls("slack", request_id=request_id)) == len(attempts) == ATTEMPTS
    waited = [
        (after["started_at"] - before["ended_at"]).total_seconds()
        for before, after in pairwise(attempts)
    ]
    assert all(wait >= delay for wait, delay in zip(waited, RETRY_DELAYS_SECONDS, strict=True)), (
        waited
    )
    assert {(attempt["verdict"], attempt["code"]) for attempt in attempts} == {("later", "500")}
    assert deliveries.facts(request_id)[-1] == "assistance_request_failed"
    [letter] = deliveries.letters()
    assert (letter["request_id"], letter["reason"]) == (request_id, "attempts_used_up")
    wait_until(lambda: len(lines(worker, "delivery.attempted")) == ATTEMPTS, "each is logged")


def test_a_slack_that_comes_back_gets_the_message(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    third_parties.misbehave("slack", "refuse")
    stage.start("slack")
    stage.start_reconciler()
    request_id = deliveries.accept()
    deliveries.publish_pending()
    wait_until(
        lambda: any("ended_at" in attempt for attempt in deliveries.attempts(request_id)),
        "the first attempt has ended",
    )
    third_parties.behave()
    stage.wait_status(request_id, "succeeded")
    assert len(third_parties.received("slack", request_id=request_id)) == 1


def test_a_permanent_refusal_fails_at_once(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    third_parties.misbehave("slack", "status", code=400, body="invalid_payload")
    stage.start("slack", call_tries=3)
    request_id = deliveries.accept()
    stage.wait_status(request_id, "failed")
    assert len(third_parties.calls("slack")) == 1
    assert deliveries.letters()[0]["excerpt"] == "invalid_payload"


def test_a_revoked_webhook_fails_no_request_that_waits(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    third_parties.misbehave("slack", "status", code=404, body="no_service")
    worker = stage.start("slack")
    stage.start_reconciler()
    request_id = deliveries.accept()
    deliveries.publish_pending()
    worker.wait_log("slack.misconfigured")
    third_parties.behave()
    stage.wait_status(request_id, "succeeded")
    assert deliveries.letters() == []


def test_a_schedule_that_was_shortened_is_not_taken_for_a_lost_worker(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    third_parties.misbehave("slack", "status", code=503)
    patient = stage.start("slack", retry_delays_seconds="[0.2, 0.2, 3]", retry_jitter_ratio=0)
    stage.start_reconciler()
    request_id = deliveries.accept()

    def tried_thrice() -> bool:
        attempts = deliveries.attempts(request_id)
        return len(attempts) == 3 and "ended_at" in attempts[-1]

    stage.wait(tried_thrice, "it was tried three times", deadline_seconds=30)
    stop(patient)
    stage.start("slack", retry_delays_seconds="[0.2]")
    stage.wait_status(request_id, "failed")
    assert {attempt["code"] for attempt in deliveries.attempts(request_id)} == {"503"}
    [letter] = deliveries.letters()
    assert (letter["reason"], letter["code"]) == ("attempts_used_up", "attempts_used_up")


def test_a_blip_is_over_within_one_attempt(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    third_parties.misbehave("slack", "status", code=503, times=1)
    stage.start("slack", call_tries=2)
    request_id = deliveries.accept()
    stage.wait_status(request_id, "succeeded")
    [attempt] = deliveries.attempts(request_id)
    assert attempt["calls"] == 2


def test_a_wait_that_slack_asks_for_is_kept(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    third_parties.misbehave("slack", "status", code=429, retry_after=2, times=1)
    stage.start("slack", call_tries=3)
    stage.start_reconciler()
    request_id = deliveries.accept()
    stage.wait_status(request_id, "succeeded")
    first, second = deliveries.attempts(request_id)
    assert first["calls"] == 1
    assert (second["started_at"] - first["ended_at"]).total_seconds() >= 2


@pytest.mark.parametrize("mode", ["hang", "reset"])
def test_after_a_lost_answer_the_call_is_repeated_as_a_possible_repeat(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties, mode: str
) -> None:
    third_parties.misbehave("slack", mode, times=1)
    stage.start("slack", call_tries=3)
    stage.start_reconciler()
    request_id = deliveries.accept()
    stage.wait_status(request_id, "succeeded")
    lost, done = third_parties.calls("slack", request_id=request_id)
    assert "may be a repeat" not in lost["text"]
    assert "may be a repeat" in done["text"]
    assert lost["idempotency_key"] == done["idempotency_key"]
    first, second = deliveries.attempts(request_id)
    assert (first["verdict"], first["calls"]) == ("unknown", 1)
    assert second["verdict"] == "done"


def test_nothing_that_slack_does_ends_the_worker(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    worker = stage.start(
        "slack", retry_delays_seconds="[600]", call_timeout_seconds=0.5, breaker_failures=0
    )
    misbehaviours: dict[str, dict[str, Any]] = {
        "refuse": {},
        "hang": {},
        "reset": {},
        "accept_then_fail": {},
        "status": {"code": 500},
        "ok_false": {"error": "internal_error"},
    }
    for mode, options in misbehaviours.items():
        third_parties.misbehave("slack", mode, **options)
        requests = [deliveries.accept() for _ in range(10)]
        deliveries.publish_pending()
        wait_until(
            lambda requests=requests: all(  # type: ignore[misc]
                len(deliveries.attempts(request_id)) == 1
                and deliveries.delivery(request_id)["state"] == "waiting"
                for request_id in requests
            ),
            f"every first attempt has ended while Slack's conduct is {mode!r}",
        )
        third_parties.behave()
        another = deliveries.accept()
        stage.wait_status(another, "succeeded")
    assert deliveries.count("failed") == 0
    stop(worker)


def test_a_duplicate_hint_is_answered_with_one_call(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    third_parties.misbehave("slack", "slow", delay_seconds=0.3)
    worker = stage.start("slack")
    request_id = deliveries.accept()
    [hint] = deliveries.hints(request_id)
    with deliveries.channel() as channel:
        for _ in range(20):
            deliveries.publish(hint, channel)
        wait_until(
            lambda: deliveries.request(request_id)["status"] == "succeeded", "it has succeeded"
        )
        for _ in range(20):
            deliveries.publish(hint, channel)
    wait_until(lambda: len(lines(worker, "delivery.not_claimed")) == 39, "all hints are spent")
    assert len(third_parties.calls("slack")) == 1
    assert len(deliveries.attempts(request_id)) == 1


def test_a_hint_for_a_request_that_is_not_there_is_acknowledged_with_a_warning(
    stage: Stage, deliveries: Deliveries, rabbit_server: RabbitServer, vhost: str
) -> None:
    worker = stage.start("slack")
    request_id = deliveries.accept()
    deliveries.database["assistances"].delete_one({"_id": request_id})
    deliveries.publish_pending()
    worker.wait_log("unknown_request")
    [line] = lines(worker, "delivery.not_claimed")
    assert (line["level"], line["request_id"]) == ("warning", request_id)
    stop(worker)
    assert rabbit_server.queue_depth(vhost, "deliveries.slack") == 0
    assert rabbit_server.queue_depth(vhost, "dead-letters") == 0


def test_a_worker_killed_in_mid_call_is_followed_by_one_that_says_so(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    third_parties.misbehave("slack", "hang", times=1)
    victim = stage.start("slack")
    request_id = deliveries.accept()
    deliveries.publish_pending()
    wait_until(lambda: third_parties.calls("slack"), "Slack is called")
    victim.kill()
    stage.start("slack")
    stage.start_reconciler()
    stage.wait_status(request_id, "succeeded")
    lost, done = deliveries.attempts(request_id)
    assert (lost["verdict"], lost["code"]) == ("unknown", "worker_lost")
    assert done["fence"] == lost["fence"] + 1
    [received] = third_parties.received("slack", request_id=request_id)
    assert "may be a repeat" in received["text"]


def test_a_frozen_worker_does_not_record_after_its_lease(
    stage: Stage,
    deliveries: Deliveries,
    third_parties: ThirdParties,
    rabbit_server: RabbitServer,
    vhost: str,
) -> None:
    third_parties.misbehave("slack", "hang", times=1)
    frozen = stage.start("slack", concurrency=1, rabbitmq_heartbeat_seconds=60)
    request_id, waiting_behind = deliveries.accept(), deliveries.accept()
    deliveries.publish_pending()
    wait_until(lambda: third_parties.calls("slack"), "Slack is called")
    wait_until(
        lambda: rabbit_server.queue_depth(vhost, "deliveries.slack") == 0,
        "the worker has fetched all that it will",
    )
    frozen.signal(signal.SIGSTOP)
    stage.start("slack")
    stage.start_reconciler()
    stage.wait_status(request_id, "succeeded")
    frozen.signal(signal.SIGCONT)
    frozen.wait_log("not_recorded")
    stage.wait_status(waiting_behind, "succeeded")
    assert len(third_parties.calls("slack", request_id=request_id)) == 2
    assert deliveries.facts(request_id).count("assistance_request_succeeded") == 1


def test_a_stop_in_mid_call_records_the_outcome_and_exits_0(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    third_parties.misbehave("slack", "slow", delay_seconds=1)
    worker = stage.start("slack")
    request_id = deliveries.accept()
    deliveries.publish_pending()
    wait_until(lambda: third_parties.calls("slack"), "Slack is called")
    stop(worker)
    assert deliveries.request(request_id)["status"] == "succeeded"
    assert deliveries.attempts(request_id)[0]["verdict"] == "done"


def test_a_stop_requeues_messages_that_were_not_begun(
    stage: Stage,
    deliveries: Deliveries,
    third_parties: ThirdParties,
    rabbit_server: RabbitServer,
    vhost: str,
) -> None:
    third_parties.misbehave("slack", "slow", delay_seconds=1)
    worker = stage.start("slack", concurrency=2)
    for _ in range(10):
        deliveries.accept()
    deliveries.publish_pending()
    wait_until(lambda: len(third_parties.calls("slack")) == 2, "two calls are under way")
    stop(worker)
    done = deliveries.count("succeeded")
    assert done == len(third_parties.calls("slack"))
    assert rabbit_server.queue_depth(vhost, "deliveries.slack") == 10 - done
    stage.start("slack")
    stage.wait_count("succeeded", 10)
    assert len(third_parties.calls("slack")) == 10


def test_a_stop_ends_the_wait_for_a_slot_and_loses_no_answer_and_no_slots(
    stage: Stage,
    deliveries: Deliveries,
    third_parties: ThirdParties,
    rabbit_server: RabbitServer,
    vhost: str,
) -> None:
    """One was refused and would be called for again at its turn; all others had none yet."""
    third_parties.misbehave("slack", "status", code=503)
    rate = {"destination_slack_rate_per_second": 0.1}
    worker = stage.start("slack", call_tries=2, retry_delays_seconds="[600]", **rate)
    requests = deliveries.accept_many(6)
    deliveries.publish_pending()
    wait_until(lambda: third_parties.calls("slack"), "the first is called for")

    def turns_ahead_seconds() -> float:
        state = deliveries.database["destinations"].find_one({"_id": "slack"})
        assert state is not None
        return float((state["slot_at"] - datetime.now(UTC)).total_seconds())

    wait_until(lambda: turns_ahead_seconds() > 15, "a second turn is taken")
    began_at = monotonic()
    stop(worker)
    assert monotonic() - began_at < 5, "a turn comes every ten seconds"
    [call] = third_parties.calls("slack")
    called = call["request_id"]
    [attempt] = deliveries.attempts(called)
    assert (attempt["verdict"], attempt["code"], attempt["calls"]) == ("later", "503", 1)
    others = [request_id for request_id in requests if request_id != called]
    assert [deliveries.attempts(request_id) for request_id in others] == [[]] * 5
    assert rabbit_server.queue_depth(vhost, "deliveries.slack") == 5
    assert turns_ahead_seconds() < 20, "who stops takes no turns"


def test_a_stop_does_not_wait_longer_than_the_grace_time(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    """MongoDB is away with the outcome in hand: it is let go, and the lease takes care of it."""
    third_parties.misbehave("slack", "slow", delay_seconds=0.5)
    worker = stage.start("slack", shutdown_grace_seconds=3)
    with failing(deliveries, "update"):
        deliveries.accept()
        deliveries.publish_pending()
        worker.wait_log("mongodb.away")
        worker.signal(signal.SIGTERM)
        assert worker.wait_exit() == 0
    assert lines(worker, "worker.cancelled")
    assert deliveries.count("accepted") == 1


def test_an_outcome_that_cannot_be_recorded_is_kept_until_it_can(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    worker = stage.start("slack", lease_margin_seconds=30)
    with failing(deliveries, "update"):
        request_id = deliveries.accept()
        deliveries.publish_pending()
        worker.wait_log("mongodb.away")
        assert deliveries.delivery(request_id)["state"] == "claimed"
    stage.wait_status(request_id, "succeeded")
    assert len(third_parties.calls("slack")) == 1


def test_a_commit_whose_answer_was_lost_is_recorded_once(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    """The server commits and says that it cannot tell, to the driver's own second try too."""
    worker = stage.start("slack")
    cannot_tell = {"writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}}
    with failing(deliveries, "commitTransaction", **cannot_tell):
        request_id = deliveries.accept()
        deliveries.publish_pending()
        worker.wait_log("CommitUnknown")
    stage.wait_status(request_id, "succeeded")
    wait_until(lambda: lines(worker, "delivery.attempted"), "the outcome is recorded")
    assert lines(worker, "delivery.attempted")[0]["state"] == "succeeded"
    assert len(third_parties.calls("slack")) == 1
    assert deliveries.facts(request_id).count("assistance_request_succeeded") == 1
    assert deliveries.request(request_id)["version"] == 3


#: What a server answers that is going away.
SHUTDOWN_IN_PROGRESS = 91


@contextmanager
def failing(deliveries: Deliveries, command: str, **failure: Any) -> Iterator[None]:
    """Fail a command of the worker's, by a fail point that test servers have."""
    data = {"failCommands": [command], "appName": "worker-slack"}
    away = failure or {"errorCode": SHUTDOWN_IN_PROGRESS}
    admin = deliveries.client.admin
    admin.command({"configureFailPoint": "failCommand", "mode": "alwaysOn", "data": data | away})
    try:
        yield
    finally:
        admin.command({"configureFailPoint": "failCommand", "mode": "off"})


def test_consumers_away_fail_nothing_and_catch_up(
    stage: Stage, deliveries: Deliveries, rabbit_server: RabbitServer, vhost: str
) -> None:
    stop(stage.start("slack"))  # the queue is there
    stop(stage.start("email"))
    reconciler = stage.start_reconciler()
    deliveries.accept_many(200)
    deliveries.publish_pending()
    assert rabbit_server.queue_depth(vhost, "deliveries.slack") == 200
    deliveries.accept(destinations=("email",), now=datetime.now(UTC) - timedelta(hours=1))
    reconciler.wait_log("hint.postponed")  # it has looked, and found nothing else to do
    assert rabbit_server.queue_depth(vhost, "deliveries.slack") == 200
    assert deliveries.count("accepted") == 201
    stage.start("slack", concurrency=20)
    stage.wait_count("succeeded", 200, deadline_seconds=60)
    assert rabbit_server.queue_depth(vhost, "dead-letters") == 0
    assert deliveries.letters() == []


def test_a_crashing_worker_fails_nothing_that_was_never_tried(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    """Each crash counts against everything that was fetched, so all of it is dead-lettered."""
    delivery_limit = 3
    stop(stage.start("slack", delivery_limit=delivery_limit))
    stage.start("dead-letters")
    deliveries.accept_many(100)
    deliveries.publish_pending()
    for _ in range(delivery_limit + 1):
        fetch_and_crash(deliveries, 100)
    wait_until(lambda: len(deliveries.letters()) == 100, "all are dead-lettered")
    assert {letter["reason"] for letter in deliveries.letters()} == {"delivery_limit"}
    assert {letter["decision"] for letter in deliveries.letters()} == {"requeued"}
    assert deliveries.count("accepted") == 100
    stage.start("slack", delivery_limit=delivery_limit)
    stage.start_reconciler()
    stage.wait_count("succeeded", 100)
    assert len(third_parties.calls("slack")) == 100


def fetch_and_crash(deliveries: Deliveries, count: int) -> None:
    """As a worker that dies before it could do anything with what it had fetched."""
    with deliveries.channel() as channel:
        channel.basic_qos(prefetch_count=count)
        fetched = channel.consume("deliveries.slack", inactivity_timeout=30)
        for _ in range(count):
            method, _, _ = next(fetched)
            assert method is not None


async def test_a_worker_keeps_consuming_after_messages_that_its_handler_rejects(
    rabbitmq_url: str, rabbit_server: RabbitServer, vhost: str
) -> None:
    """More of them than are fetched at once; each comes again until the queue gives it up."""
    handled: list[bytes] = []
    declared = asyncio.Event()
    stop_receiving = Stop()

    async def handle(message: AmqpMessage, channel: AmqpChannel) -> None:
        if message.body == b"poison":
            raise KeyError(message.body)
        handled.append(message.body)
        channel.ack(message)

    async def declare(channel: AmqpChannel) -> None:
        await declare_deliveries(channel, "slack", events_exchange="events", delivery_limit=2)
        declared.set()

    subscription = Subscription(
        name="test",
        queue="deliveries.slack",
        concurrency=1,
        grace_seconds=5,
        declare=declare,
        handle=handle,
    )
    settings = RabbitSettings(rabbitmq_url=SecretStr(rabbitmq_url))
    receiving = asyncio.create_task(Subscriber(settings, subscription, stop_receiving).run())
    await asyncio.wait_for(declared.wait(), 15)
    poison = PREFETCH_RATIO + 1
    await asyncio.to_thread(publish, rabbitmq_url, *[b"poison"] * poison)
    await wait_until_async(
        lambda: rabbit_server.queue_depth(vhost, "dead-letters") == poison,
        "the poison is given up",
        deadline_seconds=30,
    )
    await asyncio.to_thread(publish, rabbitmq_url, b"good")
    await wait_until_async(lambda: handled == [b"good"], "what follows is handled")
    stop_receiving.request()
    await receiving


async def test_a_message_whose_handling_is_cancelled_from_within_comes_again(
    rabbitmq_url: str,
) -> None:
    handled: list[bool] = []
    declared = asyncio.Event()
    stop_receiving = Stop()

    async def handle(message: AmqpMessage, channel: AmqpChannel) -> None:
        handled.append(message.redelivered)
        if len(handled) == 1:
            raise asyncio.CancelledError  # as a library's timeout that leaks
        channel.ack(message)

    async def declare(channel: AmqpChannel) -> None:
        await declare_deliveries(channel, "slack", events_exchange="events", delivery_limit=5)
        declared.set()

    subscription = Subscription(
        name="test",
        queue="deliveries.slack",
        concurrency=1,
        grace_seconds=5,
        declare=declare,
        handle=handle,
    )
    settings = RabbitSettings(rabbitmq_url=SecretStr(rabbitmq_url))
    receiving = asyncio.create_task(Subscriber(settings, subscription, stop_receiving).run())
    await asyncio.wait_for(declared.wait(), 15)
    await asyncio.to_thread(publish, rabbitmq_url, b"message")
    await wait_until_async(lambda: handled == [False, True], "it came again")
    stop_receiving.request()
    await receiving


def publish(rabbitmq_url: str, *bodies: bytes) -> None:
    with pika.BlockingConnection(pika.URLParameters(rabbitmq_url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for body in bodies:
            channel.basic_publish("events", "delivery_due.slack", body, mandatory=True)


def test_a_cut_connection_costs_no_second_call(
    stage: Stage,
    deliveries: Deliveries,
    third_parties: ThirdParties,
    rabbit_server: RabbitServer,
    vhost: str,
) -> None:
    third_parties.misbehave("slack", "slow", delay_seconds=30)
    worker = stage.start("slack", call_timeout_seconds=40, shutdown_grace_seconds=50)
    seen = len(worker.output())
    request_id = deliveries.accept()
    deliveries.publish_pending()
    wait_until(lambda: third_parties.calls("slack"), "Slack is called")
    rabbit_server.close_connections(vhost, "test")
    worker.wait_log(RECEIVING, after=seen)
    worker.wait_log("delivery.not_claimed")  # the hint came again
    third_parties.behave()
    stage.wait_status(request_id, "succeeded")
    assert len(third_parties.calls("slack")) == 1
    assert deliveries.attempts(request_id)[0]["verdict"] == "done"


def test_a_worker_is_back_soon_after_the_broker(
    stage: Stage,
    own_rabbit_server: RabbitServer,
    deliveries: Deliveries,
    third_parties: ThirdParties,
) -> None:
    deliveries.rabbitmq_url = own_rabbit_server.url
    worker = stage.start("slack")
    before = deliveries.accept_many(50)
    deliveries.publish_pending()
    own_rabbit_server.kill()
    worker.wait_log("broker.away")
    own_rabbit_server.start()
    worker.wait_log(RECEIVING, after=worker.output().rfind("broker.away"), deadline_seconds=30)
    stage.start_reconciler()
    deliveries.accept()
    stage.wait_count("succeeded", len(before) + 1)
    stop(worker)
    assert third_parties.totals("slack")["distinct"] == len(before) + 1


def test_a_worker_keeps_its_message_while_mongodb_is_away(
    own_mongo_server: MongoServer,
    rabbitmq_url: str,
    third_parties: ThirdParties,
    run_process: RunProcess,
) -> None:
    deliveries = Deliveries(own_mongo_server.url, "assistance", rabbitmq_url)
    stage = Stage(run_process, deliveries, third_parties)
    with deliveries.client:
        worker = stage.start("slack", lease_margin_seconds=30)
        request_id = deliveries.accept()
        [hint] = deliveries.hints(request_id)
        own_mongo_server.kill()
        with deliveries.channel() as channel:
            deliveries.publish(hint, channel)
        worker.wait_log("mongodb.away", deadline_seconds=30)
        own_mongo_server.start()
        stage.wait_status(request_id, "succeeded")
        assert len(third_parties.calls("slack")) == 1
        stop(worker)


@pytest.mark.parametrize(
    ("missing", "url", "waiting"),
    [
        ("mongodb_url", "mongodb://127.0.0.1:{port}/", "mongodb.away"),
        ("rabbitmq_url", "amqp://guest:guest@127.0.0.1:{port}/", "broker.away"),
    ],
)
def test_a_worker_waits_for_a_server_that_is_not_there_yet(
    stage: Stage, missing: str, url: str, waiting: str
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        worker = stage.begin("slack", **{missing: url.format(port=port)})
        worker.wait_log(waiting)
        stop(worker)


def test_every_line_about_a_delivery_has_its_ids_and_none_has_a_description(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    third_parties.misbehave("slack", "status", code=500, times=1)
    worker = stage.start("slack", call_tries=2)
    request_id = deliveries.accept("my grandmother's ring")
    [hint] = deliveries.hints(request_id)
    stage.wait_status(request_id, "succeeded")
    worker.wait_log("delivery.attempted")
    [line] = lines(worker, "delivery.attempted")
    assert line["request_id"] == request_id
    assert line["event_id"] == hint["_id"]
    assert (line["destination"], line["attempt"], line["calls"]) == ("slack", 1, 2)
    assert (line["verdict"], line["code"], line["state"]) == ("done", "200", "succeeded")
    assert line["duration_ms"] > 0
    said = worker.output()
    assert "grandmother" not in said
    assert not re.search(r"services/T\w+/B\w+", said)
