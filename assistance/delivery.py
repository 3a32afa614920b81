"""
The state machine of a delivery: one request on its way to one destination.

                       claim: due, lease free, fence + 1
             ┌───────────────────────────────────────────────┐
             │                                               v
    born ─> waiting <── later, unknown (due_at grows) ─── claimed ── done ──────> succeeded
             ^ ^ ^                                        │ │  │                      ^
             │ │ │                                        │ │  └─ never,              │
             │ │ │                                        │ │     attempts used up    │
             │ │ └── lease expired: the next claim takes <┘ │         │               │
             │ │                                            │         v               │
             │ └── redrive, by an operator only ────────────│────── failed            │
             │                                              │ unknown, and the        │
             │                                              v rule is to ask          │
             └── retry, by an operator ──────────── needs_decision ── sent, confirmed ┘

Only the holder of the newest fence may record an outcome. Waiting never fails a delivery.
"""

import random
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import NotRequired, TypedDict

from assistance.retry_policy import RetryPolicy
from assistance.verdict import Done, Later, Never, Unknown, Verdict


class DeliveryState(StrEnum):
    WAITING = "waiting"
    CLAIMED = "claimed"
    NEEDS_DECISION = "needs_decision"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


#: A worker or the reconciler has to do something about these in time.
ACTIVE_STATES = (DeliveryState.WAITING.value, DeliveryState.CLAIMED.value)

#: The request is not final before none of its deliveries is in one of these.
OPEN_STATES = (*ACTIVE_STATES, DeliveryState.NEEDS_DECISION.value)


class UnknownRule(StrEnum):
    """
    What follows an unknown outcome; a setting of each destination.

    REPEAT  the call is repeated as any other, for third parties that recognise a repeat
    RARELY  it is repeated a few times and late, since people may see a duplicate; then ASK
    ASK     a person finds out whether the third party has the message
    """

    REPEAT = "repeat"
    RARELY = "rarely"
    ASK = "ask"


#: The broker may lose a published hint, so a new one is sent after this time. The wait doubles with
#: each further hint, so that a long queue is not flooded.
HINT_PATIENCE_SECONDS = 60.0
HINT_PATIENCE_CAP_SECONDS = 3600.0


class Attempt(TypedDict):
    """
    One claim and its outcome. `calls` counts the calls made under it; `counted` is false when it
    uses up none of the attempts.
    """

    number: int
    fence: int
    worker: str
    started_at: datetime
    ended_at: NotRequired[datetime]
    calls: NotRequired[int]
    counted: NotRequired[bool]
    verdict: NotRequired[str]
    code: NotRequired[str]
    excerpt: NotRequired[str]


class Delivery(TypedDict):
    """
    due_at: not tried before this time.
    lease_until: claimed until this time.
    hint_until: the newest hint is trusted until this time.
    hints: how many hints were sent since the last attempt.
    attempts_counted: how many attempts are used up; a redrive sets it to 0. If missing, all count.
    redriven_by: the operation that reopened it last, if any.
    """

    destination: str
    channel: str
    state: str
    idempotency_key: str
    attempts: list[Attempt]
    attempts_counted: NotRequired[int]
    fence: int
    due_at: datetime
    lease_until: datetime | None
    hint_event: str
    hint_until: datetime
    hints: int
    redriven_by: NotRequired[str]


def birth(
    *, destination: str, channel: str, idempotency_key: str, hint_event: str, now: datetime
) -> Delivery:
    return {
        "destination": destination,
        "channel": channel,
        "state": DeliveryState.WAITING.value,
        "idempotency_key": idempotency_key,
        "attempts": [],
        "attempts_counted": 0,
        "fence": 0,
        "due_at": now,
        "lease_until": None,
        "hint_event": hint_event,
        "hint_until": now + timedelta(seconds=HINT_PATIENCE_SECONDS),
        "hints": 1,
    }


def is_open(delivery: Delivery) -> bool:
    return delivery["state"] in OPEN_STATES


def is_active(delivery: Delivery) -> bool:
    return delivery["state"] in ACTIVE_STATES


def next_look_at(delivery: Delivery) -> datetime | None:
    """
    The time from which the reconciler may have to act on it, or None when it is closed or waits for
    an operator.
    """
    if not is_active(delivery):
        return None
    moments = [delivery["due_at"], delivery["hint_until"]]
    if delivery["lease_until"] is not None:
        moments.append(delivery["lease_until"])
    return max(moments)


def hint_patience_seconds(hints_sent: int) -> float:
    """How long the newest of `hints_sent` hints is trusted: 1, 2, 4, ... minutes, up to an hour."""
    doubled = HINT_PATIENCE_SECONDS * 2.0 ** min(hints_sent - 1, 16)
    return min(doubled, HINT_PATIENCE_CAP_SECONDS)


@dataclass(frozen=True, slots=True)
class Succeeded:
    pass


@dataclass(frozen=True, slots=True)
class Failed:
    """reason: `permanent` or `attempts_used_up`."""

    reason: str


@dataclass(frozen=True, slots=True)
class TryAgain:
    due_at: datetime


@dataclass(frozen=True, slots=True)
class Ask:
    """A person must find out whether the third party has the message."""


Conclusion = Succeeded | Failed | TryAgain | Ask

PERMANENT = "permanent"
ATTEMPTS_USED_UP = "attempts_used_up"


def conclude(
    verdict: Verdict,
    *,
    attempts_made: int,
    attempts_in_all: int = 1,
    unknown_outcomes: int = 1,
    policy: RetryPolicy,
    now: datetime,
    randomness: random.Random,
    on_unknown: UnknownRule = UnknownRule.REPEAT,
) -> Conclusion:
    """
    What a verdict means for the delivery.

    attempts_made: those that count, this one among them if its verdict counts.
    attempts_in_all: those that do not count included.
    unknown_outcomes: how many of the counted attempts had one, this one included.

    An unknown outcome is repeated with the same idempotency key, as the rule says: a repeat is
    better than a loss. When the attempts are used up the delivery fails, unless the rule is to ask;
    attempts that do not count fail nothing.
    """
    match verdict:
        case Done():
            return Succeeded()
        case Never():
            return Failed(PERMANENT)
        case Later(wait_seconds=float() as wait_seconds):
            return TryAgain(now + timedelta(seconds=wait_seconds))
        case Later(counts=False, about_us=about_us, retry_after_seconds=asked_seconds):
            # an answer about us that only this message gets must not occupy the destination
            in_all = attempts_in_all if about_us else 1
            uncounted_seconds = policy.uncounted_delay_seconds(
                asked_seconds, randomness, attempts_in_all=in_all
            )
            return TryAgain(now + timedelta(seconds=uncounted_seconds))
        case Unknown() if on_unknown is UnknownRule.ASK:
            return Ask()
        case Unknown() if on_unknown is UnknownRule.RARELY:
            late_seconds = policy.unknown_delay_seconds(unknown_outcomes, attempts_made, randomness)
            return (
                Ask() if late_seconds is None else TryAgain(now + timedelta(seconds=late_seconds))
            )
        case Later() | Unknown():
            retry_after = verdict.retry_after_seconds if isinstance(verdict, Later) else None
            delay_seconds = policy.delay_seconds(attempts_made, retry_after, randomness)
            if delay_seconds is None:
                return Failed(ATTEMPTS_USED_UP)
            return TryAgain(now + timedelta(seconds=delay_seconds))
