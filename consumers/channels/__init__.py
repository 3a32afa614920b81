"""
Channels: one file for each kind of third party.

A channel is a class under the entry point group `assistance.channels`. Its own settings are a
class of its own, read with the destination's name as prefix: the destination `slack-emea` reads
`SLACK_EMEA_WEBHOOK_URL`. Nothing else of it is known to the workers, so a new channel is one new
file and configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import entry_points
from typing import Any, Protocol

from pydantic_settings import SettingsConfigDict

from assistance.verdict import Verdict
from runtime.settings import SettingsTable

GROUP = "assistance.channels"


@dataclass(frozen=True, slots=True)
class OutboundMessage:
    """
    What is handed over.

    idempotency_key: the same in every attempt of this delivery, and in no other.
    trace: headers that say which trace the request belongs to, for who speaks HTTP and traces too.
    may_be_repeat: an earlier attempt ended without an answer, so the third party may have it.
    """

    request_id: str
    topic: str
    description: str
    idempotency_key: str
    created_at: datetime
    may_be_repeat: bool
    trace: Mapping[str, str] = field(default_factory=dict)


class DeliveryChannel(Protocol):
    """
    One configured place of a third party.

    `send` gives its verdict within `call_timeout_seconds`, because only the channel knows whether
    anything had been sent by then. It raises nothing: whatever happens is a verdict.
    """

    Settings: type[SettingsTable]

    #: A channel may have a class attribute RATE_PER_SECOND: what the vendor bears, where a
    #: destination's own settings say nothing. Without it there is no limit.

    def __init__(self, settings: Any, *, call_timeout_seconds: float) -> None: ...

    async def send(self, message: OutboundMessage) -> Verdict: ...

    async def close(self) -> None: ...


class UnknownChannel(LookupError):
    """No installed package brings a channel of this name; the message lists those there are."""


def find_channel(name: str) -> type[DeliveryChannel]:
    """Raises UnknownChannel."""
    found = entry_points(group=GROUP)
    if name not in found.names:
        known = ", ".join(sorted(found.names)) or "none"
        raise UnknownChannel(f"there is no channel {name!r}; known: {known}")
    channel: type[DeliveryChannel] = found[name].load()
    return channel


def settings_table(channel: type[DeliveryChannel], destination: str) -> type[SettingsTable]:
    """The channel's table for one destination, with its prefix."""
    prefix = destination.replace("-", "_") + "_"
    config = SettingsConfigDict(env_prefix=prefix)
    return type(channel.Settings.__name__, (channel.Settings,), {"model_config": config})
