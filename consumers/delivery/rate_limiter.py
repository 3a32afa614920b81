"""
How fast a destination is called: one slot after another, shared by all its workers.

The next free slot stands in the destination's document, so the rate holds over all workers.
"""

import asyncio
from collections.abc import Callable

from consumers.channels import DeliveryChannel
from consumers.delivery.destinations import Destinations
from consumers.settings import DestinationSettings
from runtime.mongo import GivenUp, retry_while_unavailable
from runtime.shutdown import Stop


class RateLimiter:
    """rate_per_second: over all workers of the destination; 0 for no limit."""

    def __init__(
        self, destinations: Destinations, destination: str, rate_per_second: float, stop: Stop
    ) -> None:
        self._destinations = destinations
        self._destination = destination
        self._rate_per_second = rate_per_second
        self._stop = stop
        self._one_at_a_time = asyncio.Lock()

    @property
    def is_limited(self) -> bool:
        return self._rate_per_second > 0

    async def wait_for_slot(
        self, still_wanted: Callable[[], bool], *, within_seconds: float | None = None
    ) -> bool:
        """
        Wait for the slot of the next call; true at once without a rate.

        False when the slot is no longer wanted, or none came in time. A worker reserves one slot
        at a time: a crash wastes one slot only, and the longest wait is one slot per worker.

        Raises GivenUp at a stop.
        """
        if not self.is_limited:
            return True
        try:
            async with asyncio.timeout(within_seconds), self._one_at_a_time:
                return await self._next_slot(still_wanted)
        except TimeoutError:
            return False

    async def _next_slot(self, still_wanted: Callable[[], bool]) -> bool:
        # a slot that will not be used is left to the others
        if self._stop.requested:
            raise GivenUp
        if not still_wanted():
            return False
        interval_seconds = 1 / self._rate_per_second
        wait_seconds = await retry_while_unavailable(
            lambda: self._destinations.next_slot(self._destination, interval_seconds),
            self._stop,
        )
        await self._stop.rest(wait_seconds)
        if self._stop.requested:
            raise GivenUp
        return still_wanted()


def rate_per_second(own: DestinationSettings, third_party: DeliveryChannel) -> float:
    """The destination's own rate, else its channel's; 0 for no limit."""
    if own.rate_per_second is not None:
        return own.rate_per_second
    return float(getattr(third_party, "RATE_PER_SECOND", 0.0))
