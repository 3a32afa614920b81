"""Sends entries on a confirm channel, and turns what comes back into fates."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

from loguru import logger

from outbox.event import Event
from relay.report import Report
from relay.window import PAUSED, Entry, Fate, Window
from runtime.rabbit import AmqpChannel, BrokerGone, Unpublishable

#: A broker that owes a confirm for so long, and has not said that it is blocked, is given up.
CONFIRM_DEADLINE_SECONDS = 30.0

FIRST_PAUSE_SECONDS = 1.0
PAUSE_CAP_SECONDS = 60.0

#: A routing key that has taken so many messages in a row without refusing one is sound again.
SOUND_AFTER_MESSAGES = 512


@dataclass(slots=True)
class Suspect:
    """
    A routing key whose message was refused or reached no queue: its queue is full or missing, so
    the next message would fare no better. It is tried again after a pause, with one message, then
    two, then four.

    failures: pauses in a row; allowance: messages that may be out at once; out: those that are.
    """

    paused_until: float
    failures: int = 1
    allowance: int = 1
    out: int = 0


class Publisher:
    """wake: called whenever the fate of some entry has become known."""

    def __init__(
        self,
        channel: AmqpChannel,
        exchange: str,
        window: Window,
        report: Report,
        wake: Callable[[], None],
    ) -> None:
        self._channel = channel
        self._exchange = exchange
        self._window = window
        self._report = report
        self._wake = wake
        self._suspects: dict[str, Suspect] = {}
        self._last_progress = monotonic()

    async def open(self) -> None:
        await self._channel.confirm_publishes(
            on_confirm=self._on_confirm, on_return=self._on_return
        )

    @property
    def silent_seconds(self) -> float:
        """How long the broker has owed a confirm."""
        return monotonic() - self._last_progress if self._window.in_flight_count else 0.0

    def may_go(self, routing_key: str) -> bool:
        suspect = self._suspects.get(routing_key)
        return suspect is None or (
            suspect.paused_until <= monotonic() and suspect.out < suspect.allowance
        )

    def pause_seconds(self, routing_key: str) -> float:
        """How long nothing will be sent to this routing key."""
        suspect = self._suspects.get(routing_key)
        return 0.0 if suspect is None else max(0.0, suspect.paused_until - monotonic())

    def forgive(self, routing_key: str | None) -> None:
        """A person says that it is sound again."""
        self._suspects.pop(routing_key or "", None)

    def dispatch(self, entry: Entry) -> None:
        """Send the entry, or hold it where its routing key may not go. Raises BrokerGone."""
        event = entry.event
        assert event is not None
        if not self.may_go(event.routing_key):
            self._window.hold(entry, PAUSED)
            self._wake()
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
            self._wake()
            return
        self._window.sent(entry)
        self._report.sent(entry)
        if self._suspects and (suspect := self._suspects.get(event.routing_key)):
            suspect.out += 1
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

    def note_settled(self, entries: Iterable[Entry]) -> None:
        """Trust a suspect routing key with more as it takes what it is given."""
        if not self._suspects:
            return
        for entry in entries:
            if not entry.probe or entry.event is None:
                continue
            suspect = self._suspects.get(entry.event.routing_key)
            if suspect is None:
                continue
            suspect.out = max(0, suspect.out - 1)
            if entry.fate is Fate.PUBLISHED:
                suspect.failures = 0
                suspect.allowance *= 2
                if suspect.allowance > SOUND_AFTER_MESSAGES:
                    del self._suspects[entry.event.routing_key]

    def _on_confirm(self, delivery_tag: int, multiple: bool, accepted: bool) -> None:
        self._last_progress = monotonic()
        confirmed = self._window.confirmed(delivery_tag, multiple=multiple, accepted=accepted)
        self._report.confirmed()
        if confirmed.failed:
            self._report.failed(len(confirmed.failed), accepted=accepted)
        for entry in confirmed.failed:
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
        routing_key = entry.event.routing_key
        suspect = self._suspects.get(routing_key)
        if suspect is None:
            suspect = self._suspects[routing_key] = Suspect(paused_until=0.0, failures=0)
        if suspect.paused_until > monotonic():
            return
        pause_seconds = min(
            FIRST_PAUSE_SECONDS * 2.0 ** min(suspect.failures, 16), PAUSE_CAP_SECONDS
        )
        suspect.paused_until = monotonic() + pause_seconds
        suspect.failures += 1
        suspect.allowance = 1
        logger.warning(
            "routing_key.paused",
            routing_key=routing_key,
            pause_seconds=pause_seconds,
            reason=entry.reason,
        )
