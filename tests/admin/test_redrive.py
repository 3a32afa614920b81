"""What failed is sent again on an operator's word: once, in order, with a result for each."""

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Self

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from assistance.books import place_of
from assistance.collection import ASSISTANCES, DEAD_LETTERS
from assistance.redrive import Skip
from assistance.request import status_of
from assistance.retry_policy import RetryPolicy
from assistance.verdict import Done, Later, Never, Verdict
from consumers.admin import redrive_job
from consumers.admin.dead_letters import Selection, discard
from consumers.admin.redrive_job import KnownDestinations, RedriveBusy, RedriveLease
from consumers.admin.redrive_runner import Redrive, RedriveOptions
from consumers.delivery.ledger import Claim, Ledger, Recorded
from outbox.collection import OUTBOX
from runtime.mongo import Database
from runtime.operations import OPERATION_ITEMS, OPERATIONS, Operator
from runtime.shutdown import Stop
from sandbox.server_process import leash, let_go
from sandbox.waiting import wait_until, wait_until_async
from tests.conftest import RunProcess
from tests.support.deliveries import Deliveries, slack_settings
from tests.support.operating import database_of, fail_many, json_of, run_command
from tests.support.processes import bare_environment
from tests.support.third_parties import ThirdParties

ANN = Operator("ann", "Slack is back")
POLICY = RetryPolicy(delays_seconds=(), jitter_ratio=0.0)
QUICK = RedriveOptions(rate_per_second=1000.0, patience_seconds=20.0)
ALL = Selection()


@pytest.fixture
async def database(deliveries: Deliveries) -> AsyncIterator[Database]:
    async with database_of(deliveries) as database:
        yield database


class RelayAndWorker:
    """Publishes pending hints and works on them: claims each delivery and answers by rule."""

    def __init__(self, database: Database, verdicts: dict[str, Verdict]) -> None:
        self._outbox = database[OUTBOX]
        self._verdicts = verdicts
        self._ledger = Ledger(database, policy=POLICY, lease_seconds=30.0, worker="w")
        self.calls = Counter[str]()
        self.finished = False

    async def work(self) -> None:
        pending = {"state": "pending", "type": "delivery_due"}
        while not self.finished:
            hints = await self._outbox.find(pending).to_list(50)
            async with asyncio.TaskGroup() as group:
                for hint in hints:
                    group.create_task(self._take(hint["key"]))
            ids = {"$in": [hint["_id"] for hint in hints]}
            await self._outbox.update_many({"_id": ids}, {"$set": {"state": "published"}})
            await asyncio.sleep(0.01)

    async def _take(self, request_id: str) -> None:
        claim = await self._ledger.claim(request_id, "slack")
        assert isinstance(claim, Claim), f"the hint of {request_id} was refused: {claim}"
        self.calls[claim.idempotency_key] += 1
        await self._ledger.record(claim, self._verdicts.get(request_id, Done("200")), 1)


@asynccontextmanager
async def relay_and_worker(
    database: Database, verdicts: dict[str, Verdict]
) -> AsyncIterator[RelayAndWorker]:
    """A hint without a delivery to claim fails the test, also when the test fails otherwise."""
    worker = RelayAndWorker(database, verdicts)
    async with asyncio.TaskGroup() as group:
        group.create_task(worker.work())
        try:
            yield worker
        finally:
            # not cancelled: it may be committing a transaction
            worker.finished = True


def destinations(*, unavailable: Sequence[str] = ()) -> KnownDestinations:
    async def which() -> Sequence[str]:
        return unavailable

    return KnownDestinations({"slack", "email"}, which)


async def begun(database: Database, selection: Selection = ALL) -> RedriveLease:
    planned = await redrive_job.plan(database, selection, destinations())
    return await redrive_job.start(database, planned, selection, ANN, rate_per_second=1000.0)


def redrive(
    database: Database, lease: RedriveLease, options: RedriveOptions = QUICK, **given: Any
) -> Redrive:
    where = destinations(**given)
    return Redrive(database, lease, where, options, Stop(), lambda _: None)


def items(deliveries: Deliveries, state: str | None = None) -> list[dict[str, Any]]:
    query = {"state": state} if state else {}
    return list(deliveries.database[OPERATION_ITEMS].find(query).sort("ordinal"))


def balanced(deliveries: Deliveries) -> None:
    """Every request agrees with its deliveries and its events, as the audit sees them."""
    for request in deliveries.database[ASSISTANCES].find():
        its_events = list(deliveries.database[OUTBOX].find({"key": request["_id"]}))
        place = place_of(request, its_events, now=datetime.now(UTC))  # type: ignore[arg-type]
        assert not place.discrepancies


async def test_a_thousand_letters_of_which_a_tenth_fails_again(
    database: Database, deliveries: Deliveries
) -> None:
    request_ids = fail_many(deliveries, 1000)
    failing: dict[str, Verdict] = dict.fromkeys(request_ids[5::10], Never("404"))
    keys = {deliveries.delivery(id)["idempotency_key"] for id in request_ids[:3]}
    lease = await begun(database)
    async with relay_and_worker(database, failing) as worker:
        running = asyncio.create_task(redrive(database, lease).run())
        await wait_until_async(lambda: len(worker.calls) > 50, "some are sent")
        with pytest.raises(RedriveBusy, match=r"started by ann .* is running"):
            await begun(database)
        await running
    found = items(deliveries)
    assert len(found) == 1000
    assert {item["request_id"] for item in found if item["state"] == "failed_again"} == set(failing)
    assert {item["request_id"] for item in found if item["state"] == "succeeded"} == set(
        request_ids
    ) - set(failing)
    assert len(worker.calls) == 1000
    assert set(worker.calls.values()) == {1}
    assert keys <= set(worker.calls)
    operation = await redrive_job.find(database, lease.redrive_id)
    assert (operation["who"], operation["why"], operation["state"]) == (*_of(ANN), "done")
    assert operation["result"] == {"failed_again": 100, "succeeded": 900}
    assert deliveries.count("succeeded") == 900
    assert deliveries.facts(request_ids[0]) == [
        "assistance_request_created",
        "assistance_request_failed",
        "assistance_request_redriven",
        "assistance_request_succeeded",
    ]
    balanced(deliveries)
    # those that failed again wait for a decision again, and no others
    assert len(await redrive_job.plan(database, ALL, destinations())) == 100


def _of(operator: Operator) -> tuple[str, str]:
    return operator.who, operator.why


async def test_a_redriven_delivery_keeps_its_history_and_has_all_its_attempts_again(
    database: Database, deliveries: Deliveries
) -> None:
    (request_id,) = fail_many(deliveries, 1)
    before = deliveries.delivery(request_id)
    lease = await begun(database)
    async with relay_and_worker(database, {}):
        await redrive(database, lease).run()
    after = deliveries.delivery(request_id)
    assert after["idempotency_key"] == before["idempotency_key"]
    assert after["attempts"][0] == before["attempts"][0]
    assert [attempt["fence"] for attempt in after["attempts"]] == [1, 3]
    assert after["attempts_counted"] == 1
    *_, hint = deliveries.hints(request_id)
    assert f'"causationid":"{before["hint_event"]}"' in hint["payload"].replace(" ", "")
    [letter] = deliveries.letters()
    [taken] = letter["decisions"]
    assert letter["decision"] == taken["decision"] == "redriven"
    assert (taken["who"], taken["operation"]) == ("ann", lease.redrive_id)


async def test_a_canary_that_fails_keeps_the_rest_back_until_an_operator_resumes(
    database: Database, deliveries: Deliveries
) -> None:
    request_ids = fail_many(deliveries, 5)
    lease = await begun(database)
    async with relay_and_worker(database, {request_ids[0]: Never("404")}) as worker:
        await redrive(database, lease).run()
        operation = await redrive_job.find(database, lease.redrive_id)
        assert operation["state"] == "paused"
        assert operation["reason"] == "the first letter: failed_again"
        assert len(worker.calls) == 1
        with pytest.raises(RedriveBusy, match=r"is paused .* resume or cancel it"):
            await begun(database)
        resumed = await redrive_job.resume(database, lease.redrive_id, ANN)
        await redrive(database, resumed).run()
        assert worker.calls.total() == 5
    assert (await redrive_job.find(database, lease.redrive_id))["result"] == {
        "failed_again": 1,
        "succeeded": 4,
    }


async def test_a_redrive_stops_itself_when_failures_return(
    database: Database, deliveries: Deliveries
) -> None:
    request_ids = fail_many(deliveries, 300)
    down: dict[str, Verdict] = dict.fromkeys(request_ids[20:], Never("503"))
    lease = await begun(database)
    async with relay_and_worker(database, down) as worker:
        await redrive(database, lease).run()
    operation = await redrive_job.find(database, lease.redrive_id)
    assert operation["state"] == "paused"
    assert str(operation["reason"]).endswith("of the newest outcomes are failures")
    assert len(worker.calls) < 300
    assert len(items(deliveries, "planned")) > 0
    await redrive_job.cancel(database, lease.redrive_id, ANN)
    assert not items(deliveries, "planned")
    assert {item["why"] for item in items(deliveries, "skipped")} == {Skip.CANCELLED}
    assert (await redrive_job.find(database, lease.redrive_id))["state"] == "cancelled"
    await begun(database)  # the way is free again


async def test_a_command_that_died_is_followed_by_another_and_nothing_is_sent_twice(
    database: Database, deliveries: Deliveries
) -> None:
    request_ids = fail_many(deliveries, 40)
    lease = await begun(database)
    async with relay_and_worker(database, {}) as worker:
        slowly = RedriveOptions(rate_per_second=10.0, patience_seconds=20.0)
        dying = asyncio.create_task(redrive(database, lease, slowly).run())
        await wait_until_async(lambda: len(worker.calls) > 3, "some are sent")
        dying.cancel()
        await asyncio.gather(dying, return_exceptions=True)
        with pytest.raises(RedriveBusy, match="is running"):
            await redrive_job.resume(database, lease.redrive_id, ANN)
        lease_over = {"$set": {"lease_until": datetime.now(UTC) - timedelta(seconds=1)}}
        deliveries.database[OPERATIONS].update_one({"_id": lease.redrive_id}, lease_over)
        with pytest.raises(RedriveBusy, match="has lost its command"):
            await begun(database)
        heir = await redrive_job.resume(database, lease.redrive_id, ANN)
        # the dead one was only frozen, and goes on beside its heir
        await asyncio.gather(redrive(database, lease).run(), redrive(database, heir).run())
    assert len(worker.calls) == len(request_ids)
    assert set(worker.calls.values()) == {1}
    assert {item["state"] for item in items(deliveries)} == {"succeeded"}


async def test_what_is_skipped_is_said_with_its_reason(
    database: Database, deliveries: Deliveries
) -> None:
    discarded, gone, elsewhere, mended, suspended, good = fail_many(deliveries, 6)
    letters = deliveries.database[DEAD_LETTERS]
    letters.insert_one(
        {
            "_id": "message/1",
            "origin": "message",
            "request_id": None,
            "destination": None,
            "decision": "parked",
            "last_seen_at": datetime.now(UTC),
            "first_seen_at": datetime.now(UTC),
        }
    )
    await discard(database, Selection(ids=(discarded,)), ANN)
    deliveries.database[ASSISTANCES].update_one({"_id": gone}, {"$set": {"_id": gone}})
    letters.update_one({"request_id": gone}, {"$set": {"request_id": "unknown"}})
    for request_id, name in ((elsewhere, "teams"), (suspended, "email")):
        letters.update_one({"request_id": request_id}, {"$set": {"destination": name}})
        deliveries.database[ASSISTANCES].update_one(
            {"_id": request_id}, {"$set": {"deliveries.0.destination": name}}
        )
    deliveries.database[ASSISTANCES].update_one(
        {"_id": mended}, {"$set": {"deliveries.0.state": "succeeded", "status": "succeeded"}}
    )
    planned = await redrive_job.plan(
        database,
        Selection(ids=(discarded, "unknown", elsewhere, mended, suspended, good, "message/1")),
        destinations(unavailable=["email"]),
    )
    assert {one.letter["request_id"]: one.skip for one in planned} == {
        discarded: Skip.DISCARDED,
        "unknown": Skip.NO_REQUEST,
        elsewhere: Skip.NOT_CONFIGURED,
        mended: Skip.NOT_FAILED,
        suspended: Skip.UNAVAILABLE,
        None: Skip.NO_DELIVERY,
        good: None,
    }


def test_an_operator_looks_previews_and_decides_and_all_of_it_is_recorded(
    deliveries: Deliveries,
) -> None:
    first, second, _ = fail_many(deliveries, 3)
    letters = deliveries.database[DEAD_LETTERS]
    hostile = {"excerpt": "\x1b[2J\u202e<script>", "code": "500"}
    letters.update_one({"request_id": second}, {"$set": hostile})
    groups = json_of(deliveries, "dead-letters", "list")
    assert [(one["group"], one["count"]) for one in groups] == [
        ("slack/permanent/404", 2),
        ("slack/permanent/500", 1),
    ]
    listed = run_command(deliveries, "dead-letters", "list", "--code", "500")
    assert "\x1b" not in listed
    assert "\u202e" not in listed
    assert "\\x1b[2J\\u202e<script>" in listed
    letter_id = f"delivery/{first}/slack"
    assert "attempt        1" in run_command(deliveries, "dead-letters", "show", letter_id)
    assert "number 0" not in run_command(deliveries, "dead-letters", "show", letter_id)

    why = ("--why", "it is no longer needed", "--who", "bob")
    said = run_command(deliveries, "dead-letters", "discard", first, "--yes", *why)
    assert said.startswith("discarded: 1\n")
    [taken] = json_of(deliveries, "dead-letters", "show", letter_id)["letter"]["decisions"]
    assert (taken["decision"], taken["who"], taken["why"]) == ("discarded", "bob", why[1])
    run_command(deliveries, "dead-letters", "discard", "nonsense", "--yes", *why, code=66)
    run_command(deliveries, "dead-letters", "discard", "--yes", *why, code=2)

    redriving = ("dead-letters", "redrive", first, second, "--why", "a try", "--who", "ann")
    said = run_command(deliveries, *redriving, "--preview")
    assert said.splitlines() == [
        "send 1: slack/permanent/500",
        f"skip 1: discarded ({letter_id})",
    ]
    said = run_command(deliveries, *redriving, "--yes", "--patience-seconds", "0.2")
    assert "done: sent 1, skipped 1" in said
    [operation] = json_of(deliveries, "dead-letters", "redrives", "list")
    assert (operation["who"], operation["why"], operation["state"]) == ("ann", "a try", "done")
    shown = json_of(deliveries, "dead-letters", "redrives", "show", operation["_id"])
    assert {item["letter"]: item["state"] for item in shown["items"]} == {
        letter_id: "skipped",
        f"delivery/{second}/slack": "sent",
    }
    refused = ("dead-letters", "redrives", "pause", operation["_id"], "--why", "x")
    assert "is done" in run_command(deliveries, *refused, code=66)
    assert deliveries.request(second)["status"] == "accepted"
    assert deliveries.request(first)["status"] == "failed"


def test_a_redrive_that_ctrl_c_interrupts_is_paused_and_a_resume_sends_what_is_left(
    run_process: RunProcess, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    request_ids = fail_many(deliveries, 12)
    wanted, others = request_ids[:10], request_ids[10:]
    deliveries.database[DEAD_LETTERS].update_many(
        {"request_id": {"$in": others}}, {"$set": {"code": "500"}}
    )
    environment = deliveries.environment(**slack_settings(third_parties))
    relay = run_process("relay", "run", environment=environment)
    run_process("consumers", "run", "slack", environment=environment).wait_log("queue.receiving")
    relay.wait_log("relay.leading")

    chosen = ("--code", "404", "--destination", "slack")
    asked = ("dead-letters", "redrive", *chosen, "--rate", "4", "--why", "Slack is back")
    with Terminal(deliveries, *asked) as refused:
        refused.answer("send 10 letters? [y/N]: ", "n")
        assert refused.ends() == 130
    assert json_of(deliveries, "dead-letters", "redrives", "list") == []
    assert {letter.get("decision") for letter in deliveries.letters()} == {None}

    with Terminal(deliveries, *asked) as interrupted:
        interrupted.answer("send 10 letters? [y/N]: ", "y")
        interrupted.wait_for("the first letter: succeeded")
        third_parties.misbehave("slack", "status", code=400, times=1)
        wait_until(lambda: third_parties.calls("slack", accepted=False), "one fails again")
        interrupted.process.send_signal(signal.SIGINT)
        interrupted.wait_for("paused (its command was stopped): ")
        interrupted.wait_for("resume with: python -m consumers dead-letters redrives resume ")
        assert interrupted.ends() == 75
    [operation] = json_of(deliveries, "dead-letters", "redrives", "list")
    steering = ("dead-letters", "redrives")
    shown = json_of(deliveries, *steering, "show", operation["_id"])
    assert (shown["state"], shown["counts"]["planned"] > 0) == ("paused", True)

    why = ("--why", "it may go on")
    said = run_command(deliveries, *steering, "resume", operation["_id"], *why)
    assert "done: failed_again 1, succeeded 9" in said
    shown = json_of(deliveries, *steering, "show", operation["_id"])
    come = {item["request_id"]: (item["state"], item["code"]) for item in shown["items"]}
    [failed_again] = [call["request_id"] for call in third_parties.calls("slack", accepted=False)]
    assert come == {
        request_id: ("failed_again", "400") if request_id == failed_again else ("succeeded", "200")
        for request_id in wanted
    }
    assert sorted(call["request_id"] for call in third_parties.calls("slack")) == sorted(wanted)
    assert {deliveries.request(request_id)["status"] for request_id in others} == {"failed"}
    balanced(deliveries)
    left = {letter["request_id"] for letter in deliveries.letters(decision=None)}
    assert left == {failed_again, *others}


class Terminal:
    """`python -m consumers ...` at an interactive terminal."""

    def __init__(self, deliveries: Deliveries, *arguments: str) -> None:
        self._ours, its = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "consumers", *arguments],
            env=bare_environment() | deliveries.environment() | {"COLUMNS": "250"},
            stdin=its,
            stdout=its,
            stderr=its,
            start_new_session=True,
        )
        self._leash = leash("kill", "-s", "KILL", str(self.process.pid))
        os.close(its)
        os.set_blocking(self._ours, False)
        self._seen = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        let_go(self._leash)
        os.close(self._ours)

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self._shown(), f"it says {text!r} after {self._seen!r}")

    def answer(self, question: str, answer: str) -> None:
        self.wait_for(question)
        os.write(self._ours, f"{answer}\n".encode())

    def ends(self) -> int:
        return self.process.wait(30)

    def _shown(self) -> str:
        # nothing new; or, once the other end is closed, an error
        with suppress(BlockingIOError, OSError):
            self._seen += os.read(self._ours, 65536).decode()
        return self._seen


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def open_one(runner: asyncio.Runner, deliveries: Deliveries) -> Iterator[Database]:
    opening = database_of(deliveries)
    yield runner.run(opening.__aenter__())
    runner.run(opening.__aexit__(None, None, None))


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["slack", "email", "slack-emea"]),
        st.sampled_from(["done", "never", "redrive"]),
    ),
    min_size=3,
    max_size=10,
)


@given(ACTIONS)
@settings(
    max_examples=10,
    # to look for the shortest example takes minutes here
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_a_status_is_what_the_deliveries_say_after_any_closes_and_redrives(
    runner: asyncio.Runner,
    open_one: Database,
    deliveries: Deliveries,
    actions: list[tuple[str, str]],
) -> None:
    runner.run(_close_and_redrive(open_one, deliveries, actions))
    balanced(deliveries)


async def _close_and_redrive(
    database: Database, deliveries: Deliveries, actions: list[tuple[str, str]]
) -> None:
    request_id = deliveries.accept(destinations=("slack", "email", "slack-emea"))
    ledger = Ledger(database, policy=POLICY, lease_seconds=30.0, worker="w")
    for destination, action in actions:
        if action == "redrive":
            await _send_again(database, request_id, destination)
        elif isinstance(claim := await ledger.claim(request_id, destination), Claim):
            verdict = Done("200") if action == "done" else Later("503")
            assert isinstance(await ledger.record(claim, verdict, 1), Recorded)
        states = [delivery["state"] for delivery in deliveries.request(request_id)["deliveries"]]
        assert deliveries.request(request_id)["status"] == status_of(states)


async def _send_again(database: Database, request_id: str, destination: str) -> None:
    letter_id = f"delivery/{request_id}/{destination}"
    if await database[DEAD_LETTERS].find_one({"_id": letter_id}) is None:
        return
    chosen = Selection(ids=(letter_id,))
    where = KnownDestinations({"slack", "email", "slack-emea"}, destinations().unavailable)
    planned = await redrive_job.plan(database, chosen, where)
    lease = await redrive_job.start(database, planned, chosen, ANN, rate_per_second=1.0)
    options = RedriveOptions(patience_seconds=0.0)
    await Redrive(database, lease, where, options, Stop(), lambda _: None).run()
