"""
Retries inside a process; the only file that imports backoff, which is no longer maintained.

Long waits never live here: they are dates in MongoDB.
"""

from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import backoff

Result = TypeVar("Result")


def growing_delays(*, first_seconds: float = 0.1, cap_seconds: float = 5.0) -> Iterator[float]:
    """
    Seconds to wait before each reconnect: doubling up to a cap, the upper half of each at random.

    Half is kept, because a wait of nearly zero would hammer a server that is just coming back.
    """
    doubling = backoff.expo(factor=first_seconds, max_value=cap_seconds)
    next(doubling)  # the generator's first yield carries no value
    for delay_seconds in doubling:
        yield delay_seconds / 2 + backoff.full_jitter(delay_seconds / 2)


async def call_again(
    call: Callable[[], Awaitable[Result]],
    *,
    while_: Callable[[Result], bool],
    tries_limit: int,
    first_delay_seconds: float = 0.5,
) -> Result:
    """Call until the result is good enough or the tries are used up; the last result either way."""

    def quiet(_details: Any) -> None:
        """The ledger tells what came of each call; a second voice would only confuse."""

    again = backoff.on_predicate(
        backoff.expo,
        while_,
        max_tries=tries_limit,
        factor=first_delay_seconds,
        on_backoff=quiet,
        on_giveup=quiet,
        logger=None,
    )

    async def once() -> Result:
        return await call()

    return await again(once)()
