"""
What takes its time: with the schedules as they are by default, and with real waits.

Each raises AssertionError with what was not as it must be, and returns what was seen.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from assistance.books import Books
from assistance.collection import ASSISTANCES, DEAD_LETTERS
from assistance.retry_policy import DEFAULT_DELAYS_SECONDS
from consumers.topology import deliveries_queue
from outbox.collection import OUTBOX
from sandbox.rabbitmq import RabbitServer
from sandbox.waiting import wait_until
from tests.chaos.delivery.blows import VHOST
from tests.chaos.delivery.campaign import read_books
from tests.chaos.delivery.load import accept
from tests.chaos.delivery.plan import Order, Point
from tests.chaos.delivery.processes import DeliveryProcesses
from tests.support.deliveries import Deliveries, email_settings, slack_settings
from tests.support.paths import REPOSITORY
from tests.support.third_parties import ThirdParties

DEAD_SLACK_SECONDS = 300
#: The longest wait between two probes of what is down, with its jitter, and then some.
RECOVERY_SECONDS = 420
PROMPT_SECONDS = 15.0

QUEUE_OF_1500 = 1500
#: Past the second hint, which goes out after a minute, and the third, two minutes later.
CONSUMERS_OFF_SECONDS = 200

PREFETCHED_COUNT = 100
CONCURRENCY = 50
DELIVERY_LIMIT = 20


class DefaultSystem:
    """A processes with the settings that it has by default."""

    def __init__(
        self,
        deliveries: Deliveries,
        third_parties: ThirdParties,
        rabbit: RabbitServer,
        folder: Path,
    ) -> None:
        self.deliveries = deliveries
        self.third_parties = third_parties
        self.rabbit = rabbit
        self.requests = deliveries.database[ASSISTANCES]
        addresses: dict[str, Any] = {
            **slack_settings(third_parties),
            **email_settings(third_parties),
            "mongodb_url": deliveries.mongodb_url,
            "mongodb_database": deliveries.database_name,
            "rabbitmq_url": deliveries.rabbitmq_url,
            # the sandbox's Slack bears any rate
            "destination_slack_rate_per_second": 0,
            "concurrency": CONCURRENCY,
            "log_format": "json",
            "pythonpath": REPOSITORY,
        }
        environment = {name.upper(): str(value) for name, value in addresses.items()}
        self.processes = DeliveryProcesses(environment, folder)

    def end(self) -> None:
        self.processes.end()

    def wait_all_succeeded(self, deadline_seconds: float) -> float:
        """Returns how many seconds it took."""
        began = time.monotonic()
        wait_until(
            lambda: not self.requests.count_documents({"status": {"$ne": "succeeded"}}, limit=1),
            "all have succeeded",
            deadline_seconds=deadline_seconds,
        )
        return time.monotonic() - began

    def check_end(self, *, each_called_once: bool) -> None:
        books = asyncio.run(read_books(self.deliveries))
        assert books == Books(succeeded=books.accepted), f"the books: {books}"
        failed = self.deliveries.letters(origin="delivery")
        assert not failed, f"{len(failed)} deliveries had failed"
        if each_called_once:
            calls = self.third_parties.totals("slack")
            assert calls["repeated"] == 0, f"calls of Slack: {calls}"
        faults = self.processes.check()
        assert not faults, faults


def dead_slack(system: DefaultSystem) -> str:
    """Mails go out as ever; Slack's messages wait, and lose none of their attempts to it."""
    system.third_parties.misbehave("slack", "refuse")
    slowest_seconds, end = 0.0, time.monotonic() + DEAD_SLACK_SECONDS
    mails_count = 0
    while time.monotonic() < end:
        accept(system.deliveries, ("slack",))
        mail_id, asked = accept(system.deliveries, ("email",)), time.monotonic()
        sent = {"_id": mail_id, "status": "succeeded"}
        wait_until(
            partial(system.requests.find_one, sent),
            "the mail is sent",
            deadline_seconds=PROMPT_SECONDS,
        )
        mails_count += 1
        slowest_seconds = max(slowest_seconds, time.monotonic() - asked)
        time.sleep(1)
    system.third_parties.behave()
    took_seconds = system.wait_all_succeeded(RECOVERY_SECONDS)
    attempts = max(one["deliveries"][0]["attempts_counted"] for one in system.requests.find())
    assert attempts <= len(DEFAULT_DELAYS_SECONDS), f"a delivery used up {attempts} attempts"
    system.check_end(each_called_once=True)
    return (
        f"{mails_count} mails, each sent within {slowest_seconds:.1f} s; then as many messages"
        f" to Slack within {took_seconds:.0f} s, none of which had used up more than"
        f" {attempts} attempts"
    )


def consumers_off(system: DefaultSystem) -> str:
    """Nothing fails, nothing is dead-lettered, nothing is stormed; then each is delivered once."""
    system.processes.stop_workers()
    system.deliveries.accept_many(QUEUE_OF_1500)
    time.sleep(CONSUMERS_OFF_SECONDS)
    hints = system.deliveries.database[OUTBOX].aggregate(
        [{"$match": {"type": "delivery_due"}}, {"$group": {"_id": "$key", "n": {"$sum": 1}}}]
    )
    most_hints = max(group["n"] for group in hints)
    # at once, after one minute, and after two more
    assert most_hints <= 3, f"{most_hints} hints for one request"
    waiting = system.requests.count_documents({"status": "accepted"})
    assert waiting == QUEUE_OF_1500, f"{waiting} wait"
    queued = system.rabbit.queue_depth(VHOST, deliveries_queue("slack"))
    system.processes.start_workers()
    took_seconds = system.wait_all_succeeded(RECOVERY_SECONDS)
    assert not system.deliveries.letters(), "there are dead letters"
    system.check_end(each_called_once=True)
    return (
        f"{QUEUE_OF_1500} requests and {queued} hints waited {CONSUMERS_OFF_SECONDS} s, and were"
        f" delivered once each within {took_seconds:.0f} s"
    )


def crashing_worker(system: DefaultSystem) -> str:
    """It crashes on one message until the broker gives that up, and all that it had fetched."""
    worker = system.processes.workers["slack"]
    system.processes.stop_workers()
    poison, *_ = system.deliveries.accept_many(PREFETCHED_COUNT + 1)
    for _ in range(DELIVERY_LIMIT + 1):
        worker.order(Order("slack", Point.RECEIVED, request_id=poison))
    wait_until(
        lambda: system.rabbit.queue_depth(VHOST, deliveries_queue("slack")) > PREFETCHED_COUNT,
        "all of them wait",
    )
    system.processes.start_workers()
    took_seconds = system.wait_all_succeeded(RECOVERY_SECONDS)
    system.processes.wait_all_struck()
    letters = system.deliveries.database[DEAD_LETTERS].find()
    decisions = Counter(letter["decision"] for letter in letters)
    assert set(decisions) <= {"requeued", "ignored"}, dict(decisions)
    assert decisions, "the broker gave nothing up"
    system.check_end(each_called_once=True)
    return (
        f"{len(worker.deaths())} crashes, {decisions.total()} messages given up by the broker;"
        f" all {PREFETCHED_COUNT + 1} requests succeeded within {took_seconds:.0f} s"
    )


WAITS: dict[str, Callable[[DefaultSystem], str]] = {
    "a worker that crashes on one message while 100 others are prefetched": crashing_worker,
    "consumers off for three minutes while 1,500 requests wait": consumers_off,
    "a dead Slack for five minutes while e-mail flows": dead_slack,
}
