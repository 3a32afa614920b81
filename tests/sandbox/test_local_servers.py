"""What the local MongoDB and RabbitMQ promise to the machine they run on, and to the tests."""

import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pika
import psutil
import pytest
from pymongo import MongoClient

from sandbox.errors import ServerFailedError
from sandbox.mongodb import LocalMongo
from sandbox.ports import port_answers
from sandbox.rabbitmq import LocalRabbit
from sandbox.servers import (
    Servers,
    find_mongo,
    installed_mongod,
    installed_rabbitmq_server,
)
from sandbox.waiting import wait_until

LOOPBACK = {"127.0.0.1", "::1"}
DATABASE_DOCUMENT = {"_id": "kept"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stack")


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[tuple[LocalMongo, LocalRabbit]]:
    """A stack of this module's own, from installed binaries."""
    mongod, rabbitmq_server = installed_mongod(), installed_rabbitmq_server()
    assert mongod is not None, "`make setup` brings mongod"
    assert rabbitmq_server is not None, "`make setup` brings RabbitMQ"
    mongo = LocalMongo(mongod, folder / "mongodb")
    rabbit = LocalRabbit(rabbitmq_server, folder / "rabbitmq")
    both = Servers(mongo, rabbit)
    try:
        both.launch()
        both.wait_ready()
        yield mongo, rabbit
    finally:
        both.discard()


def started_by(servers: tuple[LocalMongo, LocalRabbit]) -> list[psutil.Process]:
    mongo, rabbit = servers
    roots = [psutil.Process(one.pid) for one in (*mongo.nodes, rabbit.node, rabbit.epmd) if one.pid]
    return [process for root in roots for process in (root, *root.children(recursive=True))]


def test_everything_listens_on_loopback_only(servers: tuple[LocalMongo, LocalRabbit]) -> None:
    mongo, rabbit = servers
    listening = [
        connection.laddr
        for process in started_by(servers)
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address.ip for address in listening} <= LOOPBACK
    assert {address.port for address in listening} == {
        *mongo.ports,
        rabbit.amqp_port,
        rabbit.management_port,
        rabbit.distribution_port,
        rabbit.epmd_port,
    }


def test_secrets_are_for_their_owner_only(folder: Path, servers: object) -> None:  # noqa: ARG001
    secret = [
        folder / "mongodb" / "settings.json",
        folder / "mongodb" / "replica-set-key",
        folder / "rabbitmq" / "settings.json",
        folder / "rabbitmq" / "rabbitmq.conf",
        folder / "rabbitmq" / ".erlang.cookie",
    ]
    assert {stat.filemode(path.stat().st_mode) for path in secret} == {"-rw-------"}


def test_no_secret_is_on_a_command_line(servers: tuple[LocalMongo, LocalRabbit]) -> None:
    mongo, rabbit = servers
    passwords = {url.split("@")[0].rsplit(":", 1)[1] for url in (mongo.url, rabbit.url)}
    words = " ".join(word for process in started_by(servers) for word in process.cmdline())
    assert not [password for password in passwords if password in words]


@pytest.fixture
def vhost(servers: tuple[LocalMongo, LocalRabbit]) -> Iterator[str]:
    rabbit = servers[1]
    rabbit.create_vhost("kept")
    yield "kept"
    rabbit.delete_vhost("kept")


def test_a_broker_that_restarts_keeps_its_messages_and_drops_its_connections(
    servers: tuple[LocalMongo, LocalRabbit], vhost: str
) -> None:
    rabbit = servers[1]
    publish_one(rabbit.url_of(vhost))
    connection = pika.BlockingConnection(pika.URLParameters(rabbit.url_of(vhost)))
    rabbit.restart()
    with pytest.raises(pika.exceptions.ConnectionClosedByBroker):
        connection.process_data_events(5)
    wait_until(lambda: rabbit.queue_depth(vhost, "q") == 1, "the message is back")


def test_a_killed_broker_comes_back_with_its_messages(
    servers: tuple[LocalMongo, LocalRabbit], vhost: str
) -> None:
    rabbit = servers[1]
    publish_one(rabbit.url_of(vhost))
    rabbit.kill()
    rabbit.start()
    wait_until(lambda: rabbit.queue_depth(vhost, "q") == 1, "the message is back")


def test_connections_of_one_vhost_are_closed_from_the_brokers_side(
    servers: tuple[LocalMongo, LocalRabbit], vhost: str
) -> None:
    rabbit = servers[1]
    closed = pika.BlockingConnection(pika.URLParameters(rabbit.url_of(vhost)))
    other = pika.BlockingConnection(pika.URLParameters(rabbit.url_of("/")))
    rabbit.close_connections(vhost, "a test said so")
    with pytest.raises(pika.exceptions.ConnectionClosedByBroker, match="a test said so"):
        closed.process_data_events(5)
    other.process_data_events(0)
    other.close()


def test_nothing_is_left_after_stop_and_a_second_start_finds_its_data(
    folder: Path, servers: tuple[LocalMongo, LocalRabbit]
) -> None:
    mongo, rabbit = servers
    with MongoClient[dict[str, str]](mongo.url) as client:
        client.test.things.insert_one(dict(DATABASE_DOCUMENT))
    publish_one(rabbit.create_vhost("kept"))
    started = started_by(servers)
    assert {"mongod", "beam.smp", "epmd"} <= {process.name() for process in started}

    rabbit.stop()
    mongo.stop()
    assert psutil.wait_procs(started, timeout=5)[1] == []
    assert not [port for port in (*mongo.ports, *rabbit.ports) if port_answers(port)]

    again = Servers(
        LocalMongo(mongo.binary, folder / "mongodb"),
        LocalRabbit(rabbit.server_script, folder / "rabbitmq"),
    )
    try:
        again.launch()
        again.wait_ready()
        assert (again.mongo.url, again.rabbit.url) == (mongo.url, rabbit.url)
        with MongoClient[dict[str, str]](mongo.url) as client:
            assert client.test.things.find_one() == DATABASE_DOCUMENT
        wait_until(lambda: again.rabbit.queue_depth("kept", "q") == 1, "the message is back")
    finally:
        again.discard()


def test_a_killed_owner_leaves_no_server_behind(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    with owner, owner.stdout:
        started = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
        assert {"mongod", "epmd"} <= {process.name() for process in started}
        owner.send_signal(signal.SIGKILL)
    assert psutil.wait_procs(started, timeout=10)[1] == []


OWNER = """
import sys, time
from pathlib import Path
from sandbox.servers import find_servers
servers = find_servers(Path(sys.argv[1]))
servers.launch()
print(servers.mongo.nodes[0].pid, servers.rabbit.node.pid, servers.rabbit.epmd.pid, flush=True)
time.sleep(60)
"""


def test_three_nodes_elect_another_primary_when_theirs_is_killed(tmp_path: Path) -> None:
    replica_set = find_mongo(tmp_path, {}, node_count=3)
    assert isinstance(replica_set, LocalMongo)
    try:
        replica_set.start()
        with MongoClient[dict[str, str]](replica_set.url) as client:
            client.test.things.insert_one(dict(DATABASE_DOCUMENT))
            _, first = client.primary or ("", 0)
            replica_set.nodes[replica_set.ports.index(first)].kill()
            wait_until(
                lambda: client.primary not in (None, (_, first)), "another node is the primary"
            )
            assert client.test.things.find_one() == DATABASE_DOCUMENT
    finally:
        replica_set.discard()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    mongo = find_mongo(tmp_path, {}, extra_arguments=["--no-such-option"])
    with pytest.raises(ServerFailedError, match="unrecognised option '--no-such-option'"):
        mongo.start()


def test_a_taken_port_is_named_with_the_cure(
    servers: tuple[LocalMongo, LocalRabbit], folder: Path
) -> None:
    mongo, _ = servers
    mongo.start()
    with pytest.raises(ServerFailedError, match=rf"Port {mongo.ports[0]} .* taken: end what"):
        LocalMongo(mongo.binary, folder / "mongodb").start()


def publish_one(url: str) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.confirm_delivery()
    channel.queue_declare("q", durable=True, arguments={"x-queue-type": "quorum"})
    channel.basic_publish("", "q", b"kept")
    connection.close()
