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


class _Line:
    """A confirm channel and the last message on it; accepted: done once that is (n)acked."""

    def __init__(self, channel: AmqpChannel) -> None:
        self.channel = channel
        self.routing_key = ""
        self.accepted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.no_queue: str | None = None

    @property
    def is_owed(self) -> bool:
        return not self.accepted.done() and not self.channel.closed.done()

    def send(self, exchange: str, event: Event) -> None:
        self.accepted, self.no_queue = asyncio.get_running_loop().create_future(), None
        self.routing_key = event.routing_key
        publish_event(self.channel, exchange, event)

    def on_confirm(self, _delivery_tag: int, _multiple: bool, accepted: bool) -> None:
        if not self.accepted.done():
            self.accepted.set_result(accepted)

    def on_return(self, _message_id: str, _routing_key: str, reason: str) -> None:
        self.no_queue = reason


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
        self._line: _Line | None = None
        #: by event id; a line is kept until the overdue confirm has come
        self._overdue: dict[Any, _Line] = {}

    async def publish(self, event: Event) -> Answer | Refusal | None:
        """
        Publish, and wait for what the broker says; None when the term ends meanwhile.

        A message whose confirm is overdue is not sent again while its channel is open, and no other
        one with its routing key is sent meanwhile.

        Raises Unpublishable, and BrokerError when there is no channel to publish on.
        """
        line = self._overdue.pop(event.id, None)
        if line is None or line.channel.closed.done():
            if self._owes(event.routing_key):
                return Refusal(None, "an earlier message is not confirmed", is_silence=True)
            line = await self._open()
            line.send(self._exchange, event)
        over = asyncio.create_task(self._over.wait())
        try:
            answered = await self._first_of(line.accepted, line.channel.closed, over)
        finally:
            over.cancel()
        if line.accepted.done():
            return Answer(line.accepted.result(), line.no_queue)
        if not answered:
            self._overdue[event.id] = line
            if self._line is line:
                self._line = None
            text = f"no confirm within {CONFIRM_DEADLINE_SECONDS:g} s"
            return Refusal(None, text, is_silence=True)
        if line.channel.closed.done():
            return await self._refusal(line.channel.closed.result())
        return None

    async def close(self) -> None:
        """The channels of a shared connection close with it."""
        if self._own is not None:
            await self._own.close()
            self._own = None

    def _owes(self, routing_key: str) -> bool:
        return any(
            line.is_owed and line.routing_key == routing_key for line in self._overdue.values()
        )

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
        self._line = None
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

    async def _open(self) -> _Line:
        if self._line is not None and not self._line.channel.closed.done():
            return self._line
        if self.own_connection and self._own is None:
            self._own = await self._connect()
        line = _Line(await (self._own or self._shared).open_channel())
        await line.channel.confirm_publishes(on_confirm=line.on_confirm, on_return=line.on_return)
        self._line = line
        return line


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
