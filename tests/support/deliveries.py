"""What the consumers' tests share: requests in MongoDB, hints on their way, what came of them."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import uuid4

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pymongo import MongoClient

from assistance.collection import ASSISTANCES, DEAD_LETTERS
from assistance.events import HINT
from assistance.request import Acceptance, accept
from assistance.routing import Destination
from consumers.delivery.hints import REQUEUED_SECONDS
from outbox.collection import OUTBOX
from tests.support.third_parties import ThirdParties

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)

CHANNEL_OF = {"slack": "slack", "email": "email", "slack-emea": "slack"}

#: Retries soon enough for a test, and still growing.
RETRY_DELAYS_SECONDS = (0.2, 0.6, 1.2)


#: How often the relay's part is played beside a test.
RELAY_REST_SECONDS = 0.05


class Deliveries:
    """
    Requests as the service writes them and hints as the relay publishes them.

    The relay's part is played by hand, so that a test says itself which hint arrives when, and how
    often.
    """

    def __init__(self, mongodb_url: str, database_name: str, rabbitmq_url: str) -> None:
        self.mongodb_url = mongodb_url
        self.database_name = database_name
        self.rabbitmq_url = rabbitmq_url
        self.client = MongoClient[dict[str, Any]](mongodb_url, tz_aware=True, w="majority")
        self.database = self.client[database_name]

    def environment(self, **settings: object) -> dict[str, str]:
        """What any consumer needs, with the settings of a test on top."""
        names = {
            "mongodb_url": self.mongodb_url,
            "mongodb_database": self.database_name,
            "rabbitmq_url": self.rabbitmq_url,
            "retry_delays_seconds": json.dumps(RETRY_DELAYS_SECONDS),
            "call_timeout_seconds": 1.5,
            "call_tries": 1,
            "lease_margin_seconds": 1,
            "reconciler_interval_seconds": 0.1,
            "shutdown_grace_seconds": 8,
            "log_level": "debug",
            "breaker_first_wait_seconds": 0.3,
            **settings,
        }
        return {name.upper(): str(value) for name, value in names.items()}

    def accept(
        self,
        description: str = "How much is the large one?",
        *,
        topic: str = "sales",
        destinations: Sequence[str] = ("slack",),
        now: datetime | None = None,
    ) -> str:
        """Write a request with its events; returns its id."""
        acceptance = new_request(description, topic, destinations, now)
        self.database[OUTBOX].insert_many(acceptance.outbox_documents)
        self.database[ASSISTANCES].insert_one(dict(acceptance.request))
        return acceptance.request["_id"]

    def accept_many(self, count: int) -> list[str]:
        accepted = [new_request(f"number {number}") for number in range(count)]
        events = [event for one in accepted for event in one.outbox_documents]
        self.database[OUTBOX].insert_many(events)
        self.database[ASSISTANCES].insert_many([dict(one.request) for one in accepted])
        return [one.request["_id"] for one in accepted]

    def publish_pending(self) -> int:
        """Publish and mark what the outbox holds, as the relay does; returns how many."""
        pending = list(self.database[OUTBOX].find({"state": "pending"}).sort("seq"))
        if pending:
            with self.channel() as channel:
                for event in pending:
                    self.publish(event, channel)
            ids = {"$in": [event["_id"] for event in pending]}
            self.database[OUTBOX].update_many({"_id": ids}, {"$set": {"state": "published"}})
        return len(pending)

    @contextmanager
    def relaying(self) -> Iterator[None]:
        """Publish what comes into the outbox, beside the test; afterwards check the hints."""
        over = threading.Event()

        def relay() -> None:
            while not over.wait(RELAY_REST_SECONDS):
                self.publish_pending()

        with ThreadPoolExecutor(1) as pool:
            relaying = pool.submit(relay)
            try:
                yield
            finally:
                over.set()
                relaying.result()
        self.check_hints()

    def check_hints(self) -> None:
        """
        Raises AssertionError for a hint that is one too many or comes too early.

        Each hint of a delivery but the first follows the one before it. It answers an attempt that
        was made since, or a hint that was trusted for a while and is taken for lost.
        """
        hints: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for hint in self.database[OUTBOX].find({"type": HINT}).sort("seq"):
            _, _, destination = hint["routing_key"].partition(".")
            hints.setdefault((hint["key"], destination), []).append(hint)
        for (request_id, destination), sent in hints.items():
            attempts = self.attempts(request_id, destination)
            for before, after in pairwise(sent):
                which = f"hint {after['_id']} of {request_id} for {destination}"
                cause = json.loads(after["payload"]).get("causationid")
                assert cause == before["_id"], f"{which} does not follow the one before it"
                since, until = before["created_at"], after["created_at"]
                was_tried = any(since <= each["started_at"] <= until for each in attempts)
                was_trusted = until - since >= timedelta(seconds=REQUEUED_SECONDS)
                assert was_tried or was_trusted, f"{which} came too early"

    def publish(self, event: Mapping[str, Any], channel: BlockingChannel) -> None:
        channel.basic_publish(
            "events",
            event["routing_key"],
            event["payload"],
            pika.BasicProperties(message_id=str(event["_id"]), type=event["type"], delivery_mode=2),
        )

    @contextmanager
    def channel(self) -> Iterator[BlockingChannel]:
        """A channel that waits for each confirm: the broker loses what is not confirmed, now and
        then even when the connection is closed in order."""
        with pika.BlockingConnection(pika.URLParameters(self.rabbitmq_url)) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            yield channel

    def request(self, request_id: str) -> dict[str, Any]:
        found = self.database[ASSISTANCES].find_one({"_id": request_id})
        assert found is not None
        return found

    def delivery(self, request_id: str, destination: str = "slack") -> dict[str, Any]:
        return next(
            delivery
            for delivery in self.request(request_id)["deliveries"]
            if delivery["destination"] == destination
        )

    def attempts(self, request_id: str, destination: str = "slack") -> list[dict[str, Any]]:
        attempts: list[dict[str, Any]] = self.delivery(request_id, destination)["attempts"]
        return attempts

    def hints(self, request_id: str) -> list[dict[str, Any]]:
        query = {"key": request_id, "type": "delivery_due"}
        return list(self.database[OUTBOX].find(query).sort("seq"))

    def facts(self, request_id: str) -> list[str]:
        query = {"key": request_id, "type": {"$ne": "delivery_due"}}
        return [event["type"] for event in self.database[OUTBOX].find(query).sort("seq")]

    def letters(self, **query: Any) -> list[dict[str, Any]]:
        return list(self.database[DEAD_LETTERS].find(query).sort("first_seen_at"))

    def count(self, status: str) -> int:
        return self.database[ASSISTANCES].count_documents({"status": status})


def new_request(
    description: str,
    topic: str = "sales",
    destinations: Sequence[str] = ("slack",),
    now: datetime | None = None,
) -> Acceptance:
    return accept(
        request_id=str(uuid4()),
        topic=topic,
        description=description,
        destinations=[Destination(name, CHANNEL_OF[name]) for name in destinations],
        now=now or datetime.now(UTC),
    )


@pytest.fixture
def deliveries(mongodb_url: str, database_name: str, rabbitmq_url: str) -> Iterator[Deliveries]:
    deliveries = Deliveries(mongodb_url, database_name, rabbitmq_url)
    with deliveries.client:
        yield deliveries


def slack_settings(third_parties: ThirdParties) -> dict[str, str]:
    return {
        "slack_webhook_url": third_parties.slack_url,
        # the sandbox's Slack bears any rate
        "destination_slack_rate_per_second": "0",
        # no test has a quarter of an hour
        "destination_slack_on_unknown": "repeat",
    }


def email_settings(third_parties: ThirdParties) -> dict[str, object]:
    return {
        "email_smtp_host": third_parties.smtp_host,
        "email_smtp_port": third_parties.smtp_port,
        "email_smtp_tls": "none",
        "email_sender": "assistant@example.org",
        "email_recipients": "pricing@example.org",
        "destination_email_on_unknown": "repeat",
    }
