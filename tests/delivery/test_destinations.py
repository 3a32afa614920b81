"""Breaker, suspension, rate and the rule after a lost answer; all workers share them."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest

from assistance.breaker import (
    BreakerPolicy,
    BreakerState,
    accepts_calls,
    breaker_state,
)
from assistance.verdict import Done, Later
from consumers.delivery.destinations import Destinations
from consumers.delivery.gate import POLL_SECONDS, Gate, as_recorded
from consumers.delivery.rate_limiter import RateLimiter
from consumers.maintenance.reconciler import Reconciler
from runtime.exit_codes import ExitCode
from runtime.mongo import Database, close, open_client
from runtime.operations import Operator
from runtime.shutdown import Stop
from sandbox.ports import free_ports
from sandbox.rabbitmq import RabbitServer
from sandbox.waiting import wait_until
from tests.support.deliveries import Deliveries
from tests.support.monitoring import Monitoring
from tests.support.processes import bare_environment
from tests.support.stage import Stage, lines, stop
from tests.support.third_parties import ThirdParties

SLACK = "slack"
OPERATOR = Operator("ann", "the workspace is moving")


@pytest.fixture
async def database(deliveries: Deliveries) -> AsyncIterator[Database]:
    client = open_client(deliveries.mongodb_url, process="test")
    yield client[deliveries.database_name]
    await close(client)


@pytest.fixture
def destinations(database: Database) -> Destinations:
    return Destinations(database)


def command(deliveries: Deliveries, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "consumers", *arguments],
        env=bare_environment() | deliveries.environment() | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def state_of(deliveries: Deliveries) -> dict[str, Any]:
    return deliveries.database["destinations"].find_one({"_id": SLACK}) or {}


def called_at(third_parties: ThirdParties) -> list[datetime]:
    return [datetime.fromisoformat(call["received_at"]) for call in third_parties.calls("slack")]


def test_an_open_breaker_costs_no_attempts_and_no_hints_and_fails_no_request(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    """The outage outlasts the retry schedule."""
    third_parties.misbehave("slack", "status", code=503)
    breaker_failures, concurrency, openings = 3, 2, 5
    settings: dict[str, object] = {
        "retry_delays_seconds": "[0.5]",
        "breaker_failures": breaker_failures,
        "breaker_longest_wait_seconds": 0.5,
        "concurrency": concurrency,
    }
    workers = [stage.start("slack", **settings) for _ in range(2)]
    stage.start_reconciler()
    requests = deliveries.accept_many(30)
    stage.wait(
        lambda: state_of(deliveries).get("openings", 0) >= openings,
        "several probes have failed",
        deadline_seconds=30,
    )
    attempts = [attempt for each in requests for attempt in deliveries.attempts(each)]
    counted = [attempt for attempt in attempts if attempt.get("counted", True)]
    # each worker opens the breaker by its own count, with its other calls under way; a poll that
    # was answered just before may let one worker fill its hands once more
    before_it_opened = len(workers) * (breaker_failures + concurrency - 1)
    assert len(counted) <= before_it_opened + concurrency
    noticed_by = state_of(deliveries)["since"] + timedelta(seconds=POLL_SECONDS + 1)
    assert max(attempt["started_at"] for attempt in counted) < noticed_by
    assert len(attempts) - len(counted) >= openings - 1, "each opening but the first is a probe's"
    assert deliveries.count("accepted") == 30
    for each in requests:
        assert len(deliveries.hints(each)) <= 1 + len(deliveries.attempts(each))
    third_parties.behave()
    stage.wait_count("succeeded", 30)
    assert state_of(deliveries)["state"] == "closed"
    assert deliveries.letters() == []
    for worker in workers:
        stop(worker)


def test_a_mail_server_that_refuses_us_fails_no_request_and_uses_up_no_attempt(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    """It answers 554 to the connection for longer than the retry schedule lasts."""
    third_parties.misbehave("email", "status", code=554, stage="connect")
    worker = stage.start(
        "email", retry_delays_seconds="[0.1]", breaker_longest_wait_seconds=0.4, breaker_failures=0
    )
    stage.start_reconciler()
    requests = [deliveries.accept(topic="pricing", destinations=("email",)) for _ in range(8)]

    def openings() -> int:
        state = deliveries.database["destinations"].find_one({"_id": "email"}) or {}
        return int(state.get("openings", 0))

    stage.wait(lambda: openings() >= 4, "several probes have failed", deadline_seconds=40)
    assert deliveries.count("accepted") == 8
    for each in requests:
        assert all(not one.get("counted", True) for one in deliveries.attempts(each, "email")[:-1])
    assert lines(worker, "email.misconfigured")
    third_parties.behave()
    stage.wait_count("succeeded", 8, deadline_seconds=60)
    assert deliveries.letters() == []


def test_another_worker_probes_once_the_right_of_one_killed_in_its_probe_has_expired(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    third_parties.misbehave("slack", "hang")
    started = [stage.start("slack", breaker_failures=1) for _ in range(2)]
    workers = {worker.pid: worker for worker in started}
    stage.start_reconciler()
    requests = deliveries.accept_many(3)

    def probing() -> str:
        """The worker that has called, by the right to probe, and has no answer yet."""
        for each in requests if state_of(deliveries).get("probe_by") else []:
            attempts = deliveries.attempts(each)
            called = len(third_parties.calls("slack", request_id=each)) == len(attempts)
            if attempts and called and "ended_at" not in attempts[-1]:
                return str(attempts[-1]["worker"])
        return ""

    _, _, pid = stage.wait(probing, "a probe is under way", deadline_seconds=30).rpartition("/")
    workers.pop(int(pid)).kill()
    calls_count = len(third_parties.calls("slack"))
    [heir] = workers.values()
    third_parties.behave()
    heir.wait_log('"state":"half-open"')
    left = state_of(deliveries)["probe_until"] - datetime.now(UTC)
    assert timedelta(seconds=2) < left < timedelta(seconds=11)
    assert len(third_parties.calls("slack")) == calls_count, (
        "the dead worker still has the right to probe"
    )
    # as if the right had expired
    deliveries.database["destinations"].update_one(
        {"_id": SLACK}, {"$set": {"probe_until": datetime.now(UTC)}}
    )
    stage.wait_count("succeeded", 3)
    assert state_of(deliveries)["state"] == "closed"
    assert deliveries.letters() == []
    lost = [
        attempt
        for each in requests
        for attempt in deliveries.attempts(each)
        if attempt["code"] == "worker_lost"
    ]
    assert len(lost) == 1
    stop(heir)


def test_a_wait_that_slack_asks_for_holds_for_every_message(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    third_parties.misbehave("slack", "status", code=429, retry_after=2, times=1)
    worker = stage.start("slack", concurrency=1)
    stage.start_reconciler()
    deliveries.accept_many(5)
    stage.wait_count("succeeded", 5)
    first, second, *_ = called_at(third_parties)
    assert (second - first).total_seconds() > 1.9
    stop(worker)


def test_a_suspended_destination_is_not_called_until_it_is_resumed_and_then_kept_to_its_rate(
    stage: Stage,
    deliveries: Deliveries,
    third_parties: ThirdParties,
    rabbit_server: RabbitServer,
    vhost: str,
) -> None:
    workers = [stage.start("slack", destination_slack_rate_per_second=5) for _ in range(2)]
    monitoring_port = free_ports(1)[0]
    stage.begin("reconciler", monitoring_port=monitoring_port)
    suspended = command(
        deliveries, "destinations", "suspend", "slack", "--why", "moving", "--who", "ann"
    )
    assert suspended.returncode == 0, suspended.stderr
    for worker in workers:
        worker.wait_log('"state":"suspended"')
    requests = deliveries.accept_many(8)
    before = [deliveries.request(request_id) for request_id in requests]
    deliveries.publish_pending()
    listed = json.loads(command(deliveries, "destinations", "list", "--json").stdout)
    [slack] = [each for each in listed if each["destination"] == SLACK]
    assert (slack["state"], slack["reason"], slack["waiting"]) == ("suspended", "moving (ann)", 8)
    assert rabbit_server.queue_depth(vhost, "deliveries.slack") == 8
    assert [deliveries.request(request_id) for request_id in requests] == before
    expected = {
        'destination_suspended{destination="slack"}': 1.0,
        'destination_breaker_closed{destination="slack"}': 0.0,
        'deliveries_waiting_count{destination="slack"}': 8.0,
    }
    wait_until(
        lambda: expected.items() <= Monitoring(monitoring_port).samples().items(),
        "the metrics show it",
    )
    again = command(deliveries, "destinations", "suspend", "slack", "--why", "moving")
    refusal = "slack is already suspended; nothing was changed\n"
    assert (again.returncode, again.stderr) == (ExitCode.NOTHING_DONE, refusal)
    stop(workers.pop())
    resumed = command(deliveries, "destinations", "resume", "slack", "--why", "moved")
    assert resumed.returncode == 0, resumed.stderr
    stage.wait_count("succeeded", 8)
    done = list(deliveries.database["operations"].find({"destination": SLACK}).sort("asked_at"))
    assert [each["what"] for each in done] == ["pause_destination", "resume_destination"]
    last = max(called_at(third_parties)) - done[1]["carried_out_at"]
    assert last.total_seconds() >= 7 / 5, "8 calls at 5 a second"
    for worker in workers:
        stop(worker)


def test_a_person_decides_about_a_call_that_was_not_answered(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    third_parties.misbehave("slack", "hang", times=2)
    worker = stage.start("slack", destination_slack_on_unknown="ask", call_timeout_seconds=0.5)
    stage.start_reconciler()
    arrived, lost = requests = deliveries.accept_many(2)
    deliveries.publish_pending()
    wait_until(
        lambda: all(deliveries.delivery(each)["state"] == "needs_decision" for each in requests),
        "both wait for a person",
    )
    assert deliveries.count("accepted") == 2
    listed = json.loads(command(deliveries, "needs-decision", "list", "--json").stdout)
    assert {(each["request"], each["code"]) for each in listed} == {
        (each, "no_answer_in_time") for each in requests
    }
    sent = command(
        deliveries, "needs-decision", "sent", arrived, SLACK, "--why", "seen in the channel"
    )
    assert sent.returncode == 0, sent.stderr
    twice = command(deliveries, "needs-decision", "retry", arrived, SLACK, "--why", "a slip")
    assert twice.returncode == ExitCode.NOTHING_DONE
    assert "succeeded: there is nothing to decide" in twice.stderr
    again = command(
        deliveries, "needs-decision", "retry", lost, SLACK, "--why", "not in the channel"
    )
    assert again.returncode == 0, again.stderr
    stage.wait_count("succeeded", 2)
    assert len(third_parties.calls("slack", request_id=arrived)) == 1
    first, second = third_parties.calls("slack", request_id=lost)
    assert first["idempotency_key"] == second["idempotency_key"]
    assert "may be a repeat" in second["text"]
    assert [deliveries.facts(each)[-1] for each in requests] == ["assistance_request_succeeded"] * 2
    recorded = deliveries.database["operations"].find().sort("asked_at")
    assert [(each["what"], each["request_id"]) for each in recorded] == [
        ("unknown_sent", arrived),
        ("unknown_again", lost),
    ]
    assert lines(worker, "delivery.attempted")[0]["state"] == "needs_decision"


async def test_one_worker_at_a_time_has_the_right_to_probe(destinations: Destinations) -> None:
    await destinations.look(SLACK)
    await destinations.open(SLACK, "503", 0.0, probe_by=None)
    tries = (destinations.take_probe(SLACK, f"worker {number}") for number in range(8))
    winners = [number for number, won in enumerate(await asyncio.gather(*tries)) if won]
    [winner] = winners
    assert await destinations.take_probe(SLACK, f"worker {winner}"), "its own right lasts"
    assert not await destinations.close(SLACK, probe_by="another")
    await destinations.open(SLACK, "503", 60.0, probe_by=f"worker {winner}")
    seen = await destinations.look(SLACK)
    assert (breaker_state(seen.state, seen.now), seen.state["openings"]) == (BreakerState.OPEN, 2)
    assert not await destinations.take_probe(SLACK, f"worker {winner}"), "before its time"


async def test_an_open_destination_gets_no_hints_a_half_open_one_gets_one_and_others_get_theirs(
    destinations: Destinations, database: Database, deliveries: Deliveries
) -> None:
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    for _ in range(5):
        deliveries.accept(destinations=("slack", "email"), now=long_ago)
    deliveries.database["outbox"].update_many({}, {"$set": {"state": "published"}})
    reconciler = Reconciler(database, Stop())

    async def hinted() -> list[str]:
        before = {hint["_id"] for hint in deliveries.database["outbox"].find()}
        while await reconciler.run_once() > 1:
            pass
        after = deliveries.database["outbox"].find({"_id": {"$nin": list(before)}})
        return sorted(hint["routing_key"] for hint in after)

    await destinations.look(SLACK)
    await destinations.open(SLACK, "503", 60.0, probe_by=None)
    assert await hinted() == ["delivery_due.email"] * 5
    await destinations.resume(SLACK, OPERATOR)
    await destinations.open(SLACK, "503", 0.0, probe_by=None)
    assert await hinted() == ["delivery_due.slack"]
    await destinations.suspend(SLACK, OPERATOR)
    assert await hinted() == []
    await destinations.resume(SLACK, OPERATOR)
    assert await hinted() == ["delivery_due.slack"] * 4


async def test_slots_are_one_interval_apart_however_many_are_requested(
    destinations: Destinations,
) -> None:
    waits = await asyncio.gather(*(destinations.next_slot(SLACK, 10.0) for _ in range(6)))
    for sooner, later in pairwise(sorted(waits)):
        assert 9.0 < later - sooner <= 10.0


async def test_a_wait_for_a_slot_ends_at_its_own_deadline(destinations: Destinations) -> None:
    limiter = RateLimiter(destinations, SLACK, rate_per_second=0.1, stop=Stop())

    async def wait_for_slot(within_seconds: float | None) -> bool:
        return await limiter.wait_for_slot(lambda: True, within_seconds=within_seconds)

    assert await wait_for_slot(5.0)
    patient = asyncio.create_task(wait_for_slot(None))
    async with asyncio.timeout(5.0):
        assert not await wait_for_slot(0.3), "another call waits for the slot before"
        patient.cancel()
        assert not await wait_for_slot(0.3), "its own slot is too far away"


async def test_a_slot_is_refused_once_it_is_no_longer_wanted(destinations: Destinations) -> None:
    limiter = RateLimiter(destinations, SLACK, rate_per_second=5.0, stop=Stop())
    assert await limiter.wait_for_slot(lambda: True)
    wanted = iter([True, False])
    assert not await limiter.wait_for_slot(lambda: next(wanted)), "it changed during the wait"
    assert not await limiter.wait_for_slot(lambda: False)


async def test_a_third_party_that_wants_no_more_is_suspended_until_an_operator_resumes_it(
    destinations: Destinations,
) -> None:
    gate = Gate(destinations, SLACK, policy=BreakerPolicy(), concurrency=4, worker="w", stop=Stop())
    assert gate.admit() is None, "no call before the first poll"
    await gate.poll()
    admission = gate.admit()
    assert admission is not None
    gone = Later("410", disables=True)
    reaction = gate.judge(gone, "r", admission)
    assert as_recorded(gone, reaction, admission) == Later("410", disables=True, counts=False)
    await gate.follow(reaction, admission)
    assert gate.admit() is None
    assert not accepts_calls((await destinations.look(SLACK)).state)
    late = gate.judge(Done("200"), "another", admission)
    await gate.follow(late, admission)
    assert gate.admit() is None, "what was in hand changes nothing"
    assert await destinations.resume(SLACK, OPERATOR)
    await gate.poll()
    assert gate.admit() is not None


def test_a_call_that_lasts_longer_than_the_heartbeats_costs_no_connection(
    stage: Stage, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    third_parties.misbehave("slack", "slow", delay_seconds=4)
    worker = stage.start(
        "slack", rabbitmq_heartbeat_seconds=1, call_timeout_seconds=20, shutdown_grace_seconds=30
    )
    request_id = deliveries.accept()
    stage.wait_status(request_id, "succeeded")
    assert len(third_parties.calls("slack")) == 1
    assert "broker.away" not in worker.output()
