"""When a delivery is tried again: the policy returns seconds or None, and never sleeps."""

import random
from dataclasses import dataclass

#: The example schedule of Standard Webhooks 1.0.0, shortened: a request is of no use after a day.
#: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
#:
#:   attempt   1   2     3      4      5       6       7     8
#:   waits     -   5 s   30 s   2 min  10 min  30 min  2 h   6 h
DEFAULT_DELAYS_SECONDS = (5.0, 30.0, 120.0, 600.0, 1800.0, 7200.0, 21600.0)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """
    delays_seconds: the wait after the first, second, ... attempt; one attempt more than delays.
    jitter_ratio: each wait is randomly longer or shorter by up to this share, so that deliveries
    that failed together are not retried together.
    retry_after_cap_seconds: the longest wait that a third party may ask for.
    """

    delays_seconds: tuple[float, ...] = DEFAULT_DELAYS_SECONDS
    jitter_ratio: float = 0.2
    retry_after_cap_seconds: float = 21600.0

    @property
    def attempts_limit(self) -> int:
        return len(self.delays_seconds) + 1

    def delay_seconds(
        self, attempts_made: int, retry_after_seconds: float | None, randomness: random.Random
    ) -> float | None:
        """Seconds until the next attempt, or None when the attempts are used up."""
        if attempts_made >= self.attempts_limit:
            return None
        if retry_after_seconds is not None:
            return self._asked_for(retry_after_seconds)
        return self._spread(self.delays_seconds[attempts_made - 1], randomness)

    def uncounted_delay_seconds(
        self, retry_after_seconds: float | None, randomness: random.Random
    ) -> float:
        """Seconds until the next attempt after one that does not count."""
        if retry_after_seconds is not None:
            return self._asked_for(retry_after_seconds)
        return self._spread((*self.delays_seconds, DEFAULT_DELAYS_SECONDS[0])[0], randomness)

    def _asked_for(self, retry_after_seconds: float) -> float:
        return min(max(retry_after_seconds, 0.0), self.retry_after_cap_seconds)

    def _spread(self, seconds: float, randomness: random.Random) -> float:
        return seconds * randomness.uniform(1 - self.jitter_ratio, 1 + self.jitter_ratio)
