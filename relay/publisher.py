"""Publishes entries on a confirm channel, and turns confirms and returns into fates."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

from loguru import logger

from outbox.event import Event
from relay.report import Report
from relay.window import PAUSED, Entry, Fate, Window
from runtime.rabbit import AmqpChannel, BrokerGone, Unpublishable

#: The term ends when no confirm arrives for this long on a connection that is not blocked.
CONFIRM_DEADLINE_SECONDS = 30.0

FIRST_PAUSE_SECONDS = 1.0
PAUSE_CAP_SECONDS = 60.0

#: A routing key has recovered after this many messages in a row without a refusal.
RECOVERED_AFTER_MESSAGES = 512


@dataclass(slots=True)
class RoutingKeyBackoff:
    """
    Slows down a routing key whose message was refused or reached no queue: its queue is full or
    missing, so the next message would fail, too. It is retried after a pause, with one message,
    then two, then four.

    failures: pauses in a row.
    allowance: maximum number of messages in flight at once.
    in_flight: number of messages in flight.
    """

    paused_until: float
    failures: int = 1
    allowance: int = 1
    in_flight: int = 0


class Publisher:
    """on_decided: called after the fate of some entry was decided."""

    def __init__(
        self,
        channel: AmqpChannel,
        exchange: str,
        window: Window,
        report: Report,
        on_decided: Callable[[], None],
    ) -> None:
        self._channel = channel
        self._exchange = exchange
        self._window = window
        self._report = report
        self._on_decided = on_decided
        self._backoffs: dict[str, RoutingKeyBackoff] = {}
        self._last_progress = monotonic()

    async def open(self) -> None:
        await self._channel.confirm_publishes(
            on_confirm=self._on_confirm, on_return=self._on_return
        )

    @property
    def silent_seconds(self) -> float:
        """Seconds since the last confirm while one is outstanding, otherwise 0."""
        return monotonic() - self._last_progress if self._window.in_flight_count else 0.0

    def may_go(self, routing_key: str) -> bool:
        backoff = self._backoffs.get(routing_key)
        return backoff is None or (
            backoff.paused_until <= monotonic() and backoff.in_flight < backoff.allowance
        )

    def pause_seconds(self, routing_key: str) -> float:
        """Seconds until this routing key may be sent to again."""
        backoff = self._backoffs.get(routing_key)
        return 0.0 if backoff is None else max(0.0, backoff.paused_until - monotonic())

    def reset(self, routing_key: str | None) -> None:
        """Send to this routing key again, as an operator asked."""
        self._backoffs.pop(routing_key or "", None)

    def dispatch(self, entry: Entry) -> None:
        """Send the entry, or hold it while its routing key is paused. Raises BrokerGone."""
        event = entry.event
        assert event is not None
        if not self.may_go(event.routing_key):
            self._window.hold(entry, PAUSED)
            self._on_decided()
            return
        if not self._window.in_flight_count:
            self._last_progress = monotonic()
        try:
            self._publish(event)
        except Unpublishable as reason:
            self._window.park(entry, str(reason))
            logger.error(
                "event.parked", event_id=event.message_id, key=event.key, reason=str(reason)
            )
            self._on_decided()
            return
        self._window.sent(entry)
        self._report.sent(entry)
        if self._backoffs and (backoff := self._backoffs.get(event.routing_key)):
            backoff.in_flight += 1
            entry.probe = True

    def _publish(self, event: Event) -> None:
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

    def note_saved(self, entries: Iterable[Entry]) -> None:
        """Allow a slowed-down routing key twice as many messages after each one it accepts."""
        if not self._backoffs:
            return
        for entry in entries:
            if not entry.probe or entry.event is None:
                continue
            backoff = self._backoffs.get(entry.event.routing_key)
            if backoff is None:
                continue
            backoff.in_flight = max(0, backoff.in_flight - 1)
            if entry.fate is Fate.PUBLISHED:
                backoff.failures = 0
                backoff.allowance *= 2
                if backoff.allowance > RECOVERED_AFTER_MESSAGES:
                    del self._backoffs[entry.event.routing_key]

    def _on_confirm(self, delivery_tag: int, multiple: bool, accepted: bool) -> None:
        self._last_progress = monotonic()
        confirmed = self._window.confirmed(delivery_tag, multiple=multiple, accepted=accepted)
        self._report.confirmed()
        if confirmed.failed:
            self._report.failed(len(confirmed.failed), accepted=accepted)
        for entry in confirmed.failed:
            self._pause(entry)
        # a closed channel ends the term; the next term reads again what was not sent
        with suppress(BrokerGone):
            for entry in confirmed.ready:
                self.dispatch(entry)
        self._on_decided()

    def _on_return(self, message_id: str, routing_key: str, reason: str) -> None:
        self._window.returned(message_id, routing_key, reason)

    def _pause(self, entry: Entry) -> None:
        assert entry.event is not None
        routing_key = entry.event.routing_key
        backoff = self._backoffs.get(routing_key)
        if backoff is None:
            backoff = self._backoffs[routing_key] = RoutingKeyBackoff(paused_until=0.0, failures=0)
        if backoff.paused_until > monotonic():
            return
        pause_seconds = min(
            FIRST_PAUSE_SECONDS * 2.0 ** min(backoff.failures, 16), PAUSE_CAP_SECONDS
        )
        backoff.paused_until = monotonic() + pause_seconds
        backoff.failures += 1
        backoff.allowance = 1
        logger.warning(
            "routing_key.paused",
            routing_key=routing_key,
            pause_seconds=pause_seconds,
            reason=entry.reason,
        )
