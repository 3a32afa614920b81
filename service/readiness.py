"""Whether the API can do its work now, and if not, why, in words."""

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
from runtime.mongo import Client, Database, check_server, ensure_collection
from runtime.retry import growing_delays
from runtime.shutdown import Stop

#: A frozen server is noticed soon; index builds, on the other hand, may take what they need.
CHECK_TIMEOUT_SECONDS = 3.0

#: Whoever probes gives up after a second or two, and should hear the reason before.
PROBE_TIMEOUT_SECONDS = 1.0


class Readiness:
    """
    why_not_prepared: what is missing until MongoDB has once been checked and its collections are
    there; None from then on.
    """

    def __init__(self, client: Client, database: Database) -> None:
        self._client = client
        self._database = database
        self.why_not_prepared: str | None = "MongoDB has not answered since the start"

    async def prepare(self, stop: Stop) -> None:
        """
        Check the server and create what is missing, as soon as it lets us.

        Raises UnsuitableServer where waiting would not help.
        """
        for delay_seconds in growing_delays():
            try:
                await self._prepare_once()
            except PyMongoError as error:
                self._tell(f"MongoDB is not ready for the API ({_name(error)})")
            else:
                self.why_not_prepared = None
                logger.info("ready")
                return
            await stop.rest(delay_seconds)
            if stop.requested:
                return

    async def why_not_ready(self) -> str | None:
        """The reason why a call would be answered 503 now; None when it would not."""
        if self.why_not_prepared is not None:
            return self.why_not_prepared
        try:
            with pymongo.timeout(PROBE_TIMEOUT_SECONDS):
                await self._client.admin.command("ping")
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

    def _tell(self, reason: str) -> None:
        # once a reason, not once a try
        if reason != self.why_not_prepared:
            logger.warning(reason)
        self.why_not_prepared = reason


def _name(error: PyMongoError) -> str:
    """Its kind and code; the message holds the whole topology."""
    code = getattr(error, "code", None)
    return type(error).__name__ if code is None else f"{type(error).__name__}, code {code}"
