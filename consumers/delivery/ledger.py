"""
The ledger: which worker may call for a delivery, and the outcome of each attempt.

    claim   one update: due and unclaimed -> claimed, with the next fence and one more attempt
    record  under the newest fence only, one of
              succeed      closed as succeeded, with the request and its fact where it was the last
              fail         the same as failed, with a dead letter
              reschedule   waiting until the next date
              ask          open until an operator decides

The server's clock decides what is due and when a lease ends, since workers' clocks differ.
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
from consumers.delivery.updates import CLAIMABLE, NOW, change, from_now, given, some_delivery
from outbox.collection import OUTBOX
from runtime.mongo import Database, Session, in_transaction

#: The verdict on an attempt whose worker died: its outcome is unknown.
WORKER_LOST = Unknown("worker_lost")

#: The verdict on a claim with no attempt left: the last worker died, or the schedule was shortened
#: since. The attempts keep their own verdicts.
NONE_LEFT = Unknown(ATTEMPTS_USED_UP)


_IS_UNENDED = {"$eq": [{"$type": "$$attempt.ended_at"}, "missing"]}
_SOME_ATTEMPT_OPEN = {
    "$anyElementTrue": [
        {"$map": {"input": "$$delivery.attempts", "as": "attempt", "in": _IS_UNENDED}}
    ]
}


class Refusal(StrEnum):
    """Why a delivery cannot be claimed, or its outcome not be recorded."""

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

    attempt: counts from one. With `used_up` it is the last one made, and no further call is due.
    With `lost` its worker died, and an operator decides before the next call.
    counted: how many attempts are used up, this one included.
    unknown_outcomes: how many counted attempts before this one had an unknown outcome.
    may_be_repeat: an earlier attempt ended without an answer.
    claimed_at, lease_until: begin and end of the lease, by the server's clock.
    answered, expires: when the claim was answered and when it ends, by `time.monotonic`.
    trace: the request's trace headers; empty where there are none.
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
    unknown_outcomes: int
    may_be_repeat: bool
    claimed_at: datetime
    lease_until: datetime
    answered: float
    expires: float
    trace: Mapping[str, str]

    def seconds_left(self) -> float:
        return self.expires - monotonic()

    def now(self) -> datetime:
        """The server's time as this process can infer it, never ahead of the server."""
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
        unknown_outcomes = _unknown_outcomes(delivery)
        lost = lost or self._no_more_repeats(unknown_outcomes)
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
            unknown_outcomes=unknown_outcomes,
            may_be_repeat=any(attempt.get("verdict") == "unknown" for attempt in attempts),
            lease_until=delivery["lease_until"],
            claimed_at=delivery["lease_until"] - timedelta(seconds=self._lease_seconds),
            answered=monotonic(),
            # counted from before the request, so that it never outlasts the server's lease
            expires=asked_at + self._lease_seconds,
            trace=request.get("trace", {}),
        )

    async def may_be_claimed(self, request_id: str, destination: str) -> bool:
        """Whether a claim would succeed now; changes nothing."""
        query = {"_id": request_id, "$expr": some_delivery(destination, *CLAIMABLE)}
        return await self._requests.find_one(query, {"_id": 1}) is not None

    async def record(self, claim: Claim, verdict: Verdict, calls: int) -> Recorded | Refused:
        """
        Write the outcome of the calls, unless another worker has claimed the delivery since.

        Idempotent: it may be repeated when the answer was lost.
        """
        conclusion = conclude(
            verdict,
            attempts_made=claim.counted,
            attempts_in_all=claim.attempt,
            unknown_outcomes=claim.unknown_outcomes + 1,
            policy=self._policy,
            now=claim.now(),
            randomness=self._randomness,
            # with no attempt left no call was made, so there is nothing to ask about
            on_unknown=UnknownRule.REPEAT if claim.used_up else self._on_unknown,
        )
        match conclusion:
            case Succeeded():
                written = await self._succeed(claim, verdict, calls)
            case Failed(reason):
                written = await self._fail(claim, reason, verdict, calls)
            case TryAgain(due_at):
                written = await self._reschedule(claim, due_at, verdict, calls)
            case Ask():
                written = await self._ask(claim, verdict, calls)
        if written or await self._is_recorded(claim):
            return Recorded(conclusion)
        return Refused(Refusal.FENCED)

    async def _succeed(self, claim: Claim, verdict: Verdict, calls: int) -> bool:
        ended = _ended(claim, verdict, calls)
        return await self._close(claim, DeliveryState.SUCCEEDED, ended, letter=None)

    async def _fail(self, claim: Claim, reason: str, verdict: Verdict, calls: int) -> bool:
        ended = _ended(claim, verdict, calls)
        letter = _dead_letter(claim, reason, verdict)
        return await self._close(claim, DeliveryState.FAILED, ended, letter)

    async def _reschedule(
        self, claim: Claim, due_at: datetime, verdict: Verdict, calls: int
    ) -> bool:
        """Waiting again, until its next date."""
        waiting = {
            "state": given(DeliveryState.WAITING.value),
            "due_at": given(due_at),
            "hint_until": given(due_at),
            **_ended(claim, verdict, calls),
        }
        return await self._keep_open(claim, waiting)

    async def _ask(self, claim: Claim, verdict: Verdict, calls: int) -> bool:
        """Open, until an operator decides."""
        undecided = {
            "state": given(DeliveryState.NEEDS_DECISION.value),
            **_ended(claim, verdict, calls),
        }
        return await self._keep_open(claim, undecided)

    async def _keep_open(self, claim: Claim, changed: Mapping[str, Any]) -> bool:
        answer = await self._requests.update_one(
            _held_by(claim), change(claim.destination, changed)
        )
        return bool(answer.matched_count)

    async def _close(
        self,
        claim: Claim,
        state: DeliveryState,
        ended: Mapping[str, Any],
        letter: Sighting | None,
    ) -> bool:
        """
        One transaction writes the delivery, the request's status, the fact about it when this was
        its last open delivery, and the dead letter of a failure.

        All of it is prepared outside the transaction for the request as it was read, and prepared
        again when another delivery of the request was recorded in between.
        """
        closed = {"state": given(state.value), **ended}
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
        """Whether this very claim was recorded before, and its answer was lost."""
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

    def _no_more_repeats(self, unknown_outcomes: int) -> bool:
        """Whether workers died in calls so often that a person must decide before the next one."""
        repeats_limit = len(self._policy.unknown_delays_seconds)
        return self._on_unknown is UnknownRule.RARELY and unknown_outcomes > repeats_limit

    def _claimed(self) -> dict[str, Any]:
        made = {"$size": "$$delivery.attempts"}
        fence = {"$add": ["$$delivery.fence", 1]}
        lease_until = from_now(self._lease_seconds)
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


def _unknown_outcomes(delivery: Delivery) -> int:
    """Among the attempts that are used up; an operator who reopens a delivery resets them."""
    counted = [one for one in delivery["attempts"] if one.get("counted", True)]
    newest = counted[len(counted) - delivery["attempts_counted"] :]
    return sum(one.get("verdict") == "unknown" for one in newest)


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
    The filter under which a status may be written: this claim still holds the delivery, and the
    other deliveries are as open as they were read.

    The version alone would not do: a delivery that closes and is not the last one appends no event.
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
    """The lease and the attempt, ended; the attempt is not counted where the verdict says so."""
    attempt = {
        "ended_at": given(claim.now()),
        "calls": given(calls),
        "verdict": given(verdict_word(verdict)),
        "code": given(verdict.code),
    }
    if verdict.excerpt:
        attempt["excerpt"] = given(verdict.excerpt)
    changed = {"lease_until": given(None)}
    if isinstance(verdict, Later) and not verdict.counts:
        attempt["counted"] = given(False)
        changed["attempts_counted"] = given(claim.counted - 1)
    return {**changed, "attempts": _end_attempts(attempt)}


def _end_attempts(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The attempts with the open one ended; at most one is open."""
    ended = {"$mergeObjects": ["$$attempt", dict(fields)]}
    return {
        "$map": {
            "input": "$$delivery.attempts",
            "as": "attempt",
            "in": {"$cond": [_IS_UNENDED, ended, "$$attempt"]},
        }
    }


def verdict_word(verdict: Verdict) -> str:
    return type(verdict).__name__.lower()


def _dead_letter(claim: Claim, reason: str, verdict: Verdict) -> Sighting:
    return from_delivery(
        request_id=claim.request_id,
        destination=claim.destination,
        reason=reason,
        code=verdict.code,
        excerpt=verdict.excerpt,
        seen_at=claim.now(),
    )
