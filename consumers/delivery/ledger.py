"""
The ledger: who may call for a delivery, and what came of it.

    claim   one update: due and free -> claimed, with the next fence and one more attempt
    record  only under the newest fence: closed, or waiting for its next date

The server's clock decides what is due and what is free, since workers' clocks differ.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from time import monotonic
from typing import Any

from pymongo import ReturnDocument

from assistance.collection import ASSISTANCES, DEAD_LETTERS
from assistance.dead_letter import Sighting, from_delivery, upsert_of_delivery
from assistance.delivery import (
    ATTEMPTS_USED_UP,
    OPEN_STATES,
    Ask,
    Conclusion,
    Delivery,
    DeliveryState,
    Failed,
    Succeeded,
    TryAgain,
    UnknownRule,
    conclude,
    is_open,
)
from assistance.request import Request, Status, closing_facts, delivery_to, status_after
from assistance.retry_policy import RetryPolicy
from assistance.verdict import Later, Unknown, Verdict
from consumers.delivery.updates import CLAIMABLE, NOW, change, given, some_delivery
from outbox.collection import OUTBOX
from runtime.mongo import Database, Session, in_transaction

#: What is known of an attempt whose worker died: nothing.
WORKER_LOST = Unknown("worker_lost")

#: What a claim comes to when no attempt is left: the last worker died, or the schedule was
#: shortened since. What each attempt came to stands beside it.
NONE_LEFT = Unknown(ATTEMPTS_USED_UP)


_IS_UNENDED = {"$eq": [{"$type": "$$attempt.ended_at"}, "missing"]}
_SOME_ATTEMPT_OPEN = {
    "$anyElementTrue": [
        {"$map": {"input": "$$delivery.attempts", "as": "attempt", "in": _IS_UNENDED}}
    ]
}


class Refusal(StrEnum):
    """Why a delivery is not ours to call for, or to record."""

    UNKNOWN_REQUEST = "unknown_request"
    CLOSED = "closed"
    NOT_DUE = "not_due"
    CLAIMED = "claimed"
    FENCED = "fenced"


@dataclass(frozen=True, slots=True)
class Refused:
    reason: Refusal


@dataclass(frozen=True, slots=True)
class Claim:
    """
    The right to call for one delivery, until the lease ends.

    attempt: counts from one. With `used_up` it is the last that was made, and no call is owed.
    With `lost` its worker died, and a person is asked before anybody calls again.
    counted: how many of the attempts are used up, this one among them.
    may_be_repeat: an earlier attempt ended without an answer.
    claimed_at, lease_until: from when to when it lasts, by the server's clock.
    answered, expires: when we heard of it and when it ends, by `time.monotonic`.
    trace: headers that say which trace the request belongs to; empty where none is known.
    """

    request_id: str
    destination: str
    topic: str
    description: str
    created_at: datetime
    idempotency_key: str
    fence: int
    attempt: int
    counted: int
    used_up: bool
    lost: bool
    may_be_repeat: bool
    claimed_at: datetime
    lease_until: datetime
    answered: float
    expires: float
    trace: Mapping[str, str]

    def seconds_left(self) -> float:
        return self.expires - monotonic()

    def now(self) -> datetime:
        """The server's time as far as this process can tell: never ahead of it."""
        return self.claimed_at + timedelta(seconds=monotonic() - self.answered)


@dataclass(frozen=True, slots=True)
class Recorded:
    conclusion: Conclusion


class Ledger:
    def __init__(
        self,
        database: Database,
        *,
        policy: RetryPolicy,
        lease_seconds: float,
        worker: str,
        on_unknown: UnknownRule = UnknownRule.REPEAT,
    ) -> None:
        self._database = database
        self._requests = database[ASSISTANCES]
        self._policy = policy
        self._lease_seconds = lease_seconds
        self._worker = worker
        self._on_unknown = on_unknown
        self._randomness = random.Random()  # noqa: S311  # spreads waits; nothing is secret

    async def claim(self, request_id: str, destination: str) -> Claim | Refused:
        asked_at = monotonic()
        request: Request | None = await self._requests.find_one_and_update(
            {"_id": request_id, "$expr": some_delivery(destination, *CLAIMABLE)},
            change(destination, self._claimed()),
            return_document=ReturnDocument.AFTER,
        )
        delivery = delivery_to(request, destination) if request else None
        if request is None or delivery is None:
            return Refused(await self._why_not(request_id, destination))
        assert delivery["lease_until"] is not None
        attempts = delivery["attempts"]
        no_call = attempts[-1]["fence"] != delivery["fence"]
        lost = no_call and self._asks and attempts[-1].get("code") == WORKER_LOST.code
        return Claim(
            request_id=request_id,
            destination=destination,
            topic=request["topic"],
            description=request["description"],
            created_at=request["created_at"],
            idempotency_key=delivery["idempotency_key"],
            fence=delivery["fence"],
            attempt=len(attempts),
            counted=delivery["attempts_counted"],
            used_up=no_call and not lost,
            lost=lost,
            may_be_repeat=any(attempt.get("verdict") == "unknown" for attempt in attempts),
            lease_until=delivery["lease_until"],
            claimed_at=delivery["lease_until"] - timedelta(seconds=self._lease_seconds),
            answered=monotonic(),
            # counted from before the question, so that ours never outlives the server's
            expires=asked_at + self._lease_seconds,
            trace=request.get("trace", {}),
        )

    async def may_be_claimed(self, request_id: str, destination: str) -> bool:
        """Whether a claim would be granted at this moment; nothing is taken."""
        query = {"_id": request_id, "$expr": some_delivery(destination, *CLAIMABLE)}
        return await self._requests.find_one(query, {"_id": 1}) is not None

    async def record(self, claim: Claim, verdict: Verdict, calls: int) -> Recorded | Refused:
        """
        Write what came of the calls, unless somebody else has claimed the delivery since.

        May be repeated when an answer was lost: what is written is not written twice.
        """
        conclusion = conclude(
            verdict,
            attempts_made=claim.counted,
            policy=self._policy,
            now=claim.now(),
            randomness=self._randomness,
            # when none is left no call was made, and there is nothing to ask about
            on_unknown=UnknownRule.REPEAT if claim.used_up else self._on_unknown,
        )
        if isinstance(conclusion, TryAgain | Ask):
            written = await self._put_back(claim, conclusion, verdict, calls)
        else:
            written = await self._close(claim, conclusion, verdict, calls)
        if written or await self._is_recorded(claim):
            return Recorded(conclusion)
        return Refused(Refusal.FENCED)

    async def _put_back(
        self, claim: Claim, conclusion: TryAgain | Ask, verdict: Verdict, calls: int
    ) -> bool:
        """Open still: to wait for its next date, or for a person."""
        changed: dict[str, Any] = {
            "lease_until": given(None),
            "attempts": _ended(claim, verdict, calls),
        }
        if isinstance(conclusion, TryAgain):
            changed["state"] = given(DeliveryState.WAITING.value)
            changed["due_at"] = changed["hint_until"] = given(conclusion.due_at)
        else:
            changed["state"] = given(DeliveryState.NEEDS_DECISION.value)
        if not _counts(verdict):
            changed["attempts_counted"] = given(claim.counted - 1)
        answer = await self._requests.update_one(
            _held_by(claim), change(claim.destination, changed)
        )
        return bool(answer.matched_count)

    async def _close(
        self, claim: Claim, conclusion: Succeeded | Failed, verdict: Verdict, calls: int
    ) -> bool:
        """
        One transaction: the delivery, the request's status when this was its last delivery, the
        fact that tells so, and the dead letter when it failed.

        All is made ready outside, for the request as it was read; and again, when another delivery
        of it was quicker.
        """
        failed = conclusion if isinstance(conclusion, Failed) else None
        state = DeliveryState.FAILED if failed else DeliveryState.SUCCEEDED
        closed = {
            "state": given(state.value),
            "lease_until": given(None),
            "attempts": _ended(claim, verdict, calls),
        }
        letter = _dead_letter(claim, failed, verdict) if failed else None
        while True:
            request: Request | None = await self._requests.find_one(_held_by(claim))
            if request is None:
                return False
            status = status_after(request, claim.destination, state)
            facts = closing_facts(request, status, claim.now())
            as_read = _as_read(claim, request["version"], status)
            changed = change(
                claim.destination,
                closed,
                {
                    "status": given(status.value),
                    "version": given(request["version"] + len(facts)),
                    "updated_at": given(claim.now()),
                },
            )
            if await self._commit_close(as_read, changed, facts, letter):
                return True

    async def _commit_close(
        self,
        as_read: Mapping[str, Any],
        changed: Sequence[Mapping[str, Any]],
        facts: Sequence[Mapping[str, Any]],
        letter: Sighting | None,
    ) -> bool:
        async def write(session: Session) -> bool:
            answer = await self._requests.update_one(as_read, changed, session=session)
            if not answer.matched_count:
                return False
            if facts:
                await self._database[OUTBOX].insert_many(facts, session=session)
            if letter is not None:
                await self._database[DEAD_LETTERS].update_one(
                    {"_id": letter.id},
                    upsert_of_delivery(letter),
                    upsert=True,
                    session=session,
                )
            return True

        return await in_transaction(self._database.client, write)

    async def _is_recorded(self, claim: Claim) -> bool:
        """Whether it was this very claim that ended already: its answer had been lost."""
        request: Request | None = await self._requests.find_one({"_id": claim.request_id})
        delivery = delivery_to(request, claim.destination) if request else None
        return (
            delivery is not None
            and delivery["fence"] == claim.fence
            and delivery["state"] != DeliveryState.CLAIMED
        )

    async def _why_not(self, request_id: str, destination: str) -> Refusal:
        request: Request | None = await self._requests.find_one({"_id": request_id})
        delivery = delivery_to(request, destination) if request else None
        if delivery is None:
            return Refusal.UNKNOWN_REQUEST
        if not is_open(delivery):
            return Refusal.CLOSED
        return Refusal.CLAIMED if _is_claimed(delivery) else Refusal.NOT_DUE

    @property
    def _asks(self) -> bool:
        return self._on_unknown is UnknownRule.ASK

    def _claimed(self) -> dict[str, Any]:
        made = {"$size": "$$delivery.attempts"}
        fence = {"$add": ["$$delivery.fence", 1]}
        lease_until = {"$add": [NOW, int(self._lease_seconds * 1000)]}
        lost = _end_attempts(
            {"ended_at": NOW, "verdict": given("unknown"), "code": given(WORKER_LOST.code)}
        )
        new = {
            "number": {"$add": [made, 1]},
            "fence": fence,
            "worker": given(self._worker),
            "started_at": NOW,
        }
        counted = {"$ifNull": ["$$delivery.attempts_counted", made]}
        no_call: Any = {"$gte": [counted, self._policy.attempts_limit]}
        if self._asks:
            no_call = {"$or": [no_call, _SOME_ATTEMPT_OPEN]}
        return {
            "state": given(DeliveryState.CLAIMED.value),
            "fence": fence,
            "lease_until": lease_until,
            "hint_until": lease_until,
            "hints": 0,
            "attempts_counted": {"$cond": [no_call, counted, {"$add": [counted, 1]}]},
            "attempts": {"$cond": [no_call, lost, {"$concatArrays": [lost, [new]]}]},
        }


def _is_claimed(delivery: Delivery) -> bool:
    return delivery["state"] == DeliveryState.CLAIMED


def _held_by(claim: Claim) -> dict[str, Any]:
    held = {
        "destination": claim.destination,
        "state": DeliveryState.CLAIMED.value,
        "fence": claim.fence,
    }
    return {"_id": claim.request_id, "deliveries": {"$elemMatch": held}}


def _as_read(claim: Claim, version: int, status: Status) -> dict[str, Any]:
    """
    The filter under which a status may be written: ours to record, and nothing has changed it.

    The version alone would not do: another delivery that closes without being the last one
    appends no event.
    """
    others_open = {
        "deliveries": {
            "$elemMatch": {
                "destination": {"$ne": claim.destination},
                "state": {"$in": list(OPEN_STATES)},
            }
        }
    }
    same = others_open if status is Status.ACCEPTED else {"$nor": [others_open]}
    return {"$and": [_held_by(claim), {"version": version}, same]}


def _ended(claim: Claim, verdict: Verdict, calls: int) -> dict[str, Any]:
    said = {"excerpt": given(verdict.excerpt)} if verdict.excerpt else {}
    if not _counts(verdict):
        said["counted"] = given(False)
    return _end_attempts(
        {
            "ended_at": given(claim.now()),
            "calls": given(calls),
            "verdict": given(verdict_word(verdict)),
            "code": given(verdict.code),
            **said,
        }
    )


def _end_attempts(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Every attempt that is still open, ended; there is one at most."""
    ended = {"$mergeObjects": ["$$attempt", dict(fields)]}
    return {
        "$map": {
            "input": "$$delivery.attempts",
            "as": "attempt",
            "in": {"$cond": [_IS_UNENDED, ended, "$$attempt"]},
        }
    }


def _counts(verdict: Verdict) -> bool:
    return not isinstance(verdict, Later) or verdict.counts


def verdict_word(verdict: Verdict) -> str:
    return type(verdict).__name__.lower()


def _dead_letter(claim: Claim, failed: Failed, verdict: Verdict) -> Sighting:
    return from_delivery(
        request_id=claim.request_id,
        destination=claim.destination,
        reason=failed.reason,
        code=verdict.code,
        excerpt=verdict.excerpt,
        seen_at=claim.now(),
    )
