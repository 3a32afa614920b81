"""
How many messages a worker fetches for its destination, according to the breaker.

    closed      as many as the settings allow
    half-open   one, in the worker that holds the right to probe
    open        none: the queue is not consumed, and fetched messages are requeued
    suspended   none, as above

The gate polls the shared state about once a second, and reacts at once to its own calls' outcomes.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pymongo
from loguru import logger
from pymongo.errors import PyMongoError

from assistance.breaker import (
    BreakerPolicy,
    BreakerState,
    Close,
    Open,
    Reaction,
    Suspend,
    breaker_state,
    describe,
    failures_after,
    may_probe,
    react,
)
from assistance.verdict import Later, Verdict
from consumers.delivery.destinations import Destinations
from consumers.delivery.subscriber import PREFETCH_RATIO, Flow, error_location
from runtime.mongo import retry_while_unavailable
from runtime.shutdown import Stop

POLL_SECONDS = 1.0

#: A poll that takes longer is given up; the last known state stays in force.
POLL_TIMEOUT_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Admission:
    """
    The permission to call for one message.

    generation: of the flow when it was given; it is void after the flow's next change.
    """

    generation: int
    is_probe: bool


class Gate:
    """worker: a name that no other process has."""

    def __init__(
        self,
        destinations: Destinations,
        destination: str,
        *,
        policy: BreakerPolicy,
        concurrency: int,
        worker: str,
        stop: Stop,
    ) -> None:
        self._destinations = destinations
        self._destination = destination
        self._policy = policy
        self._prefetch = concurrency * PREFETCH_RATIO
        self._worker = worker
        self._stop = stop
        self._state: BreakerState | None = None
        self._openings = 0
        self._writes_under_way = 0
        self._writes_ended = 0
        self._failures: frozenset[str] = frozenset()
        self._randomness = random.Random()  # noqa: S311  # spreads waits; nothing is secret
        #: nothing until the first poll: a worker that starts must not call what is suspended
        self.flow = Flow(0)

    @property
    def why_not_ready(self) -> str | None:
        """A worker of a suspended or open destination is ready; before its first poll it is not."""
        return "the destination's state is not known yet" if self._state is None else None

    async def watch(self) -> None:
        """Poll the shared state until a stop is requested."""
        while not self._stop.requested:
            try:
                with pymongo.timeout(POLL_TIMEOUT_SECONDS):
                    await self.poll()
            except PyMongoError as error:
                logger.debug("destination.unseen", error=type(error).__name__)
            except Exception as error:  # noqa: BLE001  # without polls it would stay as it is
                logger.error("destination.unseen", error=error_location(error))
            await self._stop.rest(POLL_SECONDS)

    async def poll(self) -> None:
        writes_ended = self._writes_ended
        seen = await self._destinations.look(self._destination)
        state = breaker_state(seen.state, seen.now)
        self._openings = seen.state.get("openings", 0)
        match state:
            case BreakerState.CLOSED:
                prefetch = self._prefetch
            case BreakerState.HALF_OPEN if may_probe(seen.state, self._worker, seen.now):
                took = await self._destinations.take_probe(self._destination, self._worker)
                prefetch = 1 if took else 0
            case _:
                prefetch = 0
        if self._writes_under_way or writes_ended != self._writes_ended:
            return  # read before this worker's own change, which must not be undone; poll again
        self._enter(state, prefetch, **describe(seen.state))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Makes a poll that overlaps with this write discard what it read."""
        self._writes_under_way += 1
        try:
            yield
        finally:
            self._writes_under_way -= 1
            self._writes_ended += 1

    def _enter(self, state: BreakerState, prefetch: int, **details: object) -> None:
        if state is not self._state:
            level = "INFO" if state is BreakerState.CLOSED else "WARNING"
            if self._state is not None or state is not BreakerState.CLOSED:
                logger.log(
                    level,
                    "destination.state_changed",
                    destination=self._destination,
                    state=state.value,
                    **details,
                )
            self._failures = frozenset()
        self._state = state
        self.flow.set(prefetch)

    def admit(self) -> Admission | None:
        """The permission to call for one message, or None when the message must be requeued."""
        if not self.flow.prefetch:
            return None
        return Admission(self.flow.generation, is_probe=self._state is BreakerState.HALF_OPEN)

    def holds(self, admission: Admission) -> bool:
        """Whether the flow is unchanged since the admission."""
        return admission.generation == self.flow.generation

    def judge(self, verdict: Verdict, request_id: str, admission: Admission) -> Reaction:
        """What an attempt's outcome means for the destination; call it once per attempt."""
        is_stale = not self.holds(admission)
        if not is_stale:
            self._failures = failures_after(self._failures, verdict, request_id)
        return react(
            verdict,
            # an attempt from before the change does not count against the new state; a wait that
            # the third party asked for still holds
            failures_count=0 if is_stale else len(self._failures),
            openings=self._openings,
            is_probe=admission.is_probe and not is_stale,
            policy=self._policy,
            randomness=self._randomness,
        )

    async def follow(self, reaction: Reaction, admission: Admission) -> None:
        """Share the reaction with all workers, once the outcome is in the ledger."""
        match reaction:
            case Open(reason, wait_seconds):
                probe_by = self._worker if admission.is_probe and self.holds(admission) else None
                if self._state is not BreakerState.SUSPENDED:
                    rounded = round(wait_seconds, 1)
                    self._enter(BreakerState.OPEN, 0, reason=reason, wait_seconds=rounded)
                with self._writing():
                    await retry_while_unavailable(
                        lambda: self._destinations.open(
                            self._destination, reason, wait_seconds, probe_by=probe_by
                        )
                    )
            case Suspend(reason):
                logger.error("destination.disabled", destination=self._destination, reason=reason)
                self._enter(BreakerState.SUSPENDED, 0, reason=reason)
                with self._writing():
                    await retry_while_unavailable(
                        lambda: self._destinations.suspend_as_asked(self._destination, reason)
                    )
            case Close():
                with self._writing():
                    closed = await retry_while_unavailable(
                        lambda: self._destinations.close(self._destination, probe_by=self._worker)
                    )
                if closed and self._state is BreakerState.HALF_OPEN:
                    self._enter(BreakerState.CLOSED, self._prefetch)


def as_recorded(verdict: Verdict, reaction: Reaction, admission: Admission) -> Verdict:
    """
    The verdict as the ledger records it, which may spend none of the delivery's attempts.

    A failed probe tested the destination rather than the delivery, so its delivery waits as long
    as the breaker. An attempt does not count either when its answer was about us, or when the
    destination was suspended because of it.
    """
    match verdict, reaction:
        case Later(), Open(_, wait_seconds) if admission.is_probe:
            return replace(verdict, counts=False, wait_seconds=float(wait_seconds))
        case Later(about_us=about_us), _ if (
            admission.is_probe or about_us or isinstance(reaction, Suspend)
        ):
            return replace(verdict, counts=False)
        case _:
            return verdict
