"""The whole system on real servers: from a POST to the third party and back into MongoDB."""

import asyncio
import secrets
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from pymongo import MongoClient

from assistance.books import Books
from assistance.waiting import Reason
from consumers.topology import DEAD_LETTERS_QUEUE, deliveries_queue
from runtime.mongo import close, open_client
from sandbox.rabbitmq import RabbitServer
from sandbox.waiting import wait_until
from service.audit import balance
from tests.conftest import RunProcess
from tests.support.deliveries import new_request, slack_settings
from tests.support.processes import OurProcess
from tests.support.running_service import RunningService, service_environment
from tests.support.third_parties import ThirdParties

POSTERS = 16

#: What each process says when it does its work.
AT_WORK = {
    "relay": "relay.leading",
    "slack": "queue.receiving",
    "email": "queue.receiving",
    "dead-letters": "queue.receiving",
}


@dataclass
class WholeSystem:
    """Every process of the product, each as it runs in production, with short schedules."""

    run_process: RunProcess
    environment: Mapping[str, str]
    members: dict[str, OurProcess] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.client: MongoClient[dict[str, Any]] = MongoClient(self.environment["MONGODB_URL"])
        self.database = self.client[self.environment["MONGODB_DATABASE"]]
        topology = self.run_process("consumers", "topology", environment=self.environment)
        assert topology.wait_exit() == 0, topology.output()
        self.start("service")
        self.service = RunningService(self.members["service"], self.environment)
        self.service.wait_ready()

    def start(self, *names: str) -> None:
        for name in names:
            command = [name, "run"] if name in {"service", "relay"} else ["consumers", "run", name]
            self.members[name] = self.run_process(*command, environment=self.environment)
        for name in names:
            if name in AT_WORK:
                self.members[name].wait_log(AT_WORK[name], deadline_seconds=30)

    def start_all(self) -> None:
        self.start("relay", "slack", "email", "dead-letters", "reconciler")

    def post(self, count: int) -> list[str]:
        """Post this many requests, of both topics in turn; each is answered 202."""
        bodies = [
            {"topic": ("sales", "pricing")[number % 2], "description": f"Request {number}"}
            for number in range(count)
        ]
        with ThreadPoolExecutor(POSTERS) as posters:
            return list(posters.map(self.service.accept, bodies))

    def append(self, count: int) -> list[str]:
        """Write this many requests, of both topics in turn, as the service writes them."""
        routes = (("sales", ["slack"]), ("pricing", ["email"]))
        accepted = [
            new_request(f"Request {number}", *routes[number % 2]) for number in range(count)
        ]
        events = [event for one in accepted for event in one.outbox_documents]
        self.database["outbox"].insert_many(events)
        self.database["assistances"].insert_many([dict(one.request) for one in accepted])
        return [one.request["_id"] for one in accepted]

    def count(self, status: str) -> int:
        return self.database["assistances"].count_documents({"status": status})

    def wait_all_succeeded(self, count: int, deadline_seconds: float = 60) -> None:
        wait_until(
            lambda: self.count("succeeded") == count,
            f"{count} requests have succeeded",
            deadline_seconds=deadline_seconds,
        )

    def books(self) -> Books:
        async def open_books() -> Books:
            client = open_client(self.environment["MONGODB_URL"], process="test")
            try:
                return await balance(client[self.environment["MONGODB_DATABASE"]])
            finally:
                await close(client)

        return asyncio.run(open_books())

    def close(self) -> None:
        self.service.http.close()
        self.client.close()


def system_environment(
    mongodb_url: str, database_name: str, rabbitmq_url: str, third_parties: ThirdParties
) -> dict[str, str]:
    settings = {
        **slack_settings(third_parties),
        "RABBITMQ_URL": rabbitmq_url,
        "EMAIL_SMTP_HOST": third_parties.smtp_host,
        "EMAIL_SMTP_PORT": third_parties.smtp_port,
        "EMAIL_SMTP_TLS": "none",
        "EMAIL_SENDER": "assistance@example.org",
        "EMAIL_RECIPIENTS": "pricing@example.org",
        "RETRY_DELAYS_SECONDS": "0.5,1,2,4,8,16,32",
        "CALL_TIMEOUT_SECONDS": 2,
        "LEASE_MARGIN_SECONDS": 1,
    }
    return service_environment(mongodb_url, database_name, **settings)


@pytest.fixture
def system(
    run_process: RunProcess,
    mongodb_url: str,
    database_name: str,
    rabbitmq_url: str,
    third_parties: ThirdParties,
) -> Iterator[WholeSystem]:
    environment = system_environment(mongodb_url, database_name, rabbitmq_url, third_parties)
    system = WholeSystem(run_process, environment)
    yield system
    system.close()


def received_ids(third_parties: ThirdParties) -> list[str]:
    return [
        receipt["request_id"]
        for kind in ("slack", "email")
        for receipt in third_parties.received(kind)
    ]


def test_requests_reach_slack_and_the_mailbox_and_the_books_balance(
    system: WholeSystem, third_parties: ThirdParties
) -> None:
    system.start_all()
    accepted = system.post(20)
    system.wait_all_succeeded(20)
    assert sorted(received_ids(third_parties)) == sorted(accepted)
    assert system.books() == Books(succeeded=20)


def test_1500_requests_wait_for_absent_consumers_and_all_are_delivered(
    system: WholeSystem, third_parties: ThirdParties, rabbit_server: RabbitServer, vhost: str
) -> None:
    """However long no worker runs: nothing fails, is dead-lettered, or is retried in a storm."""
    system.start("relay", "reconciler")
    accepted = system.post(300) + system.append(1200)
    slack, email = deliveries_queue("slack"), deliveries_queue("email")

    def depths() -> tuple[int, int]:
        return rabbit_server.queue_depth(vhost, slack), rabbit_server.queue_depth(vhost, email)

    wait_until(lambda: depths() == (750, 750), "every hint waits in its queue", deadline_seconds=60)
    for _ in range(3):
        once = system.run_process(
            "consumers", "run", "reconciler", "--once", environment=system.environment
        )
        assert once.wait_exit() == 0, once.output()
    assert depths() == (750, 750)
    assert rabbit_server.queue_depth(vhost, DEAD_LETTERS_QUEUE) == 0
    assert system.count("accepted") == 1500
    assert system.books() == Books(waiting=Counter({Reason.QUEUED: 1500}))
    system.start("slack", "email", "dead-letters")
    system.wait_all_succeeded(1500, deadline_seconds=120)
    assert sorted(received_ids(third_parties)) == sorted(accepted)
    assert system.database["dead_letters"].count_documents({}) == 0


def test_everybody_is_back_within_30_seconds_of_a_broker_killed_under_load(
    run_process: RunProcess,
    mongodb_url: str,
    database_name: str,
    own_rabbit_server: RabbitServer,
    third_parties: ThirdParties,
) -> None:
    environment = system_environment(
        mongodb_url, database_name, own_rabbit_server.url, third_parties
    )
    system = WholeSystem(run_process, environment)
    system.start_all()
    accepted = system.post(100)
    own_rabbit_server.kill()
    accepted += system.post(50)
    said = {name: len(member.output()) for name, member in system.members.items()}
    own_rabbit_server.start()
    for name, work in AT_WORK.items():
        system.members[name].wait_log(work, after=said[name], deadline_seconds=30)
    accepted += system.post(50)
    system.wait_all_succeeded(200)
    assert all(member.running for member in system.members.values())
    assert set(received_ids(third_parties)) == set(accepted)
    assert system.books().unexplained == 0
    system.close()


def test_a_request_is_accepted_while_everything_but_mongodb_is_down(
    system: WholeSystem, third_parties: ThirdParties
) -> None:
    accepted = system.post(10)
    assert system.count("accepted") == 10
    system.start_all()
    system.wait_all_succeeded(10)
    assert sorted(received_ids(third_parties)) == sorted(accepted)


def test_killed_workers_and_relays_lose_nothing(
    system: WholeSystem, third_parties: ThirdParties
) -> None:
    system.start_all()
    accepted = system.post(60)
    for name in ("relay", "slack", "email", "dead-letters", "reconciler"):
        system.members[name].kill()
        accepted += system.post(20)
        system.start(name)
    system.wait_all_succeeded(160)
    assert set(received_ids(third_parties)) == set(accepted)
    assert system.books().unexplained == 0


def test_every_process_drains_and_exits_0_when_stopped_in_mid_work(
    system: WholeSystem, third_parties: ThirdParties
) -> None:
    system.start_all()
    third_parties.misbehave("slack", "slow", delay_seconds=0.5)
    accepted = system.post(100)
    wait_until(lambda: third_parties.calls("slack"), "the workers are at it")
    for member in system.members.values():
        member.signal(signal.SIGTERM)
    exits = {name: member.wait_exit(30) for name, member in system.members.items()}
    assert exits == dict.fromkeys(system.members, 0)
    assert system.books().unexplained == 0
    third_parties.behave()
    system.start_all()
    system.wait_all_succeeded(100)
    assert sorted(received_ids(third_parties)) == sorted(accepted)


def test_one_request_id_finds_the_whole_way_in_the_logs(system: WholeSystem) -> None:
    system.start_all()
    (request_id,) = system.post(1)
    system.wait_all_succeeded(1)
    for name in ("service", "slack"):
        system.members[name].wait_log(request_id)


def test_no_secret_and_no_personal_text_reaches_a_log(
    system: WholeSystem, third_parties: ThirdParties
) -> None:
    system.start_all()
    words = f"my-secret-request-{secrets.token_hex(8)}"
    third_parties.misbehave("slack", "status", code=500, times=1)
    system.service.accept({"topic": "sales", "description": words})
    system.service.accept({"topic": "pricing", "description": words})
    system.wait_all_succeeded(2)
    said = "".join(member.output() for member in system.members.values())
    assert words not in said
    for name in ("API_KEYS", "SLACK_WEBHOOK_URL", "MONGODB_URL", "RABBITMQ_URL"):
        value = system.environment[name]
        for secret in value.split(",") if name == "API_KEYS" else [value]:
            assert secret not in said, f"{name} stands in a log"
