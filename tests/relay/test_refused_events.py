"""One event that costs the channel or the connection stops no other event."""

from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from sandbox.ports import free_ports
from sandbox.rabbitmq import LocalRabbit, RabbitServer
from sandbox.waiting import wait_until
from tests.support.frame_limit_proxy import frame_limit_proxy
from tests.support.monitoring import Monitoring
from tests.support.outbox_world import EXCHANGE, QUEUE, OutboxWorld, StartRelay, settled
from tests.support.processes import OurProcess


@pytest.fixture
def own_world(
    mongodb_url: str, database_name: str, own_rabbit_server: RabbitServer
) -> Iterator[OutboxWorld]:
    """An outbox beside a broker that the test may reconfigure."""
    assert isinstance(own_rabbit_server, LocalRabbit), "this test needs a broker of its own"
    world = OutboxWorld(mongodb_url, database_name, own_rabbit_server.url)
    yield world
    world.close()


@pytest.fixture
def start_own_relay(run_process: Callable[..., OurProcess], own_world: OutboxWorld) -> StartRelay:
    def start(**settings: str) -> OurProcess:
        return run_process("relay", "run", environment=own_world.environment | settings)

    return start


def test_headers_above_the_brokers_frame_max_are_parked_before_they_are_sent(
    own_rabbit_server: LocalRabbit, own_world: OutboxWorld, start_own_relay: StartRelay
) -> None:
    own_rabbit_server.evaluate("application:set_env(rabbit, frame_max, 4096)")
    relay = start_own_relay()
    relay.wait_log("resync.completed")
    (large,) = own_world.append(headers={"large": "x" * 5000})
    good = own_world.append(4)
    for event_id in good:
        own_world.wait_state(event_id, "published")
    assert "frame_max is 4096" in own_world.wait_state(large, "parked")["reason"]
    assert relay.output().count("relay.leading") == 1
    assert sorted(arrival.message_id for arrival in own_world.drain()) == sorted(good)


ALL_BUT_FORBIDDEN = "^(?!r[.]forbidden)"

CLOSURES = "relay_channel_closures_total"

#: An event is in flight at one closure at most, and is published once more by the search.
MAX_COPIES = 2


def copies(world: OutboxWorld) -> Counter[str]:
    return Counter(arrival.message_id for arrival in world.drain())


def test_an_event_that_the_topic_permissions_forbid_stops_no_other_event(
    world: OutboxWorld, start_relay: StartRelay, rabbit_server: RabbitServer, vhost: str
) -> None:
    rabbit_server.permit_topics(vhost, EXCHANGE, ALL_BUT_FORBIDDEN)
    relay = start_relay()
    relay.wait_log("resync.completed")
    good = world.append(5, key="other", routing_key="r.a")
    (forbidden,) = world.append(key="stuck", seq=1, routing_key="r.forbidden")
    (behind,) = world.append(key="stuck", seq=2)
    good += world.append(5, key="other", routing_key="r.a")
    for event_id in good:
        world.wait_state(event_id, "published")
    reason = world.wait_state(forbidden, "held")["reason"]
    assert reason.startswith("closes_the_channel: 403 ACCESS_REFUSED")
    assert "r.forbidden" in reason
    assert world.wait_state(behind, "held")["reason"] == "behind_a_held_event"
    arrived = copies(world)
    assert set(arrived) == set(good)
    assert max(arrived.values()) <= MAX_COPIES
    rabbit_server.permit_topics(vhost, EXCHANGE, ".*")
    (last,) = world.append(key="stuck", seq=3)
    world.wait_all_published()
    assert [arrival.message_id for arrival in world.drain()] == [forbidden, behind, last]
    assert relay.output().count("relay.leading") == 1


def test_a_held_event_that_closes_the_channel_is_retried_at_nobody_elses_cost(
    world: OutboxWorld, start_relay: StartRelay, rabbit_server: RabbitServer, vhost: str
) -> None:
    rabbit_server.permit_topics(vhost, EXCHANGE, ALL_BUT_FORBIDDEN)
    [port] = free_ports(1)
    relay = start_relay(MONITORING_PORT=str(port))
    relay.wait_log("resync.completed")
    (forbidden,) = world.append(routing_key="r.forbidden")
    world.wait_state(forbidden, "held")
    pages = Monitoring(port)

    def closures() -> float:
        return pages.samples_with(CLOSURES)[CLOSURES]

    before = closures()
    with world.writers(2):
        wait_until(lambda: closures() >= before + 2, "it is retried")
    world.append(20, routing_key="r.forbidden")
    wait_until(lambda: world.states().get("held") == 21, "more of its routing key is held")
    wait_until(lambda: set(world.states()) == {"held", "published"}, "the rest is published")
    assert max(copies(world).values()) == 1
    assert relay.output().count("search.started") == 1


@pytest.mark.parametrize("bad", ["one in the middle", "several in a row", "every second"])
def test_refused_events_among_thousands_cost_each_good_one_one_repeat_at_most(
    world: OutboxWorld, start_relay: StartRelay, rabbit_server: RabbitServer, vhost: str, bad: str
) -> None:
    rabbit_server.permit_topics(vhost, EXCHANGE, ALL_BUT_FORBIDDEN)
    start_relay().wait_log("resync.completed")
    if bad == "every second":
        good, forbidden = [], []
        for number in range(100):
            good += world.append()
            forbidden += world.append(routing_key=f"r.forbidden.{number}")
    else:
        good = world.append(5000)
        forbidden = [
            event_id
            for number in range(1 if bad == "one in the middle" else 30)
            for event_id in world.append(routing_key=f"r.forbidden.{number}")
        ]
        good += world.append(5000)
    expected = {"published": len(good), "held": len(forbidden)}
    wait_until(lambda: world.states() == expected, "all is settled", deadline_seconds=60)
    arrived = copies(world)
    assert set(arrived) == set(good)
    assert max(arrived.values()) <= MAX_COPIES


def test_events_that_are_all_refused_are_all_held_without_a_storm(
    world: OutboxWorld, start_relay: StartRelay, rabbit_server: RabbitServer, vhost: str
) -> None:
    rabbit_server.permit_topics(vhost, EXCHANGE, "^$")
    [port] = free_ports(1)
    relay = start_relay(MONITORING_PORT=str(port))
    relay.wait_log("resync.completed")
    world.append(2000)
    wait_until(lambda: world.states() == {"held": 2000}, "all is held")
    assert Monitoring(port).samples_with(CLOSURES)[CLOSURES] < 20
    rabbit_server.permit_topics(vhost, EXCHANGE, ".*")
    world.wait_all_published(60)
    assert max(copies(world).values()) == 1


def test_a_body_above_the_brokers_message_size_is_parked_and_stops_no_other_event(
    own_rabbit_server: LocalRabbit, own_world: OutboxWorld, start_own_relay: StartRelay
) -> None:
    own_rabbit_server.evaluate("application:set_env(rabbit, max_message_size, 1000)")
    relay = start_own_relay()
    relay.wait_log("resync.completed")
    large = [*own_world.append(3, payload="x" * 2000), *own_world.append(payload="x" * 3000)]
    good = own_world.append(50)
    for event_id in good:
        own_world.wait_state(event_id, "published")
    for event_id in large:
        reason = own_world.wait_state(event_id, "parked")["reason"]
        assert reason.startswith("closes_the_channel: 406 PRECONDITION_FAILED")
    assert relay.output().count("relay.leading") == 1
    assert max(copies(own_world).values()) <= MAX_COPIES


def test_messages_that_cost_the_connection_are_parked_and_stop_no_other_event(
    own_rabbit_server: LocalRabbit, own_world: OutboxWorld, start_own_relay: StartRelay
) -> None:
    """The relay believes in larger frames than the broker takes."""
    own_rabbit_server.evaluate("application:set_env(rabbit, frame_max, 4096)")
    with frame_limit_proxy(
        own_rabbit_server.amqp_port, broker_limit=4096, client_limit=131072
    ) as port:
        url = own_world.rabbitmq_url.replace(f":{own_rabbit_server.amqp_port}", f":{port}")
        relay = start_own_relay(RABBITMQ_URL=url)
        relay.wait_log("resync.completed")
        good = own_world.append(100)
        large = own_world.append(3, payload="x" * 7000)
        good += own_world.append(100)
        for event_id in good:
            own_world.wait_state(event_id, "published", deadline_seconds=60)
        for event_id in large:
            reason = own_world.wait_state(event_id, "parked")["reason"]
            assert reason.startswith("closes_the_channel: 501 FRAME_ERROR")
        wait_until(lambda: own_world.checkpoint()["search"] is None, "the search is over")
        assert relay.output().count("relay.leading") == 2
    arrived = copies(own_world)
    assert set(arrived) == set(good)
    assert max(arrived.values()) <= MAX_COPIES


def test_a_write_permission_revoked_with_one_event_pending_blames_nobody(
    world: OutboxWorld, start_relay: StartRelay, rabbit_server: RabbitServer, vhost: str
) -> None:
    [port] = free_ports(1)
    relay = start_relay(MONITORING_PORT=str(port))
    relay.wait_log("resync.completed")
    rabbit_server.permit_writes(vhost, "^$")
    (event_id,) = world.append()
    relay.wait_log("grant the relay's user the permissions")
    pages = Monitoring(port)
    pages.wait_unready("RabbitMQ refuses what is to be published: 403 ACCESS_REFUSED")
    assert world.states() == {None: 1}
    rabbit_server.permit_writes(vhost, ".*")
    world.wait_state(event_id, "published")
    pages.wait_ready()
    assert copies(world) == {event_id: 1}
    assert relay.output().count("search.waiting") == 1
    assert relay.output().count("relay.leading") == 1


def test_a_deleted_exchange_is_waited_for_and_nothing_is_held(
    world: OutboxWorld, start_relay: StartRelay
) -> None:
    relay = start_relay()
    relay.wait_log("resync.completed")
    before = world.append(10)
    world.wait_all_published()
    with world.channel() as channel:
        channel.exchange_delete(EXCHANGE)
    after = [event_id for key in ("a", "b") for event_id in world.append(50, key=key)]
    relay.wait_log("declare the exchange 'events'")
    assert world.states() == {"published": 10, None: 100}
    with world.channel() as channel:
        channel.exchange_declare(EXCHANGE, "topic", durable=True)
        channel.queue_bind(QUEUE, EXCHANGE, "r.#")
    world.wait_all_published()
    arrived = [arrival.message_id for arrival in world.drain()]
    assert sorted(arrived) == sorted(before + after)
    for ids in (after[:50], after[50:]):
        assert [event_id for event_id in arrived if event_id in ids] == ids
    assert relay.output().count("search.waiting") == 1


def test_a_leader_killed_while_it_searches_is_succeeded_in_the_search(
    world: OutboxWorld, start_relay: StartRelay, rabbit_server: RabbitServer, vhost: str
) -> None:
    rabbit_server.permit_topics(vhost, EXCHANGE, ALL_BUT_FORBIDDEN)
    good = world.append(1500)
    forbidden = world.append(routing_key="r.forbidden")
    good += world.append(3000)
    relay = start_relay()
    kills = 0
    for _ in range(2):
        relay.wait_log("search.")
        at = settled(world)
        wait_until(lambda at=at: settled(world) > at, "it settles suspects")  # type: ignore[misc]
        relay.kill()
        kills += 1
        relay = start_relay()
    expected = {"published": len(good), "held": len(forbidden)}
    wait_until(lambda: world.states() == expected, "all is settled", deadline_seconds=60)
    assert world.checkpoint()["search"] is None
    arrived = copies(world)
    assert set(arrived) == set(good)
    assert max(arrived.values()) <= MAX_COPIES + kills


def raft_process(rabbit: LocalRabbit, vhost: str, queue: str, call: str) -> None:
    """Suspend or resume what orders a quorum queue's messages: it has no leader meanwhile."""
    rabbit.evaluate(
        f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{vhost}">>, queue,'
        f' <<"{queue}">>)), {{Name, _}} = amqqueue:get_pid(Q), sys:{call}(Name)'
    )


def test_a_queue_that_owes_its_confirms_stops_no_other_and_repeats_nothing(
    world: OutboxWorld, start_relay: StartRelay, rabbit_server: RabbitServer, vhost: str
) -> None:
    assert isinstance(rabbit_server, LocalRabbit), "this test needs a broker of its own"
    with world.channel() as channel:
        world.declare_queue(channel, "leaderless", "leaderless")
    relay = start_relay(RELAY_WINDOW_MESSAGES="100")
    world.append(routing_key="leaderless")
    world.wait_all_published()
    assert len(world.drain("leaderless")) == 1
    raft_process(rabbit_server, vhost, "leaderless", "suspend")
    owed = world.append(3, key="owed", routing_key="leaderless")
    owed += world.append(3, routing_key="leaderless")
    good = world.append(500)
    wait_until(
        lambda: world.states() == {"held": len(owed), "published": len(good) + 1},
        "the others are published",
        deadline_seconds=25,
    )
    assert world.outbox.find_one({"_id": owed[0]})["reason"] == "not_confirmed"  # type: ignore[index]
    raft_process(rabbit_server, vhost, "leaderless", "resume")
    world.wait_all_published(90)
    assert copies(world) == dict.fromkeys(good, 1)
    arrived = [arrival.message_id for arrival in world.drain("leaderless")]
    assert sorted(arrived) == sorted(owed)
    assert [event_id for event_id in arrived if event_id in owed[:3]] == owed[:3]
    assert relay.output().count("relay.leading") == 1


def test_a_queue_that_blocks_its_whole_channel_is_found_and_stops_no_other(
    world: OutboxWorld, start_relay: StartRelay, rabbit_server: RabbitServer, vhost: str
) -> None:
    """RabbitMQ registers a channel with a quorum queue first, and does nothing else meanwhile."""
    assert isinstance(rabbit_server, LocalRabbit), "this test needs a broker of its own"
    with world.channel() as channel:
        world.declare_queue(channel, "leaderless", "leaderless")
    relay = start_relay(RELAY_WINDOW_MESSAGES="100")
    relay.wait_log("resync.completed")
    raft_process(rabbit_server, vhost, "leaderless", "suspend")
    owed = world.append(2, routing_key="leaderless")
    good = world.append(300)
    wait_until(
        lambda: world.states() == {"held": len(owed), "published": len(good)},
        "the others are published",
        deadline_seconds=90,
    )
    raft_process(rabbit_server, vhost, "leaderless", "resume")
    world.wait_all_published(90)
    assert max(copies(world).values()) <= MAX_COPIES
    arrived = Counter(arrival.message_id for arrival in world.drain("leaderless"))
    assert set(arrived) == set(owed)
    assert max(arrived.values()) <= MAX_COPIES
    assert relay.output().count("relay.leading") == 2
