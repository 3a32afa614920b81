"""The settings of each consumer process. Every table is checked when the process starts."""

from typing import Annotated, Any, Self, TypeVar

import orjson
from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from assistance.breaker import BreakerPolicy
from assistance.delivery import UnknownRule
from assistance.retry_policy import (
    DEFAULT_DELAYS_SECONDS,
    DEFAULT_UNKNOWN_DELAYS_SECONDS,
    RetryPolicy,
)
from assistance.routing import RoutingTable
from runtime.settings import (
    MongoSettings,
    MonitoringSettings,
    RabbitSettings,
    SettingsTable,
    port_from,
)

#: The wait before the second call of an attempt; each further wait is twice as long.
FIRST_PAUSE_SECONDS = 0.5

#: A channel enforces the call timeout itself. One that does not is cancelled this much later.
OVERRUN_SECONDS = 1.0

#: A worker holds messages unacknowledged while they wait for their slots, and RabbitMQ closes its
#: channel after half an hour: https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout
MIN_RATE_PER_SECOND = 0.1


def _numbers(value: Any) -> Any:
    """`[5, 30]` or `5,30`."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        return orjson.loads(text if text.startswith("[") else f"[{text}]")
    except orjson.JSONDecodeError:
        raise ValueError("must be numbers of seconds, such as 5,30,120") from None


class TopologySettings(RabbitSettings, RoutingTable):
    delivery_limit: int = Field(
        default=20,
        ge=1,
        description="how many times RabbitMQ delivers a message that is never acknowledged, before "
        "it is dead-lettered",
    )


class ReceivingSettings(MongoSettings, RabbitSettings, MonitoringSettings):
    shutdown_grace_seconds: float = Field(
        default=25.0,
        gt=0,
        description="how long a stopping process waits for the messages it is handling",
    )


#: The longest wait that a setting may give: beyond it dates would overflow.
MAX_WAIT_SECONDS = 366 * 86400.0

Delays = Annotated[
    tuple[Annotated[float, Field(ge=0, le=MAX_WAIT_SECONDS)], ...], BeforeValidator(_numbers)
]


class CallSettings(SettingsTable):
    """How third parties are called, unless the destination has a setting of its own."""

    retry_delays_seconds: Delays = Field(
        default=DEFAULT_DELAYS_SECONDS,
        description="the wait after the first, second, ... attempt of a delivery. It fails after "
        "one attempt more than there are waits",
    )
    retry_jitter_ratio: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="each retry wait is randomly longer or shorter by up to this share",
    )
    retry_after_cap_seconds: float = Field(
        default=21600.0,
        gt=0,
        le=MAX_WAIT_SECONDS,
        description="the longest wait that a third party may ask for with `Retry-After`",
    )
    unknown_delays_seconds: Delays = Field(
        default=DEFAULT_UNKNOWN_DELAYS_SECONDS,
        description="for destinations that repeat an unknown outcome `rarely`: the wait after the "
        "first, second, ... lost answer; after one more a person is asked",
    )
    call_timeout_seconds: float = Field(
        default=10.0, gt=0, description="the deadline of one call to a third party"
    )
    call_tries: int = Field(
        default=2,
        ge=1,
        le=4,
        description="the maximum number of calls in one attempt: a call that certainly failed is "
        "repeated at once; 1 disables this",
    )
    concurrency: int = Field(
        default=8, ge=1, le=200, description="how many calls one worker makes at the same time"
    )
    lease_margin_seconds: float = Field(
        default=5.0,
        ge=1,
        description="how long a worker's claim on a delivery outlasts its calls, so that the "
        "outcome can be recorded",
    )
    breaker_failures: int = Field(
        default=5,
        ge=0,
        description="the breaker of a destination opens after this many different requests failed "
        "in a row; 0 disables it",
    )
    breaker_first_wait_seconds: float = Field(
        default=5.0,
        gt=0,
        description="how long an open breaker waits before its first probe; each failed probe "
        "doubles the wait",
    )
    breaker_longest_wait_seconds: float = Field(
        default=300.0, gt=0, description="the longest wait of an open breaker between two probes"
    )

    @property
    def retry_policy(self) -> RetryPolicy:
        return RetryPolicy(
            self.retry_delays_seconds,
            self.retry_jitter_ratio,
            self.retry_after_cap_seconds,
            self.unknown_delays_seconds,
        )

    @property
    def breaker_policy(self) -> BreakerPolicy:
        return BreakerPolicy(
            self.breaker_failures,
            self.breaker_first_wait_seconds,
            self.breaker_longest_wait_seconds,
            self.retry_after_cap_seconds,
        )

    @property
    def longest_call_seconds(self) -> float:
        return self.call_timeout_seconds + OVERRUN_SECONDS

    @property
    def lease_seconds(self) -> float:
        """Longer than all the calls of one attempt: computed, so that it cannot be set wrong."""
        pauses_seconds = FIRST_PAUSE_SECONDS * (2.0**self.call_tries / 2 - 1)
        calls_seconds = self.longest_call_seconds * self.call_tries
        return calls_seconds + pauses_seconds + self.lease_margin_seconds


class DestinationSettings(SettingsTable):
    """
    The settings of one destination, with the prefix `DESTINATION_<name>_`. Without one, the setting
    for all destinations applies.
    """

    rate_per_second: float | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="the maximum calls per second to this destination, by all its workers "
        "together; 0 for no limit. The default is the channel's: 1 for Slack, no limit for "
        "the others",
    )
    concurrency: int | None = Field(
        default=None, ge=1, le=200, description="overrides CONCURRENCY for this destination"
    )
    call_timeout_seconds: float | None = Field(
        default=None, gt=0, description="overrides CALL_TIMEOUT_SECONDS for this destination"
    )
    call_tries: int | None = Field(
        default=None, ge=1, le=4, description="overrides CALL_TRIES for this destination"
    )
    retry_delays_seconds: Delays | None = Field(
        default=None, description="overrides RETRY_DELAYS_SECONDS for this destination"
    )
    on_unknown: UnknownRule | None = Field(
        default=None,
        description="what follows a call whose answer was lost: `repeat` it on the retry schedule, "
        "repeat it `rarely` and then ask a person, or `ask` a person at once. The default is "
        "`repeat` for webhooks, whose receivers recognise a repeat, and `rarely` for the others",
    )

    @field_validator("rate_per_second")
    @classmethod
    def _not_too_slow(cls, rate: float | None) -> float | None:
        if rate and rate < MIN_RATE_PER_SECOND:
            raise ValueError(
                f"must be 0, or {MIN_RATE_PER_SECOND:g} or more: waiting messages stay "
                "unacknowledged, and RabbitMQ allows that for half an hour"
            )
        return rate


def destination_table(destination: str) -> type[DestinationSettings]:
    """The class with this destination's prefix."""
    prefix = f"destination_{destination.replace('-', '_')}_"
    config = SettingsConfigDict(env_prefix=prefix)
    return type("DestinationSettings", (DestinationSettings,), {"model_config": config})


Calls = TypeVar("Calls", bound=CallSettings)


def with_own(settings: Calls, own: DestinationSettings) -> Calls:
    """The settings for all destinations, with this destination's own applied."""
    given = {
        name: value
        for name in type(settings).model_fields.keys() & type(own).model_fields.keys()
        if (value := getattr(own, name)) is not None
    }
    return settings.model_copy(update=given)


class WorkerSettings(ReceivingSettings, TopologySettings, CallSettings):
    monitoring_port: int = port_from(8020)

    @model_validator(mode="after")
    def _a_call_can_finish_before_the_end(self) -> Self:
        if problem := self.call_outlasts_stop():
            raise ValueError(problem)
        return self

    def call_outlasts_stop(self, prefix: str = "") -> str | None:
        """The problem with the two settings, or None; prefix: of CALL_TIMEOUT_SECONDS."""
        if self.shutdown_grace_seconds > self.longest_call_seconds:
            return None
        return (
            f"SHUTDOWN_GRACE_SECONDS must be more than {OVERRUN_SECONDS:g} s longer than "
            f"{prefix}CALL_TIMEOUT_SECONDS, or a stop would interrupt a call"
        )


class DeadLetterSettings(ReceivingSettings):
    """The settings of a subscriber, with its own monitoring port."""

    monitoring_port: int = port_from(8030)


class OverdueSettings(MongoSettings):
    target_seconds: float = Field(
        default=900.0,
        gt=0,
        description="a request that is not final after this time is overdue",
    )


class RedriveSettings(MongoSettings, RoutingTable):
    """The database and the configured destinations."""


class ReconcilerSettings(OverdueSettings, MonitoringSettings):
    monitoring_port: int = port_from(8040)
    reconciler_interval_seconds: float = Field(
        default=1.0, gt=0, description="the wait between two searches for due deliveries"
    )
