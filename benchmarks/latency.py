"""Latency from the moment a commit returned to the moment a consumer had the message."""

import itertools
import json
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pika

from benchmarks.contenders import Contender, running
from benchmarks.drain import make_ready
from benchmarks.field import OUTBOX, QUEUE, Field, new_event, open_field, wait_until
from benchmarks.statistics import percentile
from sandbox.servers import Servers

WRITERS = 8
WARM_UP_SECONDS = 1.0
ENTITIES = 200


@dataclass(frozen=True)
class Latency:
    """offered_per_second was asked for, reached_per_second was written; times in milliseconds."""

    contender: str
    offered_per_second: float
    reached_per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


def measure_latency(
    servers: Servers, folder: Path, contender: Contender, rates: list[float], seconds: float
) -> list[Latency]:
    """One start of the contender, one result for each offered load, in the order given."""
    with open_field(servers, folder) as field:
        field.database.create_collection("entities")
        with running(contender, field) as process:
            make_ready(field, process)
            field.purge()
            with _consumer(field) as consumer:
                _write_paced(field, rates[0], WARM_UP_SECONDS, consumer)
                consumer.arrived.clear()
                return [_measure(field, contender, rate, seconds, consumer) for rate in rates]


def _measure(
    field: Field, contender: Contender, rate: float, seconds: float, consumer: "_Consumer"
) -> Latency:
    committed = _write_paced(field, rate, seconds, consumer)
    arrived = consumer.arrived
    latencies_ms = sorted((arrived[event_id] - at) / 1e6 for event_id, at in committed.items())
    lasted = (max(committed.values()) - min(committed.values())) / 1e9
    return Latency(
        contender=contender.name,
        offered_per_second=rate,
        reached_per_second=(len(committed) - 1) / lasted,
        p50_ms=percentile(latencies_ms, 50),
        p95_ms=percentile(latencies_ms, 95),
        p99_ms=percentile(latencies_ms, 99),
    )


def _write_paced(
    field: Field, rate: float, seconds: float, consumer: "_Consumer"
) -> dict[str, int]:
    """When each commit returned, by event; every event in its own transaction, at its own time."""
    committed: dict[str, int] = {}
    turns = itertools.count()
    began = time.monotonic() + 0.05

    def write_on() -> None:
        while (due := (turn := next(turns)) / rate) < seconds:
            time.sleep(max(0.0, began + due - time.monotonic()))
            event_id, returned_at = _write(field, turn)
            committed[event_id] = returned_at

    threads = [threading.Thread(target=write_on) for _ in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(
        lambda: committed.keys() <= consumer.poll().keys(),
        "every event has arrived",
        deadline_seconds=60,
        max_pause_seconds=0.1,
    )
    return committed


def _write(field: Field, turn: int) -> tuple[str, int]:
    key = f"entity-{turn % ENTITIES}"
    event = new_event(key, turn)

    def change(session: Any) -> None:
        field.database["entities"].update_one(
            {"_id": key}, {"$set": {"turn": turn}}, upsert=True, session=session
        )
        field.database[OUTBOX].insert_one(event, session=session)

    with field.client.start_session() as session:
        session.with_transaction(change)
    return event["_id"], time.monotonic_ns()


@dataclass
class _Consumer:
    """arrived: when each event came, by its id."""

    pipe: Connection
    arrived: dict[str, int]

    def poll(self) -> dict[str, int]:
        """Fetch what has arrived since the last call; writers should be idle."""
        self.pipe.send("poll")
        self.arrived.update(self.pipe.recv())
        return self.arrived


@contextmanager
def _consumer(field: Field) -> Iterator[_Consumer]:
    """A process of its own, so that the writers' threads never delay it."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_consume, args=(field.rabbitmq_url, theirs), daemon=True)
    process.start()
    try:
        yield _Consumer(ours, {})
    finally:
        ours.send("stop")
        process.join(5)
        process.kill()


def _consume(url: str, pipe: Connection) -> None:
    seen: dict[str, int] = {}
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()

    def received(_channel: Any, _method: Any, _properties: Any, body: bytes) -> None:
        now = time.monotonic_ns()
        # mq-bridge sends the whole document, the others its payload; both know the event's id
        message = json.loads(body)
        seen.setdefault(message.get("_id") or message["id"], now)

    channel.basic_consume(QUEUE, received, auto_ack=True)
    while True:
        connection.process_data_events(time_limit=0.1)
        if pipe.poll():
            if pipe.recv() == "stop":
                sys.exit()
            pipe.send(seen)
            seen.clear()
