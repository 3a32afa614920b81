"""What the consumers say about themselves: what came of their calls, and whether they can work."""

import signal

from sandbox.ports import free_ports
from sandbox.rabbitmq import RabbitServer
from tests.conftest import RunProcess
from tests.deliveries import Deliveries, slack_settings
from tests.helpers import wait_until
from tests.monitoring import Monitoring, undocumented
from tests.third_parties import ThirdParties

SLACK = 'destination="slack"'


def test_a_worker_tells_what_came_of_its_calls_and_when_it_cannot_work(
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
    wait_until(lambda: pages.why_not_ready() is None, "it is ready", deadline_seconds=30)
    assert pages.alive()

    third_parties.misbehave("slack", "status", code=500, times=1)
    accepted = deliveries.accept_many(2)
    deliveries.publish_pending()
    done, later = (
        f'delivery_attempts_total{{{SLACK},verdict="{verdict}"}}' for verdict in ("done", "later")
    )
    wait_until(
        lambda: {done, later} <= pages.samples().keys(), "both are recorded", deadline_seconds=30
    )
    counted = pages.samples()
    assert counted[done] == counted[later] == 1
    assert counted[f"delivery_calls_total{{{SLACK}}}"] == 2
    assert counted[f"delivery_call_seconds_count{{{SLACK}}}"] == 2
    assert 0 < counted[f"delivery_call_seconds_sum{{{SLACK}}}"] < 30
    assert not any(id in name for name in counted for id in accepted)
    assert not undocumented(counted)

    rabbit_server.delete_vhost(vhost)
    reason = wait_until(pages.why_not_ready, "the broker is missed", deadline_seconds=30)
    assert reason.startswith("the queue deliveries.slack is not being received: RabbitMQ: ")
    rabbit_server.create_vhost(vhost)
    wait_until(lambda: pages.why_not_ready() is None, "it is ready again", deadline_seconds=30)

    worker.signal(signal.SIGTERM)
    assert worker.wait_exit() == 0
    assert not pages.alive()
