"""
The lock: an exclusive queue on the publishing connection.

It decides nothing by itself. It lets a standby notice within two seconds that the leader's
connection has ended, and it keeps two relays from publishing at the same time meanwhile. A leader
works without it where the broker refuses it or keeps it for a connection that is dead.
"""

import hashlib

from runtime.rabbit import (
    ACCESS_REFUSED,
    AmqpChannel,
    ChannelClosed,
    Connection,
)

PREFIX = "relay.lock."


def lock_name(group: str, *source: str) -> str:
    """
    source: what the outbox is identified by. Groups of one name that serve different outboxes may
    share a virtual host.
    """
    digest = hashlib.sha256("\0".join(source).encode()).hexdigest()[:8]
    return f"{PREFIX}{group}.{digest}"


def former_lock_name(group: str) -> str:
    """The lock of versions that did not write leases."""
    return f"{PREFIX}{group}"


class Locks:
    """
    The lock queues that this connection holds; closing it frees them.

    refusal: why the last one was not to be had, with the remedy.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._channel: AmqpChannel | None = None
        self.held: set[str] = set()
        self.refusal: str | None = None

    async def hold_only(self, name: str | None) -> None:
        """Try to hold this one, and give back all others. Raises what `hold` raises."""
        for other in self.held - {name}:
            await (await self._open_channel()).delete_queue(other)
            self.held.discard(other)
        if name is not None:
            await self.hold(name)

    async def hold(self, name: str) -> bool:
        """
        Try to hold the lock, or hold on to it; whether it is held now.

        Declaring it again keeps it from expiring under a policy. Raises BrokerGone, and
        ChannelClosed without the right to declare it.
        """
        channel = await self._open_channel()
        try:
            await channel.lock_queue(name)
        except ChannelClosed as error:
            self.refusal = _with_remedy(error, name)
            if error.code == ACCESS_REFUSED:
                raise  # this says nothing about the queue
            self.held.discard(name)
        else:
            self.held.add(name)
        return name in self.held

    async def _open_channel(self) -> AmqpChannel:
        # each refusal closes the channel
        if self._channel is None or self._channel.closed.done():
            self._channel = None
            self._channel = await self._connection.open_channel()
        return self._channel


def _with_remedy(error: ChannelClosed, name: str) -> str:
    if error.code == ACCESS_REFUSED:
        return f"{error}: run `python -m installation rabbitmq`, which grants the permission"
    return (
        f"{error}: delete the queue {name!r} if it is a durable one, or close the connection that"
        " holds it, or restart the broker"
    )
