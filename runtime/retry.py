"""
Delays between retries inside a process.

The only file that imports backoff, which is unmaintained: replacing it means changing this file
only, see tests/unit/test_retry.py. Long waits are not made here: they are dates in MongoDB.
"""

from collections.abc import Iterator

import backoff


def growing_delays(*, first_seconds: float = 0.1, cap_seconds: float = 5.0) -> Iterator[float]:
    """
    Seconds to wait before each new try: doubling up to a cap, with jitter over the upper half.

    The lower half is fixed, because a wait near zero would flood a server that is just restarting.
    """
    doubling = backoff.expo(factor=first_seconds, max_value=cap_seconds)
    next(doubling)  # the generator's first yield carries no value
    for delay_seconds in doubling:
        yield delay_seconds / 2 + backoff.full_jitter(delay_seconds / 2)
