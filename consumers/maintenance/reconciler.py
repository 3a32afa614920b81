"""
The reconciler: sends a new hint for each delivery that is due and has no trusted hint.

That covers retries, expired claims of crashed workers, and hints that the broker lost. It reads
MongoDB only. Several may run: of those that handle the same delivery, one wins. Deliveries to a
destination that is open or suspended are left alone.
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
from consumers.maintenance.metrics import deliveries_reconciled, watch_destinations
from consumers.maintenance.overdue import show_overdue
from consumers.settings import ReconcilerSettings
from runtime.mongo import TRY_SECONDS, Database, is_transient, retry_while_unavailable
from runtime.monitoring import monitored
from runtime.shutdown import Stop

#: The maximum number of deliveries per pass: after an outage the hints come back at a rate that
#: the relay and the workers can follow, and not all at once.
PASS_LIMIT = 200

#: How long to try one delivery before going on to the next.
LOCKED_SECONDS = 1.0


class Reconciler:
    def __init__(self, database: Database, stop: Stop) -> None:
        self._database = database
        self._hints = Hints(database)
        self._destinations = Destinations(database)
        self._stop = stop

    async def run_once(self) -> int:
        """Handle what is due now, until a stop is requested; returns the number of deliveries."""
        now, found = await self._find()
        done: Counter[str] = Counter()
        for due in found:
            if self._stop.requested:
                break
            done[await self._reconcile_in_time(due, now)] += 1
        if done:
            logger.info("reconciler.passed", **done)
        return done.total()

    async def preview(self) -> list[DueDelivery]:
        """The deliveries that the next pass would handle."""
        _, found = await self._find()
        return found

    async def _find(self) -> tuple[datetime, list[DueDelivery]]:
        with pymongo.timeout(TRY_SECONDS):
            now = await server_time(self._database)
            unavailable = await self._destinations.unavailable()
            found = await self._hints.find_due(now, limit=PASS_LIMIT, excluded=unavailable.keys())
            for name, seen in unavailable.items():
                # a probe needs a message, and its queue may be empty
                if breaker_state(seen.state, seen.now) is BreakerState.HALF_OPEN:
                    found += await self._hints.find_due_for(name, now)
            return now, found

    async def _reconcile_in_time(self, due: DueDelivery, now: datetime) -> str:
        """
        A process that is killed inside a transaction leaves its request locked until the server
        aborts the transaction. The other deliveries must not wait for it.
        """
        try:
            with pymongo.timeout(LOCKED_SECONDS):
                return await self._reconcile(due, now)
        except PyMongoError as error:
            if isinstance(error, ConnectionFailure) or not is_transient(error):
                raise
            logger.warning("request.locked", request_id=due.request_id)
            return "locked"

    async def _reconcile(self, due: DueDelivery, now: datetime) -> str:
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
    """Run one pass per interval until a stop is requested. Raises UnsuitableServer."""
    async with (
        monitored(settings, "reconciler") as monitor,
        open_database(settings, "reconciler", stop, monitor) as database,
    ):
        reconciled = deliveries_reconciled(monitor.registry)
        watch_destinations(monitor, Destinations(database))
        show_overdue(monitor, database, settings.target_seconds)
        reconciler = Reconciler(database, stop)
        while not stop.requested:
            reconciled.inc(
                await retry_while_unavailable(reconciler.run_once, stop, try_seconds=None)
            )
            await stop.rest(settings.reconciler_interval_seconds)
