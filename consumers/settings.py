"""What each of the consumers reads from its environment; every table is checked at boot."""

from typing import Annotated, Any, Self

import orjson
from pydantic import BeforeValidator, Field, model_validator

from assistance.retry_policy import DEFAULT_DELAYS_SECONDS, RetryPolicy
from assistance.routing import RoutingTable
from runtime.settings import MongoSettings, MonitoringSettings, RabbitSettings, port_from

#: What a call in process may wait before its second try; each further one waits twice as long.
FIRST_PAUSE_SECONDS = 0.5

#: A channel keeps its own deadline; one that does not is cut off so much later.
OVERRUN_SECONDS = 1.0


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


class WorkerSettings(ReceivingSettings, TopologySettings):
    monitoring_port: int = port_from(8020)
    retry_delays_seconds: Annotated[
        tuple[Annotated[float, Field(ge=0)], ...], BeforeValidator(_numbers)
    ] = Field(
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

    @property
    def retry_policy(self) -> RetryPolicy:
        return RetryPolicy(
            self.retry_delays_seconds, self.retry_jitter_ratio, self.retry_after_cap_seconds
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

    @model_validator(mode="after")
    def _a_call_can_finish_before_the_end(self) -> Self:
        if self.shutdown_grace_seconds <= self.longest_call_seconds:
            raise ValueError(
                f"SHUTDOWN_GRACE_SECONDS must be more than {OVERRUN_SECONDS:g} s longer than "
                "CALL_TIMEOUT_SECONDS, or a call in hand could not finish at a stop"
            )
        return self


class DeadLetterSettings(ReceivingSettings):
    """What every receiver needs, and a port of its own."""

    monitoring_port: int = port_from(8030)


class ReconcilerSettings(MongoSettings, MonitoringSettings):
    monitoring_port: int = port_from(8040)
    reconciler_interval_seconds: float = Field(
        default=1.0, gt=0, description="rest between two looks at what is due"
    )
