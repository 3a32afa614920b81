"""What an operator may do to a relay that runs: each is recorded, and safe."""

import json
from typing import Any

import pytest

from relay.checkpoint import Checkpoint, Deposed, look
from relay.operations import RequestKind, ask, record_result, results_of
from relay.source import identify
from runtime.mongo import close, open_client
from runtime.operations import Operator
from sandbox.waiting import wait_until
from tests.conftest import RunProcess
from tests.support.outbox_world import EXCHANGE, QUEUE, OutboxWorld, StartRelay, settled
from tests.support.processes import OurProcess

POISON = {"_id": "poison", "key": "k", "foo": 1}


@pytest.fixture
def relay_command(run_process: RunProcess, world: OutboxWorld) -> Any:
    def run(*arguments: str, code: int = 0) -> OurProcess:
        process = run_process("relay", *arguments, environment=world.environment)
        assert process.wait_exit() == code, process.output()
        return process

    return run


def recorded(world: OutboxWorld) -> list[tuple[str, str, str, str]]:
    return [
        (operation["what"], operation["who"], operation["why"], operation["result"])
        for operation in world.database["operations"].find(sort=[("asked_at", 1)])
    ]


def test_a_discarded_event_is_never_published_and_frees_its_key(
    world: OutboxWorld, start_relay: StartRelay, relay_command: Any
) -> None:
    start_relay()
    world.outbox.insert_one(dict(POISON))
    (behind,) = world.append(key="k")
    world.wait_state(behind, "held")
    listed = json.loads(relay_command("held", "list", "--json").output())
    assert [(event["_id"], event["state"]) for event in listed] == [
        ("poison", "parked"),
        (behind, "held"),
    ]
    said = relay_command("held", "discard", "poison", "--why", "a typo", "--who", "ann").output()
    assert "poison: discarded" in said
    world.wait_state(behind, "published")
    assert world.wait_state("poison", "discarded")
    assert [arrival.message_id for arrival in world.drain()] == [behind]
    assert recorded(world) == [("discard", "ann", "a typo", "discarded")]


def test_a_released_event_is_tried_at_once_and_parked_again_if_it_still_does_not_fit(
    world: OutboxWorld, start_relay: StartRelay, relay_command: Any
) -> None:
    start_relay()
    world.outbox.insert_one(dict(POISON))
    world.wait_state("poison", "parked")
    relay_command("held", "release", "poison", "--why", "let us see")
    world.wait_state("poison", "parked")
    world.outbox.update_one(
        {"_id": "poison"}, {"$set": {"type": "t", "routing_key": "r.a", "payload": "{}"}}
    )
    relay_command("held", "release", "poison", "--why", "mended by hand")
    world.wait_state("poison", "published")
    assert [arrival.message_id for arrival in world.drain()] == ["poison"]


def test_a_request_waits_for_a_leader(world: OutboxWorld, start_relay: StartRelay) -> None:
    relay = start_relay()
    world.outbox.insert_one(dict(POISON))
    world.wait_state("poison", "parked")
    relay.kill()
    world.database["operations"].insert_one(
        {
            "group": "relay",
            "what": "discard",
            "event_id": "poison",
            "who": "ann",
            "why": "asked while no relay led",
            "asked_at": 1,
            "carried_out_at": None,
            "result": None,
        }
    )
    start_relay()
    world.wait_state("poison", "discarded")


async def test_a_deposed_leader_does_not_record_a_result(world: OutboxWorld) -> None:
    world.outbox.insert_one({**POISON, "state": "parked"})
    client = open_client(world.mongodb_url, process="test")
    try:
        database = client[world.database_name]

        async def take_epoch(owner: str) -> int:
            seen, _ = await look(database, "relay")
            source = await identify(database, "outbox")
            taken = await Checkpoint.take(
                database, seen, group="relay", owner=owner, pipeline="p", source=source
            )
            assert taken is not None
            return taken.epoch

        deposed, leading = await take_epoch("deposed"), await take_epoch("leading")
        ann = Operator("ann", "a typo")
        (request_id,) = await ask(
            database, "outbox", "relay", RequestKind.DISCARD, ["poison"] * 2, ann
        )

        with pytest.raises(Deposed):
            await record_result(database, "relay", request_id, "too late", epoch=deposed)
        assert await results_of(database, [request_id]) == {"poison": None}

        await record_result(database, "relay", request_id, "discarded", epoch=leading)
        await record_result(database, "relay", request_id, "said again", epoch=leading)
        assert await results_of(database, [request_id]) == {"poison": "discarded"}
    finally:
        await close(client)


def test_a_wrong_request_names_the_event_and_changes_nothing(
    world: OutboxWorld, start_relay: StartRelay, relay_command: Any
) -> None:
    start_relay()
    world.outbox.insert_one(dict(POISON))
    world.wait_state("poison", "parked")
    world.append(_id="sent", state="published")
    mixed = ("poison", "nonsense", "sent", "--why", "x")
    said = relay_command("held", "discard", *mixed, code=66).output()
    assert said.strip() == (
        "neither held nor parked: nonsense is not in the outbox, sent is published;"
        " nothing was changed"
    )
    relay_command("held", "discard", "poison", "--why", " ", code=2)
    assert recorded(world) == []
    assert world.wait_state("poison", "parked")


def test_a_reset_position_is_safe_against_a_running_relay(
    world: OutboxWorld, start_relay: StartRelay, relay_command: Any
) -> None:
    relay = start_relay()
    relay.wait_log("resync.completed")
    with world.writers(4):
        wait_until(lambda: settled(world) > 100, "the relay works")
        said = len(relay.output())
        relay_command("position", "reset", "--why", "a rehearsal", "--who", "ann")
        relay.wait_log("resync.completed", after=said)
        goal = settled(world) + 50
        wait_until(lambda: settled(world) > goal, "the relay goes on")
    world.wait_all_published()
    world.check_arrivals(world.drain())
    (operation,) = recorded(world)
    assert operation[:3] == ("reset_position", "ann", "a rehearsal")


def test_the_position_is_shown(
    world: OutboxWorld, start_relay: StartRelay, relay_command: Any
) -> None:
    assert (
        "group 'relay' has no position yet" in relay_command("position", "show", code=66).output()
    )
    start_relay().wait_log("resync.completed")
    world.append(3)
    wait_until(lambda: settled(world) == 3, "three events are settled")
    assert "settled       3" in relay_command("position", "show").output()
    assert json.loads(relay_command("position", "show", "--json").output())["settled"] == 3


def test_an_event_held_for_a_missing_queue_goes_at_once_when_released(
    world: OutboxWorld, start_relay: StartRelay, relay_command: Any
) -> None:
    relay = start_relay()
    (event_id,) = world.append(routing_key="nowhere.yet")
    relay.wait_log('"pause_seconds":8.0', deadline_seconds=30)
    with world.channel() as channel:
        channel.queue_bind(QUEUE, EXCHANGE, "nowhere.yet")
    relay_command("held", "release", event_id, "--why", "the queue is there")
    world.wait_state(event_id, "published", deadline_seconds=3)
