"""A field for one measurement: a database, a virtual host and a quorum queue of its own."""

import os
import secrets
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pika
import psutil
from pymongo import MongoClient

from sandbox import waiting
from sandbox.mongodb import LocalMongo
from sandbox.rabbitmq import LocalRabbit
from sandbox.servers import Servers

EXCHANGE = "events"
QUEUE = "arrivals"
OUTBOX = "outbox"
PAYLOAD_BYTES = 500
SEED_BATCH = 10_000

#: The servers continue to work after a measurement: they delete, flush and compact. The next one
#: starts when both together use less than this share of a core, or after the deadline.
QUIET_SHARE = 0.06
QUIET_DEADLINE_SECONDS = 4.0


class MeasurementFailed(Exception):
    """What was awaited did not happen; says what, and where the log is."""


#: Pauses are short, so that polling does not delay what is measured.
wait_until = partial(waiting.wait_until, max_pause_seconds=0.01, error=MeasurementFailed)


@dataclass
class Field:
    """
    servers and folder are shared by all measurements; database, vhost and queue are this one's.

    environment: the environment of a contender.
    """

    servers: Servers
    folder: Path
    name: str
    rabbitmq_url: str
    client: MongoClient[dict[str, Any]]
    channel: Any

    @property
    def database(self) -> Any:
        return self.client[self.name]

    @property
    def environment(self) -> dict[str, str]:
        kept = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "MONGODB_DRIVER")
        return {name: os.environ[name] for name in kept if name in os.environ} | {
            "MONGODB_URL": self.servers.mongo.url,
            "MONGODB_DATABASE": self.name,
            "RABBITMQ_URL": self.rabbitmq_url,
            "LOG_FORMAT": "json",
        }

    def depth(self) -> int:
        """The number of messages in the queue, exact and current."""
        declared = self.channel.queue_declare(QUEUE, passive=True)
        return int(declared.method.message_count)

    def purge(self) -> None:
        self.channel.queue_purge(QUEUE)

    def append(
        self, count: int, *, key: str = "now", events_per_key: int = 1, **fields: Any
    ) -> None:
        """Insert events with insert_many, the events of one key next to each other."""
        for first in range(0, count, SEED_BATCH):
            numbers = range(first, min(first + SEED_BATCH, count))
            self.database[OUTBOX].insert_many(
                [
                    new_event(f"{key}-{number // events_per_key}", number) | fields
                    for number in numbers
                ],
                ordered=False,
            )

    def remove(self, *, key: str) -> None:
        """Delete what was appended under this key."""
        # "." is the character after "-"
        self.database[OUTBOX].delete_many({"key": {"$gte": f"{key}-", "$lt": f"{key}."}})

    def settled(self) -> int:
        """The number of events that are marked and behind the saved position."""
        checkpoint = self.database["checkpoints"].find_one() or {}
        return int(checkpoint.get("settled", 0))

    def wait_position(self) -> None:
        """Wait until the relay's first resync is completed: it has a position in the stream."""

        def has_position() -> bool:
            checkpoint = self.database["checkpoints"].find_one() or {}
            return bool(checkpoint.get("position")) and not checkpoint.get("handover")

        wait_until(has_position, "the relay has a position")

    def wait_quiet(self) -> None:
        """Wait until the servers have nothing left to do, or the deadline: both are facts."""
        processes = server_processes(self.servers)
        end = time.monotonic() + QUIET_DEADLINE_SECONDS
        while time.monotonic() < end:
            before = cpu_seconds(processes)
            time.sleep(0.25)
            if cpu_seconds(processes) - before < QUIET_SHARE * 0.25:
                return


@contextmanager
def open_field(servers: Servers, folder: Path) -> Iterator[Field]:
    name = f"bench-{secrets.token_hex(4)}"
    rabbitmq_url = servers.rabbit.create_vhost(name)
    connection = pika.BlockingConnection(pika.URLParameters(f"{rabbitmq_url}?heartbeat=0"))
    channel = connection.channel()
    channel.exchange_declare(EXCHANGE, "topic", durable=True)
    channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
    channel.queue_bind(QUEUE, EXCHANGE, "#")
    client: MongoClient[dict[str, Any]] = MongoClient(servers.mongo.url, w="majority")
    client[name].create_collection(OUTBOX)
    field = Field(servers, folder, name, rabbitmq_url, client, channel)
    try:
        yield field
    finally:
        connection.close()
        servers.rabbit.delete_vhost(name)
        client.drop_database(name)
        field.wait_quiet()
        client.close()


def new_event(key: str, seq: int) -> dict[str, Any]:
    """An event of about 500 bytes, as any application would append it."""
    event_id = str(uuid.uuid4())
    frame = f'{{"id":"{event_id}","key":"{key}","seq":{seq},"text":""}}'
    return {
        "_id": event_id,
        "type": "measured",
        "key": key,
        "seq": seq,
        "routing_key": QUEUE,
        "payload": frame[:-2] + "x" * (PAYLOAD_BYTES - len(frame)) + '"}',
        "created_at": datetime.now(UTC),
    }


def server_processes(servers: Servers) -> list[psutil.Process]:
    """The servers' own processes; none for external servers."""
    processes = []
    if isinstance(servers.mongo, LocalMongo):
        processes += [node.pid for node in servers.mongo.nodes]
    if isinstance(servers.rabbit, LocalRabbit):
        processes.append(servers.rabbit.node.pid)
    return [psutil.Process(pid) for pid in processes if pid is not None]


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(time.user + time.system for time in times)
