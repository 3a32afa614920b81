"""The demo in two acts: the path of a request, and delivery while processes and servers fail."""

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from sandbox import waiting
from sandbox.rabbitmq import GivenRabbit
from sandbox.stack import Say, Stack

TOPICS = ("sales", "pricing", "stock")
REQUEST_COUNT = 300
POSTERS = 8
SETTLED_SECONDS = 120
POST_SECONDS = 60


class DemoFailed(Exception):
    """The demo did not show what it should; the message says what is missing."""


def play(stack: Stack, say: Say) -> None:
    """Raises DemoFailed if a promise is broken."""
    show_one_per_topic(stack, say)
    show_slack_outage(stack, say)
    post_during_failures(stack, say)


def show_one_per_topic(stack: Stack, say: Say) -> None:
    say("\nAct 1: one request per topic")
    for topic in TOPICS:
        request_id = post(stack, topic, f"A demo of {topic} for <ACME & sons>, please")
        say(f"\n  POST /api/assistances ({topic}): 202, {request_id}")
        wait_for_status(stack, request_id, "succeeded")
        show_way(stack, say, request_id)


def show_slack_outage(stack: Stack, say: Say) -> None:
    say("\n  Slack now refuses connections, and a request for Slack is posted")
    stack.third_parties.post(
        "/misbehave", json={"kind": "slack", "mode": "refuse"}
    ).raise_for_status()
    request_id = post(stack, "sales", "Slack is down, the bot does not notice")
    say(f"  POST /api/assistances (sales): 202, {request_id}")
    wait_until(lambda: attempts_ended(stack, request_id) > 1, "a second attempt was made")
    stack.third_parties.post("/behave").raise_for_status()
    say("  Two attempts have failed; Slack comes back")
    wait_for_status(stack, request_id, "succeeded")
    show_way(stack, say, request_id)


def post_during_failures(stack: Stack, say: Say) -> None:
    """Post many requests while the relay and a worker are killed and the broker restarts."""
    say(f"\nAct 2: {REQUEST_COUNT} requests while processes are killed and the broker restarts")
    stack.third_parties.delete("/inbox").raise_for_status()
    accepted: list[str] = []
    faults: dict[int, tuple[str, Callable[[], None]]] = {
        REQUEST_COUNT // 6: ("the relay is killed (SIGKILL)", lambda: stack.kill("relay")),
        REQUEST_COUNT // 3: ("the Slack worker is killed (SIGKILL)", lambda: stack.kill("slack")),
    }
    if isinstance(stack.servers.rabbit, GivenRabbit):
        say("  RABBITMQ_URL names a broker that this demo did not start: it is not restarted")
    else:
        faults[REQUEST_COUNT // 2] = (
            "the broker is killed and started again",
            lambda: restart_broker(stack),
        )
    with ThreadPoolExecutor(POSTERS) as posters:
        posting = posters.map(
            lambda number: post(stack, TOPICS[number % len(TOPICS)], f"Request number {number}"),
            range(REQUEST_COUNT),
        )
        for number, request_id in enumerate(posting):
            accepted.append(request_id)
            if number in faults:
                words, inject = faults[number]
                say(f"  {number:3} posted: {words}")
                inject()
    say(f"  {len(accepted)} posted; every one was answered 202")
    wait_until_closed(stack, accepted, say)
    balance_the_books(stack, accepted, say)


def balance_the_books(stack: Stack, accepted: list[str], say: Say) -> None:
    """Compare what was answered 202 with what the database knows and the third parties got."""
    books = audit(stack)
    inbox = stack.third_parties.get("/inbox", params={"limit": 10_000}).raise_for_status().json()
    balance = balance_of(
        {request_id: status_of(stack, request_id) for request_id in accepted},
        [receipt["request_id"] for receipt in inbox["receipts"] if receipt["accepted"]],
        unexplained=books["unexplained"],
    )
    say(f"\n{balance}")
    if balance.posted != REQUEST_COUNT or not balance.is_even:
        raise DemoFailed("the books do not balance")


@dataclass(frozen=True)
class Balance:
    """
    lost: answered 202, and neither did a third party get it nor is it known to have failed.
    repeated: deliveries beyond the first of a request.
    """

    posted: int
    delivered: int
    failed: int
    lost: int
    unexplained: int
    repeated: int

    @property
    def is_even(self) -> bool:
        return self.delivered == self.posted and not (self.failed or self.lost or self.unexplained)

    def __str__(self) -> str:
        return (
            f"posted {self.posted}, delivered {self.delivered}, failed {self.failed},"
            f" lost {self.lost}, unexplained {self.unexplained}, repeated {self.repeated}"
        )


def balance_of(
    status_of_request: Mapping[str, str], received: Sequence[str], *, unexplained: int
) -> Balance:
    """status_of_request: of each id that was answered 202; received: an id a delivery."""
    posted = status_of_request.keys()
    delivered = posted & set(received)
    failed = {request_id for request_id in posted if status_of_request[request_id] == "failed"}
    return Balance(
        posted=len(posted),
        delivered=len(delivered),
        failed=len(failed),
        lost=len(posted - delivered - failed),
        unexplained=unexplained,
        repeated=len(received) - len(set(received)),
    )


def restart_broker(stack: Stack) -> None:
    stack.servers.rabbit.kill()
    stack.servers.rabbit.start()


def post(stack: Stack, topic: str, description: str) -> str:
    """Post a request as a patient client does: 503 and a lost connection are tried again."""
    end = time.monotonic() + POST_SECONDS
    while True:
        try:
            answer = stack.api.post(
                "/api/assistances", json={"topic": topic, "description": description}
            )
        except httpx.TransportError as error:
            if time.monotonic() > end:
                raise DemoFailed(f"the API cannot be reached: {error}") from error
        else:
            if answer.status_code == httpx.codes.ACCEPTED:
                return str(answer.json()["id"])
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > end:
                raise DemoFailed(f"a request was answered {answer.status_code}: {answer.text}")
        time.sleep(0.2)


def status_of(stack: Stack, request_id: str) -> str:
    answer = stack.api.get(f"/api/assistances/{request_id}").raise_for_status()
    return str(answer.json()["status"])


def wait_for_status(stack: Stack, request_id: str, status: str) -> None:
    wait_until(lambda: status_of(stack, request_id) == status, f"{request_id} is {status}")


def wait_until_closed(stack: Stack, accepted: list[str], say: Say) -> None:
    waiting = set(accepted)

    def all_closed() -> bool:
        for request_id in list(itertools.islice(waiting, 100)):
            if status_of(stack, request_id) != "accepted":
                waiting.discard(request_id)
        return not waiting

    started = time.monotonic()
    wait_until(all_closed, "every request is closed")
    say(f"  all closed {time.monotonic() - started:.0f} s later")


def attempts_ended(stack: Stack, request_id: str) -> int:
    shown = stack.run("service", "show", request_id, "--json")
    if shown.returncode:
        raise DemoFailed(shown.stderr.strip())
    return sum(entry["what"] == "ended" for entry in json.loads(shown.stdout)["timeline"])


def show_way(stack: Stack, say: Say, request_id: str) -> None:
    shown = stack.run("service", "show", request_id)
    if shown.returncode:
        raise DemoFailed(shown.stderr.strip())
    for line in shown.stdout.rstrip().splitlines():
        say(f"    {line}")
    inbox = stack.third_parties.get("/inbox", params={"request_id": request_id, "accepted": True})
    for receipt in inbox.raise_for_status().json()["receipts"]:
        say(f"    {receipt['kind']} received: {received_text(receipt)}")


def received_text(receipt: dict[str, Any]) -> str:
    text = receipt.get("subject") or receipt.get("text") or receipt.get("body") or ""
    return " / ".join(line for line in str(text).splitlines() if line.strip())


def audit(stack: Stack) -> dict[str, Any]:
    audited = stack.run("service", "audit", "--full", "--json")
    if audited.returncode and not audited.stdout:
        raise DemoFailed(f"the audit failed: {audited.stderr.strip()}")
    books: dict[str, Any] = json.loads(audited.stdout)
    return books


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    waiting.wait_until(is_so, what, deadline_seconds=SETTLED_SECONDS, error=DemoFailed)
