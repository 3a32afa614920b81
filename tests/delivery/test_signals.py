"""The metrics of the consumers, and their readiness."""

import signal

from assistance.verdict import Done
from consumers.delivery.destinations import Destinations
from consumers.delivery.metrics import AttemptMetrics
from consumers.maintenance.metrics import (
    deliveries_reconciled,
    letters_stored,
    watch_destinations,
)
from runtime.mongo import close, open_client
from runtime.monitoring import Monitor
from sandbox.ports import free_ports
from sandbox.rabbitmq import RabbitServer
from tests.conftest import RunProcess
from tests.support.deliveries import Deliveries, slack_settings
from tests.support.monitoring import Monitoring, undocumented
from tests.support.third_parties import ThirdParties

SLACK = 'destination="slack"'


def test_a_worker_reports_the_outcome_of_its_calls_and_why_it_is_not_ready(
    run_process: RunProcess,
    deliveries: Deliveries,
    third_parties: ThirdParties,
    rabbit_server: RabbitServer,
    vhost: str,
) -> None:
    [port] = free_ports(1)
    environment = deliveries.environment(monitoring_port=port, **slack_settings(third_parties))
    worker = run_process("consumers", "run", "slack", environment=environment)
    pages = Monitoring(port)
    pages.wait_ready()
    assert pages.alive()

    third_parties.misbehave("slack", "status", code=500, times=1)
    accepted = deliveries.accept_many(2)
    deliveries.publish_pending()
    done, later = (
        f'delivery_attempts_total{{{SLACK},verdict="{verdict}"}}' for verdict in ("done", "later")
    )
    counted = pages.samples_with(done, later)
    assert counted[done] == counted[later] == 1
    assert counted[f"delivery_calls_total{{{SLACK}}}"] == 2
    assert counted[f"delivery_call_seconds_count{{{SLACK}}}"] == 2
    assert 0 < counted[f"delivery_call_seconds_sum{{{SLACK}}}"] < 30
    assert not any(id in name for name in counted for id in accepted)

    rabbit_server.delete_vhost(vhost)
    missed = "the queue deliveries.slack is not being consumed: RabbitMQ: "
    pages.wait_unready(missed)
    rabbit_server.create_vhost(vhost)
    pages.wait_ready()

    worker.signal(signal.SIGTERM)
    assert worker.wait_exit() == 0
    assert not pages.alive()


async def test_the_page_about_monitoring_names_every_number(deliveries: Deliveries) -> None:
    client = open_client(deliveries.mongodb_url, process="test")
    monitor = Monitor("test", is_seen=False)
    AttemptMetrics(monitor.registry, "slack").note(Done("200"), 1, 0.1)
    letters_stored(monitor.registry).labels("parked").inc()
    deliveries_reconciled(monitor.registry).inc()
    watch_destinations(monitor, Destinations(client[deliveries.database_name]))
    await close(client)

    named = {family.name for family in monitor.registry.collect()}
    assert len(named) > 8
    assert not undocumented(dict.fromkeys(named, 0.0))
