"""The relay's settings."""

from pydantic import Field

from runtime.settings import MongoSettings, MonitoringSettings, RabbitSettings


class OutboxSettings(MongoSettings):
    """Settings of the commands, which need no broker."""

    outbox_collection: str = Field(
        default="outbox", min_length=1, description="the collection that holds the outbox"
    )
    relay_group: str = Field(
        default="relay",
        min_length=1,
        max_length=100,
        description="relays of one group share a position: one leads, the others stand by",
    )


class RelaySettings(OutboxSettings, RabbitSettings, MonitoringSettings):
    relay_window_messages: int = Field(
        default=1000,
        ge=1,
        le=100_000,
        description="maximum events published beyond the saved position: what a crash may repeat",
    )
    relay_window_bytes: int = Field(
        default=8 * 1024 * 1024,
        ge=1024,
        description="the same limit in bytes of payload",
    )
    relay_drain_seconds: float = Field(
        default=10.0, gt=0, description="seconds a stop waits for outstanding confirms"
    )
