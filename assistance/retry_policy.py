"""When a delivery is tried again: the policy returns seconds or None, and never sleeps."""

import random
from dataclasses import dataclass

#: The example schedule of Standard Webhooks 1.0.0, shortened: a request is of no use after a day.
#: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
#:
#:   attempt   1   2     3      4      5       6       7     8
#:   waits     -   5 s   30 s   2 min  10 min  30 min  2 h   6 h
DEFAULT_DELAYS_SECONDS = (5.0, 30.0, 120.0, 600.0, 1800.0, 7200.0, 21600.0)

#: Waits before a call with an unknown outcome is repeated, where the third party does not recognise
#: a repeat: people may see a duplicate, so at most two, well apart, within a day.
DEFAULT_UNKNOWN_DELAYS_SECONDS = (900.0, 14400.0)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """
    delays_seconds: the wait after the first, second, ... attempt; one attempt more than delays.
    jitter_ratio: each wait is randomly longer or shorter by up to this share, so that deliveries
    that failed together are not retried together.
    retry_after_cap_seconds: the longest wait that a third party may ask for. It can only lengthen a
    wait of the schedule, never shorten it.
    unknown_delays_seconds: the waits after the first, second, ... unknown outcome, where it is
    repeated rarely.
    """

    delays_seconds: tuple[float, ...] = DEFAULT_DELAYS_SECONDS
    jitter_ratio: float = 0.2
    retry_after_cap_seconds: float = 21600.0
    unknown_delays_seconds: tuple[float, ...] = DEFAULT_UNKNOWN_DELAYS_SECONDS

    @property
    def attempts_limit(self) -> int:
        return len(self.delays_seconds) + 1

    def delay_seconds(
        self, attempts_made: int, retry_after_seconds: float | None, randomness: random.Random
    ) -> float | None:
        """Seconds until the next attempt, or None when the attempts are used up."""
        if attempts_made >= self.attempts_limit:
            return None
        scheduled_seconds = self._spread(self.delays_seconds[attempts_made - 1], randomness)
        return self._lengthened(scheduled_seconds, retry_after_seconds)

    def unknown_delay_seconds(
        self, unknown_outcomes: int, attempts_made: int, randomness: random.Random
    ) -> float | None:
        """Seconds until a call with an unknown outcome is repeated, or None when it is not."""
        if unknown_outcomes > len(self.unknown_delays_seconds):
            return None
        if attempts_made >= self.attempts_limit:
            return None
        return self._spread(self.unknown_delays_seconds[unknown_outcomes - 1], randomness)

    def uncounted_delay_seconds(
        self,
        retry_after_seconds: float | None,
        randomness: random.Random,
        *,
        attempts_in_all: int = 1,
    ) -> float:
        """
        Seconds until the next attempt after one that does not count.

        attempts_in_all: its place in the schedule, of which the last wait is repeated.
        """
        delays = self.delays_seconds or DEFAULT_DELAYS_SECONDS[:1]
        scheduled_seconds = delays[min(attempts_in_all, len(delays)) - 1]
        return self._lengthened(self._spread(scheduled_seconds, randomness), retry_after_seconds)

    def _lengthened(self, scheduled_seconds: float, asked_seconds: float | None) -> float:
        """The scheduled wait, or the one that was asked for, up to the cap, if it is longer."""
        if asked_seconds is None:
            return scheduled_seconds
        return max(scheduled_seconds, min(asked_seconds, self.retry_after_cap_seconds))

    def _spread(self, seconds: float, randomness: random.Random) -> float:
        return seconds * randomness.uniform(1 - self.jitter_ratio, 1 + self.jitter_ratio)
