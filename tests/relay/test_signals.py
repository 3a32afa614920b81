"""What a relay says about itself: what it counts, how far it is, and whether it gets on."""

import asyncio
import signal
import socket
from datetime import UTC, datetime, timedelta

import psutil
import pytest
from loguru import logger
from pymongo.errors import AutoReconnect

from outbox.collection import INDEXES
from outbox.state import PENDING
from relay import backlog
from relay.backlog import measure_backlog
from runtime import monitoring
from runtime.mongo import close, open_client
from runtime.monitoring import monitored
from runtime.settings import MonitoringSettings
from sandbox.ports import LOOPBACK, free_ports
from sandbox.rabbitmq import RabbitServer
from sandbox.waiting import wait_until
from tests.support.monitoring import Monitoring, undocumented
from tests.support.outbox_world import EXCHANGE, QUEUE, OutboxWorld, StartRelay


def test_a_relay_says_how_it_gets_on_from_its_start_to_its_end(
    world: OutboxWorld, start_relay: StartRelay, rabbit_server: RabbitServer, vhost: str
) -> None:
    first_port, second_port = free_ports(2)
    first = start_relay(MONITORING_PORT=str(first_port))
    leader, standby = Monitoring(first_port), Monitoring(second_port)
    leader.wait_ready()
    second = start_relay(MONITORING_PORT=str(second_port))
    assert listening(first.pid) == [LOOPBACK]

    start = world.checkpoint()
    good = world.append(3)
    [unroutable, behind] = world.append(2, key="k", routing_key="nowhere")
    [unfit] = world.append(1, routing_key="")
    world.wait_state(behind, "held")
    world.wait_state(unroutable, "held")
    world.wait_state(unfit, "parked")
    wait_until(lambda: world.states()["published"] == 3, "the others are published")

    counted = leader.samples_with(relay_published_total=3)
    exact = {
        "relay_held_total": 2,
        "relay_parked_total": 1,
        "relay_nacked_total": 0,
        "relay_possible_repeats_total": 0,
        "relay_leading": 1,
        "relay_epoch": world.checkpoint()["epoch"],
    }
    assert exact.items() <= counted.items()
    assert counted["relay_returned_total"] >= 1
    assert counted["relay_confirm_seconds_count"] >= 1
    assert 0 < counted["relay_commit_to_confirm_seconds_sum"] < 60
    assert counted["relay_in_flight"] in {0, 1}
    wait_until(lambda: leader.samples()["relay_lag_seconds"] < 2, "it has caught up")
    assert not any(id in name for name in counted for id in (unroutable, unfit, "nowhere"))

    standby.wait_ready()
    aside = standby.samples_with("relay_oplog_runway_seconds", relay_pending=0)
    assert not undocumented(counted | aside)
    assert aside["relay_leading"] == 0
    assert not {"relay_lag_seconds", "relay_epoch"} & aside.keys()

    rabbit_server.delete_vhost(vhost)
    for pages in (leader, standby):
        pages.wait_unready("RabbitMQ: ")
    assert leader.alive()
    interrupted = leader.samples()
    assert interrupted["relay_reconnects_total"] >= 1
    assert "relay_lag_seconds" not in interrupted

    rabbit_server.create_vhost(vhost)
    with world.channel() as channel:
        channel.exchange_declare(EXCHANGE, "topic", durable=True)
        world.declare_queue(channel, QUEUE, "r.#")
    leader.wait_ready()
    standby.wait_ready()
    assert leader.samples()["relay_leading"] + standby.samples()["relay_leading"] == 1

    for process in (first, second):
        process.signal(signal.SIGTERM)
    assert [process.wait_exit() for process in (first, second)] == [0, 0]

    # what a leader leaves that dies between two confirms and their marks
    world.outbox.update_many({"_id": {"$in": good[:2]}}, {"$set": {"state": "pending"}})
    world.database["checkpoints"].update_one({}, {"$set": {"position": start["position"]}})
    start_relay(MONITORING_PORT=str(first_port))
    wait_until(lambda: world.states()["published"] == 3, "they are published again")
    leader.samples_with(relay_published_total=2, relay_possible_repeats_total=2)
    assert len(world.drain()) == 2


async def test_what_cannot_be_looked_up_is_unknown_until_it_can() -> None:
    answers: list[float | None] = [1.0, None, None, 2.0]
    looked: list[float | None] = []

    async def look() -> float:
        answer = answers.pop(0) if answers else 2.0
        if answer is None:
            raise AutoReconnect
        return answer

    async with monitored(MonitoringSettings(monitoring_port=free_ports(1)[0]), "it") as monitor:
        latest = monitor.poll("it", look, every_seconds=0)

        def seen() -> bool:
            if latest.value not in looked[-1:]:
                looked.append(latest.value)
            return looked[-3:] == [1.0, None, 2.0]

        # at every turn of the loop, or a look would be missed
        async with asyncio.timeout(20):
            while not seen():  # noqa: ASYNC110
                await asyncio.sleep(0)


async def test_the_backlog_is_measured_by_an_index_and_to_a_limit(
    world: OutboxWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "COUNT_LIMIT", 40)
    world.database.command({"createIndexes": "outbox", "indexes": [*INDEXES]})
    an_hour_ago = datetime.now(UTC) - timedelta(hours=1)
    world.append(100, state="published")
    world.append(30, created_at=an_hour_ago, seq=7)
    world.append(5, created_at="yesterday", state="pending")
    client = open_client(world.mongodb_url, process="test")
    database = client[world.database_name]

    measured = await measure_backlog(database, "outbox")
    assert measured.pending_count == 35
    assert measured.oldest_at is not None
    assert abs(measured.oldest_at - an_hour_ago) < timedelta(seconds=1)

    world.append(100)
    assert (await measure_backlog(database, "outbox")).pending_count == 40
    for plan in (
        world.outbox.find(PENDING).explain(),
        world.database.command("aggregate", "outbox", pipeline=backlog.OLDEST, explain=True),
    ):
        assert "'indexName': 'pending_in_order'" in str(plan)
        assert "COLLSCAN" not in str(plan.get("queryPlanner", plan))
    await close(client)


async def test_a_port_that_is_taken_stops_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one is used; where none is free the process goes on unseen, and says so."""
    monkeypatch.setattr(monitoring, "MONITORING_PORTS", 2)
    said: list[str] = []
    sink = logger.add(lambda message: said.append(f"{message} {message.record['extra']}"))
    [port] = free_ports(1)
    settings = MonitoringSettings(monitoring_port=port)
    with socket.socket() as taken:
        taken.bind((LOOPBACK, port))
        taken.listen()
        async with monitored(settings, "one"):
            assert "monitoring.listening" in said[-1]
            assert str(port + 1) in said[-1]
            async with monitored(settings, "other") as unseen:
                assert "monitoring.off" in said[-1]
                assert "MONITORING_PORT" in said[-1]
                assert unseen.poll("it", pytest.fail, every_seconds=1).value is None
    logger.remove(sink)


def listening(pid: int) -> list[str]:
    """The addresses that a process listens on."""
    sockets = psutil.Process(pid).net_connections("tcp")
    return [opened.laddr[0] for opened in sockets if opened.status == psutil.CONN_LISTEN]
