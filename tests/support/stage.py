"""The consumers of a test as a cast: started by name, with a relay beside every wait."""

import json
import signal
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from sandbox.waiting import wait_until
from tests.conftest import RunProcess
from tests.support.deliveries import Deliveries, email_settings, slack_settings
from tests.support.processes import OurProcess
from tests.support.third_parties import ThirdParties

RECEIVING = "queue.receiving"

Seen = TypeVar("Seen")


class Stage:
    """Starts the processes of a test, publishes as the relay does, and waits for outcomes."""

    def __init__(
        self, run_process: RunProcess, deliveries: Deliveries, third_parties: ThirdParties
    ) -> None:
        self.run_process = run_process
        self.deliveries = deliveries
        self.third_parties = third_parties

    def start(self, who: str, **settings: object) -> OurProcess:
        """`slack`, `email` or `dead-letters`, once it receives."""
        process = self.begin(who, **settings)
        process.wait_log(RECEIVING)
        return process

    def begin(self, who: str, **settings: object) -> OurProcess:
        addresses: dict[str, object] = {
            **slack_settings(self.third_parties),
            **email_settings(self.third_parties),
        }
        environment = self.deliveries.environment(**{**addresses, **settings})
        process: OurProcess = self.run_process("consumers", "run", who, environment=environment)
        return process

    def start_reconciler(self) -> OurProcess:
        return self.begin("reconciler")

    def wait_status(self, request_id: str, status: str, *, deadline_seconds: float = 20) -> None:
        self.wait(
            lambda: self.deliveries.request(request_id)["status"] == status,
            f"the request is {status}",
            deadline_seconds=deadline_seconds,
        )

    def wait_count(self, status: str, count: int, *, deadline_seconds: float = 30) -> None:
        self.wait(
            lambda: self.deliveries.count(status) == count,
            f"{count} requests are {status}",
            deadline_seconds=deadline_seconds,
        )

    def wait(self, predicate: Callable[[], Seen], what: str, *, deadline_seconds: float) -> Seen:
        """Wait for a fact while hints are published, and check that each of them was justified."""
        with self.deliveries.relaying():
            return wait_until(predicate, what, deadline_seconds=deadline_seconds)


@pytest.fixture
def stage(run_process: RunProcess, deliveries: Deliveries, third_parties: ThirdParties) -> Stage:
    return Stage(run_process, deliveries, third_parties)


def lines(process: OurProcess, message: str) -> list[dict[str, Any]]:
    said = [json.loads(line) for line in process.output().splitlines() if line.startswith("{")]
    return [line for line in said if line["message"] == message]


def stop(process: OurProcess) -> None:
    process.signal(signal.SIGTERM)
    assert process.wait_exit() == 0
