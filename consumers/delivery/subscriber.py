"""
A queue's messages, for as long as the process lives.

The broker may go and come back. What is in hand then is finished, because its outcome counts in
MongoDB and not on the broker; what was not begun comes again over the next connection.

At a stop nothing new is begun; what is in hand is finished and acknowledged; the channel is closed
last, and what was not begun goes back to its queue.
"""

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic

from loguru import logger

from consumers.database import GivenUp
from runtime.rabbit import AmqpChannel, AmqpMessage, BrokerError, BrokerGone, BrokerRefused, connect
from runtime.retry import growing_delays
from runtime.settings import RabbitSettings
from runtime.shutdown import Stop

#: Messages fetched for each that is worked on: the next is at hand when one is done, and little
#: is kept from other workers, or counted against the delivery limit when this one crashes.
PREFETCH_RATIO = 2

#: A connection that lasted so long was a good one: the next reconnect is a quick one again. Else
#: a broker that takes us in and throws us out would be asked ten times a second.
GOOD_CONNECTION_SECONDS = 10.0


class NotNow(Exception):
    """Raised by a handler that leaves its message to the queue, because the flow has changed."""


class Flow:
    """
    How many messages are fetched at most; with none the queue is not consumed at all, and what was
    fetched and not begun goes back.

    turn: counts the changes.
    """

    def __init__(self, prefetch: int) -> None:
        self.prefetch = prefetch
        self.turn = 0
        self._changed = asyncio.Event()

    def set(self, prefetch: int) -> None:
        if prefetch == self.prefetch:
            return
        self.prefetch = prefetch
        self.turn += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed_since(self, turn: int) -> None:
        if self.turn == turn:
            await self._changed.wait()


@dataclass(frozen=True, slots=True)
class Subscription:
    """
    flow: without one, it never changes.
    declare: called on each new connection, so it must bear repeating.
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
        self._trouble: str | None = "is not being received yet"
        self._flow = subscription.flow or Flow(subscription.concurrency * PREFETCH_RATIO)
        self._free = asyncio.Semaphore(subscription.concurrency)
        self._in_hand: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def why_not_ready(self) -> str | None:
        """Why no message comes, in words; None while the queue is being received."""
        if self._stop.requested:
            return "it is stopping"
        return self._trouble and f"the queue {self._subscription.queue} {self._trouble}"

    async def run(self) -> None:
        """
        Receive until asked to stop.

        Raises BrokerRefused when the broker refuses us before it ever served us; later on that is
        waited out, since a broker that is just starting may refuse everybody.
        """
        delays = growing_delays()
        while not self._stop.requested:
            began_at = monotonic()
            try:
                await self._serve()
            except BrokerError as trouble:
                if isinstance(trouble, BrokerRefused) and not self._served:
                    raise
                self._trouble = f"is not being received: RabbitMQ: {trouble}"
                logger.warning("broker.away", reason=str(trouble), in_hand=len(self._in_hand))
                if monotonic() - began_at > GOOD_CONNECTION_SECONDS:
                    delays = growing_delays()
                await self._stop.rest(next(delays))
        await self._finish()

    async def _serve(self) -> None:
        """One connection, until it is lost (raises BrokerError) or a stop is asked for."""
        subscription = self._subscription
        connection = await connect(
            self._settings.rabbitmq_url.get_secret_value(),
            name=subscription.name,
            heartbeat_seconds=self._settings.rabbitmq_heartbeat_seconds,
        )
        try:
            channel = await connection.open_channel()
            await subscription.declare(channel)
            self._served, self._trouble = True, None
            while not self._stop.requested:
                await self._receive_until_changed(channel, connection.closed)
            await self._finish()
            await channel.close()
        finally:
            await connection.close()

    async def _receive_until_changed(
        self, channel: AmqpChannel, connection_closed: asyncio.Future[str]
    ) -> None:
        """As the flow is now, until it changes, a stop is asked for, or the broker is gone."""
        prefetch, turn = self._flow.prefetch, self._flow.turn
        if not prefetch:
            await self._until_over(channel, connection_closed, turn)
            return
        arrived: asyncio.Queue[AmqpMessage] = asyncio.Queue()
        tag = await channel.consume(
            self._subscription.queue, prefetch=prefetch, on_message=arrived.put_nowait
        )
        logger.info("queue.receiving", queue=self._subscription.queue, prefetch=prefetch)
        # what goes back before would come again at once, and count against its delivery limit
        over = asyncio.Event()
        beginning = asyncio.create_task(self._begin_each(arrived, channel, over))
        try:
            await self._until_over(channel, connection_closed, turn)
            beginning.cancel()
            if not self._stop.requested:
                await channel.stop_consuming(tag)
                while not arrived.empty():
                    channel.hand_back(arrived.get_nowait())
        finally:
            beginning.cancel()
            over.set()

    async def _until_over(
        self, channel: AmqpChannel, connection_closed: asyncio.Future[str], turn: int
    ) -> None:
        """Returns when the flow has changed or a stop is asked for; raises BrokerError."""
        stopped = asyncio.create_task(self._stop.wait())
        changed = asyncio.create_task(self._flow.changed_since(turn))
        over = (stopped, changed, channel.closed, connection_closed)
        try:
            await asyncio.wait(over, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            changed.cancel()
        if self._stop.requested:
            return
        if channel.closed.done():
            raise channel.closed.result()
        if connection_closed.done():
            raise BrokerGone(connection_closed.result())

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
            return  # goes back to its queue when the channel is closed
        except NotNow:
            await over.wait()
            channel.hand_back(message)
        except Exception as error:  # noqa: BLE001  # one message must not end the receiving of all
            logger.error("message.not_handled", event_id=message.message_id, error=where(error))
            # unacknowledged it would fill the prefetch for ever; this way it comes again after a
            # wait, and the queue's delivery limit ends it
            await channel.close()

    def _put_down(self, task: asyncio.Task[None], channel: AmqpChannel) -> None:
        self._in_hand.discard(task)
        self._free.release()
        if task.cancelled() and not self._stop.requested:
            # a library's own cancellation: nobody has acknowledged the message, and nobody will
            logger.error("message.not_handled", error="CancelledError")
            closing = asyncio.create_task(channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _finish(self) -> None:
        """Wait for what is in hand; what takes longer than the grace time is let go."""
        if not self._in_hand:
            return
        logger.info("worker.finishing", in_hand=len(self._in_hand))
        _, late = await asyncio.wait(self._in_hand, timeout=self._subscription.grace_seconds)
        for task in late:
            task.cancel()
        if late:
            logger.warning("worker.let_go", in_hand=len(late))
            await asyncio.wait(late)


def where(error: Exception) -> str:
    """Its kind, and where it was raised; its words may hold a secret, or what people wrote."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {place.filename}:{place.lineno}"
