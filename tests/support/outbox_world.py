"""An outbox of a test's own: appends events as any application would, and counts what arrives."""

import itertools
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pika
import pytest
from pymongo import MongoClient

from sandbox.waiting import wait_until
from tests.support.processes import OurProcess

EXCHANGE = "events"
QUEUE = "arrivals"
FEW = 50
ACKNOWLEDGED_AT_ONCE = 500

StartRelay = Callable[..., OurProcess]


@dataclass(frozen=True)
class Arrival:
    message_id: str
    properties: Any
    body: bytes


@dataclass
class OutboxWorld:
    """
    `append` inserts ready-made events; `write` changes an entity and appends in one transaction.

    arrivals are read from a quorum queue bound to everything that tests route (`r.#`).
    """

    mongodb_url: str
    database_name: str
    rabbitmq_url: str
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.client: MongoClient[dict[str, Any]] = MongoClient(self.mongodb_url, w="majority")
        self.database = self.client[self.database_name]
        self.outbox = self.database["outbox"]
        self.environment = {
            "MONGODB_URL": self.mongodb_url,
            "MONGODB_DATABASE": self.database_name,
            "RABBITMQ_URL": self.rabbitmq_url,
            "LOG_FORMAT": "json",
        }
        with self.channel() as channel:
            channel.exchange_declare(EXCHANGE, "topic", durable=True)
            self.declare_queue(channel, QUEUE, "r.#")

    def close(self) -> None:
        self.client.close()

    @contextmanager
    def channel(self) -> Iterator[Any]:
        connection = pika.BlockingConnection(pika.URLParameters(self.rabbitmq_url))
        try:
            yield connection.channel()
        finally:
            if connection.is_open:
                connection.close()

    def declare_queue(self, channel: Any, name: str, binding: str, **arguments: Any) -> None:
        channel.queue_declare(name, durable=True, arguments={"x-queue-type": "quorum", **arguments})
        channel.queue_bind(name, EXCHANGE, binding)

    def append(self, count: int = 1, *, key: str | None = None, **fields: Any) -> list[str]:
        """Insert `count` events of one key (of a key each, when none is given) in order."""
        documents = [
            {
                "_id": str(uuid.uuid4()),
                "type": "tested",
                "routing_key": "r.a",
                "payload": "{}",
                "created_at": datetime.now(UTC),
                **({} if key is None else {"key": key}),
                **fields,
            }
            for _ in range(count)
        ]
        self.outbox.insert_many(documents)
        return [document["_id"] for document in documents]

    def write(self, key: str) -> None:
        """Change the entity `key` and append its event, as docs/outbox.md says."""
        event_id = str(uuid.uuid4())

        def change(session: Any) -> None:
            entity: Any = self.database["entities"].find_one_and_update(
                {"_id": key},
                {"$inc": {"version": 1}},
                upsert=True,
                return_document=True,
                session=session,
            )
            event = {
                "_id": event_id,
                "type": "tested",
                "key": key,
                "seq": entity["version"],
                "routing_key": "r.a",
                "payload": "{}",
                "created_at": datetime.now(UTC),
            }
            self.outbox.insert_one(event, session=session)

        with self.client.start_session() as session:
            session.with_transaction(change)

    @contextmanager
    def writers(self, count: int) -> Iterator[None]:
        """Run threads that write to their own keys and to shared ones until the block ends."""
        done = threading.Event()
        failures: list[Exception] = []
        self.database["entities"].find_one()  # creates nothing; the first write may not race
        self.database.create_collection("entities")

        def write_on(number: int) -> None:
            try:
                for turn in itertools.count():
                    if done.is_set():
                        return
                    self.write(f"own-{number}-{turn % 3}" if turn % 4 else f"shared-{turn % 5}")
            except Exception as failure:  # noqa: BLE001 - shown by the thread that waits
                failures.append(failure)

        threads = [threading.Thread(target=write_on, args=[n]) for n in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert not failures

    def states(self) -> dict[str, int]:
        counted = self.outbox.aggregate([{"$group": {"_id": "$state", "count": {"$sum": 1}}}])
        return {group["_id"]: group["count"] for group in counted}

    def wait_all_published(self, deadline_seconds: float = 30) -> None:
        wait_until(
            lambda: set(self.states()) <= {"published"},
            f"every event is published, of {self.outbox.estimated_document_count()}",
            deadline_seconds=deadline_seconds,
        )

    def wait_state(self, event_id: str, state: str, deadline_seconds: float = 15) -> dict[str, Any]:
        def in_state() -> dict[str, Any] | None:
            return self.outbox.find_one({"_id": event_id, "state": state})

        found = wait_until(in_state, f"{event_id} is {state}", deadline_seconds=deadline_seconds)
        assert found is not None
        return found

    def wait_relays_gone(self) -> None:
        """A killed relay's last write is still carried out; MongoDB lets its connection go then."""
        connections: list[dict[str, Any]] = [
            {"$currentOp": {"allUsers": True, "idleConnections": True}},
            {"$match": {"appName": "relay"}},
        ]
        wait_until(
            lambda: not list(self.client.admin.aggregate(connections)),
            "MongoDB has let go of the killed relay's connections",
        )

    def checkpoint(self) -> dict[str, Any]:
        return self.database["checkpoints"].find_one() or {}

    def drain(self, queue: str = QUEUE) -> list[Arrival]:
        """Everything that is in the queue now, taken out of it."""
        arrivals: list[Arrival] = []
        with self.channel() as channel:
            while count := channel.queue_declare(queue, passive=True).method.message_count:
                arrived = _consume if count > FEW else _get
                arrivals += arrived(channel, queue, count)
        return arrivals

    def check_arrivals(self, arrivals: Sequence[Arrival]) -> int:
        """
        Nothing lost, nothing invented, each key in commit order by first occurrence.

        Returns how many arrived more than once.
        """
        events = {event["_id"]: event for event in self.outbox.find()}
        first_occurrences = list(dict.fromkeys(arrival.message_id for arrival in arrivals))
        assert set(first_occurrences) == set(events)
        seqs: dict[str, list[int]] = defaultdict(list)
        for message_id in first_occurrences:
            event = events[message_id]
            if "seq" in event:
                seqs[event["key"]].append(event["seq"])
        for key, order in seqs.items():
            assert order == sorted(order), f"key {key} is out of order"
        return len(arrivals) - len(first_occurrences)


def _get(channel: Any, queue: str, count: int) -> Iterator[Arrival]:
    for _ in range(count):
        method, properties, body = channel.basic_get(queue, auto_ack=True)
        if method is not None:
            yield Arrival(properties.message_id, properties, body)


def _consume(channel: Any, queue: str, count: int) -> Iterator[Arrival]:
    """
    A consumer sets up slowly, and then gets all in one stream.

    It acknowledges, so that what comes in surplus goes back; in good time, as a quorum queue hands
    out 2,000 at most.
    """
    messages = channel.consume(queue)
    for number, (method, properties, body) in enumerate(itertools.islice(messages, count), 1):
        yield Arrival(properties.message_id, properties, body)
        if number % ACKNOWLEDGED_AT_ONCE == 0 or number == count:
            channel.basic_ack(method.delivery_tag, multiple=True)
    channel.cancel()


def settled(world: OutboxWorld) -> int:
    """How many events the relay group has settled."""
    return int(world.checkpoint().get("settled", 0))


@pytest.fixture
def world(mongodb_url: str, database_name: str, rabbitmq_url: str) -> Iterator[OutboxWorld]:
    world = OutboxWorld(mongodb_url, database_name, rabbitmq_url)
    yield world
    world.close()


@pytest.fixture
def start_relay(run_process: Callable[..., OurProcess], world: OutboxWorld) -> StartRelay:
    def start(**settings: str) -> OurProcess:
        return run_process("relay", "run", environment=world.environment | settings)

    return start
