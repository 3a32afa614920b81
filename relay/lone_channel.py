"""Publishes one message at a time, on a channel of its own, and waits for the broker's answer."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from outbox.event import Event
from relay.search import Refusal
from runtime.rabbit import (
    CONNECTION_CODES,
    AmqpChannel,
    BrokerError,
    ChannelClosed,
    Connection,
)
from runtime.shutdown import Stop

CONFIRM_DEADLINE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Answer:
    """accepted: not nacked. no_queue: why it was returned; None when it was routed."""

    accepted: bool
    no_queue: str | None


class LoneChannel:
    """
    connection: the one that publishes everything else.
    connect: opens another one; a message that closes it then costs nothing else.
    own_connection: use one of its own. Set after a closure of the whole connection.
    """

    def __init__(
        self,
        connection: Connection,
        connect: Callable[[], Awaitable[Connection]],
        exchange: str,
        over: Stop,
    ) -> None:
        self.own_connection = False
        self._shared = connection
        self._connect = connect
        self._exchange = exchange
        self._over = over
        self._own: Connection | None = None
        self._channel: AmqpChannel | None = None
        self._accepted: asyncio.Future[bool] | None = None
        self._no_queue: str | None = None

    async def publish(self, event: Event) -> Answer | Refusal | None:
        """
        Publish, and wait for what the broker says; None when the term ends meanwhile.

        Raises Unpublishable, and BrokerError when there is no channel to publish on.
        """
        channel = await self._open()
        self._accepted, self._no_queue = asyncio.get_running_loop().create_future(), None
        publish_event(channel, self._exchange, event)
        over = asyncio.create_task(self._over.wait())
        try:
            answered = await self._first_of(self._accepted, channel.closed, over)
        finally:
            over.cancel()
        if self._accepted.done():
            return Answer(self._accepted.result(), self._no_queue)
        if not answered:
            # a confirm that comes later must not count for the next message
            await self._drop_channel()
            return Refusal(None, f"no confirm within {CONFIRM_DEADLINE_SECONDS:g} s")
        if channel.closed.done():
            return await self._refusal(channel.closed.result())
        return None

    async def close(self) -> None:
        await self._drop_channel()
        if self._own is not None:
            await self._own.close()
            self._own = None

    async def _first_of(self, *awaited: asyncio.Future[Any]) -> bool:
        """False when none is done by the deadline; time on a blocked connection does not count."""
        while True:
            done, _ = await asyncio.wait(
                awaited,
                timeout=CONFIRM_DEADLINE_SECONDS,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if done or not (self._own or self._shared).blocked:
                return bool(done)

    async def _refusal(self, error: BrokerError) -> Refusal:
        self._channel = None
        if isinstance(error, ChannelClosed):
            return Refusal(error.code, error.text)
        if self._own is None:
            raise error
        code = self._own.close_code
        await self._own.close()
        self._own = None
        if code is not None and code not in CONNECTION_CODES:
            raise error
        return Refusal(code, str(error).removeprefix(f"{code} "))

    async def _open(self) -> AmqpChannel:
        if self._channel is not None and not self._channel.closed.done():
            return self._channel
        if self.own_connection and self._own is None:
            self._own = await self._connect()
        self._channel = await (self._own or self._shared).open_channel()
        await self._channel.confirm_publishes(
            on_confirm=self._on_confirm, on_return=self._on_return
        )
        return self._channel

    async def _drop_channel(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def _on_confirm(self, _delivery_tag: int, _multiple: bool, accepted: bool) -> None:
        if self._accepted is not None and not self._accepted.done():
            self._accepted.set_result(accepted)

    def _on_return(self, _message_id: str, _routing_key: str, reason: str) -> None:
        self._no_queue = reason


def publish_event(channel: AmqpChannel, exchange: str, event: Event) -> None:
    """Send it; its confirm comes later. Raises BrokerGone, Unpublishable."""
    channel.publish(
        exchange=exchange,
        routing_key=event.routing_key,
        body=event.body,
        message_id=event.message_id,
        type=event.type,
        content_type=event.content_type,
        headers=event.headers,
        timestamp=event.created_at,
        must_route=event.must_route,
    )
