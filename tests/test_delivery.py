"""What the workers promise, against a real broker, a real database and real third parties."""

import signal

from tests.conftest import RunProcess
from tests.deliveries import Deliveries, slack_settings
from tests.helpers import OurProcess, wait_until
from tests.third_parties import ThirdParties

RECEIVING = "queue.receiving"


def start_slack(
    run_process: RunProcess, deliveries: Deliveries, third_parties: ThirdParties, **settings: object
) -> OurProcess:
    environment = deliveries.environment(**slack_settings(third_parties), **settings)
    worker: OurProcess = run_process("consumers", "run", "slack", environment=environment)
    worker.wait_log(RECEIVING)
    return worker


def test_a_request_reaches_slack_and_is_acknowledged_in_the_ledger(
    run_process: RunProcess, deliveries: Deliveries, third_parties: ThirdParties
) -> None:
    worker = start_slack(run_process, deliveries, third_parties)
    request_id = deliveries.accept("Is it in stock?")
    deliveries.publish_pending()
    wait_until(
        lambda: deliveries.request(request_id)["status"] == "succeeded", "the request succeeds"
    )
    [received] = third_parties.received("slack", request_id=request_id)
    assert "Is it in stock?" in received["text"]
    assert received["idempotency_key"] == deliveries.delivery(request_id)["idempotency_key"]
    assert deliveries.facts(request_id) == [
        "assistance_request_created",
        "assistance_request_succeeded",
    ]
    [attempt] = deliveries.attempts(request_id)
    assert (attempt["verdict"], attempt["calls"], attempt["number"]) == ("done", 1, 1)
    assert deliveries.request(request_id)["next_due_at"] is None
    worker.signal(signal.SIGTERM)
    assert worker.wait_exit() == 0
