"""
Delays between retries inside a process; the only file that imports backoff, which is no longer
maintained.

Long waits are never kept here: they are dates in MongoDB.
"""

from collections.abc import Iterator

import backoff


def growing_delays(*, first_seconds: float = 0.1, cap_seconds: float = 5.0) -> Iterator[float]:
    """
    Seconds to wait before each new try: doubling up to a cap, the upper half of each at random.

    Half is kept, because a wait of nearly zero would hammer a server that is just coming back.
    """
    doubling = backoff.expo(factor=first_seconds, max_value=cap_seconds)
    next(doubling)  # the generator's first yield carries no value
    for delay_seconds in doubling:
        yield delay_seconds / 2 + backoff.full_jitter(delay_seconds / 2)
