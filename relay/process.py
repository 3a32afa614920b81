"""
The relay process: lead whenever the lock is free, stand by otherwise, start over after an error.

    stand by -> lock -> epoch + 1 -> one term -> transient error: wait, then stand by again
                                              -> stop requested: end
"""

from loguru import logger
from pymongo.errors import PyMongoError

from outbox.collection import INDEXES
from relay import operations
from relay.checkpoint import Checkpoint, Deposed
from relay.leadership import StandbyLost, Stopped, hold_lock
from relay.monitoring import monitored_relay
from relay.report import Report
from relay.settings import RelaySettings
from relay.stream import PIPELINE
from relay.term import Ended, Term
from runtime.mongo import (
    Client,
    check_server,
    close,
    ensure_collection,
    new_owner,
    open_client,
)
from runtime.operations import OPERATIONS
from runtime.rabbit import (
    ACCESS_REFUSED,
    BrokerError,
    BrokerRefused,
    ChannelClosed,
)
from runtime.retry import growing_delays
from runtime.shutdown import Stop

#: A new term may succeed after one of these. Any other exception is a programming or configuration
#: error and ends the process.
TRANSIENT_ERRORS = (PyMongoError, BrokerError, Deposed)


async def run(settings: RelaySettings, stop: Stop) -> None:
    """
    Lead whenever no other relay of the group does, until asked to stop.

    Raises UnsuitableServer, and BrokerRefused if the broker has never accepted a connection of this
    process. Once it has, a refusal is retried: a broker that is starting may refuse every login.
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
    owner, was_accepted, delays = new_owner(), False, growing_delays()
    while not stop.requested:
        try:
            ended = await _lead_once(settings, client, owner, stop, report)
        except Stopped:
            return
        except (PyMongoError, BrokerError) as error:
            if isinstance(error, BrokerRefused) and not was_accepted:
                raise
            # both are raised only after the broker has accepted the connection
            was_accepted = was_accepted or isinstance(error, (StandbyLost, ChannelClosed))
            ended = Ended(0, error)
        else:
            was_accepted = True
        if ended.settled_count:
            delays = growing_delays()
        if ended.cause is not None:
            if not isinstance(ended.cause, TRANSIENT_ERRORS):
                raise ended.cause
            report.interrupted(_public_reason(ended.cause))
            logger.warning("relay.interrupted", reason=_with_remedy(ended.cause))
            await stop.rest(next(delays))


async def _lead_once(
    settings: RelaySettings, client: Client, owner: str, stop: Stop, report: Report
) -> Ended:
    await check_server(client)
    database = client[settings.mongodb_database]
    await ensure_collection(database, settings.outbox_collection, indexes=INDEXES)
    await ensure_collection(database, OPERATIONS, indexes=operations.INDEXES)
    async with hold_lock(settings, stop, report) as connection:
        checkpoint = await Checkpoint.take(
            database, group=settings.relay_group, owner=owner, pipeline=PIPELINE
        )
        term = Term(settings, database, connection, checkpoint, stop, report)
        return await term.lead()


def _public_reason(error: Exception) -> str:
    """For pages without authentication: the driver's own text contains the whole topology."""
    if isinstance(error, PyMongoError):
        return f"MongoDB is unavailable ({type(error).__name__})"
    return f"RabbitMQ: {error}" if isinstance(error, BrokerError) else str(error)


def _with_remedy(error: Exception) -> str:
    if isinstance(error, ChannelClosed) and error.code == ACCESS_REFUSED:
        return f"{error}: run `python -m installation rabbitmq`, which grants them"
    return str(error)
