"""
Whether a destination is called at all, how many messages may be in hand for it, and how fast.

    flowing   as many as the settings allow
    probed    one, by the worker that holds the right to it
    down      none; paused: none. The queue is not consumed, and what was fetched goes back

The gate looks about once a second at what the workers share, and at once at what it finds itself.
"""

import asyncio
import random
from dataclasses import dataclass, replace

import pymongo
from loguru import logger
from pymongo.errors import PyMongoError

from assistance.breaker import (
    BreakerPolicy,
    Close,
    Disable,
    Open,
    Reaction,
    Standing,
    describe,
    failures_after,
    may_probe,
    react,
    standing,
)
from assistance.verdict import Later, Verdict
from consumers.channels import DeliveryChannel
from consumers.database import GivenUp, insist
from consumers.delivery.destinations import Destinations
from consumers.delivery.subscriber import PREFETCH_RATIO, Flow, where
from consumers.settings import DestinationSettings
from runtime.shutdown import Stop

LOOK_SECONDS = 1.0

#: A look that takes longer is given up; what was known last still holds.
LOOK_TIMEOUT_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Admission:
    """turn: when it was given; the next change of how the destination stands ends it."""

    turn: int
    is_probe: bool


class Gate:
    """
    rate_per_second: over all workers; 0 for no limit.
    worker: a name that no other process has.
    """

    def __init__(
        self,
        destinations: Destinations,
        destination: str,
        *,
        policy: BreakerPolicy,
        rate_per_second: float,
        concurrency: int,
        worker: str,
        stop: Stop,
    ) -> None:
        self._destinations = destinations
        self._destination = destination
        self._policy = policy
        self._rate_per_second = rate_per_second
        self._prefetch = concurrency * PREFETCH_RATIO
        self._worker = worker
        self._stop = stop
        self._standing: Standing | None = None
        self._openings = 0
        self._failures: frozenset[str] = frozenset()
        self._one_slot = asyncio.Lock()
        self._randomness = random.Random()  # noqa: S311  # spreads waits; nothing is secret
        #: shut until the first look: what is paused must not be called by a worker that starts
        self.flow = Flow(0)

    @property
    def has_rate(self) -> bool:
        return self._rate_per_second > 0

    @property
    def why_not_ready(self) -> str | None:
        """A destination that rests is no fault of its worker's, who is ready; before the first
        look it is not."""
        return "the destination's state is not known yet" if self._standing is None else None

    async def watch(self) -> None:
        """Follow what the workers share, until a stop is asked for."""
        while not self._stop.requested:
            try:
                with pymongo.timeout(LOOK_TIMEOUT_SECONDS):
                    await self.look()
            except PyMongoError as error:
                logger.debug("destination.unseen", error=type(error).__name__)
            except Exception as error:  # noqa: BLE001  # who looks no more would never call again
                logger.error("destination.unseen", error=where(error))
            await self._stop.rest(LOOK_SECONDS)

    async def look(self) -> None:
        seen = await self._destinations.look(self._destination)
        found = standing(seen.state, seen.now)
        self._openings = seen.state.get("openings", 0)
        match found:
            case Standing.FLOWING:
                prefetch = self._prefetch
            case Standing.PROBED if may_probe(seen.state, self._worker, seen.now):
                took = await self._destinations.take_probe(self._destination, self._worker)
                prefetch = 1 if took else 0
            case _:
                prefetch = 0
        self._stand(found, prefetch, **describe(seen.state))

    def _stand(self, found: Standing, prefetch: int, **about: object) -> None:
        if found is not self._standing:
            level = "INFO" if found is Standing.FLOWING else "WARNING"
            if self._standing is not None or found is not Standing.FLOWING:
                logger.log(
                    level,
                    "destination.stands",
                    destination=self._destination,
                    standing=found.value,
                    **about,
                )
            self._failures = frozenset()
        self._standing = found
        self.flow.set(prefetch)

    def admit(self) -> Admission | None:
        """The permission to call for one message, or None when it has to go back."""
        if not self.flow.prefetch:
            return None
        return Admission(self.flow.turn, is_probe=self._standing is Standing.PROBED)

    def holds(self, admission: Admission) -> bool:
        """Whether the destination stands as it did."""
        return admission.turn == self.flow.turn

    async def slot(self, admission: Admission, *, within_seconds: float | None = None) -> bool:
        """
        Wait for the next call's turn where there is a rate; false when the destination does not
        stand as it did, or none came within the time.

        A worker asks for one at a time, so that no more than one is lost with it, and nobody waits
        longer than there are workers. Raises GivenUp at a stop.
        """
        if not self.has_rate:
            return True
        try:
            async with asyncio.timeout(within_seconds), self._one_slot:
                return await self._next_slot(admission)
        except TimeoutError:
            return False

    async def _next_slot(self, admission: Admission) -> bool:
        # whoever will not call leaves the turn to others
        if self._stop.requested:
            raise GivenUp
        if not self.holds(admission):
            return False
        interval_seconds = 1 / self._rate_per_second
        wait_seconds = await insist(
            lambda: self._destinations.next_slot(self._destination, interval_seconds),
            self._stop,
        )
        await self._stop.rest(wait_seconds)
        if self._stop.requested:
            raise GivenUp
        return self.holds(admission)

    def judge(self, verdict: Verdict, request_id: str, admission: Admission) -> Reaction:
        """What an attempt's outcome means for the destination; called once for each."""
        is_stale = not self.holds(admission)
        if not is_stale:
            self._failures = failures_after(self._failures, verdict, request_id)
        return react(
            verdict,
            # begun before the destination went down, it tells nothing new of it, unless it asks
            failures_count=0 if is_stale else len(self._failures),
            openings=self._openings,
            is_probe=admission.is_probe and not is_stale,
            policy=self._policy,
            randomness=self._randomness,
        )

    async def follow(self, reaction: Reaction, admission: Admission) -> None:
        """Tell all workers, once the outcome is in the ledger."""
        match reaction:
            case Open(reason, wait_seconds):
                probe_by = self._worker if admission.is_probe and self.holds(admission) else None
                if self._standing is not Standing.PAUSED:
                    rounded = round(wait_seconds, 1)
                    self._stand(Standing.DOWN, 0, reason=reason, wait_seconds=rounded)
                await insist(
                    lambda: self._destinations.open(
                        self._destination, reason, wait_seconds, probe_by=probe_by
                    )
                )
            case Disable(reason):
                logger.error("destination.disabled", destination=self._destination, reason=reason)
                self._stand(Standing.PAUSED, 0, reason=reason)
                await insist(lambda: self._destinations.disable(self._destination, reason))
            case Close():
                closed = await insist(
                    lambda: self._destinations.close(self._destination, probe_by=self._worker)
                )
                if closed and self._standing is Standing.PROBED:
                    self._stand(Standing.FLOWING, self._prefetch)


def rate_per_second(own: DestinationSettings, third_party: DeliveryChannel) -> float:
    """The destination's own rate, else its channel's; 0 for no limit."""
    if own.rate_per_second is not None:
        return own.rate_per_second
    return float(getattr(third_party, "RATE_PER_SECOND", 0.0))


def as_recorded(verdict: Verdict, reaction: Reaction, admission: Admission) -> Verdict:
    """
    A probe that failed tried the destination and not its delivery, which waits as long as it does;
    so does what the third party refused for good until somebody sees to it.
    """
    match verdict, reaction:
        case Later(), Open(_, wait_seconds) if admission.is_probe:
            return replace(verdict, counts=False, retry_after_seconds=wait_seconds)
        case Later(), _ if admission.is_probe or isinstance(reaction, Disable):
            return replace(verdict, counts=False)
        case _:
            return verdict
