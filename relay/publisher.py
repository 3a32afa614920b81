"""
Publishes entries, and turns what the broker answers into fates.

    pipelined on one channel ── closed because of a message ──> one at a time, on a channel of
              ^                                                 their own, what was unconfirmed
              └────────────────── all of it is settled ─────────────────┘

The term goes on meanwhile. What is dispatched during the search waits for its end.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

from loguru import logger
from pymongo.errors import PyMongoError

from relay.checkpoint import Checkpoint
from relay.lone_channel import Answer, LoneChannel, publish_event
from relay.report import Report
from relay.search import Refusal, Search
from relay.window import PAUSED, UNCONFIRMED, Confirmed, Entry, Fate, Window
from runtime.rabbit import (
    ACCESS_REFUSED,
    CONNECTION_CODES,
    CONNECTION_FORCED,
    NOT_FOUND,
    AmqpChannel,
    BrokerError,
    BrokerGone,
    ChannelClosed,
    Connection,
    Unpublishable,
)
from runtime.retry import growing_delays
from runtime.shutdown import Stop

#: The term ends when no confirm arrives for this long on a connection that is not blocked.
CONFIRM_DEADLINE_SECONDS = 30.0

FIRST_PAUSE_SECONDS = 1.0
PAUSE_CAP_SECONDS = 60.0

#: An event is held when its confirm is owed for this long while others are confirmed: its queue has
#: no leader, and neither the marks nor the window must wait for it.
OVERDUE_SECONDS = 10.0

#: Pauses while the broker refuses every message.
FIRST_WAIT_SECONDS = 0.5
WAIT_CAP_SECONDS = 10.0

#: How often a relay that may have been overruled looks whether it may publish again.
OVERRULED_POLL_SECONDS = 0.25

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
    refusal: why its messages close the channel, so that they are published alone; else empty.
    """

    paused_until: float
    failures: int = 1
    allowance: int = 1
    in_flight: int = 0
    refusal: str = ""


class Publisher:
    """
    lone: publishes what must not take other messages down with it.
    over: the end of the term; call `wake` then.
    on_decided: called after the fate of some entry was decided.
    """

    def __init__(
        self,
        connection: Connection,
        lone: LoneChannel,
        exchange: str,
        window: Window,
        checkpoint: Checkpoint,
        report: Report,
        over: Stop,
        on_decided: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._lone = lone
        self._exchange = exchange
        self._window = window
        self._checkpoint = checkpoint
        self._report = report
        self._over = over
        self._on_decided = on_decided
        self._channel: AmqpChannel | None = None
        self._backoffs: dict[str, RoutingKeyBackoff] = {}
        self._last_progress = monotonic()
        self._woken = asyncio.Event()
        self._search: Search | None = None
        self._search_to_ordinal = 0
        self._retries: deque[Entry] = deque()
        self._ready: list[Entry] = []
        self._delays = _wait_delays()
        self._tags_sent: deque[tuple[float, int]] = deque()
        #: some entries may have to be published alone; otherwise nothing is looked up per event
        self._is_careful = False

    async def open(self) -> None:
        """Open the channel for all that goes pipelined. Raises BrokerError."""
        channel = await self._connection.open_channel()
        await channel.confirm_publishes(on_confirm=self._on_confirm, on_return=self._on_return)
        channel.closed.add_done_callback(lambda _: self.wake())
        self._tags_sent.clear()
        self._channel = channel

    def continue_search(self, first_ordinal: int) -> None:
        """Go on with a search that an earlier term has not finished."""
        unfinished = self._checkpoint.search
        if unfinished is None:
            return
        count = unfinished.settled_to - self._checkpoint.settled
        self._search_to_ordinal = first_ordinal + count - 1 if count > 0 else 0
        self._lone.own_connection = unfinished.code is None or unfinished.code in CONNECTION_CODES
        self._look_for_care()
        logger.warning("search.continued", code=unfinished.code, events=max(0, count))

    async def run(self) -> None:
        """
        Publish alone what must go alone, until the term is over.

        Raises PyMongoError, Deposed, and BrokerError when the connection is lost.
        """
        while not self._over.requested:
            if self._channel is not None and self._channel.closed.done():
                await self._begin_search(self._channel.closed.result())
            if not self._checkpoint.may_publish:
                await self._over.rest(OVERRULED_POLL_SECONDS)
            elif self._search is not None and (suspect := self._search.take_next()) is not None:
                await self._try_suspect(self._search, suspect)
            elif self._retries:
                await self._retry_alone(self._retries.popleft())
            elif self._search is None:
                await self._idle()
            elif self._search.is_over:
                await self._end_search(self._search)
            else:
                await self._over.rest(next(self._delays))
                self._search.resume()

    async def close(self, cause: Exception | None, *, settled_count: int) -> None:
        """
        End the term. Another one that is ended by the same messages would repeat them all, so the
        next one publishes one at a time what this one leaves unconfirmed, if this one

            was ended by a code that a message may cause, or
            got no confirm for too long, or
            settled nothing.
        """
        await self._lone.close()
        if not self._window.unconfirmed_count or not isinstance(cause, BrokerError):
            return
        code = self._connection.close_code
        lost = self._connection.closed.done()
        if code in CONNECTION_CODES or (code != CONNECTION_FORCED and not (lost and settled_count)):
            await self._store_search(code, str(cause))

    def wake(self) -> None:
        """The channel was closed, an entry must go alone, or the term is over."""
        self._woken.set()

    @property
    def silent_seconds(self) -> float:
        """Seconds since the last confirm while one is outstanding on the channel, otherwise 0."""
        return monotonic() - self._last_progress if self._window.in_flight_count else 0.0

    def hold_overdue(self) -> None:
        """
        Hold what is overdue while others are confirmed, and slow down its routing key.

        Call this several times a second: it notes how far the delivery tags have come.
        """
        now = monotonic()
        if self._connection.blocked:
            self._tags_sent.clear()
            return
        self._tags_sent.append((now, self._window.next_tag))
        before_tag = 0
        while self._tags_sent[0][0] < now - OVERDUE_SECONDS:
            _, before_tag = self._tags_sent.popleft()
        if not before_tag:
            return
        if self.silent_seconds > OVERDUE_SECONDS and self._window.awaits_newest:
            return  # the broker confirms nothing at all, or only one event is sent
        overdue = self._window.hold_overdue(before_tag)
        for entry in overdue:
            self._pause_alone(entry)
        if overdue:
            self._on_decided()

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
        backoff = self._backoffs.get(routing_key or "")
        if backoff is not None and backoff.refusal:
            backoff.paused_until, backoff.in_flight = 0.0, 0
        else:
            self._backoffs.pop(routing_key or "", None)

    def dispatch(self, entry: Entry) -> None:
        """Send the entry, set it aside, or hold it while its routing key is paused."""
        event = entry.event
        assert event is not None
        if not self.may_go(event.routing_key):
            self._hold_paused(entry)
            return
        if self._is_careful and self._is_set_aside(entry):
            return
        if not self._window.in_flight_count:
            self._last_progress = monotonic()
        try:
            assert self._channel is not None
            publish_event(self._channel, self._exchange, event)
        except Unpublishable as error:
            self._park(entry, str(error))
            return
        except BrokerGone:
            # closed a moment ago: `run` begins a search, or the term ends with the connection
            self._defer(entry)
            return
        self._window.sent(entry)
        self._report.sent(entry)
        if self._backoffs:
            self._count_probe(entry)

    def dispatch_alone(self, entry: Entry) -> None:
        """Send the entry on a channel of its own, which it has closed before."""
        self._count_probe(entry)
        self._retries.append(entry)
        self._window.set_aside(entry)
        self.wake()

    def note_saved(self, entries: Iterable[Entry]) -> None:
        """Allow a slowed-down routing key twice as many messages after each one it accepts."""
        if self._checkpoint.search is not None:
            self.wake()
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
                backoff.failures, backoff.refusal = 0, ""
                backoff.allowance *= 2
                if backoff.allowance > RECOVERED_AFTER_MESSAGES:
                    del self._backoffs[entry.event.routing_key]
        self._look_for_care()

    def _on_confirm(self, delivery_tag: int, multiple: bool, accepted: bool) -> None:
        self._last_progress = monotonic()
        self._settle(
            self._window.confirmed(delivery_tag, multiple=multiple, accepted=accepted), accepted
        )

    def _settle(self, confirmed: Confirmed, accepted: bool) -> None:
        self._report.confirmed()
        if confirmed.failed:
            self._report.failed(len(confirmed.failed), accepted=accepted)
        for entry in confirmed.failed:
            self._pause(entry)
        self._ready += confirmed.ready
        self.resume()
        self._on_decided()

    def resume(self) -> None:
        """Send what has become ready, unless this relay may have been overruled."""
        if not self._checkpoint.may_publish:
            return
        ready, self._ready = self._ready, []
        for entry in ready:
            self.dispatch(entry)

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

    def _hold_paused(self, entry: Entry) -> None:
        assert entry.event is not None
        backoff = self._backoffs[entry.event.routing_key]
        self._window.hold(entry, backoff.refusal or PAUSED)
        self._on_decided()

    def _park(self, entry: Entry, reason: str) -> None:
        self._window.park(entry, reason)
        logger.error("event.parked", event_id=str(entry.id), key=entry.key, reason=reason)
        self._on_decided()

    def _count_probe(self, entry: Entry) -> None:
        assert entry.event is not None
        backoff = self._backoffs.get(entry.event.routing_key)
        if backoff is not None and not entry.probe:
            backoff.in_flight += 1
            entry.probe = True

    def _is_set_aside(self, entry: Entry) -> bool:
        """Whether the entry waits for the end of a search, or goes alone."""
        assert entry.event is not None
        if self._search_to_ordinal and entry.in_order:
            if entry.ordinal <= self._search_to_ordinal:
                self._defer(entry, suspect=True)
                return True
            self._search_to_ordinal = 0
            self._look_for_care()
        if self._search is not None:
            self._defer(entry)
            return True
        backoff = self._backoffs.get(entry.event.routing_key)
        if backoff is not None and backoff.refusal:
            self.dispatch_alone(entry)
            return True
        return False

    def _defer(self, entry: Entry, *, suspect: bool = False) -> None:
        search = self._search or Search()
        self._search = search
        self._look_for_care()
        if suspect:
            search.suspect([entry])
        else:
            search.later.append(entry)
        self._window.set_aside(entry)
        self.wake()

    def _look_for_care(self) -> None:
        self._is_careful = (
            self._search is not None
            or self._search_to_ordinal > 0
            or any(backoff.refusal for backoff in self._backoffs.values())
        )

    async def _begin_search(self, error: BrokerError) -> None:
        if not isinstance(error, ChannelClosed):
            raise error
        suspects = self._window.recall()
        self._channel = None
        self._search = self._search or Search()
        self._search.suspect(suspects)
        self._look_for_care()
        self._report.channel_closed()
        logger.warning("search.started", reason=str(error), suspects=len(suspects))
        await self._store_search(error.code, error.text)

    async def _store_search(self, code: int | None, reason: str) -> None:
        settled_to = self._checkpoint.settled + self._window.unsaved_count
        # without it, a successor publishes the window at once, and searches when that is refused
        with suppress(PyMongoError):
            await self._checkpoint.begin_search(settled_to=settled_to, code=code, reason=reason)

    async def _end_search(self, search: Search) -> None:
        if self._channel is None:
            await self.open()
        self._search = None
        self._delays = _wait_delays()
        self._report.search_waits(None)
        self._look_for_care()
        self._ready += search.later
        self.resume()

    async def _idle(self) -> None:
        stored = self._checkpoint.search
        if stored is not None and self._checkpoint.settled >= stored.settled_to:
            with suppress(PyMongoError):  # repeated after the next save
                await self._checkpoint.end_search()
                logger.warning("search.completed")
        self._woken.clear()
        if not self._over.requested:
            await self._woken.wait()

    async def _try_suspect(self, search: Search, entry: Entry) -> None:
        assert entry.event is not None
        if not self.may_go(entry.event.routing_key):
            search.settled(entry, confirmed=False)
            self._hold_paused(entry)
            return
        self._count_probe(entry)
        try:
            answer = await self._lone.publish(entry.event)
        except Unpublishable as error:
            search.settled(entry, confirmed=False)
            self._park(entry, str(error))
            return
        except BrokerError as error:
            search.give_back(entry)
            await self._wait_for_broker(str(error))
            return
        if isinstance(answer, Answer):
            search.settled(entry, confirmed=True)
            self._delays = _wait_delays()
            self._report.search_waits(None)
            self._answered(entry, answer)
        elif answer is not None:
            self._report.channel_closed()
            if search.refused(entry, answer):
                self._blame(entry, answer)
            elif search.is_stuck:
                self._report_wait(self._with_remedy(answer))

    async def _retry_alone(self, entry: Entry) -> None:
        assert entry.event is not None
        late = self._window.take_late_confirm(entry.id)
        if late is not None:
            self._answered(entry, Answer(late.accepted, late.no_queue))
            return
        if self._window.is_owed(entry.id):
            self._window.hold(entry, UNCONFIRMED)
            self._pause_alone(entry)
            self._on_decided()
            return
        try:
            answer = await self._lone.publish(entry.event)
        except Unpublishable as error:
            self._park(entry, str(error))
            return
        except BrokerError as error:
            self._retries.appendleft(entry)
            await self._wait_for_broker(str(error))
            return
        if isinstance(answer, Answer):
            self._answered(entry, answer)
        elif answer is not None:
            self._report.channel_closed()
            self._blame(entry, answer)

    def _answered(self, entry: Entry, answer: Answer) -> None:
        decided = self._window.answered(entry, accepted=answer.accepted, no_queue=answer.no_queue)
        self._settle(decided, answer.accepted)

    def _blame(self, entry: Entry, refusal: Refusal) -> None:
        assert entry.event is not None
        if refusal.is_final:
            self._park(entry, refusal.reason)
            return
        self._window.hold(entry, refusal.reason)
        if refusal.is_silence or refusal.names(entry.event):
            self._pause_alone(entry)
        self._on_decided()

    def _pause_alone(self, entry: Entry) -> None:
        """Slow down the routing key of an entry that was held; what follows goes alone."""
        assert entry.event is not None
        self._pause(entry)
        self._backoffs[entry.event.routing_key].refusal = entry.reason
        self._look_for_care()

    async def _wait_for_broker(self, reason: str) -> None:
        self._report_wait(reason)
        await self._over.rest(next(self._delays))

    def _report_wait(self, reason: str) -> None:
        if self._report.search_waits(reason):
            logger.warning("search.waiting", reason=reason)

    def _with_remedy(self, refusal: Refusal) -> str:
        if refusal.code == NOT_FOUND:
            return (
                f"{refusal}: declare the exchange {self._exchange!r} "
                "(`python -m consumers topology`), or correct EVENTS_EXCHANGE"
            )
        if refusal.code == ACCESS_REFUSED:
            return f"{refusal}: grant the relay's user the permissions described in deploy/rabbitmq"
        return str(refusal)


def _wait_delays() -> Iterator[float]:
    return growing_delays(first_seconds=FIRST_WAIT_SECONDS, cap_seconds=WAIT_CAP_SECONDS)
