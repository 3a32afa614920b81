"""One relay leads: one that can work, whatever becomes of its lock in RabbitMQ."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pika
import pytest

from relay.lock import former_lock_name, lock_name
from sandbox.mongodb import MongoServer
from sandbox.ports import free_ports
from sandbox.rabbitmq import RabbitServer
from sandbox.waiting import wait_until
from tests.conftest import RunProcess
from tests.support.links import Link, Mode
from tests.support.monitoring import Monitoring
from tests.support.outbox_world import OutboxWorld, StartRelay, settled

WINDOW = 1000
TAKEOVER_DEADLINE_SECONDS = 40


def lock_of(world: OutboxWorld, group: str = "relay") -> str:
    replica_set = world.client.admin.command("hello")["setName"]
    return lock_name(group, replica_set, world.database_name, "outbox")


@contextmanager
def exclusive_queue(world: OutboxWorld, name: str) -> Iterator[None]:
    """A connection that is not a relay's holds the queue."""
    connection = pika.BlockingConnection(pika.URLParameters(world.rabbitmq_url))
    try:
        connection.channel().queue_declare(name, exclusive=True)
        yield
    finally:
        connection.close()


def lease(world: OutboxWorld) -> dict[str, Any]:
    found: dict[str, Any] = world.checkpoint().get("lease", {})
    return found


def wait_signs_of_life(world: OutboxWorld, count: int) -> None:
    """The leader has given so many, at different times."""
    seen = set()

    def enough() -> bool:
        seen.add(lease(world).get("renewed_at"))
        return len(seen) > count

    wait_until(enough, f"{count} signs of life", deadline_seconds=60)


def test_a_frozen_leader_is_overruled_and_publishes_nothing_when_it_thaws(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    """Its heartbeat is long, so that the broker leaves it its lock for minutes."""
    frozen = start_relay(RABBITMQ_HEARTBEAT_SECONDS="120")
    frozen.wait_log("resync.completed")
    standby = start_relay()
    standby.wait_log("relay.standing_by")
    with world.writers(2):
        wait_until(lambda: settled(world) > 50, "the leader works")
        frozen.signal(signal.SIGSTOP)
        standby.wait_log("relay.leads_without_lock", deadline_seconds=TAKEOVER_DEADLINE_SECONDS)
        goal = settled(world) + 50
        wait_until(lambda: settled(world) > goal, "the successor works")
    world.wait_all_published()
    epoch = world.checkpoint()["epoch"]
    repeats = world.check_arrivals(arrivals := world.drain())
    assert repeats <= WINDOW
    before = len(frozen.output())
    frozen.signal(signal.SIGCONT)
    frozen.wait_log("relay.standing_by", after=before)
    (later,) = world.append()
    world.wait_state(later, "published")
    # what was in its hands, and whatever arrived while it was frozen
    assert [arrival.message_id for arrival in world.drain()] == [later], len(arrivals)
    assert world.checkpoint()["epoch"] == epoch
    wait_until(lambda: lease(world)["lock"] == lock_of(world), "the leader gets the lock")


def test_a_leader_cut_off_from_mongodb_is_overruled_by_a_standby_that_is_not(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    address = urlsplit(world.mongodb_url)
    with Link(address.hostname or "", address.port or 0) as link:
        [port] = free_ports(1)
        cut_off = start_relay(
            MONGODB_URL=link.url(world.mongodb_url, directConnection="true", authSource="admin"),
            MONITORING_PORT=str(port),
        )
        cut_off.wait_log("resync.completed")
        standby = start_relay()
        standby.wait_log("relay.standing_by")
        link.switch(Mode.SILENT)
        standby.wait_log("relay.leading", deadline_seconds=TAKEOVER_DEADLINE_SECONDS)
        events = world.append(20)
        world.wait_all_published()
        Monitoring(port).wait_unready("")
        before = len(cut_off.output())
        link.switch(Mode.PASS)
        cut_off.wait_log("relay.standing_by", after=before, deadline_seconds=60)
        events += world.append(20)
        world.wait_all_published()
    assert sorted(arrival.message_id for arrival in world.drain()) == sorted(events)


def test_a_lock_that_a_dead_connection_keeps_stops_no_relay(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    with exclusive_queue(world, lock_of(world)):
        first = start_relay()
        first.wait_log("relay.leads_without_lock")
        assert "close the connection that holds it" in first.output()
        standby = start_relay()
        standby.wait_log("relay.standing_by")
        epoch = world.checkpoint()["epoch"]
        wait_signs_of_life(world, 6)
        assert world.checkpoint()["epoch"] == epoch, "they alternate"
        first.kill()
        standby.wait_log("relay.leading", deadline_seconds=TAKEOVER_DEADLINE_SECONDS)
        (event_id,) = world.append()
        world.wait_state(event_id, "published")
    wait_until(lambda: lease(world)["lock"] == lock_of(world), "it gets the lock")
    assert len(world.drain()) == 1


def test_a_durable_queue_with_the_name_of_the_lock_is_named_and_stops_no_relay(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    with world.channel() as channel:
        channel.queue_declare(lock_of(world), durable=True)
    relay = start_relay()
    relay.wait_log("relay.leads_without_lock")
    assert f"delete the queue '{lock_of(world)}'" in relay.output()
    (event_id,) = world.append()
    world.wait_state(event_id, "published")
    wait_signs_of_life(world, 6)
    assert relay.output().count("relay.leads_without_lock") == 1


@pytest.mark.parametrize("expires_ms", [400, 3000])
def test_a_policy_that_expires_queues_does_not_make_relays_alternate(
    world: OutboxWorld,
    start_relay: StartRelay,
    rabbit_server: RabbitServer,
    vhost: str,
    expires_ms: int,
) -> None:
    rabbit_server.set_policy(vhost, "locks", r"^relay\.lock\.", {"expires": expires_ms})
    for relay in (start_relay(), start_relay()):
        relay.wait_log("relay.")
    wait_until(lambda: "epoch" in world.checkpoint(), "one leads")
    epoch = world.checkpoint()["epoch"]
    wait_signs_of_life(world, 10)
    events = world.append(50)
    world.wait_all_published()
    assert world.checkpoint()["epoch"] == epoch
    assert len(world.drain()) == len(events)


def test_a_mongodb_without_a_primary_is_no_reason_for_a_change_of_leader(
    own_mongo_server: MongoServer, rabbitmq_url: str, run_process: RunProcess
) -> None:
    """For longer than a leader may be silent."""
    world = OutboxWorld(own_mongo_server.url, "stepped_down", rabbitmq_url)
    relays = [run_process("relay", "run", environment=world.environment) for _ in range(2)]
    for relay in relays:
        relay.wait_log("relay.")
    wait_until(lambda: lease(world).get("lock"), "one leads with the lock")
    epoch = world.checkpoint()["epoch"]
    world.client.admin.command({"replSetStepDown": 15, "force": True})
    (event_id,) = world.append()
    world.wait_state(event_id, "published", deadline_seconds=60)
    wait_signs_of_life(world, 5)
    assert world.checkpoint()["epoch"] == epoch
    assert len(world.drain()) == 1
    world.close()


def test_two_applications_with_the_default_group_share_a_virtual_host(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    other_name = f"{world.database_name}_other"
    try:
        for relay in (start_relay(), start_relay(MONGODB_DATABASE=other_name)):
            relay.wait_log("relay.leading")
        (event_id,) = world.append()
        other = world.client[other_name]["outbox"]
        other.insert_one({"_id": "other", "type": "t", "routing_key": "r.a", "payload": "{}"})
        world.wait_state(event_id, "published")
        wait_until(lambda: other.find_one({"state": "published"}), "the other's is published")
    finally:
        world.client.drop_database(other_name)


def test_a_relay_follows_one_of_an_older_version_only_with_its_lock(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    """Which writes no lease, so that only its lock shows whether it lives."""
    start_relay().kill()
    former = world.checkpoint()["epoch"] + 5 if world.checkpoint() else 5
    world.database["checkpoints"].update_one(
        {"_id": "relay"}, {"$set": {"epoch": former, "settled": 0}}, upsert=True
    )
    with exclusive_queue(world, former_lock_name("relay")):
        relay = start_relay()
        relay.wait_log("relay.standing_by")
        assert world.checkpoint()["epoch"] == former
    relay.wait_log("relay.leading")
    (event_id,) = world.append()
    world.wait_state(event_id, "published")


def test_a_leader_that_is_asked_to_stop_is_followed_at_once(start_relay: StartRelay) -> None:
    leader = start_relay()
    leader.wait_log("resync.completed")
    standby = start_relay()
    standby.wait_log("relay.standing_by")
    leader.signal(signal.SIGTERM)
    assert leader.wait_exit() == 0
    standby.wait_log("relay.leading", deadline_seconds=5)
    assert "relay.overrules" not in standby.output()
