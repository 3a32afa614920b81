"""One event that costs the channel or the connection stops no other event."""

from collections.abc import Callable, Iterator

import pytest

from sandbox.rabbitmq import LocalRabbit, RabbitServer
from tests.support.outbox_world import OutboxWorld, StartRelay
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
