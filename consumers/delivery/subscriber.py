"""
Consumes one queue until the process stops, across lost connections.

When the broker is lost, messages being handled are finished, because their outcome counts in
MongoDB and not on the broker. Messages that were only fetched come again on the next connection.

At a stop no new message is begun. Messages being handled are finished and acknowledged; closing the
channel, the last step, requeues the rest.
"""

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic

from loguru import logger

from runtime.mongo import GivenUp
from runtime.rabbit import AmqpChannel, AmqpMessage, BrokerError, BrokerGone, BrokerRefused, connect
from runtime.retry import growing_delays
from runtime.settings import RabbitSettings
from runtime.shutdown import Stop

#: Fetched messages per message being handled: enough that the next one is at hand, and few enough
#: to leave work to other workers and to lose few to the delivery limit when this one crashes.
PREFETCH_RATIO = 2

#: Only after a connection that lasted this long do the reconnect delays start from the shortest
#: again. Otherwise a broker that accepts and drops connections would be asked ten times a second.
GOOD_CONNECTION_SECONDS = 10.0

#: How often a consumer that waits for messages asks whether the broker still answers.
CHECK_SECONDS = 5.0


class NotNow(Exception):
    """Raised by a handler whose message must be requeued, because the flow has changed."""


class Flow:
    """
    The maximum number of fetched messages. At 0 the queue is not consumed, and messages that were
    fetched and not begun are requeued.

    generation: counts the changes.
    """

    def __init__(self, prefetch: int) -> None:
        self.prefetch = prefetch
        self.generation = 0
        self._changed = asyncio.Event()

    def set(self, prefetch: int) -> None:
        if prefetch == self.prefetch:
            return
        self.prefetch = prefetch
        self.generation += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed_since(self, generation: int) -> None:
        if self.generation == generation:
            await self._changed.wait()


@dataclass(frozen=True, slots=True)
class Subscription:
    """
    flow: without one, the prefetch never changes.
    declare: called on each new connection, so it must be idempotent.
    handle: acknowledges or dead-letters the message on the channel that it came by.
    """

    name: str
    queue: str
    concurrency: int
    grace_seconds: float
    declare: Callable[[AmqpChannel], Awaitable[None]]
    handle: Callable[[AmqpMessage, AmqpChannel], Awaitable[None]]
    flow: Flow | None = None


class Subscriber:
    def __init__(self, settings: RabbitSettings, subscription: Subscription, stop: Stop) -> None:
        self._settings = settings
        self._subscription = subscription
        self._stop = stop
        self._served = False
        self._problem: str | None = "is not being consumed yet"
        self._flow = subscription.flow or Flow(subscription.concurrency * PREFETCH_RATIO)
        self._free = asyncio.Semaphore(subscription.concurrency)
        self._in_hand: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def why_not_ready(self) -> str | None:
        """Why the queue is not being consumed; None while it is."""
        if self._stop.requested:
            return "it is stopping"
        return self._problem and f"the queue {self._subscription.queue} {self._problem}"

    async def run(self) -> None:
        """
        Consume until a stop is requested.

        Raises BrokerRefused when the broker refuses the first connection. Later refusals are
        retried, since a broker that is starting may refuse every client.
        """
        delays = growing_delays()
        while not self._stop.requested:
            began_at = monotonic()
            try:
                await self._serve()
            except BrokerError as error:
                if isinstance(error, BrokerRefused) and not self._served:
                    raise
                self._problem = f"is not being consumed: RabbitMQ: {error}"
                logger.warning("broker.away", reason=str(error), in_hand=len(self._in_hand))
                if monotonic() - began_at > GOOD_CONNECTION_SECONDS:
                    delays = growing_delays()
                await self._stop.rest(next(delays))
        await self._finish()

    async def _serve(self) -> None:
        """One connection, until it is lost (raises BrokerError) or a stop is requested."""
        subscription = self._subscription
        connection = await connect(
            self._settings.rabbitmq_url.get_secret_value(),
            name=subscription.name,
            heartbeat_seconds=self._settings.rabbitmq_heartbeat_seconds,
        )
        try:
            channel = await connection.open_channel()
            await subscription.declare(channel)
            self._served, self._problem = True, None
            while not self._stop.requested:
                await self._consume_until_changed(channel, connection.closed)
            await self._finish()
            await channel.close()
        finally:
            await connection.close()

    async def _consume_until_changed(
        self, channel: AmqpChannel, connection_closed: asyncio.Future[str]
    ) -> None:
        """Consume until the flow changes or a stop is requested; raises BrokerError."""
        prefetch, generation = self._flow.prefetch, self._flow.generation
        if not prefetch:
            await self._until_over(channel, connection_closed, generation)
            return
        arrived: asyncio.Queue[AmqpMessage] = asyncio.Queue()
        tag = await channel.consume(
            self._subscription.queue, prefetch=prefetch, on_message=arrived.put_nowait
        )
        logger.info("queue.receiving", queue=self._subscription.queue, prefetch=prefetch)
        # a message requeued before that would come again at once, and use up its delivery limit
        over = asyncio.Event()
        beginning = asyncio.create_task(self._begin_each(arrived, channel, over))
        try:
            await self._until_over(channel, connection_closed, generation)
            beginning.cancel()
            if not self._stop.requested:
                await channel.stop_consuming(tag)
                while not arrived.empty():
                    channel.requeue(arrived.get_nowait())
        finally:
            beginning.cancel()
            over.set()

    async def _until_over(
        self, channel: AmqpChannel, connection_closed: asyncio.Future[str], generation: int
    ) -> None:
        """Returns when the flow has changed or a stop is requested; raises BrokerError."""
        stopped = asyncio.create_task(self._stop.wait())
        changed = asyncio.create_task(self._flow.changed_since(generation))
        checking = asyncio.create_task(_check_link(channel))
        over = (stopped, changed, checking, channel.closed, connection_closed)
        try:
            await asyncio.wait(over, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            changed.cancel()
            checking.cancel()
        no_answer = checking.exception() if checking.done() else None
        if self._stop.requested:
            return
        if channel.closed.done():
            raise channel.closed.result()
        if connection_closed.done():
            raise BrokerGone(connection_closed.result())
        if no_answer is not None:
            raise no_answer

    async def _begin_each(
        self, arrived: asyncio.Queue[AmqpMessage], channel: AmqpChannel, over: asyncio.Event
    ) -> None:
        while True:
            await self._free.acquire()
            try:
                message = await arrived.get()
            except asyncio.CancelledError:
                self._free.release()
                raise
            task = asyncio.create_task(self._hold(message, channel, over))
            self._in_hand.add(task)
            task.add_done_callback(lambda task: self._put_down(task, channel))

    async def _hold(self, message: AmqpMessage, channel: AmqpChannel, over: asyncio.Event) -> None:
        try:
            await self._subscription.handle(message, channel)
        except GivenUp:
            return  # requeued when the channel is closed
        except NotNow:
            await over.wait()
            channel.requeue(message)
        except Exception as error:  # noqa: BLE001  # one message must not end the consumer
            logger.error(
                "message.not_handled", event_id=message.message_id, error=error_location(error)
            )
            # Unacknowledged, it would occupy the prefetch for good. Closing the channel requeues it
            # after a wait, and the queue's delivery limit ends it.
            await channel.close()

    def _put_down(self, task: asyncio.Task[None], channel: AmqpChannel) -> None:
        self._in_hand.discard(task)
        self._free.release()
        if task.cancelled() and not self._stop.requested:
            # cancelled by a library, not by us: the message was not acknowledged and never will be
            logger.error("message.not_handled", error="CancelledError")
            closing = asyncio.create_task(channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _finish(self) -> None:
        """Wait for messages being handled; cancel those that exceed the grace time."""
        if not self._in_hand:
            return
        logger.info("worker.finishing", in_hand=len(self._in_hand))
        _, late = await asyncio.wait(self._in_hand, timeout=self._subscription.grace_seconds)
        for task in late:
            task.cancel()
        if late:
            logger.warning("worker.cancelled", in_hand=len(late))
            await asyncio.wait(late)


async def _check_link(channel: AmqpChannel) -> None:
    """Raises BrokerError once the broker no longer answers; a consumer asks for nothing else."""
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        await channel.check_answers()


def error_location(error: Exception) -> str:
    """The error's type and where it was raised. Its text may hold a secret or a user's words."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {place.filename}:{place.lineno}"
