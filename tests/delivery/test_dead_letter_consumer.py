"""Dead letters are stored with where they came from and why; none of them fails a request."""

import asyncio
import signal
import struct
from datetime import UTC, datetime, timedelta

import pika
import pytest

from runtime.rabbit import connect
from sandbox.rabbitmq import RabbitServer
from sandbox.waiting import wait_until, wait_until_async
from tests.conftest import RunProcess
from tests.support.deliveries import Deliveries, slack_settings
from tests.support.processes import OurProcess
from tests.support.third_parties import ThirdParties


@pytest.fixture
def dead_letters(run_process: RunProcess, deliveries: Deliveries) -> OurProcess:
    """The dead-letter consumer, and the queues of the workers."""
    environment = deliveries.environment()
    assert run_process("consumers", "topology", environment=environment).wait_exit() == 0
    process = run_process("consumers", "run", "dead-letters", environment=environment)
    process.wait_log("queue.receiving")
    return process


def publish_to_slack(
    deliveries: Deliveries, body: bytes, message_id: str | bytes | None = None
) -> None:
    with deliveries.channel() as channel:
        properties = pika.BasicProperties(message_id=message_id, delivery_mode=2)
        channel.basic_publish("events", "delivery_due.slack", body, properties, mandatory=True)


def refuse_all(deliveries: Deliveries, count: int) -> None:
    """As a worker does with what it cannot read."""
    with deliveries.channel() as channel:
        for _ in range(count):
            method, _, _ = next(iter(channel.consume("deliveries.slack", inactivity_timeout=10)))
            assert method is not None
            channel.basic_reject(method.delivery_tag, requeue=False)


@pytest.mark.usefixtures("dead_letters")
def test_a_message_that_is_no_event_is_parked_once_and_the_worker_lives(
    run_process: RunProcess,
    deliveries: Deliveries,
    third_parties: ThirdParties,
    rabbit_server: RabbitServer,
    vhost: str,
) -> None:
    worker = run_process(
        "consumers",
        "run",
        "slack",
        environment=deliveries.environment(**slack_settings(third_parties)),
    )
    worker.wait_log("queue.receiving")
    garbage = [b"", b"not an event", b"\xff\x00\xfe", b"[" * 20_000, b'{"specversion": "1.0"}']
    for number, body in enumerate(garbage):
        publish_to_slack(deliveries, body, message_id=f"garbage-{number}")
    request_id = deliveries.accept()
    deliveries.publish_pending()
    wait_until(lambda: deliveries.request(request_id)["status"] == "succeeded", "it succeeds")
    wait_until(lambda: len(deliveries.letters()) == len(garbage), "all are stored")
    letters = deliveries.letters()
    assert {letter["message_id"] for letter in letters} == {
        f"garbage-{number}" for number in range(len(garbage))
    }
    for letter in letters:
        assert (letter["decision"], letter["count"]) == ("parked", 1)
        assert (letter["queue"], letter["reason"]) == ("deliveries.slack", "rejected")
        assert letter["problem"]
    assert worker.running
    assert worker.output().count("message.refused") == len(garbage)
    assert rabbit_server.queue_depth(vhost, "deliveries.slack") == 0
    assert rabbit_server.queue_depth(vhost, "dead-letters") == 0


@pytest.mark.usefixtures("dead_letters")
def test_a_message_whose_id_is_no_text_is_parked_once(
    run_process: RunProcess,
    deliveries: Deliveries,
    third_parties: ThirdParties,
    rabbit_server: RabbitServer,
    vhost: str,
) -> None:
    environment = deliveries.environment(**slack_settings(third_parties))
    worker = run_process("consumers", "run", "slack", environment=environment)
    worker.wait_log("queue.receiving")
    publish_to_slack(deliveries, b"not an event", message_id=b"\xff\xfe!")
    [letter] = wait_until(deliveries.letters, "the letter is stored")
    assert (letter["message_id"], letter["decision"]) == (r"\xff\xfe!", "parked")
    wait_until(lambda: rabbit_server.queue_depth(vhost, "dead-letters") == 0, "it is acknowledged")
    assert deliveries.letters()[0]["count"] == 1
    # a person gives it up, and it comes once more: it was not acknowledged in time, say
    deliveries.database["dead_letters"].update_one({}, {"$set": {"decision": "discarded"}})
    publish_to_slack(deliveries, b"not an event", message_id=b"\xff\xfe!")
    wait_until(lambda: deliveries.letters(count=2), "it is counted again")
    assert deliveries.letters()[0]["decision"] == "discarded"
    assert worker.output().count("message.refused") == 2


@pytest.mark.usefixtures("dead_letters")
def test_a_hint_for_another_destination_is_parked(
    run_process: RunProcess,
    deliveries: Deliveries,
    third_parties: ThirdParties,
) -> None:
    worker = run_process(
        "consumers",
        "run",
        "slack",
        environment=deliveries.environment(**slack_settings(third_parties)),
    )
    worker.wait_log("queue.receiving")
    request_id = deliveries.accept(destinations=("email",))
    [hint] = deliveries.hints(request_id)
    publish_to_slack(deliveries, hint["payload"].encode(), message_id=hint["_id"])
    [letter] = wait_until(deliveries.letters, "the letter is stored")
    assert (letter["request_id"], letter["destination"]) == (request_id, "email")
    assert letter["queue"] == "deliveries.slack"
    assert deliveries.delivery(request_id, "email")["state"] == "waiting"


@pytest.mark.usefixtures("dead_letters")
def test_a_letter_of_an_open_delivery_gives_it_back(
    deliveries: Deliveries,
) -> None:
    request_id = deliveries.accept()
    deliveries.publish_pending()
    trusted_until = deliveries.delivery(request_id)["hint_until"]
    refuse_all(deliveries, 1)
    [letter] = wait_until(deliveries.letters, "the letter is stored")
    assert (letter["decision"], letter["request_id"]) == ("requeued", request_id)
    delivery = deliveries.delivery(request_id)
    assert delivery["state"] == "waiting"
    assert delivery["hint_until"] < trusted_until
    assert delivery["hint_until"] < datetime.now(UTC) + timedelta(seconds=6)
    assert deliveries.request(request_id)["next_due_at"] == delivery["hint_until"]
    assert deliveries.request(request_id)["status"] == "accepted"


@pytest.mark.usefixtures("dead_letters")
def test_each_further_letter_of_a_delivery_waits_longer(
    deliveries: Deliveries,
) -> None:
    request_id = deliveries.accept()
    deliveries.database["assistances"].update_one(
        {"_id": request_id},
        {
            "$set": {
                "deliveries.0.hints": 4,
                "deliveries.0.hint_until": datetime.now(UTC) + timedelta(hours=1),
            }
        },
    )
    deliveries.publish_pending()
    refuse_all(deliveries, 1)
    wait_until(deliveries.letters, "the letter is stored")
    left = deliveries.delivery(request_id)["hint_until"] - datetime.now(UTC)
    assert timedelta(seconds=30) < left <= timedelta(seconds=40)


@pytest.mark.usefixtures("dead_letters")
def test_a_letter_that_is_not_of_the_newest_hint_changes_nothing(
    deliveries: Deliveries,
) -> None:
    request_id = deliveries.accept()
    deliveries.publish_pending()
    deliveries.database["assistances"].update_one(
        {"_id": request_id}, {"$set": {"deliveries.0.hint_event": "a newer one"}}
    )
    before = deliveries.delivery(request_id)
    refuse_all(deliveries, 1)
    [letter] = wait_until(deliveries.letters, "the letter is stored")
    assert letter["decision"] == "ignored"
    assert deliveries.delivery(request_id) == before


def test_a_letter_is_acknowledged_only_once_it_is_stored(
    run_process: RunProcess, deliveries: Deliveries, rabbit_server: RabbitServer, vhost: str
) -> None:
    """The database refuses letters for a while; the letter waits, and the process with it."""
    environment = deliveries.environment()
    assert run_process("consumers", "topology", environment=environment).wait_exit() == 0
    process = run_process("consumers", "run", "dead-letters", environment=environment)
    process.wait_log("queue.receiving")
    refuse_writes(deliveries, refuse=True)
    try:
        publish_to_slack(deliveries, b"garbage")
        refuse_all(deliveries, 1)
        process.wait_log("mongodb.away")
        process.kill()
        wait_until(
            lambda: rabbit_server.queue_depth(vhost, "dead-letters") == 1, "the letter comes back"
        )
    finally:
        refuse_writes(deliveries, refuse=False)
    successor = run_process("consumers", "run", "dead-letters", environment=environment)
    [letter] = wait_until(deliveries.letters, "the letter is stored", deadline_seconds=15)
    assert (letter["body"], letter["count"]) == ("garbage", 1)
    successor.signal(signal.SIGTERM)
    assert successor.wait_exit() == 0
    assert rabbit_server.queue_depth(vhost, "dead-letters") == 0


def refuse_writes(deliveries: Deliveries, *, refuse: bool) -> None:
    """https://www.mongodb.com/docs/manual/reference/command/ : a fail point of test servers."""
    data = {
        "failCommands": ["update"],
        "errorCode": 91,
        "errorLabels": ["RetryableWriteError"],
        "namespace": f"{deliveries.database_name}.dead_letters",
    }
    deliveries.client.admin.command(
        {
            "configureFailPoint": "failCommand",
            "mode": "alwaysOn" if refuse else "off",
            **({"data": data} if refuse else {}),
        }
    )


def with_headers(entries: bytes, body: bytes, message_id: str) -> bytes:
    """A persistent message on channel 1, whose header table is written by hand."""

    def frame(kind: int, payload: bytes) -> bytes:
        return struct.pack(">BHI", kind, 1, len(payload)) + payload + b"\xce"

    def short(text: str) -> bytes:
        return bytes([len(text)]) + text.encode()

    flags = 1 << 13 | 1 << 12 | 1 << 7
    properties = struct.pack(">HI", flags, len(entries)) + entries + b"\2" + short(message_id)
    publish = struct.pack(">HHH", 60, 40, 0) + short("events") + short("delivery_due.slack") + b"\0"
    header = struct.pack(">HHQ", 60, 0, len(body)) + properties
    return frame(1, publish) + frame(2, header) + frame(3, body)


def nested(depth: int) -> bytes:
    value = b""
    for _ in range(depth):
        value = b"A" + struct.pack(">I", len(value)) + value
    return value


@pytest.mark.usefixtures("dead_letters")
async def test_properties_that_no_library_decodes_end_in_the_dead_letters_once(
    run_process: RunProcess, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    worker = run_process(
        "consumers",
        "run",
        "slack",
        environment=deliveries.environment(**slack_settings(third_parties)),
    )
    worker.wait_log("queue.receiving")
    bad = [
        b"\x04whenT" + struct.pack(">Q", 2**63 - 1),
        b"\x04whenT" + struct.pack(">Q", 2**64 - 1),
        b"\x04whenT" + struct.pack(">Q", 253402300800),
        b"\x04deep" + nested(1200),
    ]
    hint_of = deliveries.accept()
    [hint] = deliveries.hints(hint_of)
    connection = await connect(deliveries.rabbitmq_url, name="test", heartbeat_seconds=60)
    channel = await connection.open_channel()
    for number, entries in enumerate(bad):
        connection.send(with_headers(entries, b"garbage", f"bad-{number}"))
    connection.send(with_headers(bad[0], hint["payload"].encode(), "hint"))
    await asyncio.sleep(0)  # written in the loop's next turn
    await channel.close()
    await connection.close()
    publish_to_slack(deliveries, b"honest garbage", message_id="honest")

    expected = {*(f"bad-{number}" for number in range(len(bad))), "hint", "honest"}
    await wait_until_async(
        lambda: {letter["message_id"] for letter in deliveries.letters()} == expected,
        "every letter is stored",
    )
    by_id = {letter["message_id"]: letter for letter in deliveries.letters()}
    assert {letter["count"] for letter in by_id.values()} == {1}
    for name in expected - {"honest"}:
        assert "cannot be decoded" in by_id[name]["problem"] or name.startswith("bad")
        assert by_id[name]["queue"] == "deliveries.slack"
    assert by_id["hint"]["decision"] == "requeued"
    assert by_id["bad-0"]["decision"] == "parked"
    assert "broker.away" not in worker.output()
