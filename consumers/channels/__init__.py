"""
Channels: one file for each kind of third party.

A channel is a class under the entry point group `assistance.channels`. It has its own settings
class, read with the destination's name as prefix: the destination `slack-emea` reads
`SLACK_EMEA_WEBHOOK_URL`. Workers know nothing else about it, so a new channel is one new file and
configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import entry_points
from typing import Any, Protocol

from pydantic_settings import SettingsConfigDict

from assistance.delivery import UnknownRule
from assistance.verdict import Verdict
from runtime.settings import SettingsTable

GROUP = "assistance.channels"


@dataclass(frozen=True, slots=True)
class OutboundMessage:
    """
    What is delivered to a third party.

    description: as the client wrote it; a channel sends it through `text.clean_text` or `quoted`.
    idempotency_key: the same in every attempt of this delivery, and in no other.
    trace: W3C trace headers of the request, for third parties over HTTP.
    may_be_repeat: an earlier attempt had no answer, so the third party may have the message.
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
    A channel configured for one destination.

    `send` returns a verdict within `call_timeout_seconds`, because only the channel knows whether
    anything had been sent by then. It raises nothing.
    """

    Settings: type[SettingsTable]

    #: A channel may have a class attribute RATE_PER_SECOND: the vendor's limit, which applies
    #: unless the destination has its own. Without it there is no limit.

    #: It may have KNOWS_IDEMPOTENCY_KEY = True: the third party recognises a repeat by the key, so
    #: that an unknown outcome is repeated on schedule. Without it, that happens rarely.

    def __init__(self, settings: Any, *, call_timeout_seconds: float) -> None: ...

    async def send(self, message: OutboundMessage) -> Verdict: ...

    async def close(self) -> None: ...


class UnknownChannel(LookupError):
    """No installed package has a channel of this name; the message lists the known ones."""


def find_channel(name: str) -> type[DeliveryChannel]:
    """Raises UnknownChannel."""
    found = entry_points(group=GROUP)
    if name not in found.names:
        known = ", ".join(sorted(found.names)) or "none"
        raise UnknownChannel(f"there is no channel {name!r}; known: {known}")
    channel: type[DeliveryChannel] = found[name].load()
    return channel


def settings_table(channel: type[DeliveryChannel], destination: str) -> type[SettingsTable]:
    """The channel's settings class with the destination's prefix."""
    prefix = destination.replace("-", "_") + "_"
    config = SettingsConfigDict(env_prefix=prefix)
    return type(channel.Settings.__name__, (channel.Settings,), {"model_config": config})


def unknown_rule(channel: object, own: UnknownRule | None) -> UnknownRule:
    """The rule after an unknown outcome: the destination's own, or else by the channel."""
    if own is not None:
        return own
    knows_key = getattr(channel, "KNOWS_IDEMPOTENCY_KEY", False)
    return UnknownRule.REPEAT if knows_key else UnknownRule.RARELY
