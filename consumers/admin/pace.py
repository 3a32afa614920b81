"""The rate at which an operator's command sends."""

from time import monotonic


class Pace:
    """A token bucket that holds one second's worth of tokens."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._saved = 1.0
        self._at = monotonic()

    def take(self, limit: int) -> int:
        """Returns how many may be sent now, up to the limit."""
        now = monotonic()
        earned = (now - self._at) * self._per_second
        self._saved = min(self._saved + earned, max(self._per_second, 1.0))
        self._at = now
        count = max(min(int(self._saved), limit), 0)
        self._saved -= count
        return count
