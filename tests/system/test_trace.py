"""The trace that a request comes with goes all its way: every message, every call, every fact."""

import json
from collections.abc import Mapping

from sandbox.waiting import wait_until
from tests.conftest import RunProcess
from tests.support.outbox_world import EXCHANGE, QUEUE, OutboxWorld
from tests.support.running_service import PATH, RunningService, service_environment
from tests.support.third_parties import ThirdParties

TRACE = {
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "tracestate": "bot=00f067aa0ba902b7",
}

SIGNING_SECRET = "whsec_dHJhY2V0cmFjZXRyYWNldHJhY2V0cmFjZQ=="


def test_a_trace_goes_from_the_post_to_the_third_party_and_into_the_last_fact(
    world: OutboxWorld, run_process: RunProcess, third_parties: ThirdParties
) -> None:
    with world.channel() as channel:
        channel.queue_bind(QUEUE, EXCHANGE, "#")
    environment = service_environment(
        world.mongodb_url,
        world.database_name,
        rabbitmq_url=world.rabbitmq_url,
        destinations=json.dumps({"desk": "webhook"}),
        routes=json.dumps({"sales": ["desk"]}),
        desk_url=third_parties.webhooks_url + "desk",
        desk_signing_secrets=SIGNING_SECRET,
        desk_allowed_networks="127.0.0.0/8",
        shutdown_grace_seconds=20,
    )
    run_process("relay", "run", environment=environment)
    worker = run_process("consumers", "run", "desk", environment=environment)
    process = run_process("service", "run", environment=environment)
    worker.wait_log("queue.receiving", deadline_seconds=30)
    with RunningService(process, environment) as service:
        service.wait_ready(deadline_seconds=30)
        answer = service.http.post(
            PATH, headers=TRACE, json={"topic": "sales", "description": "How much is it?"}
        )
        assert answer.status_code == 202

    arrived: dict[str, Mapping[str, str]] = {}

    def arrived_all() -> bool:
        arrived.update({each.properties.type: each.properties.headers for each in world.drain()})
        return "assistance_request_succeeded" in arrived

    wait_until(arrived_all, "the success is published", deadline_seconds=30)
    assert arrived.keys() == {
        "assistance_request_created",
        "delivery_due",
        "assistance_request_succeeded",
    }
    assert all(TRACE.items() <= headers.items() for headers in arrived.values())
    [receipt] = third_parties.received("webhook")
    assert TRACE.items() <= dict(receipt["headers"]).items()
