"""
Every mark looks at what it matched: a deposed leader changes nothing, a leader whose epoch is lower
than those in the outbox takes a higher one, and an event that was deleted is settled.
"""

import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from bson import Int64

from outbox.event import read_event
from relay.checkpoint import Deposed
from relay.marks import Marks
from relay.window import Entry, Fate
from runtime.mongo import close, open_client
from sandbox.waiting import wait_until
from tests.conftest import RunProcess
from tests.support.outbox_world import EXCHANGE, QUEUE, OutboxWorld, StartRelay
from tests.support.processes import OurProcess

DEPOSED, LEADING = 7, 8

EVENT = {"_id": "e", "type": "t", "routing_key": "r.a", "payload": "{}", "key": "k"}


@dataclass
class Fence:
    """A checkpoint that a leader still has, or one that a successor has taken."""

    epoch: int
    deposed: bool = False

    async def raise_epoch(self, above: int) -> None:
        if self.deposed:
            raise Deposed
        self.epoch = above + 1


def write(fate: Fate) -> Callable[[Marks], Awaitable[object]]:
    entry = Entry("e", "k", 1, read_event(EVENT), fate=fate, reason="late")
    return lambda marks: marks.write([entry], lambda _: 0.0)


every_mark = pytest.mark.parametrize(
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


@every_mark
async def test_a_deposed_epoch_changes_nothing_in_a_document(
    world: OutboxWorld, mark: Callable[[Marks], Awaitable[object]]
) -> None:
    before = store(world, LEADING)
    client = open_client(world.mongodb_url, process="test")
    try:
        database = client[world.database_name]
        with pytest.raises(Deposed):
            await mark(Marks(database, "outbox", Fence(DEPOSED, deposed=True)))
        assert world.outbox.find_one({"_id": "e"}) == before
        # the same mark of the leader is written, so it is the epoch that decides
        await mark(Marks(database, "outbox", Fence(LEADING)))
        assert world.outbox.find_one({"_id": "e"}) != before
    finally:
        await close(client)


@every_mark
async def test_a_leader_takes_an_epoch_above_those_of_another_group(
    world: OutboxWorld, mark: Callable[[Marks], Awaitable[object]]
) -> None:
    store(world, LEADING)
    fence = Fence(DEPOSED)
    client = open_client(world.mongodb_url, process="test")
    try:
        await mark(Marks(client[world.database_name], "outbox", fence))
    finally:
        await close(client)
    assert fence.epoch == LEADING + 1
    marked = world.outbox.find_one({"_id": "e"})
    assert marked is not None
    assert marked["relay_epoch"] == fence.epoch


@every_mark
async def test_a_mark_of_a_deleted_event_ends(
    world: OutboxWorld, mark: Callable[[Marks], Awaitable[object]]
) -> None:
    client = open_client(world.mongodb_url, process="test")
    try:
        outcome = await mark(Marks(client[world.database_name], "outbox", Fence(LEADING)))
    finally:
        await close(client)
    assert outcome is False or [entry.id for entry in outcome] == ["e"]  # type: ignore[attr-defined]
    assert world.outbox.find_one() is None


@pytest.mark.parametrize("epoch", [Int64(2**63 - 1), 1e300, float("inf"), float("nan"), "8", [9]])
async def test_a_number_that_no_relay_wrote_does_not_keep_an_event_from_being_marked(
    world: OutboxWorld, epoch: Any
) -> None:
    store(world, epoch)
    client = open_client(world.mongodb_url, process="test")
    try:
        fence = Fence(LEADING)
        await write(Fate.PUBLISHED)(Marks(client[world.database_name], "outbox", fence))
    finally:
        await close(client)
    marked = world.outbox.find_one({"_id": "e"})
    assert marked is not None
    assert (marked["state"], marked["relay_epoch"]) == ("published", fence.epoch)


def store(world: OutboxWorld, epoch: Any) -> dict[str, Any]:
    """An event that the leader of this epoch has held."""
    stored = {**EVENT, "state": "held", "reason": "r", "ordinal": 1, "held_key": "k"}
    world.outbox.insert_one({**stored, "relay_epoch": epoch})
    return world.outbox.find_one({"_id": "e"}) or {}


def stop(relay: OurProcess) -> None:
    """It releases its lease, or another group would be refused until that has expired."""
    relay.signal(signal.SIGTERM)
    assert relay.wait_exit() == 0


def hold_under_another_group(world: OutboxWorld, start_relay: StartRelay, keys: int) -> list[str]:
    """A relay of this group has led; later one of another group holds an event of each key."""
    former = start_relay()
    former.wait_log("resync.completed")
    stop(former)
    renamed = start_relay(RELAY_GROUP="renamed")
    renamed.wait_log("resync.completed")
    held = world.append(keys, routing_key="nowhere.yet")
    wait_until(lambda: world.states() == {"held": keys}, "they are held")
    stop(renamed)
    world.wait_relays_gone()
    return held


@pytest.mark.parametrize("ahead", [0, 1_000_000_000])
def test_held_events_of_another_group_are_published_once(
    world: OutboxWorld, start_relay: StartRelay, ahead: int
) -> None:
    """Its epoch is higher than that of this group's stored position, or even than the clock."""
    held = hold_under_another_group(world, start_relay, keys=20)
    world.outbox.update_many({}, {"$inc": {"relay_epoch": ahead}})
    world.database["checkpoints"].update_one({"_id": "relay"}, {"$inc": {"epoch": -1000}})
    with world.channel() as channel:
        channel.queue_bind(QUEUE, EXCHANGE, "nowhere.yet")
    relay = start_relay()
    world.wait_all_published()
    (later,) = world.append()
    world.wait_state(later, "published")
    assert sorted(arrival.message_id for arrival in world.drain()) == sorted([*held, later])
    assert relay.output().count("epoch.raised") == (1 if ahead else 0)


def test_an_operator_decides_about_events_that_another_group_parked(
    world: OutboxWorld, start_relay: StartRelay, run_process: RunProcess
) -> None:
    start_relay().wait_log("resync.completed")
    (parked,) = world.append(routing_key="")
    world.wait_state(parked, "parked")
    world.outbox.update_one({}, {"$inc": {"relay_epoch": 1_000_000_000}})
    command = ("held", "discard", parked, "--why", "a test")
    assert run_process("relay", *command, environment=world.environment).wait_exit() == 0
    world.wait_state(parked, "discarded")


def test_a_held_event_that_its_application_deletes_leaves_its_key(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    start_relay().wait_log("resync.completed")
    (lost,) = world.append(key="k", routing_key="nowhere.yet")
    world.wait_state(lost, "held")
    world.outbox.delete_one({"_id": lost})
    (later,) = world.append(key="k")
    world.wait_state(later, "published")
    assert [arrival.message_id for arrival in world.drain()] == [later]
