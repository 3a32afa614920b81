"""
Who leads: the lock elects, the epoch fences.

    stand by ── lock queue is ours ──> take epoch + 1 ──> lead ── connection lost, newer epoch ─┐
       ^                                                                                       │
       └───────────────────────────────────────────────────────────────────────────────────────┘

The lock is an exclusive queue on the connection that publishes, so a relay
that loses one loses both. RabbitMQ frees it within milliseconds of a leader's death,
and within three heartbeats of a freeze. While the broker is away no relay leads.

The lock may be held twice in a broken cluster, so it is not the truth: every write to MongoDB
matches the epoch, and the higher one wins.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from loguru import logger

from relay.report import Report
from relay.settings import RelaySettings
from runtime.rabbit import BrokerGone, Connection, ResourceLocked, connect
from runtime.shutdown import Stop

#: How soon a standby notices that the lock is free; each try is an error in the broker's log.
STANDBY_POLL_SECONDS = 0.75


class StandbyLost(BrokerGone):
    """The connection, accepted before, was lost while waiting for the lock."""


class Stopped(Exception):
    """A stop was requested before the lock was free."""


@asynccontextmanager
async def hold_lock(
    settings: RelaySettings, stop: Stop, report: Report
) -> AsyncIterator[Connection]:
    """
    A connection that holds the group's lock queue; closing it frees the lock.

    Raises Stopped, BrokerRefused, or BrokerGone (StandbyLost once the connection was accepted).
    """
    connection = await open_connection(settings)
    try:
        try:
            await _wait_for_lock(connection, f"relay.lock.{settings.relay_group}", stop, report)
        except BrokerGone as gone:
            raise StandbyLost(str(gone)) from gone
        yield connection
    finally:
        await connection.close()


async def open_connection(settings: RelaySettings, *, purpose: str = "") -> Connection:
    """Raises BrokerGone or BrokerRefused."""
    return await connect(
        settings.rabbitmq_url.get_secret_value(),
        name=f"relay {settings.relay_group} {purpose}".rstrip(),
        heartbeat_seconds=settings.rabbitmq_heartbeat_seconds,
    )


async def _wait_for_lock(connection: Connection, queue: str, stop: Stop, report: Report) -> None:
    standing_by = False
    while not stop.requested:
        channel = await connection.open_channel()
        try:
            await channel.lock_queue(queue)
        except ResourceLocked:
            # the refusal closed the channel; each try needs a new one
            if not standing_by:
                logger.info("relay.standing_by", lock=queue)
                report.stands_by()
                standing_by = True
        else:
            return
        await stop.rest(STANDBY_POLL_SECONDS)
    raise Stopped
