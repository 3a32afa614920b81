"""
Who leads: MongoDB decides, by its own clock; the lock queue only makes it quick.

    candidate: look at the lease -> may it lead? -> take epoch + 1 -> lead
                                 -> stand by, and look again
    leader:    a sign of life each second, if its last read of the stream was answered;
               none acknowledged for PUBLISH_LIMIT_SECONDS -> publish nothing until one is
               a newer epoch -> deposed

A leader that is frozen, cut off from MongoDB or dead gives no sign of life, whatever becomes of its
lock. An election of MongoDB or a blocked broker does not end a term: no other relay could do more.
"""

from collections.abc import Awaitable, Callable, Mapping
from time import monotonic
from typing import Any

import pymongo
from loguru import logger
from pymongo.errors import PyMongoError

from relay.checkpoint import Checkpoint, Position, look
from relay.lease import RENEW_SECONDS, Verdict, lock_to_hold, may_lead
from relay.lock import Locks
from relay.report import Report
from relay.source import Source
from runtime.mongo import Database, is_transient
from runtime.rabbit import BrokerGone, ChannelClosed, Connection
from runtime.shutdown import Stop

#: How often a standby looks; each try to get a lock that is held is an error in the broker's log.
STANDBY_POLL_SECONDS = 0.75

#: How often a leader without the lock tries to get it.
LOCK_RETRY_SECONDS = 5.0

#: The deadline of one sign of life.
RENEW_DEADLINE_SECONDS = 3.0


class StandbyLost(BrokerGone):
    """The connection, accepted before, was lost while standing by."""


class Stopped(Exception):
    """A stop was requested before this relay could lead."""


class Candidate:
    """
    A relay that does not lead.

    locks: own: this relay's lock queue; former: the one of older versions.
    read_from: reads from this position once; raises when this relay could not.
    """

    def __init__(
        self,
        database: Database,
        locks: Locks,
        report: Report,
        *,
        group: str,
        owner: str,
        pipeline: str,
        source: Source,
        own_lock: str,
        former_lock: str,
        read_from: Callable[[Position], Awaitable[None]],
    ) -> None:
        self._database = database
        self._locks = locks
        self._report = report
        self._group, self._owner = group, owner
        self._pipeline, self._source = pipeline, source
        self._own_lock, self._former_lock = own_lock, former_lock
        self._read_from = read_from
        self._lease: Any = None
        self._seen_since: float | None = None
        self._standing_by = False

    async def until_leading(self, stop: Stop) -> Checkpoint:
        """Stand by until this relay leads. Raises Stopped, StandbyLost, or PyMongoError."""
        try:
            while not stop.requested:
                checkpoint = await self._try_to_lead()
                if checkpoint is not None:
                    return checkpoint
                await stop.rest(STANDBY_POLL_SECONDS)
        except BrokerGone as gone:
            raise StandbyLost(str(gone)) from gone
        raise Stopped

    async def _try_to_lead(self) -> Checkpoint | None:
        try:
            document, now = await look(self._database, self._group)
        except PyMongoError as error:
            if not self._standing_by or not is_transient(error):
                raise
            # the leader cannot give a sign of life either
            self._seen_since = None
            return None
        unchanged_seconds = self._unchanged_seconds((document or {}).get("lease"))
        lock = lock_to_hold(document, own=self._own_lock, former=self._former_lock)
        await self._locks.hold_only(lock)
        verdict = may_lead(
            document,
            now=now,
            unchanged_seconds=unchanged_seconds,
            owner=self._owner,
            locks=self._locks.held,
            former=self._former_lock,
        )
        if verdict is Verdict.STAND_BY:
            self._note_standing_by(document, lock)
            return None
        if verdict is Verdict.OVERRULE and document is not None:
            logger.warning("relay.overrules", owner=document.get("owner"), epoch=document["epoch"])
            await self._prove_reading(document)
        return await Checkpoint.take(
            self._database,
            document,
            group=self._group,
            owner=self._owner,
            pipeline=self._pipeline,
            source=self._source,
            lock=self._own_lock if self._own_lock in self._locks.held else None,
        )

    async def _prove_reading(self, document: Mapping[str, Any]) -> None:
        """Read what the leader reads, so that no relay is overruled by one that cannot work."""
        position = document.get("position")
        starts_there = not document.get("handover") and document.get("pipeline") == self._pipeline
        if position and starts_there:
            await self._read_from(Position(position["token"], position["cluster_time"]))

    def _unchanged_seconds(self, lease: Any) -> float:
        """For how long every look was answered and has shown this lease."""
        if self._seen_since is None or lease != self._lease:
            self._lease, self._seen_since = lease, monotonic()
        return monotonic() - self._seen_since

    def _note_standing_by(self, document: Any, lock: str | None) -> None:
        if not self._standing_by:
            logger.info("relay.standing_by", leader=document.get("owner"), lock=lock)
            self._report.stands_by()
            self._standing_by = True


class Leader:
    """
    What a leader does to remain one, beside its work.

    is_progressing: whether the last read of the stream was answered in time.
    on_renewed: called after a sign of life, when the last one was too long ago to publish.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        connection: Connection,
        locks: Locks,
        lock: str,
        *,
        is_progressing: Callable[[], bool],
        on_renewed: Callable[[], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._connection = connection
        self._locks = locks
        self._lock = lock
        self._is_progressing = is_progressing
        self._on_renewed = on_renewed
        self._is_silent = False
        self._reported: str | None = None

    async def give_signs_of_life(self, over: Stop) -> None:
        """Raises Deposed, and PyMongoError that is not transient."""
        while not over.requested:
            if self._is_progressing():
                await self._renew()
            await over.rest(RENEW_SECONDS)

    async def _renew(self) -> None:
        might_publish = self._checkpoint.may_publish
        try:
            with pymongo.timeout(RENEW_DEADLINE_SECONDS):
                await self._checkpoint.renew(self._lock if self._lock in self._locks.held else None)
        except PyMongoError as error:
            if not is_transient(error):
                raise
            if not self._is_silent:
                logger.warning("lease.not_renewed", reason=type(error).__name__)
            self._is_silent = True
        else:
            self._is_silent = False
            if not might_publish:
                self._on_renewed()

    async def keep_lock(self, over: Stop) -> None:
        """Hold on to the locks, which a policy may expire; try to get the own one if it is lost."""
        while not over.requested:
            has_lock = self._lock in self._locks.held
            # a blocked connection is not read by the broker: the answer would not come
            if not self._connection.blocked:
                has_lock = await self._hold_locks()
            await over.rest(RENEW_SECONDS if has_lock else LOCK_RETRY_SECONDS)

    async def _hold_locks(self) -> bool:
        try:
            for lock in self._locks.held | {self._lock}:
                await self._locks.hold(lock)
        except (BrokerGone, ChannelClosed):
            pass  # a lost connection ends the term by itself; without the right it goes on
        if self._lock in self._locks.held:
            self._reported = None
            return True
        if self._locks.refusal != self._reported:
            logger.warning("relay.leads_without_lock", reason=self._locks.refusal)
            self._reported = self._locks.refusal
        return False
