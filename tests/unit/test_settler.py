"""The settler, with fakes in place of MongoDB: order, retries, and the end of a term."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from bson import Timestamp
from prometheus_client import CollectorRegistry
from pymongo.errors import AutoReconnect

from relay.checkpoint import Deposed, Position
from relay.report import Report
from relay.settler import Settler
from relay.window import Entry, Fate, Window
from runtime.shutdown import Stop

DEADLINE_SECONDS = 5


class World:
    """
    A settler whose writes are recorded in `log`.

    mark_errors, save_errors: raised by the next writes, first to last.
    saves_allowed: a save waits for it.
    """

    def __init__(self) -> None:
        self.window = Window(
            messages_limit=1, bytes_limit=10**6
        )  # never nearly empty: no gathering
        self.log: list[tuple[str, Any]] = []
        self.changed = asyncio.Event()
        self.mark_errors: list[Exception] = []
        self.save_errors: list[Exception] = []
        self.saves_allowed = asyncio.Event()
        self.saves_allowed.set()
        self.settled = 0
        self.over = Stop()
        self.settler = Settler(
            self.window,
            self,
            Report(CollectorRegistry()),
            self.over,
            mark=self.mark,
            on_saved=(lambda entries: self.note("noted", ids(entries)),),
        )

    def note(self, what: str, value: Any) -> None:
        self.log.append((what, value))
        self.changed.set()

    async def mark(self, entries: Sequence[Entry]) -> None:
        if self.mark_errors:
            self.note("mark failed", ids(entries))
            raise self.mark_errors.pop(0)
        self.note("marked", ids(entries))

    async def save(self, *, settled: int, position: Position | None) -> None:
        await self.saves_allowed.wait()
        if self.save_errors:
            self.note("save failed", settled)
            raise self.save_errors.pop(0)
        self.settled = settled
        self.note("saved", (settled, position.cluster_time.time if position else None))

    def decide(self, number: int, fate: Fate | None = Fate.KNOWN) -> Entry:
        position = Position(None, Timestamp(number, 0))
        entry = Entry(number, str(number), number, None, position, fate=fate)
        entry.fate = fate or Fate.KNOWN
        self.window.admit(entry)
        entry.fate = fate
        self.settler.wake()
        return entry

    async def until(self, *expected: tuple[str, Any]) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while any(one not in self.log for one in expected):
                self.changed.clear()
                await self.changed.wait()

    def end(self) -> None:
        self.over.request()
        self.settler.wake()


def ids(entries: Sequence[Entry]) -> list[Any]:
    return [entry.id for entry in entries]


async def test_marks_are_written_before_the_position_is_saved_and_noted() -> None:
    world = World()
    world.decide(1)
    world.decide(2)
    world.end()
    await asyncio.wait_for(world.settler.run(), DEADLINE_SECONDS)
    assert world.log == [("marked", [1, 2]), ("saved", (2, 2)), ("noted", [1, 2])]
    assert world.window.is_empty


async def test_the_position_never_passes_an_undecided_event() -> None:
    world = World()
    world.decide(1)
    undecided = world.decide(2, fate=None)
    world.decide(3)
    running = asyncio.create_task(world.settler.run())
    await world.until(("saved", (1, 1)), ("noted", [1]))
    assert ("marked", [3]) not in world.log
    undecided.fate = Fate.KNOWN
    world.end()
    await asyncio.wait_for(running, DEADLINE_SECONDS)
    assert world.log[3:] == [("marked", [2, 3]), ("saved", (3, 3)), ("noted", [2, 3])]


async def test_the_next_batch_is_marked_while_one_save_is_in_progress() -> None:
    world = World()
    world.saves_allowed.clear()
    running = asyncio.create_task(world.settler.run())
    world.decide(1)
    await world.until(("marked", [1]))
    world.decide(2)
    await world.until(("marked", [2]))
    world.decide(3)
    world.saves_allowed.set()
    await world.until(("noted", [3]))
    world.end()
    await asyncio.wait_for(running, DEADLINE_SECONDS)
    assert [entry for entry in world.log if entry[0] == "saved"] == [
        ("saved", (1, 1)),
        ("saved", (2, 2)),
        ("saved", (3, 3)),
    ]


async def test_both_writes_are_repeated_while_mongodb_is_unavailable() -> None:
    world = World()
    world.mark_errors, world.save_errors = [AutoReconnect("down")], [AutoReconnect("down")]
    running = asyncio.create_task(world.settler.run())
    world.decide(1)
    await world.until(("noted", [1]))
    world.end()
    await asyncio.wait_for(running, DEADLINE_SECONDS)
    assert [what for what, _ in world.log] == [
        *("mark failed", "marked", "save failed", "saved", "noted")
    ]


async def test_a_save_that_fails_ends_the_settler_without_a_further_event() -> None:
    world = World()
    world.save_errors = [Deposed("a newer epoch")]
    world.decide(1)
    with pytest.raises(Deposed):
        await asyncio.wait_for(world.settler.run(), DEADLINE_SECONDS)
    assert world.settled == 0
    assert not world.window.is_empty


async def test_an_error_waits_for_the_save_in_progress() -> None:
    world = World()
    world.saves_allowed.clear()
    running = asyncio.create_task(world.settler.run())
    world.decide(1)
    await world.until(("marked", [1]))
    world.mark_errors = [Deposed("a newer epoch")]
    world.decide(2)
    await world.until(("mark failed", [2]))
    assert not running.done()
    world.saves_allowed.set()
    with pytest.raises(Deposed):
        await asyncio.wait_for(running, DEADLINE_SECONDS)
    assert world.settled == 1
