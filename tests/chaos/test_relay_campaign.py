"""The crash campaign in short, and that it is not blind. `make chaos` is the long version."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from sandbox.mongodb import MongoServer
from sandbox.rabbitmq import RabbitServer
from sandbox.servers import Servers, find_mongo, find_rabbit
from tests.chaos.relay.blows import OPLOG_THAT_ROLLS
from tests.chaos.relay.campaign import run_campaign
from tests.chaos.relay.plan import Blow, Round, Strike
from tests.support.outbox_world import OutboxWorld


def rounds(*blows: Sequence[Blow], burst_count: int = 600) -> list[Round]:
    return [
        Round(number, burst_count, [Strike(blow, 40 + 30 * number, 0.3) for blow in struck])
        for number, struck in enumerate(blows, start=1)
    ]


def test_a_short_campaign_finds_nothing(tmp_path: Path) -> None:
    mongo = find_mongo(tmp_path, {}, node_count=3, extra_arguments=OPLOG_THAT_ROLLS)
    servers = Servers(mongo, find_rabbit(tmp_path, {}))
    try:
        servers.launch()
        servers.wait_ready()
        world = OutboxWorld(servers.mongo.url, "chaos", servers.rabbit.url)
        plan = rounds(
            [Blow.STEP_DOWN, Blow.KILL_LEADER],
            [Blow.ROLL_OPLOG_UNDER_DEAD],
            [Blow.RESTART_BROKER],
            [Blow.FREEZE_LEADER, Blow.STOP_LEADER],
        )
        result = run_campaign(plan, world, servers.mongo, servers.rabbit, tmp_path)
        world.close()
    finally:
        servers.discard()
    assert not result.faults
    assert result.rounds == len(plan)
    assert result.positions_lost == 1


@pytest.mark.parametrize(
    ("fault", "blow", "burst_count"),
    [
        ("save-before-confirm", Blow.KILL_LEADER, 2500),
        ("read-without-snapshot", Blow.RESET_POSITION_UNDER_DEAD, 2500),
    ],
)
def test_the_campaign_finds_a_deliberate_fault(
    world: OutboxWorld,
    mongo_server: MongoServer,
    rabbit_server: RabbitServer,
    tmp_path: Path,
    fault: str,
    blow: Blow,
    burst_count: int,
) -> None:
    plan = rounds(*[[blow]] * 8, burst_count=burst_count)
    command = ("tests.chaos.relay.faulty", fault, "run")
    result = run_campaign(plan, world, mongo_server, rabbit_server, tmp_path, command=command)
    assert any("still pending" in line for line in result.faults), result
