"""The campaign against the consumers in short, and that it is not blind; `make chaos` is long."""

from pathlib import Path

from sandbox.mongodb import MongoServer
from sandbox.rabbitmq import RabbitServer
from sandbox.servers import Servers, find_mongo, find_rabbit
from tests.chaos.delivery.blows import end_transactions_soon
from tests.chaos.delivery.campaign import run_campaign
from tests.chaos.delivery.plan import Blow, Order, Point, Round
from tests.support.deliveries import Deliveries
from tests.support.third_parties import ThirdParties


def test_a_short_campaign_finds_nothing(tmp_path: Path, third_parties: ThirdParties) -> None:
    """Every point, and a restart of each server, and a wiped disk."""
    plan = [
        Round(
            1,
            12,
            [
                Order("slack", Point.RECEIVED),
                Order("slack", Point.CALLING, nth=2),
                Order("slack", Point.RECORDING),
                Order("slack", Point.ACKNOWLEDGED),
                Order("email", Point.CLAIMED),
                Order("email", Point.CALLED, nth=2),
                Order("email", Point.RECORDED),
            ],
            Blow.RESTART_BROKER,
        ),
        Round(2, 12, [], Blow.RESTART_MONGODB),
        Round(3, 12, [], Blow.WIPE_BROKER),
    ]
    servers = Servers(find_mongo(tmp_path, {}), find_rabbit(tmp_path, {}))
    try:
        servers.launch()
        servers.wait_ready()
        deliveries = Deliveries(servers.mongo.url, "chaos", servers.rabbit.url)
        end_transactions_soon(deliveries.client)
        with deliveries.client:
            result = run_campaign(
                plan, deliveries, third_parties, servers.mongo, servers.rabbit, tmp_path, say=print
            )
    finally:
        servers.discard()
    assert not result.faults
    assert (result.rounds, result.deaths) == (len(plan), len(Point))
    struck = {order.point for round_ in plan for order in round_.orders}
    assert struck == set(Point)


def test_the_campaign_finds_deliberate_faults(
    deliveries: Deliveries,
    third_parties: ThirdParties,
    mongo_server: MongoServer,
    rabbit_server: RabbitServer,
    tmp_path: Path,
) -> None:
    deaths = [Order("slack", Point.CLAIMED), Order("email", Point.CALLED)]
    result = run_campaign(
        [Round(1, 6, deaths)],
        deliveries,
        third_parties,
        mongo_server,
        rabbit_server,
        tmp_path,
        worker_faults={"slack": "record-before-call", "email": "acknowledge-before-record"},
        # nothing else is in a dying worker's hand, which would be locked until MongoDB ends it
        settings={"concurrency": 1, "lease_margin_seconds": 1},
        coming_again_seconds=1,
        say=print,
    )
    found = " / ".join(result.faults)
    assert "succeeded, and the third party never got them" in found
    assert "acknowledged before its outcome was recorded" in found
