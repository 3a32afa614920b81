"""
The relay's life, from the lock to the last saved position.

    hold the lock, take the next epoch
    no position, or a lost one -> hand-over
    repeat: read what has arrived -> publish it
    beside it: settle -> mark, then save the position; let held events go
    stop: no new reads -> confirms -> marks -> position -> RabbitMQ (the lock frees) -> MongoDB
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

from loguru import logger
from pymongo.errors import PyMongoError

from outbox.collection import INDEXES
from outbox.state import PENDING_STATES
from relay import operations
from relay.checkpoint import Checkpoint, Deposed, Position
from relay.held import HeldKeys
from relay.intake import entry_of, is_addressable
from relay.leadership import StandbyLost, Stopped, hold_lock
from relay.marks import Marks
from relay.monitoring import monitored_relay
from relay.publisher import CONFIRM_DEADLINE_SECONDS, Publisher
from relay.release import Release
from relay.report import Leadership, Report
from relay.resync import SnapshotExpired, read_pending
from relay.settings import RelaySettings
from relay.stream import PIPELINE, Change, OutboxStream, PositionLost
from relay.sweep import Sweep
from relay.window import Entry, Fate, Window
from runtime.mongo import (
    Client,
    Database,
    Document,
    check_server,
    close,
    ensure_collection,
    is_transient,
    new_owner,
    open_client,
)
from runtime.operations import OPERATIONS
from runtime.rabbit import (
    ACCESS_REFUSED,
    NOT_FOUND,
    AmqpChannel,
    BrokerError,
    BrokerGone,
    BrokerRefused,
    ChannelClosed,
    Connection,
)
from runtime.retry import growing_delays
from runtime.shutdown import Stop

#: A quiet outbox saves how far the server has looked this often, or its position would grow old
#: and fall out of the oplog although nothing was missed.
IDLE_SAVE_SECONDS = 5.0

HELD_POLL_SECONDS = 0.25

#: With little in the window, marks wait so long for company: one at a time they would cost more of
#: both servers and of this process than the publishing does, and so its latency.
MARKS_GATHER_SECONDS = 0.05

#: What a new term may well not meet again. Anything else is a mistake of ours or of whoever set
#: the servers up, and ends the process.
PASSING_TROUBLE = (PyMongoError, BrokerError, Deposed)


async def run(settings: RelaySettings, stop: Stop) -> None:
    """
    Lead whenever nobody else does, until asked to stop.

    Raises UnsuitableServer, and BrokerRefused before the broker has once taken us in; later on one
    that is just starting may refuse everybody, and is waited out.
    """
    client = open_client(settings.mongodb_url.get_secret_value(), process="relay")
    try:
        async with monitored_relay(settings, client, stop) as report:
            await _lead_until_stopped(settings, client, stop, report)
    finally:
        await close(client)


async def _lead_until_stopped(
    settings: RelaySettings, client: Client, stop: Stop, report: Report
) -> None:
    owner, taken_in, delays = new_owner(), False, growing_delays()
    while not stop.requested:
        try:
            ended = await _lead_once(settings, client, owner, stop, report)
        except Stopped:
            return
        except (PyMongoError, BrokerError) as trouble:
            if isinstance(trouble, BrokerRefused) and not taken_in:
                raise
            # either comes only after the broker has taken us in
            taken_in = taken_in or isinstance(trouble, (StandbyLost, ChannelClosed))
            ended = Ended(0, trouble)
        else:
            taken_in = True
        if ended.settled_count:
            delays = growing_delays()
        if ended.trouble is not None:
            if not isinstance(ended.trouble, PASSING_TROUBLE):
                raise ended.trouble
            report.interrupted(_in_short(ended.trouble))
            logger.warning("relay.interrupted", reason=_cure(ended.trouble, settings))
            await stop.rest(next(delays))


@dataclass(frozen=True, slots=True)
class Ended:
    """How a term ended; trouble is None when it was asked to."""

    settled_count: int
    trouble: Exception | None


async def _lead_once(
    settings: RelaySettings, client: Client, owner: str, stop: Stop, report: Report
) -> Ended:
    await check_server(client)
    database = client[settings.mongodb_database]
    await ensure_collection(database, settings.outbox_collection, indexes=INDEXES)
    await ensure_collection(database, OPERATIONS, indexes=operations.INDEXES)
    async with hold_lock(settings, stop, report) as connection:
        channel = await connection.open_channel()
        checkpoint = await Checkpoint.take(
            database, group=settings.relay_group, owner=owner, pipeline=PIPELINE
        )
        term = Term(settings, database, connection, channel, checkpoint, stop, report)
        return await term.lead()


class Term:
    """
    One leadership, from an epoch to the loss of the lock or the wish to stop.

    Every task ends by itself once the term is over, so that no read of MongoDB is ever cancelled.
    """

    def __init__(
        self,
        settings: RelaySettings,
        database: Database,
        connection: Connection,
        channel: AmqpChannel,
        checkpoint: Checkpoint,
        stop: Stop,
        report: Report,
    ) -> None:
        self._settings = settings
        self._database = database
        self._collection = settings.outbox_collection
        self._connection = connection
        self._channel = channel
        self._checkpoint = checkpoint
        self._stop = stop
        self._report = report
        self._window = Window(settings.relay_window_messages, settings.relay_window_bytes)
        self._marks = Marks(database, self._collection, checkpoint.epoch)
        self._held = HeldKeys(database, self._collection)
        self._sweep = Sweep(database, self._collection)
        self._room, self._decided, self._over = asyncio.Event(), asyncio.Event(), Stop()
        self._trouble: Exception | None = None
        self._publisher = Publisher(
            channel, settings.events_exchange, self._window, report, self._decided.set
        )
        self._next_ordinal = 0
        self._unknown_in_a_row = 0
        self._idle_saved_at = monotonic()

    async def lead(self) -> Ended:
        """Lead until asked to stop, or until trouble ends the term."""
        settled_before = self._checkpoint.settled
        logger.info(
            "relay.leading",
            epoch=self._checkpoint.epoch,
            settled=settled_before,
            handover=self._checkpoint.handover_reason,
        )
        self._report.leads(
            Leadership(
                self._checkpoint,
                self._window,
                self._connection,
                lambda: self._publisher.silent_seconds,
            )
        )
        self._channel.closed.add_done_callback(lambda closed: self._end(closed.result()))
        self._connection.closed.add_done_callback(
            lambda closed: self._end(BrokerGone(closed.result()))
        )
        beside = [
            asyncio.create_task(self._unless_trouble(work))
            for work in (self._settle(), self._let_held_go(), self._wake_on_stop())
        ]
        await self._unless_trouble(self._relay())
        await self._drain()
        self._end(None)
        await asyncio.gather(*beside)
        self._report.ended()
        logger.info("relay.stopped_leading", settled=self._checkpoint.settled)
        return Ended(self._checkpoint.settled - settled_before, self._trouble)

    async def _relay(self) -> None:
        await self._publisher.open()
        highest_held = await self._held.load()
        # marks are written before the count: a crash in between must not number two events alike
        self._next_ordinal = max(self._checkpoint.settled, highest_held) + 1
        self._window.held_keys.update(self._held.keys)
        while self._goes_on():
            if self._checkpoint.handover_reason is not None:
                await self._hand_over()
            else:
                await self._tail()

    async def _tail(self) -> None:
        """Publish what arrives on the stream, reading one batch ahead."""
        assert self._checkpoint.position is not None
        stream = OutboxStream(self._database, self._collection, self._checkpoint.position)
        self._unknown_in_a_row = 0
        reading = asyncio.create_task(stream.read(self._stop))
        try:
            while self._goes_on():
                with self._report.waiting_for("a read of the change stream"):
                    arrived = await reading
                reading = asyncio.create_task(stream.read(self._stop))
                await self._publish_missed()
                if arrived.changes:
                    await self._publish_changes(arrived.changes)
                elif self._window.is_empty:
                    self._report.caught_up()
                    if arrived.position is not None:
                        await self._save_idle(arrived.position)
        except PositionLost as lost:
            logger.error("position.lost", reason=str(lost))
            await self._until_empty(self._goes_on)
            await self._checkpoint.begin_handover(str(lost))
        finally:
            await asyncio.gather(reading, return_exceptions=True)
            await stream.close()

    async def _publish_changes(self, changes: Sequence[Change]) -> None:
        entries = [self._entry(change.document, change.position) for change in changes]
        for entry, change in zip(entries, changes, strict=True):
            entry.committed_at = change.committed_at
            if change.document.get("state") not in PENDING_STATES:
                entry.fate = Fate.KNOWN  # its writer says that it is not to be published
        if self._unknown_in_a_row < self._settings.relay_window_messages:
            await self._skip_known(entries)
        for entry in entries:
            if not await self._admit(entry):
                return

    async def _skip_known(self, entries: Sequence[Entry]) -> None:
        """
        Skip what an earlier term has settled beyond its last saved position. As its window allowed
        no more, a whole window of events that nobody knows is the end of it; and what was committed
        since this term began goes out without the question, which would double its latency.
        """
        entries = [entry for entry in entries if self._is_older(entry)]
        if not entries:
            return
        # an _id that is an object or an array cannot stand in a set; such an event is unfit anyway
        ids = [
            entry.id
            for entry in entries
            if isinstance(entry.id, Hashable) and is_addressable(entry.id)
        ]
        known = await self._marks.settled_among(ids)
        for entry in entries:
            self._unknown_in_a_row += 1
            if isinstance(entry.id, Hashable) and entry.id in known:
                entry.fate = Fate.KNOWN
                self._unknown_in_a_row = 0
        self._report.repeats(
            sum(entry.fate is None and entry.event is not None for entry in entries)
        )

    def _is_older(self, entry: Entry) -> bool:
        return entry.committed_at is None or entry.committed_at < self._checkpoint.led_since

    async def _publish_missed(self) -> None:
        assert self._checkpoint.position is not None
        for document in await self._sweep.missed(self._checkpoint.position):
            entry = self._entry(document, None)
            logger.error("event.missed", event_id=str(entry.id), key=entry.key)
            if not await self._admit(entry):
                return

    async def _hand_over(self) -> None:
        """Publish what is pending; the stream goes on from the moment of that snapshot."""
        reason = self._checkpoint.handover_reason
        assert reason is not None
        await self._checkpoint.begin_handover(reason)
        logger.warning("handover.began", reason=reason)
        # it may have been dropped in mid-term
        await ensure_collection(self._database, self._collection, indexes=INDEXES)
        published = 0
        try:
            async with aclosing(read_pending(self._database, self._collection)) as pending:
                async for documents, snapshot_time in pending:
                    position = Position(None, snapshot_time)
                    for document in documents:
                        if not await self._admit(self._entry(document, None)):
                            return
                        published += 1
        except SnapshotExpired as expired:
            logger.warning("handover.begins_anew", reason=str(expired), published=published)
            await self._until_empty(self._goes_on)
            return
        await self._until_empty(self._goes_on)
        if self._goes_on():
            await self._checkpoint.end_handover(position, PIPELINE)
            logger.warning("handover.ended", reason=reason, published=published)

    async def _admit(self, entry: Entry) -> bool:
        """Publish the entry, or hold or park it; false when the term is over or to be stopped."""
        while not self._window.has_room and self._goes_on():
            self._room.clear()
            await self._room.wait()
        if not self._goes_on():
            return False
        if self._window.admit(entry):
            self._publisher.dispatch(entry)
        elif entry.fate is not None:
            self._decided.set()
            if entry.fate is Fate.PARKED:
                logger.error(
                    "event.parked", event_id=str(entry.id), key=entry.key, reason=entry.reason
                )
        return True

    def _entry(self, document: Document, position: Position | None) -> Entry:
        entry = entry_of(document, ordinal=self._next_ordinal, position=position)
        self._next_ordinal += 1
        return entry

    async def _settle(self) -> None:
        """
        Write down what has become of events, then save the position behind them.

        While the position of one batch is being saved, the next one is marked already.
        """
        saving = asyncio.create_task(asyncio.sleep(0))
        try:
            while True:
                await self._decided.wait()
                if self._window.is_nearly_empty:
                    await self._over.rest(MARKS_GATHER_SECONDS)
                self._decided.clear()
                if saving.done():
                    saving.result()
                entries = self._window.take_settled()
                if not entries and self._over.requested:
                    await saving
                    return
                if entries:
                    await self._mark(entries)
                    await saving
                    saving = asyncio.create_task(self._save_behind(entries))
                    saving.add_done_callback(lambda _: self._decided.set())
                if self._over.requested:
                    self._decided.set()
        finally:
            await asyncio.gather(saving, return_exceptions=True)

    async def _mark(self, entries: Sequence[Entry]) -> None:
        self._held.note_settled(entries)
        with self._report.waiting_for("the marking of events"):
            await self._insist(lambda: self._marks.write(entries, self._publisher.pause_seconds))

    async def _save_behind(self, entries: Sequence[Entry]) -> None:
        """The position never passes an event that is not marked."""
        if in_order := [entry for entry in entries if entry.in_order]:
            settled = self._checkpoint.settled + len(in_order)
            position = _last_position(in_order)
            with self._report.waiting_for("the saving of the position"):
                await self._insist(
                    lambda: self._checkpoint.save(settled=settled, position=position)
                )
        self._report.settled(entries)
        self._window.saved(entries)
        self._held.note_written(entries)
        self._publisher.note_settled(entries)
        self._room.set()
        for entry in entries:
            if entry.fate is Fate.HELD and entry.in_order:
                logger.info(
                    "event.held", event_id=str(entry.id), key=entry.key, reason=entry.reason
                )

    async def _insist(self, write: Callable[[], Awaitable[None]]) -> None:
        """Write, and again while MongoDB is away: both writes may be repeated."""
        delays = growing_delays()
        while True:
            try:
                return await write()
            except PyMongoError as error:
                if self._over.requested or not is_transient(error):
                    raise
                logger.warning("position.not_saved", reason=str(error))
            await self._over.rest(next(delays))

    async def _let_held_go(self) -> None:
        """Let held events go, and give up a broker that owes a confirm for too long."""
        release = Release(
            self._database,
            self._checkpoint.group,
            held=self._held,
            window=self._window,
            publisher=self._publisher,
            marks=self._marks,
            report=self._report,
        )
        while self._goes_on():
            await release.run_once(self._goes_on)
            silent = self._publisher.silent_seconds > CONFIRM_DEADLINE_SECONDS
            if silent and not self._connection.blocked:
                raise BrokerGone(f"no confirm for {CONFIRM_DEADLINE_SECONDS:g} s")
            await self._over.rest(HELD_POLL_SECONDS)

    async def _save_idle(self, position: Position) -> None:
        if monotonic() - self._idle_saved_at > IDLE_SAVE_SECONDS:
            with suppress(PyMongoError):  # the next one comes in five seconds
                await self._checkpoint.save(settled=self._checkpoint.settled, position=position)
            self._idle_saved_at = monotonic()

    async def _until_empty(self, goes_on: Callable[[], bool]) -> None:
        """Wait until everything that was read is settled and saved, or there is no going on."""
        while not self._window.is_empty and goes_on():
            self._room.clear()
            await self._room.wait()

    async def _drain(self) -> None:
        """Wait for the confirms that are out, and for their marks and position."""
        with suppress(TimeoutError):
            await asyncio.wait_for(
                self._until_empty(lambda: not self._over.requested),
                self._settings.relay_drain_seconds,
            )

    async def _wake_on_stop(self) -> None:
        """A stop must not wait for room in the window of a blocked broker."""
        waits = [asyncio.create_task(wait()) for wait in (self._stop.wait, self._over.wait)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        self._room.set()
        for wait in waits:
            wait.cancel()

    def _goes_on(self) -> bool:
        return not self._over.requested and not self._stop.requested

    async def _unless_trouble(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task of the term; whatever ends it early ends the term, never it alone."""
        try:
            await work
        except Exception as trouble:  # noqa: BLE001 - run() decides what passes by itself
            if self._over.requested:
                logger.warning("relay.trouble_at_the_end", reason=str(trouble))
            self._end(trouble)

    def _end(self, trouble: Exception | None) -> None:
        if not self._over.requested:
            self._trouble = trouble
        self._over.request()
        self._room.set()
        self._decided.set()


def _last_position(entries: Sequence[Entry]) -> Position | None:
    """Where the stream stands behind these; None when none of them came from it."""
    return next((entry.position for entry in reversed(entries) if entry.position), None)


def _in_short(trouble: Exception) -> str:
    """For pages that anybody may read: a driver's own words hold the whole topology."""
    if isinstance(trouble, PyMongoError):
        return f"MongoDB is away ({type(trouble).__name__})"
    return f"RabbitMQ: {trouble}" if isinstance(trouble, BrokerError) else str(trouble)


def _cure(trouble: Exception, settings: RelaySettings) -> str:
    if isinstance(trouble, ChannelClosed) and trouble.code == NOT_FOUND:
        return (
            f"{trouble}: declare the exchange {settings.events_exchange!r} "
            "(`python -m consumers topology`), or correct EVENTS_EXCHANGE"
        )
    if isinstance(trouble, ChannelClosed) and trouble.code == ACCESS_REFUSED:
        return f"{trouble}: grant the relay's user the rights that deploy/rabbitmq describes"
    return str(trouble)
