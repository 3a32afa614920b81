"""
The relay process: lead whenever no other relay does, stand by otherwise, start over after an error.

    stand by -> epoch + 1 -> one term -> transient error: stay out, then stand by again
                                      -> stop requested: end
"""

from contextlib import suppress

import pymongo
from loguru import logger
from pymongo.errors import PyMongoError

from outbox.collection import INDEXES
from relay import operations
from relay.checkpoint import Checkpoint, Deposed, Position, check_alone
from relay.leadership import Candidate, StandbyLost, Stopped
from relay.lock import Locks, former_lock_name, lock_name
from relay.monitoring import monitored_relay
from relay.report import Report
from relay.settings import RelaySettings
from relay.source import check_outbox, identify
from relay.stream import PIPELINE, OutboxStream, PositionLost
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
    Connection,
    connect,
)
from runtime.retry import growing_delays
from runtime.shutdown import Stop
from runtime.stream_client import StreamClient

#: A new term may succeed after one of these. Any other exception is a programming or configuration
#: error and ends the process.
TRANSIENT_ERRORS = (PyMongoError, BrokerError, Deposed)


#: A relay whose term ended by an error stays out for at least this long, and longer each time: a
#: standby looks more often, and may do better.
STAY_OUT_SECONDS = 1.5

#: A term that has settled events and lasted for this long ends the growth.
STEADY_SECONDS = 10.0

RELEASE_DEADLINE_SECONDS = 2.0


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
        pause_seconds = 0.0
        try:
            ended = await _lead_once(settings, client, owner, stop, report)
        except Stopped:
            return
        except (PyMongoError, BrokerError) as error:
            if isinstance(error, BrokerRefused) and not was_accepted:
                raise
            # both are raised only after the broker has accepted the connection
            was_accepted = was_accepted or isinstance(error, (StandbyLost, ChannelClosed))
            cause: Exception | None = error
        else:
            was_accepted = True
            cause, pause_seconds = ended.cause, STAY_OUT_SECONDS
            if ended.settled_count and ended.lasted_seconds > STEADY_SECONDS:
                delays = growing_delays()
        if cause is not None:
            if not isinstance(cause, TRANSIENT_ERRORS):
                raise cause
            report.interrupted(_public_reason(cause))
            logger.warning("relay.interrupted", reason=_with_remedy(cause))
            await stop.rest(max(pause_seconds, next(delays)))


async def _lead_once(
    settings: RelaySettings, client: Client, owner: str, stop: Stop, report: Report
) -> Ended:
    await check_server(client)
    database = client[settings.mongodb_database]
    await check_outbox(database, settings.outbox_collection)
    await ensure_collection(database, settings.outbox_collection, indexes=INDEXES)
    await ensure_collection(database, OPERATIONS, indexes=operations.INDEXES)
    source = await identify(database, settings.outbox_collection)
    group = settings.relay_group
    lock = lock_name(group, source.replica_set, source.database, source.collection)
    connection = await _connect(settings)
    checkpoint: Checkpoint | None = None
    try:
        locks = Locks(connection)
        candidate = Candidate(
            database,
            locks,
            report,
            group=group,
            owner=owner,
            pipeline=PIPELINE,
            source=source,
            own_lock=lock,
            former_lock=former_lock_name(group),
            read_from=lambda position: _read_once(settings, position),
        )
        checkpoint = await candidate.until_leading(stop)
        await check_alone(checkpoint)
        term = Term(
            settings,
            database,
            connection,
            locks,
            checkpoint,
            stop,
            report,
            lock=lock,
            connect=lambda: _connect(settings, purpose="search"),
            open_stream=lambda position: _open_stream(settings, position),
        )
        return await term.lead()
    finally:
        await connection.close()
        if checkpoint is not None:
            await _release(checkpoint)


async def _connect(settings: RelaySettings, *, purpose: str = "") -> Connection:
    """Raises BrokerGone or BrokerRefused."""
    return await connect(
        settings.rabbitmq_url.get_secret_value(),
        name=f"relay {settings.relay_group} {purpose}".rstrip(),
        heartbeat_seconds=settings.rabbitmq_heartbeat_seconds,
    )


def _open_stream(settings: RelaySettings, position: Position) -> OutboxStream:
    url, database = settings.mongodb_url.get_secret_value(), settings.mongodb_database
    client = StreamClient(url, database, process="relay")
    return OutboxStream(client, settings.outbox_collection, position)


async def _read_once(settings: RelaySettings, position: Position) -> None:
    """Raises PyMongoError when this relay cannot read the stream."""
    stream, at_once = _open_stream(settings, position), Stop()
    at_once.request()  # not to retry
    try:
        with suppress(PositionLost):  # it could do a resync
            await stream.read(at_once)
    finally:
        await stream.close()


async def _release(checkpoint: Checkpoint) -> None:
    """Let another relay lead at once; if this fails, it leads once the lease is old enough."""
    with suppress(PyMongoError), pymongo.timeout(RELEASE_DEADLINE_SECONDS):
        await checkpoint.release()


def _public_reason(error: Exception) -> str:
    """For pages without authentication: the driver's own text contains the whole topology."""
    if isinstance(error, PyMongoError):
        return f"MongoDB is unavailable ({type(error).__name__})"
    return f"RabbitMQ: {error}" if isinstance(error, BrokerError) else str(error)


def _with_remedy(error: Exception) -> str:
    if isinstance(error, ChannelClosed) and error.code == ACCESS_REFUSED:
        return f"{error}: run `python -m installation rabbitmq`, which grants them"
    return str(error)
