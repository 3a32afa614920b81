"""
One destination's worker.

    receive -> claim -> call -> record -> acknowledge

The message is only a hint: the ledger decides whether the delivery is due. The third party is
called under a claim and outside any transaction, and the outcome is committed to MongoDB before the
message is acknowledged. A crash at any point costs at most a repeated call, never a request.
"""

import asyncio
import os
import socket
from dataclasses import dataclass
from functools import partial
from time import monotonic

from loguru import logger
from pymongo.errors import PyMongoError

from assistance.delivery import Ask, Failed, Succeeded, TryAgain
from assistance.events import read_hint
from assistance.verdict import Later, Unknown, Verdict
from consumers import topology
from consumers.channels import DeliveryChannel, OutboundMessage, unknown_rule
from consumers.database import open_database
from consumers.delivery.destinations import Destinations
from consumers.delivery.gate import Admission, Gate, as_recorded
from consumers.delivery.hints import Hints
from consumers.delivery.ledger import (
    NONE_LEFT,
    WORKER_LOST,
    Claim,
    Ledger,
    Recorded,
    Refusal,
    Refused,
    verdict_word,
)
from consumers.delivery.metrics import AttemptMetrics
from consumers.delivery.rate_limiter import RateLimiter, rate_per_second
from consumers.delivery.subscriber import NotNow, Subscriber, Subscription, error_location
from consumers.settings import FIRST_PAUSE_SECONDS, DestinationSettings, WorkerSettings
from outbox.errors import UndecodableBody
from runtime.mongo import GivenUp, new_owner, retry_while_unavailable
from runtime.monitoring import monitored
from runtime.rabbit import AmqpChannel, AmqpMessage
from runtime.retry import growing_delays
from runtime.shutdown import Stop

NOT_CALLED = Later("lease_spent", counts=False)


@dataclass(frozen=True, slots=True)
class Hint:
    event_id: str
    request_id: str
    destination: str


@dataclass(frozen=True, slots=True)
class Outcome:
    verdict: Verdict
    calls: int
    duration_seconds: float


class Worker:
    def __init__(
        self,
        settings: WorkerSettings,
        destination: str,
        third_party: DeliveryChannel,
        ledger: Ledger,
        hints: Hints,
        gate: Gate,
        rate_limiter: RateLimiter,
        metrics: AttemptMetrics,
        stop: Stop,
    ) -> None:
        self._settings = settings
        self._destination = destination
        self._third_party = third_party
        self._ledger = ledger
        self._hints = hints
        self._gate = gate
        self._rate_limiter = rate_limiter
        self._metrics = metrics
        self._stop = stop

    async def handle(self, message: AmqpMessage, channel: AmqpChannel) -> None:
        hint = self._receive(message)
        if hint is None:
            channel.dead_letter(message)
            return
        admission = self._gate.admit()
        if admission is None:
            raise NotNow
        with logger.contextualize(request_id=hint.request_id, event_id=hint.event_id):
            try:
                await self._wait_for_slot(hint, admission)
                claim = await self._claim(hint)
                if claim is not None:
                    outcome = await self._call(claim, admission)
                    await self._record(claim, outcome, admission)
            except PyMongoError as error:
                # not transient, so not repeated here: the reconciler finds the delivery once due
                logger.error("delivery.refused_by_mongodb", error=error_location(error))
        channel.ack(message)

    def _receive(self, message: AmqpMessage) -> Hint | None:
        if message.undecodable:
            logger.warning(
                "message.refused", event_id=message.message_id, reason=message.undecodable
            )
            return None
        try:
            hint = Hint(*read_hint(message.body))
        except UndecodableBody as error:
            logger.warning("message.refused", event_id=message.message_id, reason=str(error))
            return None
        if hint.destination != self._destination:
            reason = f"a hint for {hint.destination!r} in the queue of {self._destination!r}"
            logger.warning("message.refused", event_id=hint.event_id, reason=reason)
            return None
        return hint

    async def _wait_for_slot(self, hint: Hint, admission: Admission) -> None:
        """A hint without a due delivery reserves no slot. Raises NotNow when the flow changed."""
        if not self._rate_limiter.is_limited:
            return
        due = await retry_while_unavailable(
            lambda: self._ledger.may_be_claimed(hint.request_id, hint.destination), self._stop
        )
        still_wanted = partial(self._gate.holds, admission)
        if due and not await self._rate_limiter.wait_for_slot(still_wanted):
            raise NotNow

    async def _claim(self, hint: Hint) -> Claim | None:
        """The claim, or None when there is nothing to do; then the message is acknowledged."""

        async def try_to_claim() -> Claim | Refused:
            claim = await self._ledger.claim(hint.request_id, hint.destination)
            if claim == Refused(Refusal.NOT_DUE):
                await self._hints.spend(hint.request_id, hint.destination, hint.event_id)
            return claim

        claim = await retry_while_unavailable(try_to_claim, self._stop)
        if isinstance(claim, Claim):
            return claim
        level = "WARNING" if claim.reason is Refusal.UNKNOWN_REQUEST else "DEBUG"
        logger.log(level, "delivery.not_claimed", reason=claim.reason.value)
        return None

    async def _call(self, claim: Claim, admission: Admission) -> Outcome:
        """
        Call up to `call_tries` times within the lease, until the verdict is final.

        Only a definite failure is tried again here. After a lost answer, or when the third party
        asked for a wait, the ledger schedules the next attempt. A probe is one call.
        """
        if claim.lost:
            return Outcome(WORKER_LOST, calls=0, duration_seconds=0.0)
        if claim.used_up:
            return Outcome(NONE_LEFT, calls=0, duration_seconds=0.0)
        verdict: Verdict = NOT_CALLED
        calls = 0
        pauses_seconds = growing_delays(first_seconds=FIRST_PAUSE_SECONDS)
        began_at = monotonic()
        for try_number in range(self._settings.call_tries):
            if try_number:
                await asyncio.sleep(next(pauses_seconds))
                if not await self._gets_another_slot(claim, admission):
                    break
            # this process may have been frozen, and another worker may hold the lease by now
            if claim.seconds_left() <= self._settings.longest_call_seconds:
                break
            calls += 1
            verdict = await self._send(_message(claim))
            if not self._may_call_again(verdict, admission):
                break
        return Outcome(verdict, calls, monotonic() - began_at)

    async def _gets_another_slot(self, claim: Claim, admission: Admission) -> bool:
        spare_seconds = claim.seconds_left() - self._settings.longest_call_seconds
        still_wanted = partial(self._gate.holds, admission)
        try:
            return await self._rate_limiter.wait_for_slot(
                still_wanted, within_seconds=spare_seconds
            )
        except GivenUp:
            return False  # the verdict of the call before must still be recorded

    def _may_call_again(self, verdict: Verdict, admission: Admission) -> bool:
        return (
            isinstance(verdict, Later)
            and verdict.retry_after_seconds is None
            and not verdict.disables
            and not verdict.about_us
            and not admission.is_probe
            and self._gate.holds(admission)
            and not self._stop.requested
        )

    async def _send(self, message: OutboundMessage) -> Verdict:
        try:
            async with asyncio.timeout(self._settings.longest_call_seconds):
                return await self._third_party.send(message)
        except TimeoutError:
            return Unknown("no_answer_in_time")
        except Exception as error:  # noqa: BLE001  # a broken plug-in must not end the worker
            logger.error("channel.broken", error=error_location(error))
            return Unknown("channel_broken")

    async def _record(self, claim: Claim, outcome: Outcome, admission: Admission) -> None:
        reaction = (
            self._gate.judge(outcome.verdict, claim.request_id, admission)
            if outcome.calls
            else None
        )
        verdict = as_recorded(outcome.verdict, reaction, admission)
        written = await retry_while_unavailable(
            lambda: self._ledger.record(claim, verdict, outcome.calls)
        )
        self._report(claim, outcome, written)
        await self._gate.follow(reaction, admission)

    def _report(self, claim: Claim, outcome: Outcome, written: Recorded | Refused) -> None:
        self._metrics.note(outcome.verdict, outcome.calls, outcome.duration_seconds)
        attempted = logger.bind(
            destination=claim.destination,
            attempt=claim.attempt,
            calls=outcome.calls,
            duration_ms=round(outcome.duration_seconds * 1000),
            verdict=verdict_word(outcome.verdict),
            code=outcome.verdict.code,
        )
        match written:
            case Recorded(Succeeded()):
                attempted.info("delivery.attempted", state="succeeded")
            case Recorded(TryAgain(due_at)):
                attempted.warning("delivery.attempted", state="waiting", due_at=due_at)
            case Recorded(Ask()):
                attempted.error("delivery.attempted", state="needs_decision")
            case Recorded(Failed(reason)):
                attempted.error("delivery.attempted", state="failed", reason=reason)
            case Refused(reason):
                attempted.warning("delivery.attempted", state="not_recorded", reason=reason.value)


def _message(claim: Claim) -> OutboundMessage:
    return OutboundMessage(
        request_id=claim.request_id,
        topic=claim.topic,
        description=claim.description,
        idempotency_key=claim.idempotency_key,
        created_at=claim.created_at,
        may_be_repeat=claim.may_be_repeat,
        trace=claim.trace,
    )


async def run_worker(
    settings: WorkerSettings,
    destination: str,
    own: DestinationSettings,
    third_party: DeliveryChannel,
    stop: Stop,
) -> None:
    """
    Serve one destination until a stop is requested.

    settings: with the destination's own values already applied.

    Raises UnsuitableServer or BrokerRefused when MongoDB or RabbitMQ refuses the worker at the
    start.
    """
    name = f"worker-{destination}"

    async def declare(channel: AmqpChannel) -> None:
        await topology.declare_deliveries(
            channel,
            destination,
            events_exchange=settings.events_exchange,
            delivery_limit=settings.delivery_limit,
        )

    async with (
        monitored(settings, name) as monitor,
        open_database(settings, name, stop, monitor) as database,
    ):
        ledger = Ledger(
            database,
            policy=settings.retry_policy,
            lease_seconds=settings.lease_seconds,
            worker=f"{socket.gethostname()}/{os.getpid()}",
            on_unknown=unknown_rule(third_party, own.on_unknown),
        )
        destinations = Destinations(database)
        gate = Gate(
            destinations,
            destination,
            policy=settings.breaker_policy,
            concurrency=settings.concurrency,
            worker=new_owner(),
            stop=stop,
        )
        worker = Worker(
            settings,
            destination,
            third_party,
            ledger,
            Hints(database),
            gate,
            RateLimiter(destinations, destination, rate_per_second(own, third_party), stop),
            AttemptMetrics(monitor.registry, destination),
            stop,
        )
        subscription = Subscription(
            name=name,
            queue=topology.deliveries_queue(destination),
            concurrency=settings.concurrency,
            grace_seconds=settings.shutdown_grace_seconds,
            declare=declare,
            handle=worker.handle,
            flow=gate.flow,
        )
        subscriber = Subscriber(settings, subscription, stop)
        monitor.ready_when(lambda: subscriber.why_not_ready)
        monitor.ready_when(lambda: gate.why_not_ready)
        watching = asyncio.create_task(gate.watch())
        try:
            await subscriber.run()
        finally:
            watching.cancel()
            await third_party.close()
