"""Sends entries on a confirm channel and turns what comes back into fates."""

from collections.abc import Callable
from contextlib import suppress
from time import monotonic

from loguru import logger

from outbox.event import Event
from relay.held import retry_delay_seconds
from relay.settling import PAUSED, Entry, Fate, Window
from runtime.rabbit import BrokerGone, Channel

#: A broker that owes a confirm for so long, and has not said that it is blocked, is given up.
CONFIRM_DEADLINE_SECONDS = 30.0


class Publisher:
    """
    wake: called whenever the fate of some entry has become known.

    A refused message (nack: the queue is full, or the broker is in trouble) pauses its routing
    key, so that a full queue is knocked at now and then instead of with every event.
    """

    def __init__(
        self, channel: Channel, exchange: str, window: Window, wake: Callable[[], None]
    ) -> None:
        self._channel = channel
        self._exchange = exchange
        self._window = window
        self._wake = wake
        self._paused_until: dict[str, float] = {}
        self._refusals: dict[str, int] = {}
        self._last_progress = monotonic()

    async def open(self) -> None:
        await self._channel.confirm_publishes(
            on_confirm=self._on_confirm, on_return=self._on_return
        )

    @property
    def silent_seconds(self) -> float:
        """How long the broker has owed a confirm."""
        return monotonic() - self._last_progress if self._window.in_flight_count else 0.0

    def dispatch(self, entry: Entry) -> None:
        """Send the entry, or hold it where its routing key is paused. Raises BrokerGone."""
        event = entry.event
        assert event is not None
        if self._is_paused(event):
            self._window.hold(entry, PAUSED)
            self._wake()
            return
        if not self._window.in_flight_count:
            self._last_progress = monotonic()
        self._channel.publish(
            exchange=self._exchange,
            routing_key=event.routing_key,
            body=event.body,
            message_id=event.message_id,
            type=event.type,
            content_type=event.content_type,
            headers=event.headers,
            timestamp=event.created_at,
            must_route=event.must_route,
        )
        self._window.sent(entry)

    def _is_paused(self, event: Event) -> bool:
        return self._paused_until.get(event.routing_key, 0.0) > monotonic()

    def _on_confirm(self, delivery_tag: int, multiple: bool, accepted: bool) -> None:
        self._last_progress = monotonic()
        confirmed = self._window.confirmed(delivery_tag, multiple=multiple, accepted=accepted)
        for entry in confirmed.refused:
            self._pause(entry)
        # a closed channel ends the term; what is left unsent is read again by the next one
        with suppress(BrokerGone):
            for entry in confirmed.ready:
                self.dispatch(entry)
        self._wake()

    def _on_return(self, message_id: str, code: int, text: str) -> None:
        self._window.returned(message_id, f"{code} {text}")

    def _pause(self, entry: Entry) -> None:
        assert entry.event is not None
        if self._is_paused(entry.event):
            return
        routing_key = entry.event.routing_key
        refusals = self._refusals.get(routing_key, 0)
        delay_seconds = retry_delay_seconds(refusals)
        self._refusals[routing_key] = refusals + 1
        self._paused_until[routing_key] = monotonic() + delay_seconds
        logger.warning("routing_key.paused", routing_key=routing_key, delay_seconds=delay_seconds)

    def note_published(self, entries: list[Entry]) -> None:
        """What flows again starts its next pause from the beginning."""
        if not self._refusals:
            return
        for entry in entries:
            if entry.fate is Fate.PUBLISHED and entry.event is not None:
                self._refusals.pop(entry.event.routing_key, None)
                self._paused_until.pop(entry.event.routing_key, None)
