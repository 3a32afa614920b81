"""A worker's own change of a breaker is not undone by a poll that was read before it."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from assistance.breaker import BreakerPolicy, Close, Open, Reaction, Suspend
from consumers.delivery.destinations import Seen
from consumers.delivery.gate import Admission, Gate
from runtime.shutdown import Stop

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
CLOSED: Any = {"_id": "slack", "state": "closed", "openings": 0, "open_until": None}
PROBED: Any = {**CLOSED, "state": "open", "open_until": NOW, "reason": "503", "since": NOW}


class SlowDestinations:
    """The stored state, of which reads and writes end when the test lets them."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.read, self.written = asyncio.Event(), asyncio.Event()
        self.read.set()

    async def look(self, _name: str) -> Seen:
        found = Seen(self.state, NOW)
        await self.read.wait()
        return found

    async def take_probe(self, _name: str, _worker: str) -> bool:
        return True

    async def open(self, *_: object, **__: object) -> None:
        await self.written.wait()

    async def suspend_as_asked(self, *_: object) -> None:
        await self.written.wait()

    async def close(self, *_: object, **__: object) -> bool:
        await self.written.wait()
        return True


@pytest.mark.parametrize(
    ("stored", "reaction", "prefetch"),
    [
        (CLOSED, Open("503", 5.0), 0),
        (CLOSED, Suspend("410"), 0),
        (PROBED, Close(), 16),
    ],
)
@pytest.mark.parametrize("poll_ends", ["before the write", "after the write"])
async def test_a_poll_that_was_read_before_an_own_change_does_not_undo_it(
    stored: Any, reaction: Reaction, prefetch: int, poll_ends: str
) -> None:
    destinations: Any = SlowDestinations(stored)
    gate = Gate(
        destinations,
        "slack",
        policy=BreakerPolicy(),
        concurrency=8,
        worker="w",
        stop=Stop(),
    )
    await gate.poll()
    began_with = gate.flow.prefetch
    assert began_with != prefetch
    destinations.read.clear()
    poll = asyncio.create_task(gate.poll())
    await asyncio.sleep(0)  # it has read the state, and waits for the answer
    admission = Admission(gate.flow.generation, is_probe=isinstance(reaction, Close))
    following = asyncio.create_task(gate.follow(reaction, admission))
    await asyncio.sleep(0)
    if poll_ends == "after the write":
        destinations.written.set()
        await following
    destinations.read.set()
    await poll
    destinations.written.set()
    await following
    assert gate.flow.prefetch == prefetch
    await gate.poll()
    assert gate.flow.prefetch == began_with, "a later poll is believed"
