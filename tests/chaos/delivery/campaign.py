"""
Rounds of deaths and blows under load, each followed by a verdict.

    load begins -> workers die, a blow falls -> load ends -> all has succeeded -> the books
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from assistance.books import Books
from assistance.collection import ASSISTANCES, DEAD_LETTERS
from runtime.mongo import close, open_client
from sandbox.mongodb import MongoServer
from sandbox.rabbitmq import RabbitServer
from sandbox.waiting import wait_until
from service.audit import balance
from tests.chaos.delivery.blows import Blows
from tests.chaos.delivery.load import load, now
from tests.chaos.delivery.plan import OUTLASTS_LEASES, WORKERS, Blow, Round
from tests.chaos.delivery.processes import DeliveryProcesses
from tests.chaos.delivery.verdict import Call, Evidence, Verdict, decide, not_come_again
from tests.support.deliveries import Deliveries, email_settings, slack_settings
from tests.support.paths import REPOSITORY
from tests.support.third_parties import ThirdParties

#: Shorter than the minute for which a hint is trusted: one that is lost must not be healed unseen.
SETTLING_SECONDS = 50.0

#: All that was ordered has succeeded by then, so this is for what was behind it in the queue.
COMING_AGAIN_SECONDS = 20.0

SETTINGS: dict[str, object] = {
    # enough that the faults of a round exhaust the attempts of no delivery
    "retry_delays_seconds": json.dumps([0.3] * 40),
    # a lease of 4 s: soon over after a death, and long beside a call of a few milliseconds
    "call_timeout_seconds": 1,
    "lease_margin_seconds": 2,
    "breaker_longest_wait_seconds": 1,
    "log_level": "info",
    "log_format": "json",
    "rabbitmq_heartbeat_seconds": 2,
    "pythonpath": REPOSITORY,
}

Say = Callable[[str], None]


@dataclass
class Result:
    """Counts of all rounds; faults: of the last one, which they ended."""

    faults: list[str] = field(default_factory=list)
    rounds: int = 0
    requests: int = 0
    calls: int = 0
    repeats: int = 0
    deaths: int = 0

    def __str__(self) -> str:
        return (
            f"{self.rounds} rounds, {self.requests} requests, {self.deaths} deaths of workers,"
            f" {self.calls} calls, {self.repeats} of them repeats"
        )


def run_campaign(
    plan: Sequence[Round],
    deliveries: Deliveries,
    third_parties: ThirdParties,
    mongo: MongoServer,
    rabbit: RabbitServer,
    folder: Path,
    *,
    worker_faults: Mapping[str, str] = {},
    settings: Mapping[str, object] = {},
    coming_again_seconds: float = COMING_AGAIN_SECONDS,
    say: Say = lambda _line: None,
) -> Result:
    """Play the rounds up to the first with a fault. Ends its processes; the servers are not its."""
    addresses = {**slack_settings(third_parties), **email_settings(third_parties)}
    environment = deliveries.environment(**{**addresses, **SETTINGS, **settings})
    processes = DeliveryProcesses(environment, folder, worker_faults)
    blows = Blows(processes, mongo, rabbit, deliveries.client)
    campaign = Campaign(processes, blows, deliveries, third_parties, coming_again_seconds, say)
    try:
        for round_ in plan:
            campaign.play(round_)
            if campaign.result.faults:
                return campaign.result
        processes.stop_all()
        campaign.result.faults += processes.faults
    finally:
        processes.end()
    return campaign.result


class Campaign:
    def __init__(
        self,
        processes: DeliveryProcesses,
        blows: Blows,
        deliveries: Deliveries,
        third_parties: ThirdParties,
        coming_again_seconds: float,
        say: Say,
    ) -> None:
        self._processes = processes
        self._blows = blows
        self._deliveries = deliveries
        self._third_parties = third_parties
        self._coming_again_seconds = coming_again_seconds
        self._say = say
        self.result = Result()

    def play(self, round_: Round) -> None:
        began, began_at = time.monotonic(), now()
        self._third_parties.clear()
        if misbehaviour := round_.misbehaviour:
            self._third_parties.misbehave(
                misbehaviour.kind,
                misbehaviour.mode,
                times=misbehaviour.times,
                **misbehaviour.options,
            )
        self._processes.begin_round()
        for order in round_.orders:
            self._processes.workers[order.worker].order(order)
        faults = []
        try:
            with load(self._deliveries, round_.requests_count):
                if round_.blow is not None:
                    self._wait_accepted(began_at, round_.requests_count // 2)
                    self._blows.execute(round_.blow)
                self._processes.wait_all_struck()
        except AssertionError as in_vain:
            faults.append(str(in_vain))
        self._third_parties.behave()
        faults += self._settle(began_at)
        if round_.blow is not Blow.WIPE_BROKER:
            self._wait_come_again()
        evidence = self._gather(round_, began_at)
        verdict = decide(evidence)
        faults += [*verdict.faults, *self._check_letters(), *self._processes.check()]
        self._note(evidence, verdict, faults)
        self._say(
            f"round {round_.number:4}  {time.monotonic() - began:5.1f} s"
            f"  {len(evidence.deliveries):5} deliveries  {verdict.repeats:4} repeats"
            f"  {'ok  ' if not faults else 'FAIL'}  {round_}"
        )

    def _wait_accepted(self, began_at: datetime, count: int) -> None:
        requests = self._deliveries.database[ASSISTANCES]
        query = {"created_at": {"$gte": began_at}}
        wait_until(lambda: requests.count_documents(query) >= count, "it is the moment")

    def _settle(self, began_at: datetime) -> list[str]:
        """Wait until every request has succeeded."""
        requests = self._deliveries.database[ASSISTANCES]
        query = {"created_at": {"$gte": began_at}, "status": {"$ne": "succeeded"}}

        try:
            wait_until(
                lambda: not requests.count_documents(query, limit=1),
                "all have succeeded",
                deadline_seconds=SETTLING_SECONDS,
            )
        except AssertionError as stuck:
            return [f"{stuck}; {requests.count_documents(query)} have not"]
        return []

    def _wait_come_again(self) -> None:
        """Until what was in a dead worker's hand has been received again; the verdict looks."""
        with suppress(AssertionError):
            wait_until(
                lambda: not not_come_again(self._processes.deaths(), self._processes.arrivals()),
                "it has come again",
                deadline_seconds=self._coming_again_seconds,
            )

    def _gather(self, round_: Round, began_at: datetime) -> Evidence:
        requests = self._deliveries.database[ASSISTANCES].find({"created_at": {"$gte": began_at}})
        return Evidence(
            books=asyncio.run(read_books(self._deliveries)),
            deliveries={
                (request["_id"], delivery["destination"]): delivery
                for request in requests
                for delivery in request["deliveries"]
            },
            calls=[call for kind in WORKERS for call in self._calls(kind)],
            deaths=self._processes.deaths(),
            arrivals=self._processes.arrivals(),
            leases_may_end=round_.blow in OUTLASTS_LEASES,
            broker_forgot=round_.blow is Blow.WIPE_BROKER,
        )

    def _calls(self, kind: str) -> list[Call]:
        return [
            Call(
                way=(receipt["request_id"], kind),
                # a mail's Message-ID is the key at the sender's domain
                key=receipt["idempotency_key"].strip("<>").partition("@")[0],
                accepted=receipt["accepted"],
            )
            for receipt in self._third_parties.calls(kind)
        ]

    def _check_letters(self) -> list[str]:
        letters = self._deliveries.database[DEAD_LETTERS].count_documents({})
        return [f"{letters} dead letters"] if letters else []

    def _note(self, evidence: Evidence, verdict: Verdict, faults: list[str]) -> None:
        result = self.result
        result.faults = faults
        result.rounds += 1
        result.requests = evidence.books.accepted
        result.calls += len(evidence.calls)
        result.repeats += verdict.repeats
        result.deaths += len(evidence.deaths)


async def read_books(deliveries: Deliveries) -> Books:
    client = open_client(deliveries.mongodb_url, process="campaign")
    try:
        return await balance(client[deliveries.database_name])
    finally:
        await close(client)
