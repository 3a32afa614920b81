"""Real third parties for the tests: one process a session, emptied and behaving for each test."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.support.processes import leashed

STOP_SECONDS = 5


class ThirdParties:
    """
    Steers the sandbox's Slack, mail server and webhook receiver, and reads what they got.

    A receipt is a dict: `number`, `received_at`, `kind`, `destination`, `request_id`,
    `idempotency_key`, `accepted`, `repeat`, `answer`, `headers`; of Slack also `text` and
    `payload`; of e-mail `envelope_from`, `envelope_to`, `subject`, `from`, `to`, `date`,
    `message_id` and `body`; of a webhook `body`.
    """

    def __init__(self, addresses: dict[str, str]) -> None:
        self.page_url = addresses["page"]
        self.slack_url = addresses["slack"]
        self.slack_api_url = addresses["slack_api"]
        self.webhooks_url = addresses["webhooks"]
        self.smtp_host, _, smtp_port = addresses["smtp"].partition(":")
        self.smtp_port = int(smtp_port)
        self.http = httpx.Client(base_url=self.page_url, timeout=10, trust_env=False)

    def received(self, kind: str, **filters: Any) -> list[dict[str, Any]]:
        """Return what `kind` kept, oldest first; filters: `request_id`, `limit`."""
        return self.calls(kind, accepted=True, **filters)

    def calls(self, kind: str, **filters: Any) -> list[dict[str, Any]]:
        """Return every call of `kind` that arrived, refused ones too, oldest first."""
        answer = self.http.get("inbox", params={"kind": kind, "limit": 10_000, **filters})
        receipts: list[dict[str, Any]] = answer.raise_for_status().json()["receipts"]
        return receipts[::-1]

    def totals(self, kind: str) -> dict[str, int]:
        """Count `received` (= `distinct` + `repeated`) and `refused` since the last clear."""
        answer = self.http.get("inbox", params={"limit": 1}).raise_for_status()
        totals: dict[str, int] = answer.json()["totals"][kind]
        return totals

    def misbehave(self, kind: str, mode: str, **options: Any) -> None:
        """See sandbox/third_parties/misbehaviour.py for modes and options."""
        body = {"kind": kind, "mode": mode, **options}
        self.http.post("misbehave", json=body).raise_for_status()

    def behave(self) -> None:
        self.http.post("behave").raise_for_status()

    def clear(self) -> None:
        self.http.delete("inbox").raise_for_status()


@contextmanager
def running_third_parties() -> Iterator[ThirdParties]:
    command = [sys.executable, "-m", "sandbox.third_parties"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, leashed(process):
        try:
            assert process.stdout is not None
            client = ThirdParties(read_addresses(process.stdout.readline()))
            with client.http:
                yield client
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_SECONDS) == 0


@pytest.fixture(scope="session")
def third_parties_process() -> Iterator[ThirdParties]:
    with running_third_parties() as client:
        yield client


@pytest.fixture
def third_parties(third_parties_process: ThirdParties) -> Iterator[ThirdParties]:
    third_parties_process.behave()
    third_parties_process.clear()
    yield third_parties_process
    third_parties_process.behave()


def read_addresses(ready_line: str) -> dict[str, str]:
    assert ready_line, "the third parties did not start; their reason is on stderr"
    pairs = (word.partition("=") for word in ready_line.split() if "=" in word)
    return {name: address for name, _, address in pairs}
