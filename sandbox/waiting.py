"""Wait for facts, with a deadline and an error that says what was awaited."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

Seen = TypeVar("Seen")

MIN_PAUSE_SECONDS = 0.01
MAX_PAUSE_SECONDS = 0.2


def wait_until(
    predicate: Callable[[], Seen],
    what: str,
    *,
    deadline_seconds: float = 30,
    max_pause_seconds: float = MAX_PAUSE_SECONDS,
    error: type[Exception] = AssertionError,
) -> Seen:
    """
    Return the first true value of `predicate`.

    Between two calls it pauses, at first briefly, then for up to `max_pause_seconds`.
    Raises `error` past the deadline, with what was awaited and what was seen last.
    """
    end = time.monotonic() + deadline_seconds
    pause_seconds = MIN_PAUSE_SECONDS
    while not (seen := predicate()):
        if time.monotonic() > end:
            raise error(_timed_out(what, deadline_seconds, seen))
        time.sleep(pause_seconds)
        pause_seconds = min(pause_seconds * 1.5, max_pause_seconds)
    return seen


async def wait_until_async(
    predicate: Callable[[], Awaitable[Seen] | Seen], what: str, *, deadline_seconds: float = 30
) -> Seen:
    """Do the same without blocking the event loop; `predicate` may be a coroutine function."""
    end = time.monotonic() + deadline_seconds
    pause_seconds = MIN_PAUSE_SECONDS
    while True:
        answer = predicate()
        seen = await answer if inspect.isawaitable(answer) else answer
        if seen:
            return seen
        if time.monotonic() > end:
            raise AssertionError(_timed_out(what, deadline_seconds, seen))
        await asyncio.sleep(pause_seconds)
        pause_seconds = min(pause_seconds * 1.5, MAX_PAUSE_SECONDS)


def _timed_out(what: str, deadline_seconds: float, seen: object) -> str:
    return f"timed out after {deadline_seconds:g} s waiting until {what}; last seen: {seen!r}"
