"""
The circuit breaker of a destination. All workers of the destination share its state.

             N different requests failed in a row, the third party
             asked for a wait, or its answer was about us
    CLOSED ─────────────────────────────────────> OPEN: no calls until `open_until`
      ^                                            │ ^
      │                          the wait is over  │ │ the probe failed: a longer wait
      │                                            v │
      └──────────── the probe was answered ──── HALF_OPEN: one probe at a time

SUSPENDED overrides all three. An operator suspends a destination, and so does a third party whose
answer says that it accepts no more messages (`410`). Nothing is called until an operator resumes
the destination, which also closes the breaker.

Each worker counts the failures that it sees itself. Only failures of different requests count: one
request that fails again and again says nothing about the destination.
"""

import random
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, TypedDict

from assistance.verdict import Done, Later, Never, Verdict


class BreakerState(StrEnum):
    """Only CLOSED and OPEN are stored; the other two follow from the stored fields and the time."""

    CLOSED = "closed"
    HALF_OPEN = "half-open"
    OPEN = "open"
    SUSPENDED = "suspended"


class Suspension(TypedDict):
    who: str
    why: str
    since: datetime


class DestinationState(TypedDict):
    """
    One document of the collection `destinations`. A missing document means closed.

    state: `closed` or `open`.
    openings: how many times in a row the breaker was opened, failed probes included.
    open_until: no probe before this time.
    probe_by, probe_until: the worker that may probe, and until when no other worker may.
    paused: set while the destination is suspended.
    slot_at: the earliest time of the next call, where the destination has a rate.
    """

    _id: str
    state: str
    since: datetime
    reason: str
    openings: int
    open_until: datetime | None
    probe_by: str | None
    probe_until: datetime | None
    paused: Suspension | None
    slot_at: datetime | None


def breaker_state(found: DestinationState, now: datetime) -> BreakerState:
    if found.get("paused"):
        return BreakerState.SUSPENDED
    if found.get("state") != BreakerState.OPEN:
        return BreakerState.CLOSED
    open_until = found["open_until"]
    if open_until is not None and now < open_until:
        return BreakerState.OPEN
    return BreakerState.HALF_OPEN


def may_probe(found: DestinationState, worker: str, now: datetime) -> bool:
    """Whether this worker holds the right to probe, or no other worker does."""
    until = found.get("probe_until")
    return found.get("probe_by") == worker or until is None or until <= now


def accepts_calls(found: DestinationState) -> bool:
    """
    Whether deliveries are called as they come: neither suspended nor open nor half-open.

    Deliveries of other destinations get no hints, and are not overdue.
    """
    return not found.get("paused") and found.get("state") != BreakerState.OPEN


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """
    failures_limit: how many different requests must fail in a row to open it; with 0 only
    `Retry-After` and answers about us open it.
    The waits double from `first_wait_seconds` to `longest_wait_seconds`. A fifth of each is
    random, so that destinations of the same vendor are not probed at the same time.
    retry_after_cap_seconds: the longest wait that a third party may ask for. It can only lengthen
    the breaker's own.
    """

    failures_limit: int = 5
    first_wait_seconds: float = 5.0
    longest_wait_seconds: float = 300.0
    retry_after_cap_seconds: float = 21600.0

    def wait_seconds(
        self, openings: int, retry_after_seconds: float | None, randomness: random.Random
    ) -> float:
        """openings: how many times in a row the breaker was opened, this time included."""
        doubled = self.first_wait_seconds * 2.0 ** min(max(openings - 1, 0), 32)
        own_seconds = min(doubled, self.longest_wait_seconds) * randomness.uniform(0.8, 1.0)
        if retry_after_seconds is None:
            return own_seconds
        return max(own_seconds, min(retry_after_seconds, self.retry_after_cap_seconds))


@dataclass(frozen=True, slots=True)
class Open:
    """No calls for `wait_seconds`, then one probe."""

    reason: str
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class Close:
    pass


@dataclass(frozen=True, slots=True)
class Suspend:
    """The third party accepts no more messages: suspended until an operator resumes it."""

    reason: str


Reaction = Open | Close | Suspend | None


def failures_after(failures: frozenset[str], verdict: Verdict, request_id: str) -> frozenset[str]:
    """The requests whose deliveries failed since the third party last answered."""
    if _answers(verdict):
        return frozenset()
    return failures | {request_id} if _concerns_destination(verdict) else failures


def react(
    verdict: Verdict,
    *,
    failures_count: int,
    openings: int,
    is_probe: bool,
    policy: BreakerPolicy,
    randomness: random.Random,
) -> Reaction:
    """
    What one attempt means for the destination.

    failures_count: different requests that failed in a row, this attempt included.
    openings: how many times in a row the breaker was opened so far.
    """
    match verdict:
        case Later(disables=True):
            return Suspend(verdict.code)
        case Done() | Never():
            return Close() if is_probe else None
        case Later(counts=False):
            return None
    asked_seconds = verdict.retry_after_seconds if isinstance(verdict, Later) else None
    too_many = 0 < policy.failures_limit <= failures_count
    about_us = isinstance(verdict, Later) and verdict.about_us
    if not (is_probe or asked_seconds or too_many or about_us):
        return None
    wait_seconds = policy.wait_seconds(openings + 1, asked_seconds, randomness)
    return Open(verdict.code, wait_seconds)


def _answers(verdict: Verdict) -> bool:
    return isinstance(verdict, Done | Never)


def _concerns_destination(verdict: Verdict) -> bool:
    return not isinstance(verdict, Later) or verdict.counts


def describe(found: DestinationState) -> dict[str, Any]:
    """Since when it is in its state, and why; for logs and operators."""
    suspension = found.get("paused")
    if suspension:
        reason = f"{suspension['why']} ({suspension['who']})"
        return {"since": suspension["since"], "reason": reason}
    return {"since": found.get("since"), "reason": found.get("reason") or ""}
