"""Waiting for facts, with a deadline that says what was awaited."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

Seen = TypeVar("Seen")

FIRST_REST_SECONDS = 0.01
LONGEST_REST_SECONDS = 0.2


def wait_until(predicate: Callable[[], Seen], what: str, *, deadline_seconds: float = 30) -> Seen:
    """Return the first true value of `predicate`.

    Raises AssertionError past the deadline, saying what was awaited and what was last seen.
    """
    end = time.monotonic() + deadline_seconds
    rest_seconds = FIRST_REST_SECONDS
    while not (seen := predicate()):
        if time.monotonic() > end:
            raise AssertionError(_unseen(what, deadline_seconds, seen))
        time.sleep(rest_seconds)
        rest_seconds = min(rest_seconds * 1.5, LONGEST_REST_SECONDS)
    return seen


async def wait_until_async(
    predicate: Callable[[], Awaitable[Seen] | Seen], what: str, *, deadline_seconds: float = 30
) -> Seen:
    """Do the same without holding up the event loop; `predicate` may be a coroutine function."""
    end = time.monotonic() + deadline_seconds
    rest_seconds = FIRST_REST_SECONDS
    while True:
        answer = predicate()
        seen = await answer if inspect.isawaitable(answer) else answer
        if seen:
            return seen
        if time.monotonic() > end:
            raise AssertionError(_unseen(what, deadline_seconds, seen))
        await asyncio.sleep(rest_seconds)
        rest_seconds = min(rest_seconds * 1.5, LONGEST_REST_SECONDS)


def _unseen(what: str, deadline_seconds: float, seen: object) -> str:
    return f"waited {deadline_seconds:g} s in vain until {what}; last seen: {seen!r}"
