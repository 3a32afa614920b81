"""What the consumers declare on the broker, and what they say when they cannot start."""

import pytest
from pika.exceptions import ChannelClosedByBroker

from sandbox.rabbitmq import RabbitServer
from tests.conftest import RunProcess
from tests.support.deliveries import Deliveries, slack_settings
from tests.support.third_parties import ThirdParties


def test_topology_declares_everything_and_says_what(
    run_process: RunProcess, deliveries: Deliveries
) -> None:
    for _ in range(2):  # it may be repeated
        process = run_process("consumers", "topology", environment=deliveries.environment())
        assert process.wait_exit() == 0
    said = process.output()
    assert "events -- delivery_due.slack --> deliveries.slack" in said
    assert "events -- delivery_due.email --> deliveries.email" in said
    assert "dead-letters --> dead-letters" in said
    with deliveries.channel() as channel:
        for queue in ("deliveries.slack", "deliveries.email", "dead-letters"):
            channel.queue_declare(queue, passive=True)


def test_a_hint_reaches_its_own_queue_only(
    run_process: RunProcess, deliveries: Deliveries, rabbit_server: RabbitServer, vhost: str
) -> None:
    environment = deliveries.environment()
    assert run_process("consumers", "topology", environment=environment).wait_exit() == 0
    deliveries.accept(destinations=("slack",))
    deliveries.accept(destinations=("slack", "email"))
    deliveries.publish_pending()
    assert rabbit_server.queue_depth(vhost, "deliveries.slack") == 2
    assert rabbit_server.queue_depth(vhost, "deliveries.email") == 1
    assert rabbit_server.queue_depth(vhost, "dead-letters") == 0


def test_a_refused_message_is_dead_lettered_with_its_origin(
    run_process: RunProcess, deliveries: Deliveries
) -> None:
    environment = deliveries.environment()
    assert run_process("consumers", "topology", environment=environment).wait_exit() == 0
    deliveries.accept()
    deliveries.publish_pending()
    with deliveries.channel() as channel:
        method, _, body = channel.basic_get("deliveries.slack")
        assert method is not None
        channel.basic_reject(method.delivery_tag, requeue=False)
        letter = next(iter(channel.consume("dead-letters", inactivity_timeout=10)))
        assert letter[1] is not None
        headers = letter[1].headers or {}
        assert headers["x-first-death-queue"] == "deliveries.slack"
        assert headers["x-first-death-reason"] == "rejected"
        assert letter[2] == body


def test_a_queue_that_differs_is_named_with_the_cure(
    run_process: RunProcess, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    with deliveries.channel() as channel:
        channel.queue_declare("deliveries.slack", durable=True)
    environment = deliveries.environment(**slack_settings(third_parties))
    for arguments in (("topology",), ("run", "slack")):
        process = run_process("consumers", *arguments, environment=environment)
        assert process.wait_exit() == 78
        assert "'deliveries.slack' already exists with other arguments" in process.output()
        assert "drain and delete it" in process.output()
        assert "Traceback" not in process.output()


def test_a_wrong_password_ends_the_worker_with_the_cure(
    run_process: RunProcess, deliveries: Deliveries, third_parties: ThirdParties, rabbitmq_url: str
) -> None:
    host = rabbitmq_url.partition("@")[2]
    environment = deliveries.environment(
        **slack_settings(third_parties), rabbitmq_url=f"amqp://stranger:wrong-password@{host}"
    )
    process = run_process("consumers", "run", "slack", environment=environment)
    assert process.wait_exit() == 77
    assert "correct RABBITMQ_URL" in process.output()
    assert "wrong-password" not in process.output()


def test_an_unknown_destination_is_answered_with_those_there_are(
    run_process: RunProcess, deliveries: Deliveries
) -> None:
    process = run_process("consumers", "run", "slak", environment=deliveries.environment())
    assert process.wait_exit() == 2
    said = " ".join(process.output().replace("│", " ").split())
    assert "no destination 'slak'" in said
    for name in ("email", "slack", "dead-letters", "reconciler"):
        assert name in said


def test_every_wrong_setting_is_named_at_once_and_no_secret_is_shown(
    run_process: RunProcess, deliveries: Deliveries
) -> None:
    environment = deliveries.environment(
        slack_webhook_url="hooks.slack.example/services/hush",
        mongodb_url="http://user:hush@nowhere",
        call_timeout_seconds="soon",
        retry_delays_seconds="5,later",
        concurrency="0",
    )
    process = run_process("consumers", "run", "slack", environment=environment)
    assert process.wait_exit() == 78
    said = process.output()
    for name in (
        "SLACK_WEBHOOK_URL",
        "MONGODB_URL",
        "CALL_TIMEOUT_SECONDS",
        "RETRY_DELAYS_SECONDS",
        "CONCURRENCY",
    ):
        assert name in said
    assert "5 settings are wrong" in said
    assert "hush" not in said


def test_a_second_destination_of_a_channel_has_settings_of_its_own(
    run_process: RunProcess, deliveries: Deliveries
) -> None:
    environment = deliveries.environment(
        destinations='{"slack-emea": "slack", "pager": "pagerduty"}',
        routes='{"sales": ["slack-emea"]}',
        slack_webhook_url="https://hooks.slack.example/services/x",
    )
    process = run_process("consumers", "run", "slack-emea", environment=environment)
    assert process.wait_exit() == 78
    assert "SLACK_EMEA_WEBHOOK_URL is missing" in process.output()
    process = run_process("consumers", "run", "pager", environment=environment)
    assert process.wait_exit() == 78
    assert "there is no channel 'pagerduty'; known: email, slack" in process.output()


def test_routes_that_lead_nowhere_are_refused(
    run_process: RunProcess, deliveries: Deliveries
) -> None:
    environment = deliveries.environment(routes='{"sales": ["fax"]}')
    process = run_process("consumers", "run", "slack", environment=environment)
    assert process.wait_exit() == 78
    assert "'fax', which is not a destination" in process.output()


@pytest.mark.parametrize("option", ["--once", "--dry-run"])
def test_a_worker_cannot_run_once(
    run_process: RunProcess, deliveries: Deliveries, option: str
) -> None:
    process = run_process("consumers", "run", "slack", option, environment=deliveries.environment())
    assert process.wait_exit() == 2
    assert "for the reconciler only" in " ".join(process.output().replace("│", " ").split())


def test_no_queue_may_drop_what_was_never_tried(
    run_process: RunProcess, deliveries: Deliveries
) -> None:
    """The broker itself confirms each argument: a declaration without one of them is refused."""
    environment = deliveries.environment(delivery_limit=7)
    assert run_process("consumers", "topology", environment=environment).wait_exit() == 0
    needed = {
        "x-queue-type": "quorum",
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": "dead-letters",
        "x-dead-letter-strategy": "at-least-once",
        "x-delivery-limit": 7,
    }
    with deliveries.channel() as channel:
        channel.queue_declare("deliveries.slack", durable=True, arguments=needed)
    for name in needed:
        fewer = {other: value for other, value in needed.items() if other != name}
        with deliveries.channel() as channel, pytest.raises(ChannelClosedByBroker):
            channel.queue_declare("deliveries.slack", durable=True, arguments=fewer)
