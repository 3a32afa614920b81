"""Each process with the work it does, behind links that a test can spoil."""

import signal
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import pika
import pytest

from outbox.collection import OUTBOX
from sandbox.ports import free_ports
from sandbox.waiting import wait_until
from tests.conftest import RunProcess
from tests.support.deliveries import Deliveries, email_settings, slack_settings
from tests.support.links import Link, Mode
from tests.support.monitoring import Monitoring
from tests.support.outbox_world import OutboxWorld
from tests.support.processes import OurProcess
from tests.support.running_service import OLD_BODY, RunningService, service_environment
from tests.support.third_parties import ThirdParties

GRACE_SECONDS = 4

#: What a process needs after its grace time to close its connections and to end.
CLOSING_SECONDS = 6

CHANGE_STREAM = b"$changeStream"


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


@dataclass
class Surroundings:
    run_process: RunProcess
    mongodb_url: str
    database_name: str
    rabbitmq_url: str
    third_parties: ThirdParties


class Subject(ABC):
    """
    One process, started behind one link to each of its peers.

    links: by peer: `mongodb`, `rabbitmq`, `third-party`.
    """

    peers: tuple[str, ...] = ("mongodb",)

    #: further settings of the process
    extra: Mapping[str, str] = MappingProxyType({})

    def __init__(self, around: Surroundings) -> None:
        self.around = around
        self.port = free_ports(1)[0]
        self.monitoring = Monitoring(self.port)
        self.links: dict[str, Link] = {}
        self._stack = ExitStack()
        for peer in self.peers:
            self.links[peer] = self._stack.enter_context(self._link(peer))
        self.prepare()
        self.process = self.start()
        self.monitoring.wait_ready()

    def close(self) -> None:
        self._stack.close()

    def _link(self, peer: str) -> Link:
        if peer == "mongodb":
            return Link("127.0.0.1", port_of(self.around.mongodb_url))
        if peer == "rabbitmq":
            return Link("127.0.0.1", port_of(self.around.rabbitmq_url))
        return Link(*self.third_party_address())

    def third_party_address(self) -> tuple[str, int]:
        raise NotImplementedError

    @abstractmethod
    def prepare(self) -> None:
        """Make what must exist before the process starts."""

    @abstractmethod
    def start(self) -> OurProcess: ...

    @abstractmethod
    def ask(self) -> None:
        """Give it one piece of work, past the link."""

    @abstractmethod
    def open_count(self) -> int:
        """How many pieces of work are not done yet."""

    def has_noticed(self) -> bool:
        return self.monitoring.why_not_ready() is not None

    def addresses(self) -> dict[str, str]:
        addresses = {
            "MONGODB_URL": self.around.mongodb_url,
            "MONGODB_DATABASE": self.around.database_name,
            "RABBITMQ_URL": self.around.rabbitmq_url,
            "MONITORING_PORT": str(self.port),
            "LOG_FORMAT": "json",
            "RELAY_DRAIN_SECONDS": str(GRACE_SECONDS),
            "SHUTDOWN_GRACE_SECONDS": str(GRACE_SECONDS),
            **self.extra,
        }
        if "mongodb" in self.links:
            addresses["MONGODB_URL"] = self.links["mongodb"].url(
                self.around.mongodb_url, directConnection="true"
            )
        if "rabbitmq" in self.links:
            addresses["RABBITMQ_URL"] = self.links["rabbitmq"].url(self.around.rabbitmq_url)
        return addresses


class RelaySubject(Subject):
    peers: tuple[str, ...] = ("mongodb", "rabbitmq")

    def prepare(self) -> None:
        self.world = OutboxWorld(
            self.around.mongodb_url, self.around.database_name, self.around.rabbitmq_url
        )
        self._stack.callback(self.world.close)
        self.asked: list[str] = []

    def start(self) -> OurProcess:
        return self.around.run_process("relay", "run", environment=self.addresses())

    def ask(self) -> None:
        self.asked += self.world.append()

    def open_count(self) -> int:
        query: dict[str, Any] = {"state": {"$ne": "published"}}
        return self.world.outbox.count_documents(query)


class ConsumerSubject(Subject):
    peers: tuple[str, ...] = ("mongodb", "rabbitmq")
    name = "slack"

    def prepare(self) -> None:
        self.deliveries = Deliveries(
            self.around.mongodb_url, self.around.database_name, self.around.rabbitmq_url
        )
        self._stack.enter_context(self.deliveries.client)
        environment = self.deliveries.environment()
        declared = self.around.run_process("consumers", "topology", environment=environment)
        assert declared.wait_exit() == 0

    def start(self) -> OurProcess:
        environment = self.deliveries.environment(**self.settings()) | self.addresses()
        return self.around.run_process("consumers", "run", self.name, environment=environment)

    def settings(self) -> dict[str, object]:
        return {}


class WorkerSubject(ConsumerSubject):
    peers: tuple[str, ...] = ("mongodb", "rabbitmq", "third-party")

    def prepare(self) -> None:
        super().prepare()
        self.requests: list[str] = []

    def third_party_address(self) -> tuple[str, int]:
        at = urlsplit(self.around.third_parties.slack_url)
        assert at.hostname is not None
        assert at.port is not None
        return at.hostname, at.port

    def settings(self) -> dict[str, object]:
        url = self.links["third-party"].url(self.around.third_parties.slack_url)
        return {**slack_settings(self.around.third_parties), "slack_webhook_url": url}

    def ask(self) -> None:
        self.requests.append(self.deliveries.accept(destinations=[self.name]))
        self.deliveries.publish_pending()

    def open_count(self) -> int:
        return len(self.requests) - self.deliveries.count("succeeded")

    def wake(self) -> None:
        """What the reconciler does: send the hints of what is due again."""
        with self.deliveries.channel() as channel:
            for request_id in self.requests:
                if self.deliveries.request(request_id)["status"] != "succeeded":
                    self.deliveries.publish(self.deliveries.hints(request_id)[-1], channel)


class SlackWorker(WorkerSubject):
    """Its calls to the third party are HTTP."""


class EmailWorker(WorkerSubject):
    """Its calls to the third party are SMTP."""

    peers: tuple[str, ...] = ("third-party",)
    name = "email"

    def third_party_address(self) -> tuple[str, int]:
        return self.around.third_parties.smtp_host, self.around.third_parties.smtp_port

    def settings(self) -> dict[str, object]:
        link = self.links["third-party"]
        return {**email_settings(self.around.third_parties), "email_smtp_port": link.port}


class DeadLetterSubject(ConsumerSubject):
    name = "dead-letters"

    def prepare(self) -> None:
        super().prepare()
        self.asked = 0

    def ask(self) -> None:
        self.asked += 1
        with self.deliveries.channel() as channel:
            properties = pika.BasicProperties(message_id=str(uuid.uuid4()), delivery_mode=2)
            channel.basic_publish("dead-letters", "", b"garbage", properties, mandatory=True)

    def open_count(self) -> int:
        return self.asked - len(self.deliveries.letters())


class ReconcilerSubject(ConsumerSubject):
    """Requests whose hint was published an hour ago and lost."""

    peers: tuple[str, ...] = ("mongodb",)
    name = "reconciler"

    def prepare(self) -> None:
        super().prepare()
        self.requests: list[str] = []

    def ask(self) -> None:
        self.requests.append(self.deliveries.accept(now=datetime.now(UTC) - timedelta(hours=1)))
        self.deliveries.database[OUTBOX].update_many(
            {"key": self.requests[-1]}, {"$set": {"state": "published"}}
        )

    def open_count(self) -> int:
        return sum(len(self.deliveries.hints(request_id)) < 2 for request_id in self.requests)


class ServiceSubject(Subject):
    """It is asked over HTTP, and a request that was not accepted is asked for again."""

    def prepare(self) -> None:
        self.asked = 0
        self.deliveries = Deliveries(
            self.around.mongodb_url, self.around.database_name, self.around.rabbitmq_url
        )
        self._stack.enter_context(self.deliveries.client)

    def start(self) -> OurProcess:
        environment = service_environment(
            self.around.mongodb_url, self.around.database_name, api_port=self.port
        )
        environment |= self.addresses()
        process = self.around.run_process("service", "run", environment=environment)
        self.service = RunningService(process, environment)
        self._stack.enter_context(self.service)
        self.service.wait_ready()
        return process

    def ask(self) -> None:
        self.asked += 1

    def has_noticed(self) -> bool:
        return self.service.http.get("/readyz").status_code != HTTPStatus.OK

    def open_count(self) -> int:
        while open_count := self.asked - self.deliveries.count("accepted"):
            # the same key until it is accepted, so that none is accepted twice
            key = {"Idempotency-Key": f"number {open_count} of {self.asked}"}
            answer = self.service.http.post("/api/assistances", json=OLD_BODY, headers=key)
            if answer.status_code != HTTPStatus.ACCEPTED:
                return open_count
        return 0


SUBJECTS: dict[str, type[Subject]] = {
    "relay": RelaySubject,
    "worker": SlackWorker,
    "e-mail worker": EmailWorker,
    "dead-letters": DeadLetterSubject,
    "reconciler": ReconcilerSubject,
    "service": ServiceSubject,
}


@dataclass(frozen=True, slots=True)
class Measured:
    """
    noticed_seconds: until the process reported it; None where it recovered unnoticed.
    recovered_seconds: until all work was done, from the end of the fault, or, where only the
    connection was spoiled, from its beginning.
    exit_seconds: from SIGTERM, sent during a second fault, to the end of the process.
    """

    noticed_seconds: float | None
    recovered_seconds: float
    exit_seconds: float


def done(subject: Subject) -> bool:
    return subject.open_count() == 0


def wait_done(subject: Subject, deadline_seconds: float) -> float:
    began_at = time.monotonic()

    def settled() -> bool:
        if isinstance(subject, WorkerSubject) and not done(subject):
            subject.wake()
        return done(subject)

    wait_until(settled, "all work is done", deadline_seconds=deadline_seconds)
    return time.monotonic() - began_at


def exit_seconds(process: OurProcess) -> float:
    began_at = time.monotonic()
    process.signal(signal.SIGTERM)
    process.wait_exit(GRACE_SECONDS + CLOSING_SECONDS)
    return time.monotonic() - began_at


def measure(subject: Subject, peer: str, mode: Mode, *, carrying: bytes | None = None) -> Measured:
    """Spoil the link, watch it being noticed, mend it, and stop the process in a second fault."""
    link = subject.links[peer]
    wait_done_after_asking(subject)
    link.switch(mode, carrying=carrying)
    began_at = time.monotonic()
    for _ in range(3):
        subject.ask()
    noticed: float | None = None
    if carrying is None and peer != "third-party":
        wait_until(subject.has_noticed, "the process reports it", deadline_seconds=45)
        noticed = time.monotonic() - began_at
        link.switch(Mode.PASS)
    elif peer == "third-party":
        noticed = _until_attempted(subject)
        link.switch(Mode.PASS)
    recovered = wait_done(subject, 45)
    link.switch(mode, carrying=carrying)
    subject.ask()
    ended = exit_seconds(subject.process)
    return Measured(noticed, recovered, ended)


def _until_attempted(subject: Subject) -> float:
    assert isinstance(subject, WorkerSubject)
    began_at = time.monotonic()
    newest = subject.requests[-1]

    def attempted() -> bool:
        attempts = subject.deliveries.attempts(newest, subject.name)
        return bool(attempts) and "ended_at" in attempts[-1]

    wait_until(attempted, "an attempt has failed", deadline_seconds=30)
    return time.monotonic() - began_at


def wait_done_after_asking(subject: Subject) -> None:
    for _ in range(2):
        subject.ask()
    wait_done(subject, 30)


@pytest.fixture
def surroundings(
    run_process: RunProcess,
    mongodb_url: str,
    database_name: str,
    rabbitmq_url: str,
    third_parties: ThirdParties,
) -> Surroundings:
    return Surroundings(run_process, mongodb_url, database_name, rabbitmq_url, third_parties)
