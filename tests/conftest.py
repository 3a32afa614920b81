"""Real servers for every test, found as `sandbox/servers.py` finds them; a missing one fails."""

import os
import secrets
import signal
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from loguru import logger
from pymongo import MongoClient

from runtime.shutdown import Stop
from sandbox.mongodb import MongoServer
from sandbox.rabbitmq import RabbitServer
from sandbox.servers import Servers, find_mongo, find_rabbit, find_servers
from tests.support.processes import OurProcess, group_members

# How long an example takes depends on what else the machine does. The rest is Hypothesis's default
# profile, which is another one in CI.
settings.register_profile("any_load", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_load")

# A shell starts what runs in the background with SIGINT ignored, and all that it starts as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

RunProcess = Callable[..., OurProcess]

pytest_plugins = [
    "tests.support.unit_rules",
    "tests.support.workers",
    "tests.support.third_parties",
    "tests.support.deliveries",
    "tests.support.outbox_world",
    "tests.support.stage",
    "tests.support.subjects",
]

#: A server that a test may hurt is never one that a URL names, but may run from a named image.
NAMED_IMAGES = {
    name: os.environ[name] for name in ("MONGODB_IMAGE", "RABBITMQ_IMAGE") if name in os.environ
}

processes_of_test = pytest.StashKey[list[OurProcess]]()


@pytest.fixture(autouse=True)
def keep_the_runner(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """
    A command run inside the test process must not end it, when it is not gone within the grace time
    of the command, nor take over its signals.
    """
    monkeypatch.setattr(Stop, "_end_in_time", lambda *_: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def reset_log_context() -> Iterator[None]:
    """A command run inside the test process must not add its fields to the logs of later tests."""
    yield
    logger.configure(extra={}, patcher=lambda _record: None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the processes said when a test fails."""
    report = yield
    if report.failed:
        for process in item.stash.get(processes_of_test, []):
            report.sections.append((process.state(), process.output()))
    return report


@pytest.fixture(scope="session")
def launched_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Both servers, launched side by side; each is waited for by the first test that needs it."""
    servers = find_servers(tmp_path_factory.mktemp("servers"))
    try:
        servers.launch()
        yield servers
    finally:
        servers.discard()


@pytest.fixture(scope="session")
def mongo_server(launched_servers: Servers) -> MongoServer:
    launched_servers.mongo.wait_ready()
    return launched_servers.mongo


@pytest.fixture(scope="session")
def rabbit_server(launched_servers: Servers) -> RabbitServer:
    launched_servers.rabbit.wait_ready()
    return launched_servers.rabbit


@pytest.fixture
def own_mongo_server(tmp_path: Path) -> Iterator[MongoServer]:
    """A MongoDB that the test may hurt; it must be one that we start."""
    server = find_mongo(tmp_path, NAMED_IMAGES)
    try:
        server.start()
        yield server
    finally:
        server.discard()


@pytest.fixture
def own_rabbit_server(tmp_path: Path) -> Iterator[RabbitServer]:
    """A RabbitMQ that the test may hurt; it must be one that we start."""
    server = find_rabbit(tmp_path, NAMED_IMAGES)
    try:
        server.start()
        yield server
    finally:
        server.discard()


@pytest.fixture
def mongodb_url(mongo_server: MongoServer) -> str:
    return mongo_server.url


@pytest.fixture
def database_name(mongodb_url: str) -> Iterator[str]:
    """A database of the test's own, dropped afterwards."""
    name = f"test_{secrets.token_hex(6)}"
    yield name
    with MongoClient[dict[str, Any]](mongodb_url) as client:
        client.drop_database(name)


@pytest.fixture
def vhost(rabbit_server: RabbitServer) -> Iterator[str]:
    """A virtual host of the test's own, deleted afterwards."""
    name = f"test_{secrets.token_hex(6)}"
    rabbit_server.create_vhost(name)
    yield name
    rabbit_server.delete_vhost(name)


@pytest.fixture
def rabbitmq_url(rabbit_server: RabbitServer, vhost: str) -> str:
    return rabbit_server.url_of(vhost)


@pytest.fixture
def run_process(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunProcess]:
    """Run `python -m …` as a real process: `run_process("relay", "run", environment={…})`.

    What the processes said is shown when the test fails. All are ended afterwards.
    """
    started = request.node.stash[processes_of_test] = list[OurProcess]()

    def run(*arguments: str, environment: Mapping[str, str]) -> OurProcess:
        log = tmp_path / f"{len(started)}-{'-'.join(arguments).replace('/', '_')}.log"
        process = OurProcess(arguments, environment, log)
        started.append(process)
        return process

    yield run

    for process in started:
        process.end()
    assert not [left for process in started for left in group_members(process.pid)]
