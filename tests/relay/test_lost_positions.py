"""A relay whose position is lost publishes what is pending, and only that, and says so once."""

import random
from pathlib import Path
from typing import Any

from relay.checkpoint import Position
from relay.stream import OutboxStream
from runtime.shutdown import Stop
from runtime.stream_client import StreamClient
from sandbox.servers import find_mongo
from sandbox.waiting import wait_until
from tests.chaos.relay.blows import OPLOG_THAT_ROLLS, roll_oplog
from tests.conftest import RunProcess
from tests.support.outbox_world import OutboxWorld, StartRelay, settled
from tests.support.processes import OurProcess

WINDOW = 1000
BURST_COUNT = 20_000
BURST_KEYS_COUNT = 500


def check_resynced(relay: OurProcess, *, reason: str, published: int) -> None:
    """It began once, for this reason, and published this many events."""
    relay.wait_log("resync.completed")
    ended = [line for line in relay.output().splitlines() if '"message":"resync.completed"' in line]
    assert len(ended) == 1
    assert reason in ended[0]
    assert f'"published":{published}' in ended[0]


def test_a_position_that_fell_out_of_the_oplog(
    tmp_path: Path, rabbitmq_url: str, run_process: RunProcess
) -> None:
    mongo = find_mongo(tmp_path, {}, extra_arguments=OPLOG_THAT_ROLLS)
    try:
        mongo.start()
        world = OutboxWorld(mongo.url, "rolled", rabbitmq_url)
        first = run_process("relay", "run", environment=world.environment)
        world.append(20)
        wait_until(lambda: settled(world) == 20, "twenty are settled")
        first.kill()
        world.append(7)
        roll_oplog(world)
        relay = run_process("relay", "run", environment=world.environment)
        world.wait_all_published()
        check_resynced(relay, reason="(286)", published=7)
        assert world.check_arrivals(world.drain()) == 0
        world.close()
    finally:
        mongo.discard()


def token_that_the_filter_excludes(world: OutboxWorld) -> Any:
    (event_id,) = world.append(state="published")
    with world.outbox.watch() as changes:
        world.outbox.update_one({"_id": event_id}, {"$set": {"seen": True}})
        token = changes.next()["_id"]
    world.outbox.delete_one({"_id": event_id})
    return token


def has_position(world: OutboxWorld) -> bool:
    checkpoint = world.database["checkpoints"].find_one() or {}
    return bool(checkpoint.get("position")) and not checkpoint.get("handover")


def test_a_position_that_the_server_does_not_accept(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    start_relay().kill()
    tokens = {
        "(280)": token_that_the_filter_excludes(world),
        "(9)": {"_data": "no hexadecimal number"},
        "(40647)": {"other": "make"},
    }
    relay = start_relay()
    for reason, token in tokens.items():
        world.append(2)
        world.wait_all_published()
        wait_until(lambda: has_position(world), "the relay has a position")
        relay.kill()
        world.append(3)
        world.database["checkpoints"].update_one({}, {"$set": {"position.token": token}})
        relay = start_relay()
        world.wait_all_published()
        check_resynced(relay, reason=reason, published=3)
    assert world.check_arrivals(world.drain()) == 0


def test_a_position_that_the_server_calls_invalid(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    """The server rejects no token that a test could make, so a fail point makes it."""
    relay = start_relay()
    former = world.append(5)
    world.wait_all_published()
    said = relay.wait_log("resync.completed")
    refusal = {"failCommands": ["getMore"], "errorCode": 260, "appName": "relay"}
    world.client.admin.command(
        {"configureFailPoint": "failCommand", "mode": {"times": 1}, "data": refusal}
    )
    relay.wait_log("is not usable (260)", after=said)
    relay.wait_log("resync.completed", after=said)
    later = world.append(4)
    world.wait_all_published()
    assert sorted(arrival.message_id for arrival in world.drain()) == sorted(former + later)


async def test_a_stream_goes_on_behind_the_moment_of_a_snapshot(world: OutboxWorld) -> None:
    """What was committed at that very moment stands in the snapshot."""
    with world.outbox.watch() as changes:
        world.append()
        moment = changes.next()["clusterTime"]
    client = StreamClient(world.mongodb_url, world.database_name, process="test")
    stream = OutboxStream(client, "outbox", Position(None, moment))
    try:
        assert not (await stream.read(Stop())).changes
        [later] = world.append()
        [change] = (await stream.read(Stop())).changes
        assert change.document["_id"] == later
    finally:
        await stream.close()


def test_a_renamed_outbox(world: OutboxWorld, start_relay: StartRelay) -> None:
    relay = start_relay()
    former = world.append(5)
    world.wait_all_published()
    world.outbox.rename("former")
    said = relay.wait_log("resync.completed")
    later = world.append(4)
    world.wait_all_published()
    relay.wait_log("dropped or renamed", after=said)
    assert sorted(arrival.message_id for arrival in world.drain()) == sorted(former + later)


def test_a_successor_repeats_a_resync_that_was_killed(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    world.append(4000)
    relay = start_relay()
    wait_until(lambda: settled(world) > 500, "the resync is in progress")
    relay.kill()
    world.wait_relays_gone()
    assert world.checkpoint()["handover"]["reason"] == "first_start"
    pending = world.outbox.count_documents({"state": None})
    later = world.append(1)
    successor = start_relay()
    world.wait_all_published()
    check_resynced(successor, reason="unfinished_handover", published=pending + len(later))
    assert world.check_arrivals(world.drain()) <= WINDOW


def test_a_relay_killed_in_a_burst_of_20000_loses_nothing_and_keeps_order(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    documents = [
        {
            "_id": f"event-{number}",
            "type": "t",
            "key": f"key-{number % BURST_KEYS_COUNT}",
            "seq": number // BURST_KEYS_COUNT,
            "routing_key": "r.a",
            "payload": "x" * 500,
        }
        for number in range(BURST_COUNT)
    ]
    relay = start_relay()
    relay.wait_log("resync.completed")
    world.outbox.insert_many(documents)
    kills = sorted(random.sample(range(1, BURST_COUNT - 2 * WINDOW), 3))
    for at in kills:
        wait_until(lambda at=at: settled(world) >= at, "it is the moment", deadline_seconds=60)  # type: ignore[misc]
        relay.kill()
        relay = start_relay()
    world.wait_all_published(deadline_seconds=60)
    repeats = world.check_arrivals(world.drain())
    print(f"{repeats} repeats after kills at {kills}, of {len(kills) * WINDOW} allowed")  # noqa: T201
    assert repeats <= len(kills) * WINDOW
