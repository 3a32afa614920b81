"""A message that is not acknowledged in time comes back, and its consumer subscribes again."""

import asyncio
import json
import secrets
from urllib.parse import urlsplit

import httpx
import pika
import pytest

import runtime.rabbit
from consumers.delivery.subscriber import Subscriber, Subscription
from runtime.rabbit import AmqpChannel, AmqpMessage
from runtime.settings import RabbitSettings
from runtime.shutdown import Stop
from sandbox.rabbitmq import RabbitServer
from sandbox.waiting import wait_until_async

#: The first that cancels a consumer by an argument of its own.
CANCELLING = (4, 3)


def version_of(server: RabbitServer) -> tuple[int, ...]:
    parts = urlsplit(server.url)
    answer = httpx.get(
        f"{server.management_url}/api/overview",
        auth=(parts.username or "", parts.password or ""),
        trust_env=False,
    )
    version = json.loads(answer.raise_for_status().text)["rabbitmq_version"]
    return tuple(int(part) for part in version.split(".")[:2])


async def test_a_consumer_that_the_broker_cancels_subscribes_again(
    rabbit_server: RabbitServer, rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.rabbit, "CONSUMER_TIMEOUT_SECONDS", 2.0)
    queue, stop, released = f"slow-{secrets.token_hex(4)}", Stop(), asyncio.Event()
    received: list[AmqpMessage] = []

    async def declare(channel: AmqpChannel) -> None:
        await channel.declare_queue(queue, {"x-queue-type": "quorum", "x-delivery-limit": 20})

    async def handle(message: AmqpMessage, channel: AmqpChannel) -> None:
        received.append(message)
        if not message.redelivered:
            await released.wait()
        channel.ack(message)

    settings = RabbitSettings.model_validate({"rabbitmq_url": rabbitmq_url})
    subscription = Subscription(
        name="slow", queue=queue, concurrency=2, grace_seconds=5, declare=declare, handle=handle
    )
    subscriber = Subscriber(settings, subscription, stop)
    running = asyncio.create_task(subscriber.run())
    try:
        await wait_until_async(lambda: subscriber.why_not_ready is None, "it consumes")
        await asyncio.to_thread(_publish, rabbitmq_url, queue)
        await wait_until_async(lambda: len(received) == 1, "the message arrives")
        if version_of(rabbit_server) >= CANCELLING:
            # while the first handling hangs: the timeout is looked at every few seconds
            await wait_until_async(
                lambda: len(received) == 2, "the message comes back", deadline_seconds=90
            )
            assert received[1].redelivered
        released.set()
        await wait_until_async(lambda: subscriber.why_not_ready is None, "it consumes")
    finally:
        released.set()
        stop.request()
        await running


def _publish(url: str, queue: str) -> None:
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.basic_publish("", queue, b"{}")
