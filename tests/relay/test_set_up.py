"""What a relay depends on: a set-up that cannot work is refused, with the remedy."""

from collections.abc import Callable
from typing import Any

import pytest

from sandbox.waiting import wait_until
from tests.support.outbox_world import OutboxWorld, StartRelay

Database = Any


def make_view(database: Database) -> None:
    database.create_collection("letters")
    database.command({"create": "outbox", "viewOn": "letters", "pipeline": []})


def make_capped(database: Database) -> None:
    database.create_collection("outbox", capped=True, size=10**6)


def make_time_series(database: Database) -> None:
    database.create_collection("outbox", timeseries={"timeField": "created_at"})


def make_ttl(database: Database) -> None:
    database["outbox"].create_index("created_at", name="old", expireAfterSeconds=60)


def make_index_of_our_name(database: Database) -> None:
    database["outbox"].create_index("other", name="of_one_key")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_view, "is a view"),
        (make_capped, "is a capped collection"),
        (make_time_series, "is a time series"),
        (make_ttl, "the index 'old' of the outbox 'outbox'"),
        (make_index_of_our_name, "dropIndex('of_one_key')"),
    ],
)
def test_an_outbox_that_cannot_work_is_refused_with_the_remedy(
    world: OutboxWorld, start_relay: StartRelay, make: Callable[[Database], None], said: str
) -> None:
    make(world.database)
    relay = start_relay()
    assert relay.wait_exit() == 78
    assert said in relay.output()
    assert "$clusterTime" not in relay.output(), "the server's whole answer"


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ([("key", 1), ("seq", 1)], {}),
        ([("key", 1), ("seq", 1)], {"unique": True}),
        ([("expire_at", 1)], {"expireAfterSeconds": 3600}),
        ([("expire_at", 1)], {"expireAfterSeconds": 3600, "name": "expiry"}),
        ([("expire_at", 1)], {}),
        (
            [("published_at", 1)],
            {"expireAfterSeconds": 60, "partialFilterExpression": {"state": "published"}},
        ),
    ],
)
def test_an_index_of_the_application_is_used_as_it_is(
    world: OutboxWorld, start_relay: StartRelay, key: Any, options: dict[str, Any]
) -> None:
    world.outbox.create_index(key, **options)
    relay = start_relay()
    (event_id,) = world.append(key="k", seq=1)
    world.wait_state(event_id, "published")
    assert relay.output().count("index.differs") <= 1
    names = {index["name"] for index in world.outbox.list_indexes()}
    assert {"pending_in_order", "held_in_order"} <= names


def test_a_second_group_on_the_same_outbox_is_refused(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    start_relay().wait_log("resync.completed")
    second = start_relay(RELAY_GROUP="second")
    assert second.wait_exit() == 78
    assert "set RELAY_GROUP=relay" in second.output()
    events = world.append(20)
    world.wait_all_published()
    assert sorted(arrival.message_id for arrival in world.drain()) == sorted(events)


def test_a_position_of_another_collection_is_not_used(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    relay = start_relay()
    relay.wait_log("resync.completed")
    world.append(5)
    world.wait_all_published()
    relay.kill()
    world.wait_relays_gone()
    world.drain()
    other = world.database["letters"]
    events = [
        {"_id": str(n), "type": "t", "routing_key": "r.a", "payload": "{}", "key": "k", "seq": n}
        for n in range(300)
    ]
    other.insert_many(events)
    relay = start_relay(OUTBOX_COLLECTION="letters")
    relay.wait_log("resync.completed")
    assert "another_outbox" in relay.output()
    wait_until(lambda: other.count_documents({"state": "published"}) == 300, "all are published")
    assert [arrival.message_id for arrival in world.drain()] == [event["_id"] for event in events]


def test_an_older_versions_position_is_adopted(world: OutboxWorld, start_relay: StartRelay) -> None:
    start_relay().wait_log("resync.completed")
    (first,) = world.append()
    world.wait_state(first, "published")
    world.database["checkpoints"].update_one({}, {"$unset": {"source": ""}})
    successor_of(world, start_relay)
    assert world.checkpoint()["source"]["collection"] == "outbox"


def successor_of(world: OutboxWorld, start_relay: StartRelay) -> None:
    """Another relay of the group leads, and from the stored position."""
    epoch = world.checkpoint()["epoch"]
    world.database["checkpoints"].update_one({}, {"$inc": {"epoch": 1, "lease.epoch": 1}})
    relay = start_relay()
    wait_until(lambda: world.checkpoint()["epoch"] > epoch + 1, "another leads")
    (event_id,) = world.append()
    world.wait_state(event_id, "published")
    assert "resync.started" not in relay.output()


def test_a_whole_number_of_type_double_is_a_seq(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    start_relay().wait_log("resync.completed")
    (big,) = world.append(key="k", seq=1_700_000_000_000.0)
    (broken,) = world.append(key="l", seq=1.5)
    world.wait_state(big, "published")
    assert "seq is float" in world.wait_state(broken, "parked")["reason"]


def test_an_event_whose_mark_is_refused_repeats_no_other(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    """The application has a unique index on the state."""
    world.outbox.create_index([("key", 1), ("state", 1)], unique=True)
    relay = start_relay()
    relay.wait_log("resync.completed")
    events = world.append(1, key="same")
    world.wait_state(events[0], "published")
    events += world.append(1, key="same")
    for number in range(50):
        events += world.append(1, key=f"other-{number}")
    relay.wait_log("event.not_marked")
    wait_until(lambda: world.states().get("published") == 51, "the others are marked")
    relay.kill()
    start_relay()
    (later,) = world.append()
    world.wait_state(later, "published")
    assert sorted(arrival.message_id for arrival in world.drain()) == sorted([*events, later])
    assert world.database["journal"].count_documents({"ids": events[1]}) == 1
