"""The epoch fence on marks: a deposed leader changes nothing that its successor has marked."""

from collections.abc import Awaitable, Callable

import pytest

from outbox.event import read_event
from relay.marks import Marks
from relay.window import Entry, Fate
from runtime.mongo import close, open_client
from tests.support.outbox_world import OutboxWorld

DEPOSED, LEADING = 7, 8

EVENT = {"_id": "e", "type": "t", "routing_key": "r.a", "payload": "{}", "key": "k"}


def write(fate: Fate) -> Callable[[Marks], Awaitable[object]]:
    entry = Entry("e", "k", 1, read_event(EVENT), fate=fate, reason="late")
    return lambda marks: marks.write([entry], lambda _: 0.0)


@pytest.mark.parametrize(
    "mark",
    [
        pytest.param(write(Fate.PUBLISHED), id="publish"),
        pytest.param(write(Fate.HELD), id="hold"),
        pytest.param(write(Fate.PARKED), id="park"),
        pytest.param(lambda marks: marks.park("e", "late"), id="park at release"),
        pytest.param(lambda marks: marks.release("e"), id="release"),
        pytest.param(lambda marks: marks.discard("e"), id="discard"),
    ],
)
async def test_a_deposed_epoch_changes_nothing_in_a_document(
    world: OutboxWorld, mark: Callable[[Marks], Awaitable[object]]
) -> None:
    stored = {**EVENT, "state": "held", "reason": "r", "ordinal": 1, "held_key": "k"}
    world.outbox.insert_one({**stored, "relay_epoch": LEADING})
    before = world.outbox.find_one({"_id": "e"})
    client = open_client(world.mongodb_url, process="test")
    try:
        database = client[world.database_name]
        await mark(Marks(database, "outbox", DEPOSED))
        assert world.outbox.find_one({"_id": "e"}) == before
        # the same mark of the leader is written, so it is the epoch that decides
        await mark(Marks(database, "outbox", LEADING))
        assert world.outbox.find_one({"_id": "e"}) != before
    finally:
        await close(client)
