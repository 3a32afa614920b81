"""How fast an operator's command sends what waits."""

from time import monotonic


class Pace:
    """So many a second, and never more than a second's worth at once."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._saved = 1.0
        self._at = monotonic()

    def take(self, most: int) -> int:
        now = monotonic()
        earned = (now - self._at) * self._per_second
        self._saved = min(self._saved + earned, max(self._per_second, 1.0))
        self._at = now
        count = max(min(int(self._saved), most), 0)
        self._saved -= count
        return count
