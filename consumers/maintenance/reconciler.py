"""
The reconciler: what the broker or a crash left behind is sent on its way again.

It reads MongoDB only. Several may run: of those who see to the same delivery one wins. What waits
for a destination that is down or paused is left alone.
"""

from collections import Counter
from datetime import datetime

import pymongo
from loguru import logger
from pymongo.errors import ConnectionFailure, PyMongoError

from assistance.breaker import BreakerState, breaker_state
from assistance.delivery import DeliveryState
from consumers.database import open_database, server_time
from consumers.delivery.destinations import Destinations
from consumers.delivery.hints import DueDelivery, Hints, Step
from consumers.delivery.metrics import deliveries_seen_to, watch_destinations
from consumers.maintenance.overdue import show_overdue
from consumers.settings import ReconcilerSettings
from runtime.mongo import TRY_SECONDS, Database, is_transient, retry_while_unavailable
from runtime.monitoring import monitored
from runtime.shutdown import Stop

#: Most deliveries seen to between two rests: after an outage the hints come back as a stream that
#: the relay and the workers keep up with, and not as one wave.
PASS_LIMIT = 200

#: How long to try for one delivery before the next one's turn comes.
LOCKED_SECONDS = 1.0


class Reconciler:
    def __init__(self, database: Database, stop: Stop) -> None:
        self._database = database
        self._hints = Hints(database)
        self._destinations = Destinations(database)
        self._stop = stop

    async def run_once(self) -> int:
        """See to what is due now, until asked to stop; how many deliveries it was."""
        now, found = await self._look()
        done: Counter[str] = Counter()
        for due in found:
            if self._stop.requested:
                break
            done[await self._see_to_in_time(due, now)] += 1
        if done:
            logger.info("reconciler.passed", **done)
        return done.total()

    async def preview(self) -> list[DueDelivery]:
        """What the next pass would see to."""
        _, found = await self._look()
        return found

    async def _look(self) -> tuple[datetime, list[DueDelivery]]:
        with pymongo.timeout(TRY_SECONDS):
            now = await server_time(self._database)
            unavailable = await self._destinations.unavailable()
            found = await self._hints.find_due(now, limit=PASS_LIMIT, excluded=unavailable.keys())
            for name, seen in unavailable.items():
                # a probe needs a message, and its queue may be empty
                if breaker_state(seen.state, seen.now) is BreakerState.HALF_OPEN:
                    found += await self._hints.find_due_for(name, now)
            return now, found

    async def _see_to_in_time(self, due: DueDelivery, now: datetime) -> str:
        """
        A process that is killed inside a transaction leaves its request locked until the server
        ends the transaction. The others must not wait for that one.
        """
        try:
            with pymongo.timeout(LOCKED_SECONDS):
                return await self._see_to(due, now)
        except PyMongoError as error:
            if isinstance(error, ConnectionFailure) or not is_transient(error):
                raise
            logger.warning("request.locked", request_id=due.request_id)
            return "locked"

    async def _see_to(self, due: DueDelivery, now: datetime) -> str:
        about = logger.bind(
            request_id=due.request_id,
            destination=due.destination,
            cause=due.delivery["hint_event"],
            reason=why(due),
        )
        if due.step is Step.POSTPONE:
            postponed = await self._hints.postpone(due)
            if postponed:
                about.info("hint.postponed")
            return "postponed" if postponed else "overtaken"
        event_id = await self._hints.send(due, now)
        if event_id is None:
            return "overtaken"
        about.info("hint.sent", event_id=event_id, hints=due.delivery["hints"] + 1)
        return "sent"


def why(due: DueDelivery) -> str:
    if due.step is Step.POSTPONE:
        return "hint_not_published"
    if due.delivery["state"] == DeliveryState.CLAIMED:
        return "lease_expired"
    return "retry_due" if due.delivery["hints"] == 0 else "hint_lost"


async def run_reconciler(settings: ReconcilerSettings, stop: Stop) -> None:
    """See to what is due, again and again, until asked to stop. Raises UnsuitableServer."""
    async with (
        monitored(settings, "reconciler") as monitor,
        open_database(settings, "reconciler", stop, monitor) as database,
    ):
        seen_to = deliveries_seen_to(monitor.registry)
        watch_destinations(monitor, Destinations(database))
        show_overdue(monitor, database, settings.target_seconds)
        reconciler = Reconciler(database, stop)
        while not stop.requested:
            seen_to.inc(await retry_while_unavailable(reconciler.run_once, stop, try_seconds=None))
            await stop.rest(settings.reconciler_interval_seconds)
