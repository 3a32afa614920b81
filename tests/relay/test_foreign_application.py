"""An application that is not ours, with nothing but its plain driver and docs/outbox.md."""

import re
from typing import Any

import pika
from pymongo import MongoClient

from sandbox.waiting import wait_until
from tests.conftest import RunProcess
from tests.support.paths import REPOSITORY

PAGE = REPOSITORY / "docs" / "outbox.md"
EXAMPLE_URL = "mongodb://localhost/?replicaSet=rs0"


def example_in(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_an_application_of_its_own_appends_and_its_events_arrive(
    mongodb_url: str, database_name: str, rabbitmq_url: str, run_process: RunProcess
) -> None:
    """A database, a collection and an exchange of its own; four fields, then the page's example."""
    environment = {
        "MONGODB_URL": mongodb_url,
        "MONGODB_DATABASE": database_name,
        "OUTBOX_COLLECTION": "letters",
        "RABBITMQ_URL": rabbitmq_url,
        "EVENTS_EXCHANGE": "shop.events",
        "RELAY_GROUP": "shop",
    }
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq_url))
    channel = connection.channel()
    channel.exchange_declare("shop.events", "topic", durable=True)
    channel.queue_declare("shop", durable=True)
    channel.queue_bind("shop", "shop.events", "orders.*")
    client: MongoClient[dict[str, Any]] = MongoClient(mongodb_url, w="majority")
    client[database_name]["letters"].insert_one(
        {"_id": "first", "type": "greeted", "routing_key": "orders.greeted", "payload": "hello"}
    )
    run_process("relay", "run", environment=environment)

    example = example_in("python")
    for theirs, ours in {
        EXAMPLE_URL: mongodb_url,
        'client["shop"]': f'client["{database_name}"]',
        "db.outbox": "db.letters",
    }.items():
        assert theirs in example
        example = example.replace(theirs, ours)
    application: dict[str, Any] = {}
    exec(compile(example, str(PAGE), "exec"), application)
    application["client"].close()

    arrived: list[tuple[str, str, bytes]] = []

    def both_arrived() -> bool:
        method, properties, body = channel.basic_get("shop", auto_ack=True)
        if method is not None:
            arrived.append((properties.message_id, properties.type, body))
        return len(arrived) == 2

    wait_until(both_arrived, "both events arrive", deadline_seconds=30)
    assert arrived == [
        ("first", "greeted", b"hello"),
        (application["event_id"], "order_placed", b'{"order": 42}'),
    ]
    connection.close()
    client.close()
