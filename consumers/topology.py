"""
What the consumers own on the broker, and its declaration.

    events (topic) ── delivery_due.<destination> ──> deliveries.<destination>
                                                          │ refused, or handed out too often
                                                          v
                                            dead-letters (fanout) ──> dead-letters

Every queue is a quorum queue. A dead letter leaves its queue only once the next queue has it:
https://www.rabbitmq.com/docs/quorum-queues#dead-lettering
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from assistance.events import hint_routing_key
from runtime.rabbit import (
    ACCESS_REFUSED,
    PRECONDITION_FAILED,
    AmqpChannel,
    BrokerRefused,
    ChannelClosed,
)

DEAD_LETTERS_EXCHANGE = "dead-letters"
DEAD_LETTERS_QUEUE = "dead-letters"


def deliveries_queue(destination: str) -> str:
    return f"deliveries.{destination}"


def deliveries_arguments(delivery_limit: int) -> dict[str, Any]:
    """
    Neither a TTL nor a length limit: a message that was never tried is never dropped.

    Without `x-overflow`, the strategy `at-least-once` silently falls back to `at-most-once`. The
    delivery limit is explicit because servers before 4.0 have none.
    """
    return {
        "x-queue-type": "quorum",
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": DEAD_LETTERS_EXCHANGE,
        "x-dead-letter-strategy": "at-least-once",
        "x-delivery-limit": delivery_limit,
    }


#: Dead letters have no further queue, so the server's default limit (20 from 4.0) would drop a
#: letter whose consumer crashes again and again. Servers before 4.0 do not accept "no limit".
NO_DELIVERY_LIMIT = 2**31 - 1


async def declare_dead_letters(channel: AmqpChannel) -> None:
    """Raises BrokerRefused, with the remedy, where a queue or exchange of that name differs."""
    arguments = {"x-queue-type": "quorum", "x-delivery-limit": NO_DELIVERY_LIMIT}
    with _naming(DEAD_LETTERS_EXCHANGE, DEAD_LETTERS_QUEUE):
        await channel.declare_exchange(DEAD_LETTERS_EXCHANGE, "fanout")
        await channel.declare_queue(DEAD_LETTERS_QUEUE, arguments)
        await channel.bind_queue(DEAD_LETTERS_QUEUE, DEAD_LETTERS_EXCHANGE, "")


async def declare_deliveries(
    channel: AmqpChannel, destination: str, *, events_exchange: str, delivery_limit: int
) -> None:
    """One destination's queue and what it depends on. Idempotent; raises BrokerRefused as above."""
    await declare_dead_letters(channel)
    queue = deliveries_queue(destination)
    with _naming(events_exchange, queue):
        await channel.declare_exchange(events_exchange, "topic")
        await channel.declare_queue(queue, deliveries_arguments(delivery_limit))
        await channel.bind_queue(queue, events_exchange, hint_routing_key(destination))


@contextmanager
def _naming(exchange: str, queue: str) -> Iterator[None]:
    try:
        yield
    except ChannelClosed as error:
        if error.code == PRECONDITION_FAILED:
            raise BrokerRefused(
                f"exchange {exchange!r} or queue {queue!r} already exists with other arguments "
                f"({error}): correct the setting, or drain and delete it on the broker and restart"
            ) from error
        if error.code == ACCESS_REFUSED:
            raise BrokerRefused(
                f"the user may not declare {exchange!r} and {queue!r} ({error}): run "
                "`python -m installation rabbitmq`, which grants it"
            ) from error
        raise
