"""
The circuit breaker of a destination, which all its workers share: what is down is not called.

               so many different deliveries failed in a row,
               or it asked for a wait: for so long, and then
    closed ───────────────────────────────────────────────────> open
      ^                                                        │  ^ │
      │                          one probe at a time           │  │ │ its wait is over
      │                                    v                   │  └─┘ probe failed: a longer wait
      └──────────────── answered ──────────┘<──────────────────┘

Beside it an operator may pause a destination, as may the third party itself by saying that it wants
no more; then nothing is called until an operator resumes it, which closes the breaker too.

A worker counts the failures that it sees itself. One delivery that fails again and again proves
nothing of the destination, so only different ones count.
"""

import random
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, TypedDict

from assistance.verdict import Done, Later, Never, Verdict


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"


class Pause(TypedDict):
    who: str
    why: str
    since: datetime


class DestinationState(TypedDict):
    """
    What the collection `destinations` holds of one; where there is none, nothing is wrong.

    openings: how often in a row its wait has been set; open_until: no probe before.
    probe_by, probe_until: the worker that may probe, and until when that is its own right.
    slot_at: when the next call may be made, where there is a rate.
    """

    _id: str
    state: str
    since: datetime
    reason: str
    openings: int
    open_until: datetime | None
    probe_by: str | None
    probe_until: datetime | None
    paused: Pause | None
    slot_at: datetime | None


class Standing(StrEnum):
    FLOWING = "flowing"
    PROBED = "probed"
    DOWN = "down"
    PAUSED = "paused"


def standing(found: DestinationState, now: datetime) -> Standing:
    if found.get("paused"):
        return Standing.PAUSED
    if found.get("state") != BreakerState.OPEN:
        return Standing.FLOWING
    open_until = found["open_until"]
    return Standing.DOWN if open_until is not None and now < open_until else Standing.PROBED


def may_probe(found: DestinationState, worker: str, now: datetime) -> bool:
    """Whether it is this worker's right already, or may be had."""
    until = found.get("probe_until")
    return found.get("probe_by") == worker or until is None or until <= now


def is_resting(found: DestinationState) -> bool:
    """Whether its deliveries wait for it: then they are given no hints, and are not overdue."""
    return bool(found.get("paused")) or found.get("state") == BreakerState.OPEN


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """
    failures_limit: how many different deliveries have to fail in a row; 0 never opens it.
    The waits double from the first to the longest; a fifth of each is left to chance, so that
    several destinations of one vendor are not probed in step.
    """

    failures_limit: int = 5
    first_wait_seconds: float = 5.0
    longest_wait_seconds: float = 300.0
    retry_after_cap_seconds: float = 21600.0

    def wait_seconds(
        self, openings: int, retry_after_seconds: float | None, randomness: random.Random
    ) -> float:
        """openings: how often its wait has been set in a row, this one included."""
        if retry_after_seconds:
            return min(retry_after_seconds, self.retry_after_cap_seconds)
        doubled = self.first_wait_seconds * 2.0 ** min(max(openings - 1, 0), 32)
        return min(doubled, self.longest_wait_seconds) * randomness.uniform(0.8, 1.0)


@dataclass(frozen=True, slots=True)
class Open:
    """Call nobody for so long; then let a probe through."""

    reason: str
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class Close:
    pass


@dataclass(frozen=True, slots=True)
class Disable:
    """The third party wants no more: a pause that a person has to end."""

    reason: str


Reaction = Open | Close | Disable | None


def failures_after(failures: frozenset[str], verdict: Verdict, request_id: str) -> frozenset[str]:
    """The requests whose deliveries have failed since the last answer."""
    if _answers(verdict):
        return frozenset()
    return failures | {request_id} if _tells_of_destination(verdict) else failures


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

    failures_count: with this attempt; openings: how often its wait has been set in a row so far.
    """
    match verdict:
        case Later(disables=True):
            return Disable(verdict.code)
        case Done() | Never():
            return Close() if is_probe else None
        case Later(counts=False):
            return None
    asked_seconds = verdict.retry_after_seconds if isinstance(verdict, Later) else None
    too_many = 0 < policy.failures_limit <= failures_count
    if not (is_probe or asked_seconds or too_many):
        return None
    wait_seconds = policy.wait_seconds(openings + 1, asked_seconds, randomness)
    return Open(verdict.code, wait_seconds)


def _answers(verdict: Verdict) -> bool:
    return isinstance(verdict, Done | Never)


def _tells_of_destination(verdict: Verdict) -> bool:
    return not isinstance(verdict, Later) or verdict.counts


def describe(found: DestinationState) -> dict[str, Any]:
    """Who or what stopped it, since when: for people and logs."""
    pause = found.get("paused")
    if pause:
        return {"since": pause["since"], "reason": f"{pause['why']} ({pause['who']})"}
    return {"since": found.get("since"), "reason": found.get("reason") or ""}
