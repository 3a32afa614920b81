"""The relay's promises, with real servers, real processes and real kills."""

import json
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from bson import Binary, DatetimeMS, ObjectId, encode
from bson.raw_bson import RawBSONDocument

from relay.publisher import FIRST_PAUSE_SECONDS
from sandbox.mongodb import LocalMongo, MongoServer
from sandbox.ports import LOOPBACK, free_ports, port_answers
from sandbox.rabbitmq import LocalRabbit, RabbitServer
from sandbox.server_process import ServerProcess
from sandbox.waiting import wait_until
from tests.support.monitoring import Monitoring
from tests.support.outbox_world import EXCHANGE, QUEUE, OutboxWorld, StartRelay, settled
from tests.support.processes import OurProcess

WINDOW = 1000


def test_an_event_arrives_as_it_was_written(world: OutboxWorld, start_relay: StartRelay) -> None:
    start_relay().wait_log("resync.completed")
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    (event_id,) = world.append(
        payload='{"n": 1}',
        type="order_placed",
        content_type="application/json",
        headers={"traceparent": trace},
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
    )
    published = world.wait_state(event_id, "published")
    (arrival,) = world.drain()
    properties = arrival.properties
    assert arrival.body == b'{"n": 1}'
    assert (properties.message_id, properties.type) == (event_id, "order_placed")
    assert (properties.content_type, properties.delivery_mode) == ("application/json", 2)
    assert properties.headers["traceparent"] == trace
    assert properties.timestamp == int(datetime(2026, 1, 2, tzinfo=UTC).timestamp())
    assert published["expire_at"] > published["published_at"]


def test_four_fields_in_any_of_three_kinds_of_id_are_enough(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    start_relay()
    object_id, uuid = ObjectId(), uuid4()
    for event_id in ("text", object_id, Binary.from_uuid(uuid)):
        world.outbox.insert_one(
            {"_id": event_id, "type": "t", "routing_key": "r.x", "payload": b"\x00\xff"}
        )
    wait_until(lambda: world.states() == {"published": 3}, "the events are published")
    arrivals = world.drain()
    assert {arrival.message_id for arrival in arrivals} == {"text", str(object_id), str(uuid)}
    assert [arrival.body for arrival in arrivals] == [b"\x00\xff"] * 3


def test_a_first_start_publishes_what_was_pending_and_only_that(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    pending = world.append(20) + world.append(1, state="pending")
    world.append(5, state="published")
    relay = start_relay()
    relay.wait_log('"published":21')
    wait_until(lambda: world.states() == {"published": 26}, "everything is published")
    assert sorted(arrival.message_id for arrival in world.drain()) == sorted(pending)


def test_resyncs_under_concurrent_writers_leave_no_gap(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    """A killed relay and a lost position, four times, while transactions commit all the time."""
    with world.writers(8):
        for _ in range(4):
            relay = start_relay()
            relay.wait_log("resync.completed")
            grown = settled(world) + 100
            wait_until(lambda goal=grown: settled(world) > goal, "the stream is tailed")  # type: ignore[misc]
            relay.kill()
            world.database["checkpoints"].delete_many({})
        start_relay()
    world.wait_all_published()
    repeats = world.check_arrivals(world.drain())
    assert repeats <= 4 * WINDOW


def test_sigterm_in_a_burst_exits_0_and_the_next_relay_repeats_nothing(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    relay = start_relay()
    relay.wait_log("resync.completed")
    world.append(5000, payload="x" * 500)
    wait_until(lambda: settled(world) > 0, "the burst is under way")
    relay.signal(signal.SIGTERM)
    assert relay.wait_exit() == 0
    assert settled(world) < 5000, "the burst was over before the signal"
    start_relay()
    world.wait_all_published()
    assert world.check_arrivals(world.drain()) == 0


def test_a_standby_leads_as_soon_as_the_leader_is_killed(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    leader = start_relay()
    leader.wait_log("resync.completed")
    standby = start_relay()
    standby.wait_log("relay.standing_by")
    leader.kill()
    killed_at = time.monotonic()
    standby.wait_log("relay.leading")
    assert time.monotonic() - killed_at < 5
    (event_id,) = world.append()
    world.wait_state(event_id, "published")
    assert len(world.drain()) == 1


def test_two_relays_publish_each_event_once(world: OutboxWorld, start_relay: StartRelay) -> None:
    for relay in (start_relay(), start_relay()):
        relay.wait_log("relay.")
    world.append(200)
    world.wait_all_published()
    assert world.check_arrivals(world.drain()) == 0


def test_a_leader_that_was_frozen_stands_by_and_writes_nothing(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    frozen = start_relay(RABBITMQ_HEARTBEAT_SECONDS="1")
    frozen.wait_log("resync.completed")
    standby = start_relay(RABBITMQ_HEARTBEAT_SECONDS="1")
    standby.wait_log("relay.standing_by")

    def marked_by_frozen() -> set[Any]:
        return set(world.outbox.distinct("_id", {"relay_epoch": frozen_epoch}))

    with world.writers(4):
        wait_until(lambda: settled(world) > 100, "the leader works")
        frozen_epoch = world.checkpoint()["epoch"]
        frozen.signal(signal.SIGSTOP)
        standby.wait_log("relay.leading", deadline_seconds=20)
        epoch = world.checkpoint()["epoch"]
        goal = settled(world) + 100
        wait_until(lambda: settled(world) > goal, "the successor works")
        marked_before_thaw = marked_by_frozen()
        assert marked_before_thaw
        thawed_at = len(frozen.output())
        frozen.signal(signal.SIGCONT)
        frozen.wait_log("relay.standing_by", after=thawed_at)
        goal = settled(world) + 100
        wait_until(lambda: settled(world) > goal, "the successor goes on")
    world.wait_all_published()
    assert world.checkpoint()["epoch"] == epoch
    assert marked_by_frozen() <= marked_before_thaw
    assert world.check_arrivals(world.drain()) <= WINDOW


def test_an_event_without_a_queue_waits_with_its_key_and_no_other(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    start_relay().wait_log("resync.completed")
    (lost,) = world.append(key="stuck", seq=1, routing_key="nowhere.yet")
    (behind,) = world.append(key="stuck", seq=2)
    (other,) = world.append(key="free", seq=1)
    world.wait_state(other, "published")
    assert world.wait_state(lost, "held")["reason"] == "unroutable: 312 NO_ROUTE"
    assert world.wait_state(behind, "held")["reason"] == "behind_a_held_event"
    assert [arrival.message_id for arrival in world.drain()] == [other]
    with world.channel() as channel:
        channel.queue_bind(QUEUE, EXCHANGE, "nowhere.yet")
    (after,) = world.append(key="stuck", seq=3)
    world.wait_all_published()
    assert [arrival.message_id for arrival in world.drain()] == [lost, behind, after]


def test_held_events_follow_in_order_after_a_change_of_leader(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    relay = start_relay()
    (first,) = world.append(key="stuck", seq=1, routing_key="nowhere.yet")
    world.wait_state(first, "held")
    relay.kill()
    (second,) = world.append(key="stuck", seq=2)
    start_relay()
    world.wait_state(second, "held")
    with world.channel() as channel:
        channel.queue_bind(QUEUE, EXCHANGE, "nowhere.yet")
    world.wait_all_published()
    assert [arrival.message_id for arrival in world.drain()] == [first, second]


def test_an_event_that_need_not_be_routed_is_published(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    start_relay()
    (event_id,) = world.append(routing_key="nowhere.ever", must_route=False)
    world.wait_state(event_id, "published")


def test_a_full_queue_holds_its_own_events_and_is_not_tried_for_each(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    with world.channel() as channel:
        full = {"x-max-length": 20, "x-overflow": "reject-publish"}
        world.declare_queue(channel, "small", "small", **full)
    relay = start_relay()
    relay.wait_log("resync.completed")
    started_at = time.monotonic()
    taken = world.append(50, routing_key="small")  # above its limit: it refuses the rest
    world.wait_all_published()
    held = world.append(200, routing_key="small")
    (other,) = world.append()
    world.wait_state(other, "published")
    wait_until(lambda: world.states().get("held", 0) > 100, "the rest is held")
    arrived: list[str] = []

    def all_arrived() -> bool:
        arrived.extend(arrival.message_id for arrival in world.drain("small"))
        return len(set(arrived)) == len(taken + held)

    wait_until(all_arrived, "all of them arrive, a few at a time", deadline_seconds=60)
    # every pause lasts at least FIRST_PAUSE_SECONDS, so not more of them fit into the time
    max_pauses = (time.monotonic() - started_at) / FIRST_PAUSE_SECONDS + 1
    assert relay.output().count("routing_key.paused") <= max_pauses


#: Fields that may go out as they are.
SOUND: dict[str, Any] = {"type": "t", "routing_key": "r.a", "payload": "{}"}

UNFIT: list[dict[str, Any]] = [
    {"foo": 1},
    SOUND | {"payload": {"not": "encoded"}},
    SOUND | {"routing_key": "r" * 256},
    SOUND | {"_id": {"an": "object"}},
    SOUND | {"payload": "x" * (1024 * 1024 + 1)},
    SOUND | {"content_type": "x" * 256},
    SOUND | {"headers": {"CC": "r.b"}},
    SOUND | {"_id": Binary(b"short", 4)},
    SOUND | {"_id": Binary(b"short", 3)},
]


def test_events_that_do_not_fit_are_parked_once_and_the_stream_goes_on(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    relay = start_relay()
    relay.wait_log("resync.completed")
    unfit_ids = [world.outbox.insert_one(dict(unfit)).inserted_id for unfit in UNFIT]
    (good,) = world.append()
    world.wait_state(good, "published")
    for event_id in unfit_ids:
        parked = world.outbox.find_one({"_id": event_id})
        assert parked is not None
        assert parked["state"] == "parked", parked
        assert parked["reason"]
    relay.kill()
    successor = start_relay()
    (later,) = world.append()
    world.wait_state(later, "published")
    said = relay.output() + successor.output()
    assert said.count("event.parked") == len(UNFIT)
    assert len(world.drain()) == 2


def test_text_that_is_no_utf_8_is_parked(world: OutboxWorld, start_relay: StartRelay) -> None:
    """MongoDB stores whatever bytes a sloppy driver calls a string."""
    relay = start_relay()
    relay.wait_log("resync.completed")
    fields = ["type", "routing_key", "key", "content_type", "payload"]
    outbox = world.database.get_collection("outbox")
    for sound in [SOUND | {"_id": "abcd"}, *(SOUND | {"_id": at, at: "abcd"} for at in fields)]:
        broken = encode(sound).replace(b"abcd", b"\xff\xfe\xfd\xfc")
        outbox.insert_one(RawBSONDocument(broken))
    (good,) = world.append()
    world.wait_state(good, "published")
    # no query can name the document whose broken text is its _id
    parked = {"_id": {"$in": fields}, "state": "parked"}
    wait_until(lambda: world.outbox.count_documents(parked) == len(fields), "they are parked")
    assert relay.output().count("event.parked") == len(fields) + 1
    relay.signal(signal.SIGTERM)
    assert relay.wait_exit() == 0


def test_documents_that_no_driver_decodes_are_parked_and_delay_no_others(
    world: OutboxWorld, start_relay: StartRelay, run_process: Callable[..., OurProcess]
) -> None:
    """Old binary data holds its length twice; here the two contradict each other."""

    def broken(event_id: str, **elsewhere: Any) -> RawBSONDocument:
        sound = {"_id": event_id, "type": "t", "routing_key": "r.a", "payload": "{}"}
        old = Binary(b"abcd", 2)
        raw = encode({**sound, **(elsewhere or {"extra": old})})
        return RawBSONDocument(raw.replace(b"\x04\x00\x00\x00abcd", b"\x05\x00\x00\x00abcd"))

    raw_outbox = world.database["outbox"]
    world.append(3)
    raw_outbox.insert_one(broken("pending"))
    relay = start_relay()
    relay.wait_log("resync.completed")
    raw_outbox.insert_one(broken("streamed"))
    raw_outbox.insert_one(broken("nested", headers={"a": {"b": Binary(b"abcd", 2)}}))
    (good,) = world.append()
    world.wait_state(good, "published")
    relay.kill()
    start_relay()
    (later,) = world.append()
    world.wait_state(later, "published")
    assert world.states() == {"published": 5, "parked": 3}
    listing = run_process("relay", "held", "list", "--json", environment=world.environment)
    assert listing.wait_exit() == 0
    listed = {event["_id"] for event in json.loads(listing.output())}
    assert listed == {"pending", "streamed", "nested"}


@pytest.mark.parametrize(
    "fields",
    [
        {"created_at": datetime(1, 1, 1, tzinfo=UTC)},
        {"created_at": DatetimeMS(10**15)},
        {"_id": Binary.from_uuid(uuid4())},
        {"other": Binary(b"no UUID", 4)},
    ],
)
def test_an_odd_but_harmless_field_does_not_keep_an_event_back(
    world: OutboxWorld, start_relay: StartRelay, fields: dict[str, Any]
) -> None:
    start_relay()
    world.outbox.insert_one({"type": "t", "routing_key": "r.a", "payload": "{}", **fields})
    wait_until(lambda: world.states() == {"published": 1}, "it is published")
    assert len(world.drain()) == 1


def test_what_a_writer_inserts_as_held_or_published_is_not_published(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    start_relay().wait_log("resync.completed")
    for state in ("held", "published", "parked"):
        world.append(state=state)
    (good,) = world.append()
    world.wait_state(good, "published")
    start_relay()  # a later leader does not stumble over them either
    assert [arrival.message_id for arrival in world.drain()] == [good]


def test_a_dropped_and_recreated_outbox_is_taken_up_again(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    relay = start_relay()
    world.append(10)
    world.wait_all_published()
    world.outbox.drop()
    (event_id,) = world.append()
    world.wait_state(event_id, "published")
    relay.wait_log("position.lost")
    assert world.drain()[-1].message_id == event_id


def test_a_validator_that_knows_no_marks_is_passed_by_or_named_with_the_cure(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    known = ["_id", "type", "routing_key", "payload", "created_at"]
    schema = {"additionalProperties": False, "properties": {name: {} for name in known}}
    world.database.create_collection("outbox", validator={"$jsonSchema": schema})
    world.append(5)
    with_all_rights = start_relay()
    world.wait_all_published()
    with_all_rights.kill()
    rights = [{"role": "readWrite", "db": world.database_name}]
    world.database.command("createUser", "shop", pwd="secret", roles=rights)
    hosts = world.mongodb_url.split("@")[1]
    without = start_relay(
        MONGODB_URL=f"mongodb://shop:secret@{hosts}&authSource={world.database_name}"
    )
    without.wait_log("relay.leading")
    world.append(1)
    assert without.wait_exit() == 78
    assert "grant the relay bypassDocumentValidation" in without.output()
    world.database.command("dropUser", "shop")


def test_a_missing_exchange_is_named_with_the_cure_and_waited_for(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    with world.channel() as channel:
        channel.exchange_delete(EXCHANGE)
    relay = start_relay()
    (event_id,) = world.append()
    relay.wait_log("declare the exchange 'events'")
    with world.channel() as channel:
        channel.exchange_declare(EXCHANGE, "topic", durable=True)
        channel.queue_bind(QUEUE, EXCHANGE, "r.#")
    world.wait_state(event_id, "published", deadline_seconds=30)


def test_a_connection_cut_under_load_costs_nothing_but_repeats(
    world: OutboxWorld, start_relay: StartRelay, rabbit_server: RabbitServer, vhost: str
) -> None:
    relay = start_relay()
    relay.wait_log("resync.completed")
    with world.writers(4):
        for _ in range(3):
            goal = settled(world) + 50
            wait_until(lambda at=goal: settled(world) > at, "the relay works")  # type: ignore[misc]
            said = len(relay.output())
            rabbit_server.close_connections(vhost, "a test")
            relay.wait_log("relay.leading", after=said, deadline_seconds=30)
    world.wait_all_published()
    assert world.check_arrivals(world.drain()) <= 3 * WINDOW


def test_a_broker_killed_under_load_is_taken_up_again_within_30_seconds(
    mongodb_url: str,
    database_name: str,
    own_rabbit_server: RabbitServer,
    run_process: Callable[..., OurProcess],
) -> None:
    world = OutboxWorld(mongodb_url, database_name, own_rabbit_server.url)
    relay = run_process("relay", "run", environment=world.environment)
    relay.wait_log("resync.completed")
    with world.writers(4):
        wait_until(lambda: settled(world) > 50, "the relay works")
        own_rabbit_server.kill()
        own_rabbit_server.start()
        goal = settled(world)
        wait_until(lambda: settled(world) > goal, "the relay is back", deadline_seconds=30)
    world.wait_all_published()
    assert world.check_arrivals(world.drain()) <= WINDOW
    world.close()


def test_a_restarted_mongodb_is_waited_for(
    own_mongo_server: MongoServer,
    rabbitmq_url: str,
    run_process: Callable[..., OurProcess],
) -> None:
    world = OutboxWorld(own_mongo_server.url, "restarted", rabbitmq_url)
    [port] = free_ports(1)
    settings = {"MONITORING_PORT": str(port)}
    relay = run_process("relay", "run", environment=world.environment | settings)
    relay.wait_log("resync.completed")
    world.append(50)
    world.wait_all_published()
    own_mongo_server.kill()
    pages = Monitoring(port)
    pages.wait_unready("MongoDB does not answer")
    own_mongo_server.start()
    (event_id,) = world.append()
    world.wait_state(event_id, "published", deadline_seconds=30)
    assert relay.running
    pages.wait_ready()
    assert world.check_arrivals(world.drain()) <= WINDOW
    world.close()


def test_an_idle_outbox_moves_its_position_on(world: OutboxWorld, start_relay: StartRelay) -> None:
    start_relay().wait_log("resync.completed")
    start = world.checkpoint()["position"]["cluster_time"]

    def moved() -> bool:
        world.database["unrelated"].insert_one({})
        return bool(world.checkpoint()["position"]["cluster_time"] > start)

    wait_until(moved, "the position follows the oplog", deadline_seconds=20)


def test_an_event_that_the_position_has_passed_is_found_and_published(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    """This should never happen; the test removes a mark by hand."""
    (event_id,) = world.append()
    relay = start_relay()
    world.wait_all_published()
    relay.signal(signal.SIGTERM)
    assert relay.wait_exit() == 0
    world.outbox.update_one({"_id": event_id}, {"$set": {"state": "pending"}})
    successor = start_relay()
    world.wait_state(event_id, "published", deadline_seconds=60)
    assert '"message":"event.missed"' in successor.output()
    assert [arrival.message_id for arrival in world.drain()] == [event_id, event_id]


def test_logs_are_json_and_carry_the_event_id(world: OutboxWorld, start_relay: StartRelay) -> None:
    relay = start_relay()
    (event_id,) = world.append(routing_key="nowhere")
    world.wait_state(event_id, "held")
    relay.wait_log("event.held")
    lines = [json.loads(line) for line in relay.output().splitlines()]
    assert {line["event_id"] for line in lines if line["message"] == "event.held"} == {event_id}
    assert {line["process"] for line in lines} == {"relay"}


def test_a_broker_that_has_once_taken_it_in_is_waited_for_whatever_it_says_later(
    start_relay: StartRelay, rabbit_server: RabbitServer, vhost: str
) -> None:
    start_relay().wait_log("relay.leading")
    standby = start_relay()
    standby.wait_log("relay.standing_by")
    rabbit_server.take_rights_away(vhost)
    standby.wait_log("ACCESS_REFUSED")
    standby.wait_log("RabbitMQ refuses this user, password or virtual host")
    rabbit_server.create_vhost(vhost)
    standby.wait_log("relay.standing_by", after=standby.wait_log("RabbitMQ refuses"))


@pytest.mark.parametrize(
    ("setting", "wrong", "cure"),
    [
        ("MONGODB_URL", "password", "MongoDB refuses the user or password"),
        ("RABBITMQ_URL", "password", "RabbitMQ refuses this user, password or virtual host"),
        ("RABBITMQ_URL", "vhost", "RabbitMQ refuses this user, password or virtual host"),
    ],
)
def test_a_server_that_refuses_us_is_named_with_the_cure(
    world: OutboxWorld, start_relay: StartRelay, setting: str, wrong: str, cure: str
) -> None:
    url = world.environment[setting]
    if wrong == "password":
        user, rest = url.split("@", 1)
        url = f"{user}-wrong@{rest}"
    else:
        url = url.rsplit("/", 1)[0] + "/no-such-vhost"
    relay = start_relay(**{setting: url})
    assert relay.wait_exit() == 77
    assert cure in relay.output()
    assert "-wrong" not in relay.output()


def test_a_connection_limit_at_the_first_start_is_waited_for_and_named(
    start_relay: StartRelay, rabbit_server: RabbitServer, vhost: str
) -> None:
    rabbit_server.limit_connections(vhost, 0)
    relay = start_relay()
    relay.wait_log("RabbitMQ accepts no more connections")
    rabbit_server.limit_connections(vhost, -1)
    relay.wait_log("relay.leading")
    assert "RabbitMQ refuses this user" not in relay.output()


def test_a_mongodb_without_a_replica_set_is_named_with_the_cure(
    mongo_server: MongoServer, start_relay: StartRelay, tmp_path: Path
) -> None:
    assert isinstance(mongo_server, LocalMongo), "this test needs a mongod binary of its own"
    (port,) = free_ports(1)
    data = tmp_path / "standalone"
    data.mkdir()
    command = [str(mongo_server.binary), "--dbpath", str(data), "--port", str(port)]
    alone = ServerProcess(
        "mongod", [*command, "--bind_ip", LOOPBACK, "--nounixsocket"], tmp_path / "mongod.log"
    )
    alone.launch()
    try:
        wait_until(lambda: port_answers(port), "mongod answers")
        relay = start_relay(MONGODB_URL=f"mongodb://{LOOPBACK}:{port}/")
        assert relay.wait_exit() == 78
        assert "start it with --replSet" in relay.output()
    finally:
        alone.kill()


def test_an_event_held_before_a_crash_stays_in_front_of_one_held_after_it(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    """Marks are written before the count of settled events: here the count is lost in between."""
    relay = start_relay()
    world.append(10)
    (first,) = world.append(key="stuck", routing_key="nowhere.yet")
    world.wait_state(first, "held")
    relay.kill()
    world.database["checkpoints"].update_one({}, {"$set": {"settled": 0}})
    (second,) = world.append(key="stuck")
    start_relay()
    world.wait_state(second, "held")
    with world.channel() as channel:
        channel.queue_bind(QUEUE, EXCHANGE, "nowhere.yet")
    world.wait_all_published()
    order = [arrival.message_id for arrival in world.drain()]
    assert order.index(first) < order.index(second)


def test_a_broker_without_memory_is_waited_for_and_holds_up_no_stop(
    mongodb_url: str,
    database_name: str,
    own_rabbit_server: RabbitServer,
    run_process: Callable[..., OurProcess],
) -> None:
    assert isinstance(own_rabbit_server, LocalRabbit), "this test needs a broker of its own"
    world = OutboxWorld(mongodb_url, database_name, own_rabbit_server.url)
    pending = world.append(3000)
    own_rabbit_server.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.000001)")
    settings = {"RELAY_DRAIN_SECONDS": "2"}
    relay = run_process("relay", "run", environment=world.environment | settings)
    relay.wait_log("resync.started")
    relay.signal(signal.SIGTERM)
    assert relay.wait_exit(15) == 0
    [port] = free_ports(1)
    settings = {"MONITORING_PORT": str(port)}
    successor = run_process("relay", "run", environment=world.environment | settings)
    successor.wait_log("broker.blocked")
    pages = Monitoring(port)
    pages.wait_unready("RabbitMQ blocks publishing: it is short of memory")
    pending += world.append(10)
    assert psutil.Process(successor.pid).cpu_percent(interval=1) < 50, "it spins"
    assert world.states() == {None: len(pending)}
    assert pages.samples_with("relay_pending")["relay_pending"] >= 3000
    own_rabbit_server.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.4)")
    successor.wait_log("broker.unblocked")
    world.wait_all_published()
    pages.wait_ready()
    assert {arrival.message_id for arrival in world.drain()} == set(pending)
    assert successor.output().count("relay.leading") == 1
    world.close()
