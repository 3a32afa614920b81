"""Whether the API can accept requests now, and if not, why."""

from contextlib import suppress

import pymongo
from loguru import logger
from pymongo.errors import PyMongoError

from assistance.collection import (
    ASSISTANCES,
    ASSISTANCES_INDEXES,
    ASSISTANCES_VALIDATOR,
    IDEMPOTENCY_KEYS,
    IDEMPOTENCY_KEYS_INDEXES,
)
from outbox.collection import INDEXES, OUTBOX
from runtime.mongo import Client, Database, check_server, ensure_collection, ping
from runtime.retry import growing_delays
from runtime.shutdown import Stop

#: Detects a frozen server. Index builds have no deadline.
CHECK_TIMEOUT_SECONDS = 3.0

#: Probes time out after one or two seconds and should get the reason before that.
PROBE_TIMEOUT_SECONDS = 1.0

#: How often MongoDB's clock is read; this process' monotonic one bridges the time between.
CLOCK_SECONDS = 5.0


class Readiness:
    """
    why_not_prepared: the reason why MongoDB has not been checked or lacks collections; None once
    both are done.
    """

    def __init__(self, client: Client, database: Database) -> None:
        self._client = client
        self._database = database
        self.why_not_prepared: str | None = "MongoDB has not answered since the start"

    async def prepare(self, stop: Stop) -> None:
        """
        Check the server and create missing collections and indexes, retrying while it is away.

        Raises UnsuitableServer when retrying would not help.
        """
        for delay_seconds in growing_delays():
            try:
                await self._prepare_once()
            except PyMongoError as error:
                self._note(f"MongoDB is not ready for the API ({_name(error)})")
            else:
                self.why_not_prepared = None
                logger.info("service.ready")
                return
            await stop.rest(delay_seconds)
            if stop.requested:
                return

    async def watch_clock(self, stop: Stop) -> None:
        """Keep the estimate of MongoDB's clock fresh, also when no probe comes."""
        while not stop.requested:
            with suppress(PyMongoError), pymongo.timeout(PROBE_TIMEOUT_SECONDS):
                await ping(self._client)
            await stop.rest(CLOCK_SECONDS)

    async def why_not_ready(self) -> str | None:
        """The reason why a call would be answered 503 now; None if it would be served."""
        if self.why_not_prepared is not None:
            return self.why_not_prepared
        try:
            with pymongo.timeout(PROBE_TIMEOUT_SECONDS):
                await ping(self._client)
        except PyMongoError as error:
            return f"MongoDB does not answer ({_name(error)})"
        return None

    async def _prepare_once(self) -> None:
        with pymongo.timeout(CHECK_TIMEOUT_SECONDS):
            await check_server(self._client)
        await ensure_collection(
            self._database,
            ASSISTANCES,
            indexes=ASSISTANCES_INDEXES,
            validator=ASSISTANCES_VALIDATOR,
        )
        await ensure_collection(self._database, OUTBOX, indexes=INDEXES)
        await ensure_collection(self._database, IDEMPOTENCY_KEYS, indexes=IDEMPOTENCY_KEYS_INDEXES)

    def _note(self, reason: str) -> None:
        # once per reason, not per try
        if reason != self.why_not_prepared:
            logger.warning("service.not_ready", reason=reason)
        self.why_not_prepared = reason


def _name(error: PyMongoError) -> str:
    """Type and code; the driver's message repeats the whole topology."""
    code = getattr(error, "code", None)
    return type(error).__name__ if code is None else f"{type(error).__name__}, code {code}"
