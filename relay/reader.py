"""
Reads the outbox and admits events into the window, in order.

    no position, or a lost one -> resync: one snapshot of what is pending
    otherwise                  -> tail the change stream; now and then sweep for missed events
"""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from contextlib import aclosing, suppress
from time import monotonic
from typing import Any

from loguru import logger
from pymongo.errors import PyMongoError

from outbox.collection import INDEXES
from outbox.state import PENDING_STATES
from relay.checkpoint import Checkpoint, Position
from relay.intake import entry_of, is_addressable
from relay.marks import Marks
from relay.report import Report
from relay.resync import SnapshotExpired, read_pending
from relay.source import identify
from relay.stream import PIPELINE, Change, OutboxStream, PositionLost
from relay.sweep import Sweep
from relay.window import Entry, Fate, Window
from runtime.mongo import (
    Database,
    Document,
    GivenUp,
    ensure_collection,
    is_transient,
    retry_while_unavailable,
)
from runtime.shutdown import Stop

#: While the outbox is quiet, the position the server has scanned to is saved this often. Otherwise
#: the saved position would age out of the oplog although no event was missed.
IDLE_SAVE_SECONDS = 5.0


class Reader:
    """
    is_journaled: whether an event is published although its document is pending.
    may_publish: no event is admitted while it returns False; call `wake` after that.
    send: publishes an entry. on_decided: called when an entry needs no publishing.
    stop: no event is admitted, and no read started, once it is requested; call `wake` then.

    A read of MongoDB is never cancelled, because motor's thread would go on and what it brings
    would be lost.
    """

    def __init__(
        self,
        database: Database,
        collection: str,
        checkpoint: Checkpoint,
        window: Window,
        marks: Marks,
        report: Report,
        stop: Stop,
        *,
        open_stream: Callable[[Position], OutboxStream],
        may_publish: Callable[[], bool],
        is_journaled: Callable[[Any], bool],
        send: Callable[[Entry], None],
        on_decided: Callable[[], None],
    ) -> None:
        self._database = database
        self._collection = collection
        self._checkpoint = checkpoint
        self._window = window
        self._marks = marks
        self._report = report
        self._stop = stop
        self._open_stream = open_stream
        self._may_publish = may_publish
        self._is_journaled = is_journaled
        self._stream: OutboxStream | None = None
        self._send = send
        self._on_decided = on_decided
        self._sweep = Sweep(database, collection)
        self._woken = asyncio.Event()
        self._next_ordinal = 0
        self._unknown_in_a_row = 0
        self._idle_saved_at = monotonic()

    @property
    def is_stuck(self) -> bool:
        """Whether the change stream has not answered for too long."""
        return self._stream is not None and self._stream.is_stuck

    def wake(self) -> None:
        """The window has changed, a stop was requested, or events may be published again."""
        self._woken.set()

    async def run(self, first_ordinal: int) -> None:
        """Read and admit until asked to stop. Raises PyMongoError, Deposed or BrokerGone."""
        self._next_ordinal = first_ordinal
        with suppress(GivenUp):  # a stop was requested
            while not self._stop.requested:
                if self._checkpoint.resync_reason is not None:
                    await self._resync(self._checkpoint.resync_reason)
                else:
                    await self._tail()

    async def until_empty(self, stop: Stop) -> None:
        """Wait until every admitted event is settled and saved, or `stop` is requested."""
        while not self._window.is_empty and not stop.requested:
            self._woken.clear()
            await self._woken.wait()

    async def _tail(self) -> None:
        """Admit what arrives on the stream, reading one batch ahead."""
        assert self._checkpoint.position is not None
        stream = self._stream = self._open_stream(self._checkpoint.position)
        self._unknown_in_a_row = 0
        reading = asyncio.create_task(stream.read(self._stop))
        try:
            while not self._stop.requested:
                with self._report.waiting_for("reading the change stream"):
                    arrived = await reading
                reading = asyncio.create_task(stream.read(self._stop))
                await self._admit_missed()
                if arrived.changes:
                    await self._admit_changes(arrived.changes)
                elif self._window.is_empty:
                    self._report.caught_up()
                    if arrived.position is not None:
                        await self._save_idle(arrived.position)
        except PositionLost as lost:
            logger.error("position.lost", reason=str(lost))
            await self.until_empty(self._stop)
            reason = str(lost)
            await retry_while_unavailable(lambda: self._checkpoint.begin_resync(reason), self._stop)
        finally:
            await asyncio.gather(reading, return_exceptions=True)
            await stream.close()
            self._stream = None

    async def _resync(self, reason: str) -> None:
        """Admit what is pending; the stream continues from the time of that snapshot."""
        await retry_while_unavailable(lambda: self._checkpoint.begin_resync(reason), self._stop)
        logger.warning("resync.started", reason=reason)
        # the collection may have been dropped during the term
        await retry_while_unavailable(self._prepare_outbox, self._stop, try_seconds=None)
        published = 0
        try:
            async with aclosing(read_pending(self._database, self._collection)) as pending:
                async for documents, snapshot_time in pending:
                    position = Position(None, snapshot_time)
                    for document in documents:
                        if not await self._admit(self._entry(document, None)):
                            return
                        published += 1
        except (SnapshotExpired, PyMongoError) as error:
            if not isinstance(error, SnapshotExpired) and not is_transient(error):
                raise
            logger.warning("resync.restarted", reason=_in_words(error), published=published)
            await self.until_empty(self._stop)
            return
        await self.until_empty(self._stop)
        if not self._stop.requested:
            await retry_while_unavailable(
                lambda: self._checkpoint.end_resync(position, PIPELINE), self._stop
            )
            logger.warning("resync.completed", reason=reason, published=published)

    async def _prepare_outbox(self) -> None:
        await ensure_collection(self._database, self._collection, indexes=INDEXES)
        self._checkpoint.source = await identify(self._database, self._collection)

    async def _admit_changes(self, changes: Sequence[Change]) -> None:
        entries = [self._entry(change.document, change.position) for change in changes]
        for entry, change in zip(entries, changes, strict=True):
            entry.committed_at = change.committed_at
            if change.document.get("state") not in PENDING_STATES:
                entry.fate = Fate.KNOWN  # its writer excluded it from publishing
        if self._unknown_in_a_row < self._window.messages_limit:
            await self._skip_known(entries)
        for entry in entries:
            if not await self._admit(entry):
                return

    async def _skip_known(self, entries: Sequence[Entry]) -> None:
        """
        Skip what an earlier term settled beyond its last saved position.

        Its window bounds how many those are: after a whole window of unknown events there are none
        left. Events committed since this term began are not looked up, which would double their
        latency.
        """
        entries = [entry for entry in entries if self._is_older(entry)]
        if not entries:
            return
        # an _id that is an object or an array is not hashable; such an event is unfit anyway
        ids = [
            entry.id
            for entry in entries
            if isinstance(entry.id, Hashable) and is_addressable(entry.id)
        ]
        known = await retry_while_unavailable(lambda: self._marks.settled_among(ids), self._stop)
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

    async def _admit_missed(self) -> None:
        assert self._checkpoint.position is not None
        try:
            missed = await self._sweep.missed(self._checkpoint.position)
        except PyMongoError as error:
            if not is_transient(error):
                raise
            return  # the next sweep looks again
        for document in missed:
            entry = self._entry(document, None)
            if entry.fate is Fate.KNOWN:
                continue
            logger.error("event.missed", event_id=str(entry.id), key=entry.key)
            if not await self._admit(entry):
                return

    async def _admit(self, entry: Entry) -> bool:
        """Publish, hold or park the entry once there is room; False when a stop is requested."""
        while not (self._window.has_room and self._may_publish()) and not self._stop.requested:
            self._woken.clear()
            await self._woken.wait()
        if self._stop.requested:
            return False
        if self._window.admit(entry):
            self._send(entry)
        elif entry.fate is not None:
            self._on_decided()
            if entry.fate is Fate.PARKED:
                logger.error(
                    "event.parked", event_id=str(entry.id), key=entry.key, reason=entry.reason
                )
        return True

    def _entry(self, document: Document, position: Position | None) -> Entry:
        entry = entry_of(document, ordinal=self._next_ordinal, position=position)
        self._next_ordinal += 1
        if self._is_journaled(entry.id):
            entry.fate = Fate.KNOWN
        return entry

    async def _save_idle(self, position: Position) -> None:
        if monotonic() - self._idle_saved_at > IDLE_SAVE_SECONDS:
            with suppress(PyMongoError):  # retried after IDLE_SAVE_SECONDS
                await self._checkpoint.save(settled=self._checkpoint.settled, position=position)
            self._idle_saved_at = monotonic()


def _in_words(error: Exception) -> str:
    """The driver's own text contains the whole topology."""
    return type(error).__name__ if isinstance(error, PyMongoError) else str(error)
