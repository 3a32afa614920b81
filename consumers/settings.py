"""What each of the consumers reads from its environment; every table is checked at boot."""

from typing import Annotated, Any, Self, TypeVar

import orjson
from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from assistance.breaker import BreakerPolicy
from assistance.delivery import UnknownRule
from assistance.retry_policy import DEFAULT_DELAYS_SECONDS, RetryPolicy
from assistance.routing import RoutingTable
from runtime.settings import (
    MongoSettings,
    MonitoringSettings,
    RabbitSettings,
    SettingsTable,
    port_from,
)

#: What a call in process may wait before its second try; each further one waits twice as long.
FIRST_PAUSE_SECONDS = 0.5

#: A channel keeps its own deadline; one that does not is cut off so much later.
OVERRUN_SECONDS = 1.0

#: Messages wait for their turn in a worker's hand, which RabbitMQ takes from it after half an hour.
SLOWEST_RATE_PER_SECOND = 0.1


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
        description="how often the broker hands out a message that crashes its worker",
    )


class ReceivingSettings(MongoSettings, RabbitSettings, MonitoringSettings):
    shutdown_grace_seconds: float = Field(
        default=25.0, gt=0, description="how long a stop waits for what is in hand"
    )


Delays = Annotated[tuple[Annotated[float, Field(ge=0)], ...], BeforeValidator(_numbers)]


class CallSettings(SettingsTable):
    """How third parties are called, where a destination's own table says nothing else."""

    retry_delays_seconds: Delays = Field(
        default=DEFAULT_DELAYS_SECONDS,
        description="waits after the first, second, ... attempt; one attempt more than waits",
    )
    retry_jitter_ratio: float = Field(
        default=0.2, ge=0, lt=1, description="each wait is spread over plus or minus this share"
    )
    retry_after_cap_seconds: float = Field(
        default=21600.0, gt=0, description="the longest wait that a third party may ask for"
    )
    call_timeout_seconds: float = Field(
        default=10.0, gt=0, description="a call without an answer by then has an unknown outcome"
    )
    call_tries: int = Field(
        default=2,
        ge=1,
        le=4,
        description="calls made under one attempt while each fails for sure; 1 switches it off",
    )
    concurrency: int = Field(
        default=8, ge=1, le=200, description="calls that one worker has under way at once"
    )
    lease_margin_seconds: float = Field(
        default=5.0, ge=1, description="what a claim outlives its calls by, to record the outcome"
    )
    breaker_failures: int = Field(
        default=5,
        ge=0,
        description="so many different requests that fail in a row show that the destination is "
        "down, and it is probed by one at a time; 0 switches it off",
    )
    breaker_first_wait_seconds: float = Field(
        default=5.0, gt=0, description="the wait before the first probe; each failed one doubles it"
    )
    breaker_longest_wait_seconds: float = Field(
        default=300.0, gt=0, description="the longest wait between two probes"
    )

    @property
    def retry_policy(self) -> RetryPolicy:
        return RetryPolicy(
            self.retry_delays_seconds, self.retry_jitter_ratio, self.retry_after_cap_seconds
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
    One destination's own, read with `DESTINATION_<name>_` in front; what is not given is as for
    all of them.
    """

    rate_per_second: float | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="calls a second over all its workers, 0 for no limit; by default the "
        "channel's own: 1 for Slack, no limit for the others",
    )
    concurrency: int | None = Field(
        default=None, ge=1, le=200, description="instead of CONCURRENCY"
    )
    call_timeout_seconds: float | None = Field(
        default=None, gt=0, description="instead of CALL_TIMEOUT_SECONDS"
    )
    call_tries: int | None = Field(default=None, ge=1, le=4, description="instead of CALL_TRIES")
    retry_delays_seconds: Delays | None = Field(
        default=None, description="instead of RETRY_DELAYS_SECONDS"
    )
    on_unknown: UnknownRule = Field(
        default=UnknownRule.REPEAT,
        description="after a call that was not answered: `repeat` it with the same idempotency "
        "key, or `ask` a person",
    )

    @field_validator("rate_per_second")
    @classmethod
    def _not_too_slow(cls, rate: float | None) -> float | None:
        if rate and rate < SLOWEST_RATE_PER_SECOND:
            raise ValueError(
                f"must be 0, or {SLOWEST_RATE_PER_SECOND:g} or more: messages wait in hand"
            )
        return rate


def destination_table(destination: str) -> type[DestinationSettings]:
    """The table with the destination's prefix."""
    prefix = f"destination_{destination.replace('-', '_')}_"
    config = SettingsConfigDict(env_prefix=prefix)
    return type("DestinationSettings", (DestinationSettings,), {"model_config": config})


Calls = TypeVar("Calls", bound=CallSettings)


def with_own(settings: Calls, own: DestinationSettings) -> Calls:
    """The settings of all, with what the destination has of its own in their place."""
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
        """What is wrong with the two settings, in words; prefix: of the call's timeout."""
        if self.shutdown_grace_seconds > self.longest_call_seconds:
            return None
        return (
            f"SHUTDOWN_GRACE_SECONDS must be more than {OVERRUN_SECONDS:g} s longer than "
            f"{prefix}CALL_TIMEOUT_SECONDS, or a call in hand could not finish at a stop"
        )


class DeadLetterSettings(ReceivingSettings):
    """What every receiver needs, and a port of its own."""

    monitoring_port: int = port_from(8030)


class OverdueSettings(MongoSettings):
    target_seconds: float = Field(
        default=900.0,
        gt=0,
        description="a request that is still accepted after so long is overdue",
    )


class RedriveSettings(MongoSettings, RoutingTable):
    """What a redrive needs to tell which destinations there are."""


class ReconcilerSettings(OverdueSettings, MonitoringSettings):
    monitoring_port: int = port_from(8040)
    reconciler_interval_seconds: float = Field(
        default=1.0, gt=0, description="rest between two looks at what is due"
    )
