"""
One term of leadership, from an epoch to the loss of the lock or a requested stop.

    beside each other: reader, settler, release of held events
    stop: no new reads -> confirms -> marks -> position -> RabbitMQ (the lock frees) -> MongoDB
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

from loguru import logger
from pymongo.errors import PyMongoError

from relay.checkpoint import Checkpoint, Position
from relay.held import HeldKeys
from relay.journal import Journal
from relay.leadership import Leader
from relay.lock import Locks
from relay.lone_channel import LoneChannel
from relay.marks import Marks
from relay.publisher import CONFIRM_DEADLINE_SECONDS, Publisher
from relay.reader import Reader
from relay.release import Release
from relay.report import Leadership, Report
from relay.settings import RelaySettings
from relay.settler import Batch, Settler
from relay.stream import OutboxStream
from relay.window import Fate, Window
from runtime.mongo import Database, is_transient
from runtime.rabbit import BrokerGone, Connection
from runtime.shutdown import Stop

HELD_POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Ended:
    """How a term ended; cause: None after a requested stop."""

    settled_count: int
    lasted_seconds: float
    cause: Exception | None


class Term:
    """Every task returns by itself once the term is over; none is cancelled."""

    def __init__(
        self,
        settings: RelaySettings,
        database: Database,
        connection: Connection,
        locks: Locks,
        checkpoint: Checkpoint,
        stop: Stop,
        report: Report,
        *,
        lock: str,
        connect: Callable[[], Awaitable[Connection]],
        open_stream: Callable[[Position], OutboxStream],
    ) -> None:
        collection = settings.outbox_collection
        self._drain_seconds = settings.relay_drain_seconds
        self._connection = connection
        self._checkpoint = checkpoint
        self._stop, self._reading_stop, self._over = stop, Stop(), Stop()
        self._report = report
        self._cause: Exception | None = None
        self._window = Window(settings.relay_window_messages, settings.relay_window_bytes)
        self._journal = Journal(database, checkpoint.group)
        self._marks = Marks(database, collection, checkpoint, self._journal)
        self._held = HeldKeys(database, collection)
        self._publisher = Publisher(
            connection,
            LoneChannel(connection, connect, settings.events_exchange, self._over),
            settings.events_exchange,
            self._window,
            checkpoint,
            report,
            self._over,
            self._on_decided,
        )
        self._release = Release(
            database,
            checkpoint,
            held=self._held,
            window=self._window,
            publisher=self._publisher,
            marks=self._marks,
            report=report,
        )
        self._reader = Reader(
            database,
            collection,
            checkpoint,
            self._window,
            self._marks,
            report,
            self._reading_stop,
            open_stream=open_stream,
            may_publish=lambda: checkpoint.may_publish,
            is_journaled=self._journal.has,
            send=self._publisher.dispatch,
            on_decided=self._on_decided,
        )
        self._leader = Leader(
            checkpoint,
            connection,
            locks,
            lock,
            is_progressing=lambda: not self._reader.is_stuck,
            on_renewed=self._resume,
        )
        self._settler = Settler(
            self._window,
            checkpoint,
            report,
            self._over,
            mark=self._mark,
            on_saved=(
                report.settled,
                self._held.note_saved,
                self._publisher.note_saved,
                lambda _: self._reader.wake(),
            ),
        )

    async def lead(self) -> Ended:
        """Lead until asked to stop, or until an error ends the term."""
        settled_before, began_at = self._checkpoint.settled, monotonic()
        logger.info(
            "relay.leading",
            epoch=self._checkpoint.epoch,
            settled=settled_before,
            resync=self._checkpoint.resync_reason,
        )
        self._report.leads(
            Leadership(
                self._checkpoint,
                self._window,
                self._connection,
                lambda: self._publisher.silent_seconds,
            )
        )
        self._connection.closed.add_done_callback(
            lambda closed: self._end(BrokerGone(closed.result()))
        )
        async with asyncio.TaskGroup() as tasks:
            for work in (
                self._leader.give_signs_of_life(self._over),
                self._leader.keep_lock(self._over),
                self._settler.run(),
                self._publisher.run(),
                self._release_held(),
                self._watch_stop(),
            ):
                tasks.create_task(self._or_end(work))
            await self._or_end(self._read())
            await self._drain()
            self._end(None)
        settled_count = self._checkpoint.settled - settled_before
        await self._publisher.close(self._cause, settled_count=settled_count)
        self._report.ended()
        logger.info("relay.stopped_leading", settled=self._checkpoint.settled)
        return Ended(settled_count, monotonic() - began_at, self._cause)

    async def _read(self) -> None:
        await self._publisher.open()
        highest_held = await self._held.load()
        await self._journal.load()
        self._window.held_keys.update(self._held.keys)
        # marks are written before the count: a crash in between must not number two events alike
        first_ordinal = max(self._checkpoint.settled, highest_held) + 1
        self._publisher.continue_search(first_ordinal)
        await self._reader.run(first_ordinal)

    async def _mark(self, entries: Batch) -> None:
        gone = await self._marks.write(entries, self._publisher.pause_seconds)
        self._report.deleted(len(gone))
        for entry in gone:
            if entry.fate is not Fate.PUBLISHED:
                logger.error(
                    "event.deleted", event_id=str(entry.id), key=entry.key, reason=entry.reason
                )

    async def _release_held(self) -> None:
        """Release held events, and give up a broker that owes a confirm for too long."""
        while not self._reading_stop.requested:
            try:
                await self._release.run_once(self._may_release)
            except PyMongoError as error:
                # an election is no reason to end the term
                if not is_transient(error):
                    raise
            self._publisher.hold_overdue()
            silent = self._publisher.silent_seconds > CONFIRM_DEADLINE_SECONDS
            if silent and not self._connection.blocked:
                raise BrokerGone(f"no confirm for {CONFIRM_DEADLINE_SECONDS:g} s")
            await self._over.rest(HELD_POLL_SECONDS)

    def _may_release(self) -> bool:
        return self._checkpoint.may_publish and not self._reading_stop.requested

    def _resume(self) -> None:
        """Events may be published again."""
        self._publisher.resume()
        self._reader.wake()

    async def _watch_stop(self) -> None:
        """A stop must not wait for room in the window of a blocked broker."""
        waits = [asyncio.create_task(wait()) for wait in (self._stop.wait, self._over.wait)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        self._reading_stop.request()
        self._reader.wake()
        for wait in waits:
            wait.cancel()

    async def _drain(self) -> None:
        """Wait for the outstanding confirms, and for their marks and position."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._reader.until_empty(self._over), self._drain_seconds)

    def _on_decided(self) -> None:
        self._settler.wake()

    async def _or_end(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task of the term; an error in one task ends the whole term."""
        try:
            await work
        except Exception as error:  # noqa: BLE001 - process.py decides which errors are transient
            if self._over.requested:
                logger.warning("relay.error_while_stopping", reason=str(error))
            self._end(error)

    def _end(self, cause: Exception | None) -> None:
        if not self._over.requested:
            self._cause = cause
        self._over.request()
        self._reading_stop.request()
        self._reader.wake()
        self._settler.wake()
        self._publisher.wake()
